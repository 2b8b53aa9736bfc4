"""Attention sinks as a research script measures them: a prompt at a time, whole maps, reduced at the end.

Written anew, from the paper's description (arXiv:2410.10781): eager attention returns the maps of every layer,
those of all prompts are kept and stacked, and only then the mean over the queries that see a key is taken.
"""

import torch


def measure(model, tokens):
    """Scores ``[batch layer head pos]``, norms of values ``[layer pos]`` and of the stream ``[n_layers + 1, pos]``."""
    maps, values, stream = [], [], []
    for prompt in tokens:
        out = model(prompt[None], output_attentions=True, output_hidden_states=True, use_cache=True)
        maps.append(torch.stack([layer[0] for layer in out.attentions]))
        layers = out.past_key_values.layers
        values.append(torch.stack([layer.values[0].norm(dim=-1) for layer in layers]).mean(dim=1))
        stream.append(torch.stack([each[0].norm(dim=-1) for each in out.hidden_states]))
    pattern = torch.stack(maps)
    n_pos = pattern.shape[-1]
    score = pattern.sum(dim=-2) / torch.arange(n_pos, 0, -1)
    return score, torch.stack(values).mean(dim=0), torch.stack(stream).mean(dim=0)
