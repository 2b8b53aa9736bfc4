"""A head that is dormant on one kind of prompt and active on another, built by hand, and its prompts."""

import torch

import workbench as wb
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context

BOS = 0
LETTERS_A = range(1, 6)
LETTERS_B = range(6, 11)
BIG = 4.0


def planted_model():
    """One layer of three heads of which the test knows what they do.

    Head 0: a letter of A looks at BOS, whose value is zero; a letter of B looks at the letters of B
    so far and writes them, which is the next token of prompts that repeat one letter. Head 1: looks
    at BOS always. Head 2: looks at itself always and writes nothing. Letter i is the axis i of the
    stream; heads write to axes of their own, which the unembedding reads.
    """
    width, d_head = 48, 16
    sizes = ToyModelConfig(
        d_vocab=11, n_ctx=16, n_layers=1, n_heads=3, d_model=width, d_mlp=0, positions="none"
    )
    model = make_model(sizes, seed=0)
    spare, axis = 15, torch.eye(width)
    a, b = axis[list(LETTERS_A)].sum(0), axis[list(LETTERS_B)].sum(0)
    bos, every = axis[BOS], axis[:11].sum(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.zero_()
        model.embed.weight[:, :11] = torch.eye(11)
        heads = {name: model.blocks[0].attention.get_submodule(name) for name in ("W_Q", "W_K")}
        query, key = (heads[name].weight.view(3, d_head, width) for name in ("W_Q", "W_K"))
        query[0, 0], key[0, 0] = BIG * (a + bos), bos
        query[0, 1], key[0, 1] = BIG * b, b
        query[1, 0], key[1, 0] = BIG * every, bos
        query[2, :11] = key[2, :11] = BIG * axis[:11]
        value = model.blocks[0].attention.get_submodule("W_V").weight.view(3, d_head, width)
        out = model.blocks[0].attention.get_submodule("W_O").weight.view(width, 3, d_head)
        for letter in LETTERS_B:
            # Less the spare axis: the norm's mean is in every axis alike, and BOS has no value.
            value[0, letter] = axis[letter] - axis[spare]
            out[16 + letter, 0, letter] = 1.0
        model.unembed.weight[:, 16:27] = 2.0 * torch.eye(11)
    return wb.wrap(model)


def planted_tokens(n=6, n_pos=12):
    """Domain A: random letters of A; domain B: one letter of B, repeated. BOS before both."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(1, 6, (n, n_pos), generator=generator)
    second = torch.randint(6, 11, (n, 1), generator=generator).expand(n, n_pos)
    tokens = torch.cat([first, second])
    tokens[:, 0] = BOS
    return tokens, Context(labels={"domain": ("A",) * n + ("B",) * n})


def domains(n_first, n_second, **more):
    return Context(labels={"domain": ("first",) * n_first + ("second",) * n_second}, **more)
