"""Concept similarity as a research script scores it: one request at a time, the context encoded for each choice.

Written anew, from the description of the experiments around arXiv:2308.10874: a text's vector is the mean of its
last hidden states weighted by position (w1mean), a choice's score its dot product with the context's.
"""

import torch


def vector(model, ids):
    """w1mean of the last hidden states, ``[d_model]``."""
    hidden = model(ids[None], output_hidden_states=True).hidden_states[-1][0]
    place = torch.arange(1, len(ids) + 1, dtype=hidden.dtype)
    return (hidden * place[:, None]).sum(dim=0) / place.sum()


def scores(model, questions):
    """``[question choice]``, softmax over the choices; a question is its context's ids and its choices' ids."""
    found = []
    for context, choices in questions:
        dots = [torch.dot(vector(model, context), vector(model, choice)) for choice in choices]
        found.append(torch.stack(dots).softmax(dim=0))
    return torch.stack(found)
