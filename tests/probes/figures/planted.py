"""A result of the attention-sinks probe with sinks put in by hand."""

import torch

from probes.attention_sinks_results import AttentionSinkConfig, AttentionSinkResult

SINKS = {(1, 2): 0.9, (2, 0): 0.6}


def planted_result(lengths=(30, 20), n_layers=3, n_heads=4, position=0, inputs="natural"):
    """Heads in SINKS look at ``position`` on every prompt; the others at themselves."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return 1.0 + torch.rand(*shape, generator=generator)

    n_pos = max(lengths)
    pos = torch.arange(n_pos)
    score = torch.full((len(lengths), n_layers, n_heads, n_pos), torch.nan)
    for row, length in enumerate(lengths):
        own = 0.25 * noise(n_layers, n_heads, length) / (length - pos[:length])
        score[row, ..., :length] = own
        for (layer, head), share in SINKS.items():
            # Differs by prompt, so that a mean over the wrong axis shows.
            score[row, layer, head, position] = share - 0.01 * row
    resid = noise(n_layers + 1, n_pos)
    resid[1:, position] *= 100
    ov = noise(n_layers, n_heads, n_pos)
    ov[..., position] *= 0.1
    cosine = 0.1 * noise(n_layers, n_heads, n_pos)
    for layer, head in SINKS:
        cosine[layer, head, position] = 0.8
    return AttentionSinkResult(
        score,
        noise(n_layers, 2, n_pos),
        noise(n_layers, 2, n_pos),
        ov,
        resid,
        cosine,
        20 * noise(n_layers, n_heads, n_pos),
        AttentionSinkConfig(position=position, inputs=inputs),
    )
