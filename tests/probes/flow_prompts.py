"""Prompts with items for the information-flow probe, and one batch of them encoded."""

import torch

import workbench as wb
from probes.information_flow_encoding import END, Encoded, PadEncodings
from probes.information_flow_items import Padding, Places
from tests.encoders import save_encoder
from tests.probes.planted_flow import rows_of
from tests.zoo import random_tokens, tiny_model

PLAIN = {"common": "left-in"}
TWO_ITEMS = rows_of(([1, 5, 2, 6, 3], [[5], [6]]), ([1, 7, 2, 8, 3], [[7], [8]]))
TEXTS = [
    {"text": "the red cat by a pool table", "items": ["red cat", "pool table"]},
    {"text": "a starfish near the big blue house", "items": ["starfish", "blue house"]},
    {"text": "a sunflower and a football on the boat", "items": ["sunflower", "football", "boat"]},
]


def random_rows(n_prompts=4, seed=0):
    """Prompts of 12 tokens for the zoo's models, with items of 2, 1 and 3 tokens."""
    tokens = random_tokens(n_prompts, seed=seed).tolist()
    return rows_of(*((row, [row[1:3], row[5:6], row[8:11]]) for row in tokens))


def run(model, rows, **options):
    return wb.run("information-flow", model, rows, **options)


def encoder(kind, folder):
    return wb.load(str(save_encoder(kind, folder)))


def encoded_batch(layer=1):
    model = wb.wrap(tiny_model("llama"))
    tokens = random_tokens(2)
    of_pos = torch.full((2, 12), -1)
    of_pos[:, 1:3], of_pos[:, 6] = 0, 1
    pads = PadEncodings(model, Padding(2))
    lengths = torch.tensor([12, 12])
    site = f"L{layer}.resid_pre"
    pad_layer = model.capture(torch.full((2, 12), 2), [site])[site]
    end = model.capture(tokens, [END])[END]
    places = Places(of_pos, 2)
    pad_end = pads.get(tokens, lengths, END)
    return Encoded(model, layer, tokens, None, places, pad_layer, pad_end, end, None, False, 2)
