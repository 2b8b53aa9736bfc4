"""The record of a Bigram-Backcopy run: every checkpoint measured, whole and under ablations."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from toy_tasks.bigram_ablations import ablations, ask_ablated, ask_circuit, circuits
from toy_tasks.bigram_config import BigramBackcopyConfig
from toy_tasks.bigram_measure import HeldOut, Observed, observe, over_rest
from toy_tasks.model import ToyModel, make_model
from toy_tasks.training import Figures, checkpoint_steps, load_weights

N_SNAPSHOTS = 5
"""Checkpoints whose attention patterns are kept, spread evenly over the log scale."""
SNAPSHOT_POS = 64
"""Positions that a kept pattern shows at most."""

Arrays = dict[str, Tensor]
"""By the name of the result's field."""


def headline(found: Observed) -> Figures:
    """The figures that are noted while it trains."""
    value, rest = over_rest(found.ov_norm).tolist()
    peaks = over_rest(found.resid_norm)
    return {
        "sink_attention": found.sink_attention.mean().item(),
        "sink_logit_gap": found.sink_logit_gap.mean().item(),
        "value_drain": value / rest if rest else math.nan,
        "resid_peak_ratio": (peaks[0] / peaks[1]).max().item(),
        "backcopy_risk": found.backcopy_risk,
        "bigram_risk": found.bigram_risk,
    }


def measure_checkpoints(
    config: BigramBackcopyConfig, held_out: HeldOut, out_dir: Path
) -> tuple[Arrays, dict[str, tuple[str, ...]]]:
    """Measure every checkpoint of a finished run from its weights.

    Returns:
        The arrays, and the names along the axes ``ablation`` and ``circuit``.
    """
    steps = checkpoint_steps(config.training())
    # From the last to the first: the last decides after which block residual norms are compared.
    models = _checkpoints(config, held_out.law.d_vocab, out_dir, steps[::-1])
    last = next(models)
    observed = [observe(last, held_out)]
    depth = peak_depth(observed[0], first=1)
    ablated = [_ask_all(last, held_out, depth)]
    arrays = _circuit_series(last, held_out)
    for model in models:
        observed.insert(0, observe(model, held_out))
        ablated.insert(0, _ask_all(model, held_out, depth))
    arrays |= {"step": torch.tensor(steps)} | _series(observed)
    arrays |= _ablated_series(ablated) | _snapshots(observed, steps)
    labels = {"ablation": tuple(name for name, _ in ablations(last))}
    names = tuple(circuits(config.n_layers))
    return arrays, labels | ({"circuit": names} if names else {})


def _checkpoints(
    config: BigramBackcopyConfig, d_vocab: int, out_dir: Path, steps: list[int]
) -> Iterator[ToyModel]:
    """One model, with the weights of one step after the other."""
    model = make_model(config.model(d_vocab), config.seed).to(config.device)
    for step in steps:
        load_weights(model, out_dir / "checkpoints" / f"step_{step:08d}.safetensors")
        yield model


def _ask_all(model: ToyModel, held_out: HeldOut, depth: int) -> list[tuple[float, float, float]]:
    return [ask_ablated(model, held_out, tap, depth) for _, tap in ablations(model)]


def peak_depth(found: Observed, first: int = 0) -> int:
    """The depth, from ``first`` on, where <s> stands out most."""
    bos, rest = over_rest(found.resid_norm)
    return first + int((bos / rest)[first:].argmax())


def _series(observed: list[Observed]) -> Arrays:
    depth = peak_depth(observed[-1])
    value = torch.stack([over_rest(found.ov_norm) for found in observed])
    resid = torch.stack([over_rest(found.resid_norm) for found in observed])
    sink = torch.stack([found.sink_attention for found in observed])
    gap = torch.stack([found.sink_logit_gap for found in observed])
    spread = torch.stack([found.spread_by_layer for found in observed])
    numbers = (
        "backcopy_risk",
        "bigram_risk",
        "sink_logit_std",
        "other_logit_std",
        "bias_attention",
    )
    return {
        "sink_attention": sink.mean(dim=(1, 2)),
        "sink_logit_gap": gap.mean(dim=(1, 2)),
        "value_norm_bos": value[:, 0],
        "value_norm_rest": value[:, 1],
        "value_norm_stationary": _nanmean([found.stationary_norm for found in observed]),
        "resid_norm_bos": resid[:, 0, depth],
        "resid_norm_rest": resid[:, 1, depth],
        "sink_attention_by_head": sink,
        "sink_logit_gap_by_head": gap,
        "sink_logit_gap_by_token": torch.stack([found.gap_by_token for found in observed]),
        "sink_logit_spread_by_layer": spread[..., 0].contiguous(),
        "other_logit_spread_by_layer": spread[..., 1].contiguous(),
        "resid_norm_bos_by_depth": resid[:, 0],
        "resid_norm_rest_by_depth": resid[:, 1],
        **{name: torch.tensor([getattr(found, name) for found in observed]) for name in numbers},
    }


def _nanmean(by_head: list[Tensor]) -> Tensor:
    return torch.stack(by_head).flatten(1).nanmean(dim=1)


def _ablated_series(ablated: list[list[tuple[float, float, float]]]) -> Arrays:
    backcopy, bigram, peak = torch.tensor(ablated).permute(2, 1, 0)
    return {
        "backcopy_risk_ablated": backcopy.contiguous(),
        "bigram_risk_ablated": bigram.contiguous(),
        "resid_peak_ablated": peak.contiguous(),
    }


def _circuit_series(model: ToyModel, held_out: HeldOut) -> Arrays:
    """The minimal circuit's numbers; nothing for models that are too shallow."""
    found = [ask_circuit(model, held_out, tap) for tap in circuits(model.config.n_layers).values()]
    if not found:
        return {}
    columns = zip(found[0]._fields, torch.tensor(found).T.contiguous(), strict=True)
    return {f"{name}_circuit": column.clone() for name, column in columns}


def _snapshots(observed: list[Observed], steps: list[int]) -> Arrays:
    """Attention patterns of one sequence, at a few steps."""
    even = torch.linspace(0, len(steps) - 1, min(N_SNAPSHOTS, len(steps)))
    chosen = even.round().long().tolist()
    shown = [observed[index].pattern[..., :SNAPSHOT_POS, :SNAPSHOT_POS] for index in chosen]
    return {
        "pattern": torch.stack(shown),
        "pattern_step": torch.tensor([steps[index] for index in chosen]),
    }
