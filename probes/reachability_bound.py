"""What self-attention cannot write under a control of k tokens.

A head reads X = [U; X_0], k tokens of control and the state. For the query i of a state token, with
scores s_j over what it sees of the state, D = sum_j exp(s_j) and yhat its output without a control,

    y = y_u + c yhat,  0 < c <= 1,    y_u = sum over u of exp(s_u) v_u / (D + sum over u of exp(s_u))

so the part of y orthogonal to yhat comes from y_u alone. With |s_u| <= alpha and |v_u| <= V,

    |y_perp| <= k e^alpha V / (D + k e^alpha) =: B(k) <= k e^alpha V / D

A wanted output whose orthogonal part is longer than B(k) is out of reach of k tokens; one longer than
V is out of reach of any number. For tokens of norm at most M_u, alpha = |q_i| sigma_k M_u / sqrt(d_k)
(or M_x sigma_q sigma_k M_u / sqrt(d_k) for every query) and V = sigma_v M_u.

Theorem 1 of the paper's third version has the inequality the other way round and sigma_q for sigma_v;
taken literally it excludes outputs that do occur. This is the proof's own form, and a little sharper
than k e^alpha sigma_v M_u / D.

Paper: Bhargava et al. 2023, arXiv:2310.04444, section 4 (theorem 1).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def orthogonal_part(
    wanted: Float[Tensor, "*batch d"], own: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    """What of ``wanted`` is orthogonal to ``own``; all of it where ``own`` is 0."""
    length = (own * own).sum(dim=-1, keepdim=True)
    share = (wanted * own).sum(dim=-1, keepdim=True) / length.where(length > 0, 1.0)
    return wanted - share * own


def limit(
    k: int | Int[Tensor, "*batch"],
    log_d: Float[Tensor, "*batch"],
    alpha: Float[Tensor, "*batch"],
    value: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """B(k), the longest orthogonal part that k tokens of control can make.

    Args:
        k: Tokens of control.
        log_d: ln D, the log of the sum of the exponentiated scores over the state.
        alpha: The largest score that a control token can have.
        value: The longest value vector that a control token can have.
    """
    k = torch.as_tensor(k)
    weight = torch.sigmoid(k.to(log_d).log() + alpha - log_d)
    return torch.where(k > 0, value * weight, torch.zeros_like(value))


def minimal_k(
    orthogonal: Float[Tensor, "*batch"],
    log_d: Float[Tensor, "*batch"],
    alpha: Float[Tensor, "*batch"],
    value: Float[Tensor, "*batch"],
) -> Int[Tensor, "*batch"]:
    """Fewest tokens with B(k) >= ``orthogonal``; -1: no number of tokens suffices.

    k_min = ceil(b D / (e^alpha (V - b))) for b < V.
    """
    room = value - orthogonal
    needed = (orthogonal / room.where(room > 0, 1.0)) * (log_d - alpha).exp()
    # Rounding must not raise a count: 3.0000001 tokens are 3.
    fewest = (needed * (1 - 1e-5)).ceil().clamp(max=2.0**62).long()
    return fewest.where((room > 0) | (orthogonal == 0), torch.full_like(fewest, -1))
