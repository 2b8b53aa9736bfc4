"""Succession scores as a research script computes them: whole d_model x d_model circuits, a task at a time.

Written anew, from the paper's description (arXiv:2312.09230): the OV matrix of every head is multiplied out, and
each task's representations go through the matrices of a whole layer and the task's columns of the unembedding.
"""

import torch


def found_pairs(values, outputs, reps, unembed, tasks):
    """Whether a pair's target is the strict maximum among its task's targets.

    Args:
        values: W_V of every layer, ``[head d_model d_head]`` each.
        outputs: W_O of every layer, ``[head d_head d_model]`` each.
        reps: What heads read of every token, ``[token d_model]``.
        unembed: ``[d_model token]``.
        tasks: Rows of tokens and pairs (source, target) among them, one a task.

    Returns:
        ``[layer head pair]``, pairs in the order of the tasks.
    """
    layers = []
    for w_v, w_o in zip(values, outputs, strict=True):
        circuit = w_v @ w_o
        found = []
        for rows, pairs in tasks:
            source, target = pairs[:, 0], pairs[:, 1]
            logits = torch.einsum("sd,hde,ev->hsv", reps[rows], circuit, unembed[:, rows])
            for place in range(len(pairs)):
                row = logits[:, source[place]][:, target]
                best = row.argmax(dim=1)
                tied = (row == row.amax(dim=1, keepdim=True)).sum(dim=1) > 1
                found.append((best == place) & ~tied)
        layers.append(torch.stack(found, dim=1))
    return torch.stack(layers)
