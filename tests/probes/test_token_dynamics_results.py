"""Headline numbers and tables of both modes of token dynamics, against loops over unequal values."""

import dataclasses
import statistics

import pytest
import torch

from probes.token_dynamics_results import StateSpaceResult, TokenDynamicsConfig, WalkResult
from probes.token_dynamics_walk import attribution, chosen_rows, cosine, frozen_norm, mean_over

N_BATCH, N_POS, N_LAYERS = 3, 6, 2
LENGTHS = (6, 4, 5)
NAN = float("nan")


def drawn(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1


@pytest.fixture
def result():
    """Three prompts of 6, 4 and 5 tokens through two blocks."""
    shapes = {
        "step_norm": (N_BATCH, N_POS, 4),
        "waypoint_norm": (N_BATCH, N_POS, 5),
        "waypoint_cosine": (N_BATCH, N_POS, 5),
        "entry_cosine": (N_BATCH, N_POS, 5),
        "turning_cosine": (N_BATCH, N_POS, 3),
        "radial_cosine": (N_BATCH, N_POS, 4),
        "straightness_by_view": (3, N_BATCH, N_POS),
        "view_cosine": (3, N_BATCH, 5),
        "view_turning": (3, N_BATCH, 3),
        "turning_null": (N_BATCH, 3),
        "pair_cosine": (N_BATCH, 5),
        "arrival": (N_BATCH, N_POS),
        "lens_kl": (N_BATCH, 5),
        "lens_agreement": (N_BATCH, 5),
        "association_bias": (N_BATCH, 2),
        "entropy_gap": (N_BATCH, 2),
        "kl_uniform": (N_BATCH,),
        "kl_zero": (N_BATCH,),
        "kl_parameterless": (N_BATCH,),
        "agreement_uniform": (N_BATCH,),
        "loss": (N_BATCH, 3),
        "attribution_norm": (N_BATCH, 1, 2, N_POS),
        "attribution_share": (N_BATCH, 1, 2, N_POS),
        "attribution_rest": (N_BATCH, 1, 2),
        "telescoping_error": (N_BATCH,),
    }
    fields = {name: drawn(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    past = torch.arange(N_POS) >= torch.tensor(LENGTHS)[:, None]
    for name, x in fields.items():
        if name == "straightness_by_view":
            x[:, past] = NAN
        elif x.shape[:2] == (N_BATCH, N_POS):
            x[past] = NAN
    nothing = dict.fromkeys(
        (
            "tuned_kl",
            "decoding_step",
            "decoding_turning",
            "decoding_straightness",
            "proximity",
            "chosen_cosine",
        )
    )
    return WalkResult(**fields, **nothing)


def inner():
    """Real tokens after the first."""
    return [(b, pos) for b, length in enumerate(LENGTHS) for pos in range(1, length)]


def lower_median(values):
    return statistics.median_low([float(value) for value in values])


def test_numbers_leave_the_first_token_and_padding_out(result):
    assert [tuple(place) for place in result.inside().nonzero().tolist()] == inner()
    found = result.metrics()
    for name, view in (
        ("straightness", 0),
        ("straightness_centred", 1),
        ("straightness_normed", 2),
    ):
        expected = lower_median(result.straightness_by_view[view, b, p] for b, p in inner())
        assert found[name] == pytest.approx(expected)
    shares = [
        (result.step_norm[b, p, 0] + result.step_norm[b, p, 2]) / result.step_norm[b, p].sum()
        for b, p in inner()
    ]
    assert found["aggregate_share"] == pytest.approx(lower_median(shares))
    turns = [float(result.turning_cosine[b, p].mean()) for b, p in inner()]
    assert found["turning_cosine"] == pytest.approx(sum(turns) / len(turns))
    arrivals = [float(result.arrival[b, p]) / 4 for b, p in inner()]
    assert found["arrival_share"] == pytest.approx(sum(arrivals) / len(arrivals))
    for name in ("association_bias", "entropy_gap", "agreement_uniform"):
        assert found[name] == pytest.approx(
            float(getattr(result, name).sum()) / getattr(result, name).numel()
        )
    assert found["turning_cosine_null"] == pytest.approx(float(result.turning_null.sum()) / 9)
    for name, column in (("loss", 0), ("loss_uniform", 1), ("loss_zero", 2)):
        assert found[name] == pytest.approx(float(result.loss[:, column].sum()) / 3)
    assert found["telescoping_error"] == pytest.approx(max(result.telescoping_error.tolist()))
    assert (found["n_prompts"], found["n_pos"]) == (3.0, 6.0)
    uniform, zero = (sum(x.tolist()) / 3 for x in (result.kl_uniform, result.kl_zero))
    assert found["redundancy"] == pytest.approx(1 - uniform / zero, rel=1e-5)
    assert "proximity" not in found
    proximity = torch.tensor([[0.5, NAN], [0.25, 0.75], [NAN, NAN]])
    assert dataclasses.replace(result, proximity=proximity).metrics()["proximity"] == 0.5


def test_silencing_that_changes_nothing_leaves_all_redundant(result):
    none = dataclasses.replace(result, kl_zero=torch.zeros(3))
    assert none.redundancy() == 1.0
    small = dataclasses.replace(
        result, kl_zero=torch.full((3,), 1e-6), kl_uniform=torch.full((3,), 5e-7)
    )
    assert small.redundancy() == pytest.approx(0.5)


def test_a_path_of_length_0_has_no_share(result):
    steps = result.step_norm.clone()
    steps[0, 2] = 0.0
    assert dataclasses.replace(result, step_norm=steps).aggregate_shares()[0, 2] == 0.0


def test_the_table_of_a_walk_has_a_row_a_block(result):
    table = result.table()
    assert table["layer"] == [0, 1]
    for layer in range(2):
        for name, step in (("attention", 2 * layer), ("mlp", 2 * layer + 1)):
            steps = [result.step_norm[b, p, step] for b, p in inner()]
            assert table[f"{name}_step"][layer] == pytest.approx(lower_median(steps))
            relative = [
                result.step_norm[b, p, step] / result.waypoint_norm[b, p, step] for b, p in inner()
            ]
            assert table[f"{name}_relative_step"][layer] == pytest.approx(lower_median(relative))
            radial = [float(result.radial_cosine[b, p, step]) for b, p in inner()]
            assert table[f"{name}_radial"][layer] == pytest.approx(sum(radial) / len(radial))
        for name in ("lens_agreement", "lens_kl"):  # after the block
            expected = float(getattr(result, name)[:, 2 * layer + 2].sum()) / 3
            assert table[name][layer] == pytest.approx(expected)
        for name in ("association_bias", "entropy_gap"):
            assert table[name][layer] == pytest.approx(
                float(getattr(result, name)[:, layer].sum()) / 3
            )


def test_the_numbers_of_a_state_space_model():
    eigenvalues = torch.tensor(
        [
            [[-3.0, 1], [-2, 0], [-1, 2], [0.5, 0]],
            [[1.0, 0], [2, 1], [3, 0], [4, 0]],
            [[-4.0, 0], [-3, 0], [-2, 0], [-1, 0]],
        ]
    )
    result = StateSpaceResult(
        eigenvalues=eigenvalues,
        n_positive=torch.tensor([1, 4, 0]),
        n_negative=torch.tensor([3, 0, 4]),
        regime=torch.tensor([0, 1, -1]),
        symmetric_positive=torch.tensor([2, 4, 1]),
        symmetric_negative=torch.tensor([6, 4, 7]),
        delta_norm=torch.tensor([0.5, 1.5, 2.5]),
        decay=torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]),
    )
    assert result.metrics() == pytest.approx(
        {
            "share_convergent": 1 / 3,
            "share_divergent": 1 / 3,
            "share_mixed": 1 / 3,
            "positive_eigenvalues": 5 / 12,
            "negative_eigenvalues": 7 / 12,
            "n_layers": 3.0,
            "d_state": 4.0,
        }
    )
    mostly = dataclasses.replace(result, regime=torch.tensor([-1, -1, 1]))
    assert [mostly.share(code) for code in (-1, 0, 1)] == pytest.approx([2 / 3, 0.0, 1 / 3])
    assert result.table() == {
        "layer": [0, 1, 2],
        "regime": [0, 1, -1],
        "n_positive": [1, 4, 0],
        "n_negative": [3, 0, 4],
        "smallest_real_part": [-3.0, 1.0, -4.0],
        "largest_real_part": [0.5, 4.0, -1.0],
        "symmetric_positive": [2, 4, 1],
        "symmetric_negative": [6, 4, 7],
        "delta_norm": [0.5, 1.5, 2.5],
        "mean_decay": [2.0, 5.0, 8.0],
    }
    assert WalkResult.kind_of(TokenDynamicsConfig()) is WalkResult
    assert WalkResult.kind_of(TokenDynamicsConfig(mode="state-space")) is StateSpaceResult


# What walks are made of


def test_cosines_of_rows_and_of_nothing():
    a, b = (
        torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]),
        torch.tensor([[4.0, 3.0], [1, 2], [-2, 0]]),
    )
    torch.testing.assert_close(cosine(a, b), torch.tensor([24 / 25, 0.0, -1.0]))


def test_means_keep_what_stands_behind_positions():
    x, weight = drawn(2, 4, 3, 2, seed=1), torch.tensor([[0.0, 1, 1, 0], [0, 1, 1, 1]])
    found = mean_over(x, weight)
    torch.testing.assert_close(found[0], (x[0, 1] + x[0, 2]) / 2)
    torch.testing.assert_close(found[1], (x[1, 1] + x[1, 2] + x[1, 3]) / 3)


def test_a_norm_behind_the_sum_scales_every_part_alike():
    written = drawn(2, 3, 4, 5, seed=2)
    whole = written.sum(dim=2)
    gain = drawn(5, seed=3)
    normed = whole / whole.square().mean(dim=-1, keepdim=True).sqrt() * gain
    found = frozen_norm(written, normed)
    torch.testing.assert_close(found.sum(dim=2), normed)
    torch.testing.assert_close(
        found, written * gain / whole.square().mean(dim=-1).sqrt()[..., None, None]
    )
    written[0, 0] = 0.0
    assert frozen_norm(written, normed)[0, 0].eq(0.0).all()


def test_shares_of_what_attention_adds():
    written, bias = drawn(2, 3, 4, 5, seed=4), drawn(5, seed=5)
    out = written.sum(dim=2) + bias
    found = attribution(written, out)
    for b in range(2):
        for q in range(3):
            size = out[b, q] @ out[b, q]
            for k in range(4):
                assert found["norm"][b, q, k].item() == pytest.approx(
                    float(written[b, q, k].norm())
                )
                share = written[b, q, k] @ out[b, q] / size
                assert found["share"][b, q, k].item() == pytest.approx(float(share), rel=1e-4)
            assert found["rest"][b, q].item() == pytest.approx(
                float(bias @ out[b, q] / size), rel=1e-3
            )


def test_rows_are_chosen_prompt_by_prompt():
    x = drawn(2, 4, 3, seed=6)
    found = chosen_rows(x, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(found, torch.stack([x[0, [3, 0]], x[1, [1, 1]]]))
