"""Scan-snap as a plain PyTorch script writes it: sequences one by one, one-hot vectors, autograd.

Written anew, from the paper's description (arXiv:2305.16380), in the manner of research code: a
Python loop draws every sequence, tokens become one-hot vectors [batch pos token], the scores of all
queries over all positions come from a product with the attention matrix, and SGD is torch's.
"""

import numpy as np
import torch
from torch import nn


def generate(law, batch_size, n_drawn, rng):
    """Contextual tokens, query indices and targets; ``law`` is a ``ClassLaw``."""
    prob = law.prob.numpy()
    prob = prob / prob.sum(axis=1, keepdims=True)
    rows, queries, targets = [], [], []
    for _ in range(batch_size):
        row = rng.integers(len(prob))
        counts = rng.multinomial(n_drawn, prob[row])
        tokens = []
        for token, count in enumerate(counts):
            tokens += [token] * int(count)
        rng.shuffle(tokens)
        rows.append(tokens)
        queries.append(int(law.query[row]))
        targets.append(int(law.next_token[row]))
    return torch.tensor(rows), torch.tensor(queries), torch.tensor(targets)


class Model(nn.Module):
    """Y and Z as bias-free linear maps; the query does not attend to itself."""

    def __init__(self, n_tokens, first_query):
        super().__init__()
        self.first_query = first_query
        self.decoder = nn.Linear(n_tokens, n_tokens, bias=False, dtype=torch.float64)
        self.attention = nn.Linear(n_tokens, n_tokens, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.decoder.weight)
        nn.init.zeros_(self.attention.weight)

    def forward(self, tokens, query):
        """Logits, and the attention over positions."""
        n_tokens = self.decoder.weight.shape[0]
        x = nn.functional.one_hot(tokens, n_tokens).double()
        q = nn.functional.one_hot(self.first_query + query, n_tokens).double()
        keys = x @ self.attention.weight.T
        pattern = torch.softmax(torch.bmm(keys, q[:, :, None])[..., 0], dim=1)
        a = torch.bmm(pattern[:, None], x)[:, 0]
        return self.decoder(a / a.norm(dim=1, keepdim=True)), pattern.detach().clone()


def optimizer_of(model, config):
    """SGD with momentum, a rate for each matrix."""
    groups = [
        {"params": [model.decoder.weight], "lr": config.lr_z * config.lr_ratio},
        {"params": [model.attention.weight], "lr": config.lr_z},
    ]
    return torch.optim.SGD(groups, momentum=config.momentum)


def step(model, optimizer, tokens, query, target):
    logits, pattern = model(tokens, query)
    loss = nn.functional.cross_entropy(logits, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), pattern


def make_rng(seed):
    return np.random.default_rng(seed)
