"""Toys whose flow is known: heads that copy one chosen position each, and nothing else.

The residual stream holds the token one-hot and the position one-hot; token 0 (the pad) is zero. In the
copying block position ``to`` attends to ``sources[to]`` alone and adds ``gain`` times its token's part
(up to the norm's shift); other positions attend to themselves. The other blocks write nothing.
"""

import torch

import workbench as wb
from toy_tasks.model import ToyModelConfig, make_model

N_VOCAB, N_POS = 14, 8


def copying_toy(sources, *, gain=1.0, layer=1, strength=None):
    """A planted toy of two blocks without MLP.

    Args:
        sources: position -> the earlier position that it copies in block ``layer``.
        gain: Size of what is copied, relative to a token (before the norm's scale of about 3).
        strength: Token -> length of its vector, 1 unless said.
    """
    d_model = N_VOCAB + N_POS
    config = ToyModelConfig(d_vocab=N_VOCAB, n_ctx=N_POS, n_layers=2, d_model=d_model, d_mlp=0)
    toy = make_model(config, 0)
    with torch.no_grad():
        for name, parameter in toy.named_parameters():
            if "ln" not in name:
                parameter.zero_()
        toy.embed.weight[:, :N_VOCAB] = torch.eye(N_VOCAB)
        toy.embed.weight[0] = 0.0
        for token, length in (strength or {}).items():
            toy.embed.weight[token] *= length
        toy.position.weight[:, N_VOCAB:] = torch.eye(N_POS)
        attention = toy.blocks[layer].attention
        where = slice(N_VOCAB, None)
        attention.W_K.weight[where, where] = torch.eye(N_POS)
        for to in range(N_POS):
            attention.W_Q.weight[N_VOCAB + sources.get(to, to), N_VOCAB + to] = 400.0
        attention.W_V.weight[:N_VOCAB, :N_VOCAB] = torch.eye(N_VOCAB)
        attention.W_O.weight[:N_VOCAB, :N_VOCAB] = gain * torch.eye(N_VOCAB)
    return wb.wrap(toy.eval())


def rows_of(*prompts):
    """Rows of token ids with their items, as ``wb.run`` takes them."""
    return [{"tokens": tokens, "items": items} for tokens, items in prompts]
