"""The edges of what an attack accepts: the last that is taken and the first that is refused."""

import dataclasses
import itertools
import math

import pytest
import torch

import workbench as wb
from probes.activation_attacks import ActivationAttackConfig, measure_activation_attacks
from probes.activation_attacks_bench import (
    problems_at_once,
)
from probes.activation_attacks_cases import (
    attacked_positions,
    check_cases,
    dimension_mask,
    distance_to_others,
    draw_cases,
    target_limit,
)
from probes.activation_attacks_scaling import reached_half
from tests.probes.attacked_models import NO_DATA, small
from tests.zoo import random_tokens, tiny_model
from workbench.context import Context
from workbench.errors import ConfigError, DataError

NAN = math.nan

# Edges of what is accepted


def test_the_last_layer_is_attacked_and_none_beyond():
    model = wb.wrap(tiny_model("gpt2"))
    quick = {"steps": 1, "t_limit": 1, "check_generation": False, "n_attacked": (1,)}
    found = measure_activation_attacks(model, NO_DATA, small(layer=1, **quick))
    assert found.t_max.shape == (1,)
    with pytest.raises(ConfigError, match=r"layer must be below 2.*got 2"):
        measure_activation_attacks(model, NO_DATA, small(layer=2, **quick))


def test_the_memory_setting_is_in_mebibytes(monkeypatch):
    seen = []
    real = problems_at_once
    monkeypatch.setattr(
        "probes.activation_attacks_solve.problems_at_once",
        lambda bench, group: seen.append((bench.budget_bytes, bench.margin)) or real(bench, group),
    )
    quick = {"steps": 1, "t_limit": 1, "check_generation": False, "memory_mb": 3, "margin": 0.25}
    measure_activation_attacks(wb.wrap(tiny_model("gpt2")), NO_DATA, small(**quick))
    assert set(seen) == {(3 * 1024 * 1024, 0.25)}


def test_a_target_may_fill_what_the_context_leaves():
    spec = dataclasses.replace(wb.wrap(tiny_model("gpt2")).spec, n_ctx=20)
    assert target_limit(spec, small(t_limit=12)) == 12
    assert target_limit(spec, small(t_limit=None)) == 12
    assert target_limit(spec, small(t_limit=None, context=19)) == 1
    for changes in ({"t_limit": 13}, {"t_limit": None, "context": 20}):
        with pytest.raises(ConfigError, match="n_ctx = 20"):
            target_limit(spec, small(**changes))
    long = dataclasses.replace(spec, n_ctx=5000)
    assert target_limit(long, small(t_limit=None)) == 1000
    assert target_limit(long, small(t_limit=1001)) == 1001


def test_distances_of_unembeddings_one_by_one():
    model = wb.wrap(tiny_model("gpt2"))
    weight = model.weight("W_U").T.double()
    ids = torch.tensor([[5, 5, 90], [0, 100, 3]])
    found = distance_to_others(model, ids)
    for row in range(2):
        for place in range(3):
            own = weight[ids[row, place]]
            others = [(own - w).norm() for t, w in enumerate(weight) if t != ids[row, place]]
            expected = float(min(others) / own.norm())
            assert found[row, place].item() == pytest.approx(expected, rel=1e-4)


def test_ids_of_the_whole_vocabulary_are_accepted_and_no_others():
    model = wb.wrap(tiny_model("gpt2"))
    edge = torch.tensor([[0, 100]])
    check_cases(model, edge, edge)
    for name, outside in (("context", -1), ("context", 101), ("target", -1), ("target", 101)):
        wrong = torch.tensor([[3, outside]])
        pair = (wrong, edge) if name == "context" else (edge, wrong)
        with pytest.raises(DataError, match=f"{name} ids.*got {outside} in row 0"):
            check_cases(model, *pair)


def test_prompts_may_be_just_as_many_and_as_long_as_needed():
    model = wb.wrap(tiny_model("gpt2"))
    tokens = random_tokens(2, 14)
    config = small(targets="text")
    cases = draw_cases(model, tokens, config, Context())
    assert torch.equal(cases.contexts, tokens[:, :8])
    assert torch.equal(cases.targets, tokens[:, 8:14])
    drawn = draw_cases(model, tokens[:, :8], small(), Context())
    assert torch.equal(drawn.contexts, tokens[:, :8])
    assert drawn.targets.shape == (2, 6)
    with pytest.raises(DataError, match=r"at least 14 tokens.*shortest has 13"):
        draw_cases(model, tokens[:, :13], config, Context())
    with pytest.raises(DataError, match="n_seeds = 2 prompts; got 1"):
        draw_cases(model, tokens[:1], config, Context())
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[2, 5:] = 0  # a prompt that is not used may be short
    draw_cases(model, random_tokens(3, 14), config, Context(attention_mask=mask))


def test_positions_of_a_smaller_attack_are_among_those_of_a_larger():
    def positions(a, **changes):
        config = small(n_attacked=(1, 2, 4), **changes)
        return attacked_positions(config, a, torch.Generator().manual_seed(0))

    assert positions(3) == (0, 1, 2)
    assert positions(3, positions="last") == (5, 6, 7)
    assert positions(4, positions="7,0,3,1,2") == (0, 1, 3, 7)
    assert positions(1, positions="7,0,3,1,2") == (7,)
    drawn = [set(positions(a, positions="random")) for a in (1, 2, 4, 8)]
    assert [len(each) for each in drawn] == [1, 2, 4, 8]
    assert all(few < more for few, more in itertools.pairwise(drawn))


def test_a_share_of_the_listed_dimensions_is_free():
    generator = torch.Generator().manual_seed(0)
    config = small(dimensions=(1, 4, 6, 7))
    assert dimension_mask(8, config, 1.0, generator).tolist() == [0, 1, 0, 0, 1, 0, 1, 1]
    half = dimension_mask(8, config, 0.5, generator)
    assert half.sum() == 2
    assert half[[0, 2, 3, 5]].sum() == 0
    assert dimension_mask(8, small(), 0.25, generator).sum() == 2
    with pytest.raises(ConfigError, match="below d_model = 7"):
        dimension_mask(7, config, 1.0, generator)
    with pytest.raises(ConfigError, match="at least one of 4 dimensions"):
        dimension_mask(8, config, 0.1, generator)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_attacked": ()}, "n_attacked must be ascending"),
        ({"n_attacked": (0, 1)}, "n_attacked must be ascending"),
        ({"n_attacked": (2, 1)}, "n_attacked must be ascending"),
        ({"n_attacked": (1, 1)}, "n_attacked must be ascending"),
        ({"n_attacked": (1, 9)}, "at most the context, 8"),
        ({"fractions": (0.0,)}, r"fractions must lie in \(0, 1\]"),
        ({"fractions": (1.5,)}, r"fractions must lie in \(0, 1\]"),
        ({"dimensions": (1, 1)}, "dimensions must be different"),
        ({"dimensions": (-1,)}, "dimensions must be different"),
        ({"positions": "0,8"}, "different positions of the context, 0 ... 7"),
        ({"positions": "0,-1"}, "different positions"),
        ({"positions": "0,0,1"}, "different positions"),
        ({"positions": "0"}, "must be 2 different positions"),
        ({"positions": "middle"}, "first, last, random or a list"),
    ],
)
def test_settings_beyond_the_edge_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        small(**changes)


def test_settings_at_the_edge_are_accepted():
    assert small(n_attacked=(1, 8)).n_attacked == (1, 8)
    assert small(fractions=(1.0, 0.01)).fractions == (1.0, 0.01)
    assert small(dimensions=(0,)).dimensions == (0,)
    assert small(positions="0,7").listed_positions() == (0, 7)
    assert ActivationAttackConfig(margin=0.25).descent.margin == 0.5


def test_a_curve_that_never_passed_is_no_lower_bound():
    t_max, censored = reached_half(torch.tensor([1, 2]), torch.tensor([[0.4, NAN], [NAN, NAN]]))
    assert t_max.tolist() == [0.0, 0.0]
    assert not censored.any()
