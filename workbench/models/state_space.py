"""The matrices of a selective state-space layer, as the theory of its token dynamics names them.

    B_l = S_B x_l,  C_l = S_C x_l,  Delta(x_l) = softplus(S_Delta x_l + bias),  decay a = exp(A_log)

Mamba-1 keeps them in ``x_proj`` (rows: time step | B | C), ``dt_proj`` and ``A_log``; x_l is the
input of the scan, after the convolution. Mamba-2 keeps them in ``in_proj`` (rows: gate | x | B | C
| time step), so there x_l is the input of the layer; B and C come once a group, the time step and
the decay once a head.

Paper: Vo et al. 2025, arXiv:2410.03292. Card: ssm_token_dynamics section 4.
"""

from typing import Any

import torch
from torch import Tensor, nn

STATE_SPACE_WEIGHTS = {
    "S_B": "group d_state d_in; one group in Mamba-1",
    "S_C": "group d_state d_in",
    "S_Delta": "channel d_in: d_inner channels in Mamba-1, one a head in Mamba-2; without the bias",
    "Delta_bias": "channel",
    "decay": "channel d_state: a = exp(A_log); one column in Mamba-2",
}
"""Weights of a selective state-space layer that an adapter may give beside ``base.WEIGHTS``."""


def read_state_space(mixer: nn.Module, name: str) -> Tensor | None:
    """One of STATE_SPACE_WEIGHTS from a Mamba mixer of transformers; None where it has none."""
    if name not in STATE_SPACE_WEIGHTS:
        return None
    if hasattr(mixer, "x_proj"):
        return _mamba1(mixer, name)
    if hasattr(mixer, "dt_bias"):
        return _mamba2(mixer, name)
    return None


def _mamba1(mixer: Any, name: str) -> Tensor:
    weight, rank, n = mixer.x_proj.weight, mixer.time_step_rank, mixer.ssm_state_size
    if name == "S_B":
        return weight[rank : rank + n][None]
    if name == "S_C":
        return weight[rank + n :][None]
    if name == "S_Delta":
        return mixer.dt_proj.weight.float() @ weight[:rank].float()
    return mixer.dt_proj.bias if name == "Delta_bias" else torch.exp(mixer.A_log.float())


def _mamba2(mixer: Any, name: str) -> Tensor:
    groups, n, inner = mixer.n_groups, mixer.ssm_state_size, mixer.intermediate_size
    # From the end: some checkpoints have an MLP's rows in front.
    sizes = [inner, groups * n, groups * n, mixer.num_heads]
    weight = mixer.in_proj.weight
    _, b, c, delta = weight[weight.shape[0] - sum(sizes) :].split(sizes)
    parts = {
        "S_B": b.unflatten(0, (groups, n)),
        "S_C": c.unflatten(0, (groups, n)),
        "S_Delta": delta,
        "Delta_bias": mixer.dt_bias,
        "decay": torch.exp(mixer.A_log.float())[:, None],
    }
    return parts[name]
