"""Questions and edits of the tests of calibration."""

import dataclasses

import torch

import workbench as wb
from tests.zoo import random_tokens
from workbench.evaluation.scoring import Encoded
from workbench.evaluation.task import Question
from workbench.interventions.act import ACT

EDITS = {
    "zerotuning": wb.ZeroTuning(3.0),
    "near nothing": wb.ZeroTuning(1e-4),  # no accurate output form: runs in tiles
    "key": wb.ZeroTuning(1.5, mode="key"),
    "act": ACT(1.2, 0.2),
    "act full": ACT(1.2, 0.2, mode="full"),
}


def with_heads(edit, layer, head):
    return dataclasses.replace(edit, heads=((layer, head),))


def questions(n=10, n_pos=9, seed=0):
    """Random prompts of different lengths with two random one-token labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = random_tokens(n, n_pos, seed=seed)
    found = []
    for row in range(n):
        length = int(torch.randint(5, n_pos + 1, (1,), generator=generator))
        labels = torch.randperm(101, generator=generator)[:2].tolist()
        found.append(
            Encoded(tuple(tokens[row, :length].tolist()), tuple((x,) for x in labels), row % 2)
        )
    return found


def made_up(n):
    words = ["good", "bad", "fine", "poor", "great", "awful"]
    return [
        Question(f"Review {i}: a {words[i % 6]} film\nSentiment:", (" good", " bad"), i % 2)
        for i in range(n)
    ]
