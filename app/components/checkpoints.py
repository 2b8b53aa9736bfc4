"""What a training run has left in its folder so far: curves, checkpoints, patterns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from probes.figures.theme import INK, SERIES, TEMPLATE, plain
from workbench.revisions import checkpoints

MOST_POINTS = 2000
"""Points of a curve that are drawn."""
UNITS = {
    "attention": "share", "mass": "share", "loss": "nats", "entropy": "nats", "risk": "nats",
    "gap": "nats", "drain": "ratio", "ratio": "ratio", "lr": "per update",
}  # fmt: skip
"""By the last word of a curve's name that has one."""

Curve = tuple[list[float], list[float]]
"""Steps, and a number at each."""


def curves(folder: Path) -> dict[str, Curve]:
    """Every figure of ``metrics.jsonl`` as (steps, values); a half-written line is left out."""
    found: dict[str, Curve] = {}
    try:
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(float(row.get("step", len(steps))))
                values.append(float(value))
    return found


def theory_of(toy: str, found: Mapping[str, Curve]) -> dict[str, tuple[str, Curve]]:
    """What a toy's own figures say theory predicts of its curves, by curve: name and values."""
    import inspect

    from workbench.discovery import find_figures, find_probe

    try:
        module = inspect.getmodule(find_figures(find_probe(toy)))
    except ModuleNotFoundError:  # a toy without figures
        return {}
    predict = getattr(module, "live_theory", None)
    return {} if predict is None else dict(predict(found))


def unit_of(name: str) -> str:
    """Of a curve, by its name; a curve of a kind that nobody named is shown as it was logged."""
    return next((UNITS[word] for word in reversed(name.split("_")) if word in UNITS), "as logged")


def curves_figure(
    chosen: Mapping[str, Curve],
    mark: int | None,
    theory: Mapping[str, tuple[str, Curve]] | None = None,
) -> go.Figure:
    """Curves over steps, one panel a curve, with the step that is looked at and what theory says."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        len(chosen), 1, shared_xaxes=True, vertical_spacing=0.06 if len(chosen) > 1 else 0.0
    )
    for row, (name, curve) in enumerate(chosen.items(), start=1):
        shown = plain(name)
        line = {"color": SERIES[(row - 1) % len(SERIES)]}
        _add(figure, row, shown, curve, mode="lines+markers", marker_size=4, line=line)
        if theory and name in theory:
            label, predicted = theory[name]
            line = {"color": INK, "dash": "dash"}
            _add(figure, row, f"{shown}, {label}", predicted, mode="lines", line=line)
        title = f"{shown.replace('_', ' ')} ({unit_of(name)})"
        figure.update_yaxes(title=title, row=row, col=1)
        if mark is not None:
            figure.add_vline(mark, line_dash="dot", line_color=INK, row=row, col=1)
    figure.update_xaxes(title="step (updates)", row=len(chosen), col=1)
    figure.update_layout(
        template=TEMPLATE, showlegend=False, height=90 + 170 * len(chosen), margin_t=20
    )
    return figure


def _add(figure: go.Figure, row: int, name: str, curve: Curve, **look: Any) -> None:
    steps, values = curve
    every = max(1, len(steps) // MOST_POINTS)
    hover = f"step %{{x}}<br>{name}: %{{y:.4g}}<extra></extra>"
    figure.add_scatter(
        x=steps[::every],
        y=values[::every],
        name=name,
        hovertemplate=hover,
        row=row,
        col=1,
        **look,
    )


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps whose weights are kept."""
    return sorted(int(step) for step in checkpoints(folder))


def sample_tokens(folder: Path, d_vocab: int, n_pos: int) -> tuple[np.ndarray, str]:
    """One prompt for the pattern, ``[pos]``, and where it came from."""
    sample = folder / "sample.safetensors"
    if sample.is_file():
        from safetensors.numpy import load_file

        return load_file(sample)["tokens"][0][:n_pos], "the first held-out sequence"
    drawn = np.random.default_rng(0).integers(0, d_vocab, n_pos)
    return drawn, "random tokens (the run has no sample.safetensors)"


def pattern_at(folder: Path, step: int, layer: int) -> tuple[np.ndarray, list[str], str]:
    """Patterns ``[head q_pos k_pos]`` of one layer at a checkpoint, token names, and the prompt's origin.

    Raises:
        ModelError: The folder holds no model that can be loaded.
    """
    import torch

    from workbench.models.base import Site
    from workbench.models.load import load

    model: Any = load(f"toy:{folder}", revision=str(step))
    spec = model.spec
    tokens, origin = sample_tokens(folder, spec.d_vocab, min(spec.n_ctx, 64))
    site = Site("pattern", min(layer, spec.n_layers - 1))
    found = model.capture(torch.as_tensor(tokens)[None].long(), [site])[site][0].cpu().numpy()
    names = _token_names(folder, tokens)
    return found, names, origin


def _token_names(folder: Path, tokens: np.ndarray) -> list[str]:
    try:
        known = json.loads((folder / "config.json").read_bytes()).get("tokens", [])
    except (OSError, ValueError):
        known = []
    return [str(known[token]) if token < len(known) else str(token) for token in tokens.tolist()]


def shape_of(folder: Path) -> tuple[int, int]:
    """Layers and heads of a run's model, (1, 1) where its config does not say."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return 1, 1
    return int(config.get("n_layers", 1)), int(config.get("n_heads", 1))
