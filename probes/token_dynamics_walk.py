"""Mathematics of the walk: waypoints, steps, angles, and how attention is split by source token.

r_0 is the residual stream at the entry; r_{2l+1} = r_{2l} + attn_out_l, r_{2l+2} = r_{2l+1} +
mlp_out_l, also where the two run in parallel (order by convention). Step s_i = r_{i+1} - r_i.

Paper: Singh 2023, arXiv:2308.10874. Card: embedding_walk sections 2-4; the definitions are ours.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def waypoints(
    entry: Float[Tensor, "batch pos d_model"],
    attn_out: Sequence[Float[Tensor, "batch pos d_model"]],
    mlp_out: Sequence[Float[Tensor, "batch pos d_model"]],
) -> Float[Tensor, "waypoint batch pos d_model"]:
    """The 2 L + 1 points of the walk."""
    steps = [step for pair in zip(attn_out, mlp_out, strict=True) for step in pair]
    return torch.stack([entry, *steps]).cumsum(dim=0)


def cosine(a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """cos(a, b); 0 where one of them is zero."""
    product = a.norm(dim=-1) * b.norm(dim=-1)
    dot = (a * b).sum(dim=-1)
    return torch.where(product > 0, dot / product, torch.zeros_like(dot))


def straightness(
    path: Float[Tensor, "waypoint *batch d"],
) -> Float[Tensor, "*batch"]:
    """|displacement| / path length, in [0, 1]; 1 for a path of length 0."""
    length = path.diff(dim=0).norm(dim=-1).sum(dim=0)
    share = (path[-1] - path[0]).norm(dim=-1) / length
    # Rounding may put a straight path a little above 1.
    return torch.where(length > 0, share.clamp(max=1.0), torch.ones_like(length))


def turning(path: Float[Tensor, "waypoint *batch d"]) -> Float[Tensor, "*batch turn"]:
    """cos(s_i, s_{i+1}) at every waypoint between two steps."""
    steps = path.diff(dim=0)
    return cosine(steps[:-1], steps[1:]).movedim(0, -1)


def shuffled(
    path: Float[Tensor, "waypoint *batch d"], order: Int[Tensor, " step"]
) -> Float[Tensor, "waypoint *batch d"]:
    """The path whose steps come in another order: same ends, same length."""
    return torch.cat([path[:1], path.diff(dim=0)[order]]).cumsum(dim=0)


def centred(
    path: Float[Tensor, "waypoint batch pos d"], weight: Float[Tensor, "batch pos"]
) -> Float[Tensor, "waypoint batch pos d"]:
    """Less the weighted mean over each prompt's positions, waypoint by waypoint."""
    share = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    return path - torch.einsum("wbpd,bp->wbd", path, share)[:, :, None]


def pair_cosine(
    path: Float[Tensor, "waypoint batch pos d"], weight: Float[Tensor, "batch pos"]
) -> Float[Tensor, "batch waypoint"]:
    """Mean cosine of two different tokens' waypoints; NaN for fewer than two tokens."""
    unit = torch.nn.functional.normalize(path, dim=-1) * weight[..., None]
    count = weight.sum(dim=-1)
    # |sum of unit vectors|^2 = n + sum over pairs: no pos x pos matrix.
    together = unit.sum(dim=2).square().sum(dim=-1)
    return ((together - unit.square().sum(dim=(2, 3))) / (count * (count - 1))).T


def mean_over(
    x: Float[Tensor, "batch pos *rest"], weight: Float[Tensor, "batch pos"]
) -> Float[Tensor, "batch ..."]:
    """Mean over the positions with weight 1."""
    shape = (*weight.shape, *[1] * (x.dim() - 2))
    return (x * weight.view(shape)).sum(dim=1) / weight.sum(dim=1).view(-1, *shape[2:])


def path_numbers(
    path: Float[Tensor, "waypoint batch pos d"],
) -> dict[str, Float[Tensor, "batch pos _"]]:
    """Lengths and angles of every step and waypoint."""
    steps = path.diff(dim=0)
    per_waypoint = {
        "step_norm": steps.norm(dim=-1),
        "waypoint_norm": path.norm(dim=-1),
        "waypoint_cosine": cosine(path, path[-1:].expand_as(path)),
        "entry_cosine": cosine(path, path[:1].expand_as(path)),
        "radial_cosine": cosine(steps, path[:-1]),
    }
    return {name: x.movedim(0, -1) for name, x in per_waypoint.items()} | {
        "turning_cosine": turning(path)
    }


def by_source(
    rows: Float[Tensor, "batch head query k_pos"],
    value: Float[Tensor, "batch k_pos kv_head d_head"],
    w_o: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "batch query k_pos d_model"]:
    """What each source token writes at each query: sum over heads of A[q, k] v_k W_O."""
    n_heads = w_o.shape[0]
    value = value.repeat_interleave(n_heads // value.shape[2], dim=2)
    mixed = torch.einsum("bhqk,bkhd->bqkhd", rows, value).flatten(3)
    return mixed @ w_o.flatten(0, 1)


def frozen_norm(
    written: Float[Tensor, "batch query k_pos d_model"],
    normed: Float[Tensor, "batch query d_model"],
) -> Float[Tensor, "batch query k_pos d_model"]:
    """Pass contributions through the RMS norm that follows, its scale frozen at their sum."""
    whole = written.sum(dim=2)
    scale = torch.where(whole == 0, torch.zeros_like(whole), normed / whole)
    return written * scale[:, :, None]


def attribution(
    written: Float[Tensor, "batch query k_pos d_model"],
    attn_out: Float[Tensor, "batch query d_model"],
) -> dict[str, Float[Tensor, "batch query *_"]]:
    """Length and share of every source token in ``attn_out``, and the share of none."""
    size = attn_out.square().sum(dim=-1).clamp(min=1e-30)
    share = torch.einsum("bqkd,bqd->bqk", written, attn_out) / size[..., None]
    rest = ((attn_out - written.sum(dim=2)) * attn_out).sum(dim=-1) / size
    return {"norm": written.norm(dim=-1), "share": share, "rest": rest}


def chosen_rows(
    x: Float[Tensor, "batch pos d_model"], queries: Int[Tensor, "batch query"]
) -> Float[Tensor, "batch query d_model"]:
    """The vectors at each prompt's chosen positions."""
    return x.gather(1, queries[..., None].expand(-1, -1, x.shape[-1]))


def valid_positions(
    tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"] | None
) -> Bool[Tensor, "batch pos"]:
    """Where real tokens are."""
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
