"""The numbers that the figures of the attention-sinks probe draw, taken from its result."""

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from probes.attention_sinks_results import AttentionSinkResult, peak_ratio


def prompt_lengths(result: AttentionSinkResult) -> Int[np.ndarray, " prompt"]:
    """How many positions of each prompt were measured."""
    return to_numpy((~result.score[:, 0, 0].isnan()).sum(dim=-1))


def n_text(result: AttentionSinkResult) -> str:
    """Over how much the means were taken."""
    lengths = prompt_lengths(result)
    low, high = int(lengths.min()), int(lengths.max())
    prompts = "1 prompt" if len(lengths) == 1 else f"{len(lengths)} prompts"
    return f"n = {prompts} of {high if low == high else f'{low} to {high}'} positions"


def drawn_text(shown: Int[np.ndarray, " shown"], result: AttentionSinkResult) -> str:
    """What to add to n where not every position is drawn."""
    return "" if len(shown) == prompt_lengths(result).max() else f", {len(shown)} of them drawn"


def norm_ratios(result: AttentionSinkResult) -> dict[str, Float[np.ndarray, " pos"]]:
    """Each norm over its mean elsewhere; at the judged position these are the probe's metrics."""
    pos = result.config.position
    depth = int(peak_ratio(result.resid_norm, pos).argmax())
    norms = {
        f"residual |h| after {depth} blocks": result.resid_norm[depth],
        "key |k|": result.key_norm.mean(dim=(0, 1)),
        "value |v|": result.value_norm.mean(dim=(0, 1)),
        "output |v W_O|": result.ov_norm.mean(dim=(0, 1)),
    }
    return {name: to_numpy(norm) / mean_elsewhere(norm, pos) for name, norm in norms.items()}


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The same numbers as a numpy array."""
    return np.asarray(tensor)


def head_scores(result: AttentionSinkResult) -> Float[np.ndarray, "layer head"]:
    """Mean score of each head at the judged position."""
    return to_numpy(result.score[..., result.config.position].nanmean(dim=0))


def ratio_at(norm: Tensor, pos: int) -> Float[np.ndarray, "layer head"]:
    """A norm of each head at a position over its mean elsewhere."""
    return to_numpy(peak_ratio(norm, pos))


def mean_elsewhere(values: Float[Tensor, "... pos"], pos: int) -> Float[np.ndarray, "..."]:
    """Mean over all positions but one, without those past every prompt's end."""
    others = values.clone()
    others[..., pos] = float("nan")
    return to_numpy(others.nanmean(dim=-1))


def resid_peak(result: AttentionSinkResult) -> float:
    """The largest ratio over depth, the metric ``resid_peak_ratio``."""
    return peak_ratio(result.resid_norm, result.config.position).max().item()
