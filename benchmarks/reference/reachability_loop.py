"""Gradient coordinate search as a research script writes it: one problem, one proposal at a time.

Written anew, from the description of the paper (arXiv:2310.04444, Algorithm 3) and of its release:
proposals are built in a Python loop and may come twice, every row goes through the whole model with
labels for all its tokens (a loss that nobody reads), logits are made at every position, 301 rows at a
time, and the best proposal of a step replaces the control whether it is better or not.
"""

import random

import torch

MAX_PARALLEL = 301


def gradient(model, control, state, target):
    """Gradient of the target's loss with respect to the control's one-hot tokens, ``[k d_vocab]``."""
    table = model.get_input_embeddings().weight
    one_hot = torch.nn.functional.one_hot(control, table.shape[0]).to(table.dtype)
    one_hot.requires_grad_()
    rest = table[torch.cat([state, target])]
    embeddings = torch.cat([one_hot @ table, rest])[None]
    logits = model(inputs_embeds=embeddings).logits
    loss = torch.nn.functional.cross_entropy(logits[:, -2], target)
    loss.backward()
    return one_hot.grad


def losses(model, controls, state, target):
    """Loss of each control, all rows through the whole model."""
    found = []
    for start in range(0, len(controls), MAX_PARALLEL):
        part = controls[start : start + MAX_PARALLEL]
        after = torch.cat([state, target]).repeat(len(part), 1)
        rows = torch.cat([part, after], dim=1)
        with torch.no_grad():
            logits = model(rows, labels=rows).logits
        found.append(
            torch.nn.functional.cross_entropy(
                logits[:, -2], target.repeat(len(part)), reduction="none"
            )
        )
    return torch.cat(found)


def search(model, control, state, target, *, steps, candidates, batch, seed=0):
    """Search for one control; returns it and the proposals of each step.

    Args:
        model: A causal language model of transformers.
        control: Ids ``[k]`` to begin with.
        state: Ids ``[pos]``.
        target: One id ``[1]``.
        steps: Of the search.
        candidates: Tokens a position with the best gradient.
        batch: Proposals a step.
        seed: Of the proposals.
    """
    rng = random.Random(seed)
    scored = []
    for _ in range(steps):
        best = (-gradient(model, control, state, target)).topk(candidates, dim=1).indices
        proposals = []
        for _ in range(batch):
            place = rng.randrange(len(control))
            changed = control.clone()
            changed[place] = best[place, rng.randrange(candidates)]
            proposals.append(changed)
        proposals = torch.stack(proposals)
        loss = losses(model, proposals, state, target)
        scored.append(proposals)
        control = proposals[loss.argmin()]
    return control, scored
