"""A planted successor head: a number is digit + tens + domain, and the head moves the digit on."""

import torch

from probes.successor_heads import SuccessorHeadsConfig
from probes.successor_heads_tokens import ROMAN as ROMAN_NUMERALS
from probes.successor_heads_tokens import SERIES
from tests.probes.planted_successors import PlantedWeights, WordTokenizer

NO_TOKENS = torch.zeros(0, 0, dtype=torch.long)
QUICK = SuccessorHeadsConfig(sae_steps=20, sae_seeds=2)
WEIGHTS = SuccessorHeadsConfig(sae_steps=1, sae_seeds=1)

NUMBERS = [f" {number}" for number in range(1, 101)]
NUMBER_WORDS = [f" {word}" for word in SERIES[1].items]
MONTHS = [f" {word}" for word in SERIES[5].items]
ROMAN = [f" {word}" for word in ROMAN_NUMERALS.items[:10]]
N_DIGITS, N_TENS, N_DOMAINS = 10, 11, 4


def factored(order=(0, 1, 2, 3)):
    """Heads by layer 0: digits move on; all is copied; noise; nothing is written."""
    words = [*NUMBERS, *NUMBER_WORDS, *MONTHS, *ROMAN]
    tokenizer = WordTokenizer(words)
    d_model = N_DIGITS + N_TENS + N_DOMAINS
    embed = torch.zeros(len(tokenizer.words), d_model)
    for domain, items in enumerate((NUMBERS, NUMBER_WORDS, MONTHS, ROMAN)):
        for index, word in enumerate(items, start=1):
            row = embed[tokenizer.ids[word]]
            row[index % 10] += 1
            row[N_DIGITS + index // 10] += 1
            row[N_DIGITS + N_TENS + domain] += 1
    rest = torch.eye(N_TENS + N_DOMAINS)
    turn = torch.block_diag(torch.eye(10).roll(1, dims=1), rest)
    noise = torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(0))
    heads = torch.stack([turn, torch.eye(d_model), noise, 0 * turn])[list(order)]
    return PlantedWeights(tokenizer, embed, embed.T, heads[None])
