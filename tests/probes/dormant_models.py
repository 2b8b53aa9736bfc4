"""A toy of two layers and prompts for it: for the parts of the active-dormant probe."""

import torch

from tests.zoo import random_tokens
from toy_tasks.model import ToyModelConfig, make_model

TOY = ToyModelConfig(d_vocab=50, n_ctx=16, n_layers=2, n_heads=3, d_model=24, d_mlp=32)


def toy(**changes):
    model = make_model(ToyModelConfig(**{**vars(TOY), **changes}), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return model.eval()


def small_tokens(n_prompts=3, n_pos=10):
    return random_tokens(n_prompts, n_pos) % 50
