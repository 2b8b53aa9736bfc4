"""Results of every probe and toy task with numbers put in by hand, no two of an array alike.

What a figure draws of them can be told by the numbers: an exchanged axis, a shifted index or a mean
in place of a sum gives others. Nothing is trained and no model is run, so that each test draws anew.
"""

import dataclasses
import math
import typing

import numpy as np
import torch
from plotly import graph_objects as go

from probes.information_flow import InformationFlowResult
from probes.information_flow_routes import MLP, RESIDUAL
from probes.information_flow_tokens import KEEP_SETS
from probes.successor_heads import SuccessorHeadsResult
from probes.token_dynamics_results import StateSpaceResult, TokenDynamicsConfig, WalkResult
from toy_tasks.bigram_backcopy import BigramBackcopyConfig, BigramBackcopyResult
from toy_tasks.scan_snap import ScanSnapConfig, ScanSnapResult
from toy_tasks.scan_snap_panels import ScanSnapSweepConfig, ScanSnapSweepResult
from toy_tasks.scan_snap_text import ScanSnapTextResult
from toy_tasks.state_space import VARIANTS, StateSpaceToyResult

NAN = math.nan


def planted(cls, sizes, **given):
    """A result whose arrays have the shapes that its fields state, with numbers in (0, 1).

    Args:
        cls: A frozen dataclass with jaxtyping annotations.
        sizes: By the name of an axis.
        given: Fields that are to be as they are here.
    """
    generator = torch.Generator().manual_seed(len(cls.__name__))
    hints, fields = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        shapes = [kind.dim_str.split() for kind in kinds if hasattr(kind, "dim_str")]
        if field.name in given or not shapes or not all(axis in sizes for axis in shapes[0]):
            continue
        shape = [sizes[axis] for axis in shapes[0]]
        count = math.prod(shape)
        numbers = torch.linspace(0.02, 0.98, count)[torch.randperm(count, generator=generator)]
        kind = next(kind for kind in kinds if hasattr(kind, "dim_str"))
        if "bool" in kind.dtypes:
            numbers = numbers > 0.5
        elif "int64" in kind.dtypes:
            numbers = (numbers * 100).long()
        fields[field.name] = numbers.reshape(shape)
    return cls(**fields, **given)


def walk(n_layers=5, n_pos=7):
    """Three prompts, the second and the third of 5 and 4 tokens."""
    lengths = (n_pos, 5, 4)
    steps = 2 * n_layers
    sizes = {"batch": 3, "pos": n_pos, "step": steps, "waypoint": steps + 1, "turn": steps - 1}
    sizes |= {"view": 3, "layer": n_layers, "model": 3, "query": 2, "k_pos": n_pos, "new": 3}
    sizes |= {"gap": 2, "bend": 1}
    arrival = torch.arange(3 * n_pos).reshape(3, n_pos).remainder(steps + 1).float()
    for row, length in enumerate(lengths):
        arrival[row, length:] = NAN
    texts = tuple(f"t{index}" for index in range(3 * n_pos))
    config = TokenDynamicsConfig(queries=(-1, 2), new_tokens=3)
    found = planted(
        WalkResult, sizes, arrival=arrival, config=config, labels={"token": texts}, tuned_kl=None
    )
    # Attention's share is no whole number of percent, and the first token's norms are far away.
    found.step_norm[:, 0] *= 100
    return dataclasses.replace(found, tuned_kl=torch.rand(3, n_layers))


def spectrum():
    """Three layers: all positive, all negative, mixed; the last one has a zero."""
    real = torch.tensor([[0.5, 1, 2, 3], [-4, -3, -2, -1], [-2, -1, 0, 5]])
    return planted(
        StateSpaceResult,
        {"layer": 3, "bound": 3},
        eigenvalues=torch.stack([real, 0.1 * real + 1], dim=-1),
        n_positive=torch.tensor([4, 0, 1]),
        n_negative=torch.tensor([0, 4, 2]),
        regime=torch.tensor([1, -1, 0]),
        symmetric_positive=torch.tensor([3, 1, 2]),
        symmetric_negative=torch.tensor([1, 2, 2]),
        labels={"regime": ("divergent", "convergent", "mixed")},
        config=TokenDynamicsConfig(mode="state-space"),
    )


TASKS = ("numbers", "number words", "days", "months", "letters", "ordinals", "roman numerals")
SOURCES = ("numbers:38", "numbers:40", "numbers:41", "numbers:7", "days:1", "days:2", "months:55")
SUMMARY = ("chance", "probe_accuracy", "probe_tokens", "n_prefixes", "n_winning")


def successors(**changes):
    """Seven series, three layers of four heads; head L2H1 is the best, L0H3 the second."""
    sizes = {"layer": 3, "head": 4, "task": len(TASKS), "source": len(SOURCES), "scale": 4}
    sizes |= {"residue": 10, "named": 10, "judged": 2, "category": 3, "d_model": 5}
    score = torch.linspace(0.1, 0.5, 12).reshape(3, 4)
    score[2, 1], score[0, 3] = 0.9, 0.7
    table = (torch.arange(70).reshape(7, 10) % 3 == 0).float()
    table[4:, 8:] = NAN
    labels = {
        "task": TASKS,
        "source": SOURCES,
        "summary": SUMMARY,
        "scale": ("0.5", "1.0", "2.0", "4.0"),
        "judged": ("by rank", "by share"),
        "category": ("successor", "acronym", "copy"),
        "filter": tuple(f"series {row}: {row} of it kept" for row in range(5)),
    }
    given = {
        "score": score,
        "n_pairs": torch.arange(len(TASKS)) + 20,
        "filter_counts": torch.tensor(
            [[40, 30, 20], [50, 20, 10], [8, 7, 6], [5, 5, 4], [10, 1, 0]]
        ),
        "summary": torch.tensor([0.05, 0.75, 61.0, 230.0, 17.0]),
        "steering_table": table,
        "steered_index": torch.arange(70).reshape(7, 10),
        "feature_logits": torch.linspace(-1, 2, 100).reshape(10, 10),
        "labels": labels,
    }
    return planted(SuccessorHeadsResult, sizes, **(given | changes))


def flow(**changes):
    """Three prompts with three, two and one items; the first item of the first has three tokens."""
    item_of_pos = torch.tensor(
        [[-1, 0, 0, 0, 1, -1, 2], [0, -1, 1, 1, -1, -1, -1], [-1, -1, 0, 0, -1, -1, -1]]
    )
    sizes = {"prompt": 3, "pos": 7, "item": 3, "keep_set": len(KEEP_SETS), "layer": 4}
    representative = torch.zeros(3, 7, dtype=torch.bool)
    for row, pos in ((0, 3), (0, 4), (1, 0), (1, 2), (2, 3)):
        representative[row, pos] = True
    labels = {"keep_set": KEEP_SETS, "token": tuple(f"t{index}" for index in range(21))}
    edges = torch.tensor(
        [
            *((0, 0, 2, 1, 4), (0, 0, 1, 0, 3), (0, 0, RESIDUAL, 4, 4), (0, 1, MLP, 4, 4)),
            *((0, 1, RESIDUAL, 6, 6), (0, 1, 3, 2, 6), (1, 0, 0, 0, 2), (1, 3, MLP, 2, 2)),
        ]
    )
    given = {
        "item_of_pos": item_of_pos,
        "representative": representative,
        "route_edges": edges,
        "route_importance": torch.tensor([0.05, 0.1, 0.29, 0.3, 1.0, 0.5, 0.2, 0.4]),
        "labels": labels,
    }
    result = planted(InformationFlowResult, sizes, **(given | changes))
    result.keep_set_score[..., 2] = NAN
    return result


LETTERS = tuple(" \nab<cd")


def bigram(**config):
    """Six checkpoints, three of them with patterns; two layers of two heads."""
    sizes = {"checkpoint": 6, "layer": 2, "head": 2, "depth": 3, "ablation": 5, "d_vocab": 7}
    sizes |= {"next_token": 7, "snapshot": 3, "q_pos": 40, "k_pos": 40}
    result = planted(
        BigramBackcopyResult,
        sizes,
        step=torch.tensor([0, 1, 2, 4, 8, 12]),
        pattern_step=torch.tensor([1, 4, 12]),
        sample_tokens=torch.arange(3 * 40).reshape(3, 40) % 7,
        triggers=torch.tensor([2, 5]),
        unigram=torch.tensor([0.3, 0.1, 0.2, 0.0005, 0.15, 0.1, 0.1495]),
        labels={
            "token": LETTERS,
            "ablation": ("no_attention:L0", "no_mlp:L0", "no_attention:L1", "no_mlp:L1", "head:0"),
        },
        config=BigramBackcopyConfig(n_layers=2, n_heads=2, n_pos=40),
    )
    result.sink_logit_gap_by_token[:, [2, 5]] = NAN
    return dataclasses.replace(result, config=dataclasses.replace(result.config, **config))


def snap(steps=200, snapped=13, **config):
    """A run of two queries with two classes each; attention on a class's own tokens sums to 1."""
    config = ScanSnapConfig(
        **{"n_classes_per_query": 2, "n_common": 3, "n_distinct": 4, "steps": steps, **config}
    )
    sizes = {"checkpoint": steps + 1, "query": 2, "token": config.n_tokens, "class": 4}
    return planted(
        ScanSnapResult,
        sizes,
        step=torch.arange(steps + 1),
        snap_step=torch.tensor(snapped),
        config=config,
    )


def sweep():
    """Two panels of two times three settings, two seeds; every run of one setting diverged."""
    config = ScanSnapSweepConfig(
        n_queries=(1, 3), lr_z=(0.5, 2.0), lr_ratio=(1.0, 2.0, 5.0), n_seeds=2, seed=4
    )
    sizes = {"panel": 2, "lr_z": 2, "lr_ratio": 3, "seed": 2}
    diverged = torch.full((2, 2, 3, 2), -1)
    diverged[1, 1, 2] = 7
    result = planted(ScanSnapSweepResult, sizes, diverged_at=diverged, labels={}, config=config)
    result.entropy[1, 1, 2] = NAN
    return result


def snap_text():
    """Five checkpoints of two layers."""
    sizes = {"checkpoint": 5, "layer": 2, "byte": 32}
    result = planted(ScanSnapTextResult, sizes, step=torch.tensor([0, 1, 2, 4, 7]))
    result.change[0] = NAN
    return result


def state_space():
    """Four checkpoints; the first variant never learns half, the others at different steps."""
    sizes = {"variant": len(VARIANTS), "checkpoint": 4, "depth": 3}
    steps = torch.tensor([0, 10, 20, 30])
    accuracy = torch.linspace(0.1, 0.45, 4).repeat(len(VARIANTS), 1)
    for row in range(1, len(VARIANTS)):
        accuracy[row, -1 - (row - 1) % 3 :] = 0.5 + 0.01 * row
    return planted(StateSpaceToyResult, sizes, step=steps, accuracy=accuracy)


# Reading a figure


class Drawn:
    """The figures of a result by name, each drawn when it is first asked for."""

    def __init__(self, module, result):
        self.module, self.result, self.known = module, result, {}

    def __getitem__(self, name):
        if name not in self.known:
            self.known[name] = getattr(self.module, f"figure_{name}")(self.result)
        return self.known[name]


def named(figure, name, number=0):
    """One of the traces of that name, by its order."""
    return [trace for trace in figure.data if trace.name == name][number]


def numbers(values):
    """What is drawn as an array; text that stands for a hole is none."""
    return np.asarray(values, dtype=float)


def same(drawn, expected):
    """Hold that what is drawn are these numbers, to the digits of float32."""
    np.testing.assert_allclose(numbers(drawn), np.asarray(expected, dtype=float), rtol=2e-5)


def place(trace):
    """Row and column cannot be read from a trace; the number of its axis can: 1 is the first."""
    return int((trace.xaxis or "x")[1:] or 1)


def title_of(figure: go.Figure, axis="xaxis"):
    return figure.layout[axis].title.text
