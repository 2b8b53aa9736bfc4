"""The mathematics of the walk, by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.token_dynamics_concepts import concept_vector, parameterless_attention
from probes.token_dynamics_decoding import context_path, correlation, proximity
from probes.token_dynamics_lens import arrival, kl_divergence
from probes.token_dynamics_walk import (
    attribution,
    by_source,
    centred,
    frozen_norm,
    mean_over,
    pair_cosine,
    path_numbers,
    shuffled,
    straightness,
    turning,
    waypoints,
)
from workbench.errors import ConfigError


def test_a_square_walked_on_three_sides():
    # (0,0) -> (1,0) -> (1,1) -> (0,1): length 3, displacement 1, two right angles.
    path = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])[:, None, None]
    numbers = path_numbers(path)
    assert straightness(path).item() == pytest.approx(1 / 3)
    assert numbers["step_norm"][0, 0].tolist() == [1, 1, 1]
    assert numbers["turning_cosine"][0, 0].tolist() == [0, 0]
    half = math.sqrt(0.5)
    expected = torch.tensor([0.0, 0, half, 1])  # the origin has no direction
    torch.testing.assert_close(numbers["waypoint_cosine"][0, 0], expected)
    torch.testing.assert_close(numbers["radial_cosine"][0, 0], torch.tensor([0.0, 0, -half]))


def test_waypoints_add_attention_before_the_mlp():
    entry, a, m = (torch.full((1, 1, 2), x) for x in (1.0, 10.0, 100.0))
    path = waypoints(entry, [a, 2 * a], [m, 2 * m])
    assert path[:, 0, 0, 0].tolist() == [1, 11, 111, 131, 331]


@given(n_steps=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_straightness_is_a_share_that_rotations_and_lengths_leave_alone(n_steps, seed):
    generator = torch.Generator().manual_seed(seed)
    path = torch.randn(n_steps + 1, 2, 3, 5, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    found = straightness(path)
    assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(straightness(7 * path @ rotation), found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turning(path @ rotation), turning(path), rtol=1e-4, atol=1e-5)


def test_a_path_of_length_zero_is_straight():
    assert straightness(torch.ones(4, 1, 1, 3)).item() == 1.0


def test_shuffled_steps_keep_ends_and_length_but_not_the_turns():
    path = torch.tensor([[0.0, 0], [1, 0], [2, 0], [2, 1], [2, 2]])[:, None, None]
    mixed = shuffled(path, torch.tensor([0, 2, 1, 3]))
    torch.testing.assert_close(mixed[-1], path[-1])
    torch.testing.assert_close(straightness(mixed), straightness(path))
    assert turning(path)[0, 0].tolist() == [1, 0, 1]
    assert turning(mixed)[0, 0].tolist() == [0, 0, 0]


def test_centring_takes_out_what_all_tokens_share():
    shared = torch.tensor([100.0, 0.0])
    path = torch.randn(3, 1, 4, 2) + shared
    weight = torch.tensor([[0.0, 1, 1, 1]])
    moved = centred(path, weight)
    torch.testing.assert_close(moved[:, :, 1:].mean(2), torch.zeros(3, 1, 2), atol=1e-4, rtol=0)
    assert (pair_cosine(path, weight) > 0.95).all()
    # Three centred vectors: the mean cosine of pairs is negative.
    assert (pair_cosine(moved, weight) < 0).all()


def test_pair_cosine_is_the_mean_over_pairs():
    path, weight = torch.randn(2, 1, 5, 3), torch.tensor([[0.0, 1, 1, 1, 0]])
    unit = torch.nn.functional.normalize(path[:, 0, 1:4], dim=-1)
    pairs = [(unit[:, a] * unit[:, b]).sum(-1) for a, b in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(pair_cosine(path, weight)[0], torch.stack(pairs).mean(0))


def test_mean_over_leaves_positions_out():
    x = torch.tensor([[[1.0], [2], [6]]])
    assert mean_over(x, torch.tensor([[0.0, 1, 1]])).item() == 4.0


@pytest.mark.parametrize(
    ("first", "expected"),
    [((0, 1, 0, 1, 1), 3), ((1, 1, 1, 1, 1), 0), ((1, 1, 1, 0, 1), 4), ((0, 0, 0, 0, 0), 4)],
)
def test_arrival_is_where_the_final_token_stays_first(first, expected):
    assert arrival(torch.tensor(first).bool()[None, None]).item() == expected


def test_kl_by_hand():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(p, p).item() == 0.0


def test_sources_by_hand():
    # Two heads, values 1 and 2 for tokens 0 and 1, W_O = 1 and 10 times a basis vector.
    rows = torch.tensor([[[[0.25, 0.75]], [[0.5, 0.5]]]])
    value = torch.tensor([[[[1.0], [1.0]], [[2.0], [2.0]]]])
    w_o = torch.tensor([[[1.0, 0.0]], [[0.0, 10.0]]])
    written = by_source(rows, value, w_o)
    torch.testing.assert_close(written, torch.tensor([[[[0.25, 5.0], [1.5, 10.0]]]]))
    numbers = attribution(written, written.sum(2) + torch.tensor([0.0, 1.0]))
    shares = numbers["share"].sum() + numbers["rest"].sum()
    assert shares.item() == pytest.approx(1.0)
    assert numbers["rest"].item() == pytest.approx(16 / (1.75**2 + 16**2))


def test_a_frozen_norm_is_linear():
    written = torch.randn(1, 1, 3, 4)
    whole, gain = written.sum(2), torch.rand(4) + 0.5
    normed = gain * whole / whole.square().mean(-1, keepdim=True).sqrt()
    passed = frozen_norm(written, normed)
    torch.testing.assert_close(passed.sum(2), normed)
    scale = gain / whole.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(passed, written * scale[:, :, None])


def test_w1mean_weights_grow_with_position():
    h = torch.randn(1, 3, 4)
    expected = (h[:, 0] + 2 * h[:, 1] + 3 * h[:, 2]) / 6
    torch.testing.assert_close(concept_vector(h), expected)
    torch.testing.assert_close(concept_vector(h, how="mean"), h.mean(1))
    torch.testing.assert_close(concept_vector(h, how="last"), h[:, 2])
    with pytest.raises(ConfigError, match="w1mean"):
        concept_vector(h, how="median")


@pytest.mark.parametrize("how", ["mean", "last", "w1mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_concepts_ignore_padding(how, side):
    h = torch.randn(1, 3, 4)
    junk = torch.full((1, 2, 4), 1e6)
    whole, mask = (torch.cat([h, junk], 1), [1, 1, 1, 0, 0])
    if side == "left":
        whole, mask = torch.cat([junk, h], 1), [0, 0, 1, 1, 1]
    found = concept_vector(whole, torch.tensor([mask]), how)
    torch.testing.assert_close(found, concept_vector(h, how=how))


def test_parameterless_attention_averages_the_prefix():
    x = torch.randn(2, 1, 4)
    torch.testing.assert_close(parameterless_attention(x, 3), x)  # one token: itself
    long = 0.1 * torch.randn(1, 300, 4, dtype=torch.float64)
    scores = (long @ long.transpose(1, 2)).masked_fill(
        torch.ones(300, 300).triu(1).bool(), -torch.inf
    )
    torch.testing.assert_close(parameterless_attention(long), scores.softmax(-1) @ long)
    ones = torch.ones(1, 300, 4)
    torch.testing.assert_close(parameterless_attention(ones), ones)  # rows sum to 1


def test_proximity_and_the_path_of_context_vectors_by_hand():
    x, y = torch.tensor([[1.0, 2, 3]]), torch.tensor([[2.0, 4, 7]])
    assert correlation(x, y).item() == pytest.approx(5 / math.sqrt(2 * 38 / 3), rel=1e-5)
    vectors = torch.tensor([[1.0, 0], [1, 1]])
    log_p = torch.tensor([[0.8, 0.1, 0.1], [0.4, 0.5, 0.1]]).log()
    unembedding = torch.tensor([[2.0, 0, -1], [0, 1, 0]])
    half = math.sqrt(0.5)
    expected = correlation(torch.tensor([[1.0, 0, -1], [half, half, -half]]), log_p)
    torch.testing.assert_close(proximity(vectors, log_p, unembedding), expected)
    # A straight line with steps 1 and 2, then a right angle of length 4.
    path = torch.tensor([[0.0, 0], [1, 0], [3, 0], [3, 4]])[:, None]
    found = context_path(path)
    assert found["decoding_step"].tolist() == [[1, 2, 4]]
    assert found["decoding_turning"].tolist() == [[1, 0]]
    assert found["decoding_straightness"].item() == pytest.approx(5 / 7)
