"""Token dynamics of a selective state-space model from its formula: a system and a pair of tokens at a time.

Written anew, from the equation of arXiv:2410.03292: every pair's decay is a sum over the tokens between them, and
the eigenvalues are those of the whole d_in x d_in matrix S_C^T S_B.
"""

import torch
from torch.nn.functional import softplus


def velocity(m, s_delta, decay, x):
    """dx/dt of one system's tokens ``[token dim]``."""
    delta = softplus(x @ s_delta.T)
    moved = torch.zeros_like(x)
    for token in range(len(x)):
        for source in range(token + 1):
            between = delta[source + 1 : token + 1].sum(dim=0)
            weight = x[token] @ m @ x[source]
            moved[token] += weight * torch.exp(-decay * between) * delta[source] * x[source]
    return moved


def eigenvalues(s_b, s_c):
    """Of S_C^T S_B, ``[d_in]``."""
    return torch.linalg.eigvals(s_c.double().T @ s_b.double())
