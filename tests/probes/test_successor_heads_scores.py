"""The effective OV circuit, its score and its bias, by hand and with planted heads."""

import pytest
import torch

from probes.successor_heads_scores import (
    TokenPath,
    chance,
    greater_than,
    is_strict_maximum,
    ov_logits,
    score_layer,
    vocabulary_of,
)
from probes.successor_heads_tokens import Series, TokenSet, find_token_sets
from tests.probes.planted_successors import PlantedWeights, WordTokenizer, head_that_maps
from workbench.errors import CapabilityError, EngineError
from workbench.testing import PlantedModel, identity_pattern

# By hand


def test_strict_maximum_on_a_matrix_worked_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 6.0], [4.0, 4.0, 4.0]])
    found = is_strict_maximum(logits, torch.tensor([0, 1, 2]))
    assert found.tolist() == [True, False, False]
    assert is_strict_maximum(logits, torch.tensor([2, 2, 0])).tolist() == [False, True, False]


def test_a_tie_is_not_found_but_the_smallest_lead_is():
    tied = torch.tensor([[1.0, 1.0]])
    ahead = torch.tensor([[1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()]])
    assert not is_strict_maximum(tied, torch.tensor([1])).item()
    assert is_strict_maximum(ahead, torch.tensor([1])).item()


def test_greater_than_bias_of_one_source_worked_by_hand():
    # The source is item 1 of 0..3: above it 5 and 7, below it 1; mean 4, deviation sqrt(5).
    row = torch.tensor([1.0, 3.0, 5.0, 7.0])
    logits = torch.stack([torch.zeros(4), row, torch.zeros(4), torch.zeros(4)])
    expected = torch.tensor([(6.0 - 1.0) / 5.0**0.5, 0.0])
    torch.testing.assert_close(greater_than(logits), expected)


def test_copying_has_no_greater_than_bias_and_an_upper_triangle_has():
    assert greater_than(torch.eye(12)).abs().max() == 0
    assert greater_than(torch.ones(12, 12).triu(1)).min() > 1
    torch.testing.assert_close(greater_than(torch.ones(9, 9).tril(-1)).mean(), -_upper(9))


def _upper(n_items):
    return greater_than(torch.ones(n_items, n_items).triu(1)).mean()


def test_ov_logits_equal_the_product_through_the_whole_matrix():
    reps, w_v, w_o = torch.randn(5, 12), torch.randn(3, 12, 4), torch.randn(3, 4, 12)
    unembed = torch.randn(12, 7)
    found = ov_logits(reps, w_v, w_o, unembed)
    for head in range(3):
        whole = w_v[head] @ w_o[head]
        torch.testing.assert_close(found[head], reps @ whole @ unembed, rtol=1e-4, atol=1e-4)


def test_chance_is_the_mean_over_pairs_of_one_in_the_candidates():
    abc = Series("abc", tuple("abcdefg"))
    sets = [TokenSet(abc, "bare", (1, 2, 3), (0, 1, 2))]
    sets.append(TokenSet(abc, "space", (1, 2, 3, 4, 5, 6, 7), tuple(range(7))))
    # Two pairs with chance 1/2, six with 1/6: (2/2 + 6/6) / 8.
    assert chance(sets) == pytest.approx(2 / 8)


# Planted: card section 10, check 1 (50 numbers, months, days, letters)

WORDS = (
    [f" {number}" for number in range(1, 51)]
    + [" January", " February", " March", " April", " May", " June", " July", " August"]
    + [" September", " October", " November", " December"]
    + [" Monday", " Tuesday", " Wednesday", " Thursday", " Friday", " Saturday", " Sunday"]
    + [f" {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
)
D_MODEL = 256


def planted(seed=0):
    """Four heads: next item, same item, Gaussian, all larger items."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = WordTokenizer(WORDS)
    n_words = len(tokenizer.words)
    embed = torch.randn(n_words, D_MODEL, generator=generator)
    unembed = torch.randn(D_MODEL, n_words, generator=generator)
    first = torch.randn(D_MODEL, D_MODEL, generator=generator) / 16
    second = torch.randn(D_MODEL, D_MODEL, generator=generator) / 16

    def mlp(x):
        return torch.relu(x @ first) @ second

    sets = find_token_sets(tokenizer, "all", "planted").scored
    ids = torch.tensor([id_ for one in sets for id_ in one.ids])
    reps = mlp(torch.nn.functional.layer_norm(embed[ids], (D_MODEL,)))
    step, larger, start = torch.zeros(len(ids), len(ids)), torch.zeros(len(ids), len(ids)), 0
    for one in sets:
        source, target = (one.pairs() + start).unbind(1)
        step[source, target] = 1.0
        rows = slice(start, start + len(one.ids))
        larger[rows, rows] = torch.ones(len(one.ids), len(one.ids)).triu(1)
        start = rows.stop
    heads = [head_that_maps(reps, unembed[:, ids], rule) for rule in (step, torch.eye(len(ids)))]
    heads.append(torch.randn(D_MODEL, D_MODEL, generator=generator))
    heads.append(head_that_maps(reps, unembed[:, ids], larger))
    return PlantedWeights(tokenizer, embed, unembed, torch.stack(heads)[None], mlp), sets


@pytest.fixture(scope="module")
def model_and_sets():
    return planted()


def scores(model, sets, path=TokenPath()):  # noqa: B008 - frozen
    return score_layer(model, 0, vocabulary_of(model, sets, path))


def test_planted_successor_copy_and_gaussian_heads(model_and_sets):
    model, sets = model_and_sets
    found = scores(model, sets)["found"].mean(dim=1)
    assert found.shape == (4,)
    assert found[0] == 1.0
    assert found[1] == 0.0
    assert found[2] < 3 * chance(sets)


def test_planted_successor_is_lost_without_the_first_mlp(model_and_sets):
    model, sets = model_and_sets
    without = scores(model, sets, TokenPath(mlp0=False))["found"].mean(dim=1)
    assert without[0] < 0.15


def test_norm_and_residual_are_parts_of_the_path(model_and_sets):
    model, _ = model_and_sets
    ids = torch.tensor([3, 4])
    embed = model.weight("W_E")[ids]
    normed = torch.nn.functional.layer_norm(embed, (D_MODEL,))
    torch.testing.assert_close(TokenPath().represent(model, ids), model.mlp(normed))
    torch.testing.assert_close(TokenPath(norm=False).represent(model, ids), model.mlp(embed))
    whole = TokenPath(residual=True).represent(model, ids)
    torch.testing.assert_close(whole, model.mlp(normed) + embed)
    torch.testing.assert_close(TokenPath(mlp0=False).represent(model, ids), embed)


def test_planted_greater_than_bias(model_and_sets):
    model, sets = model_and_sets
    found = scores(model, sets)
    bias = found["greater"].mean(dim=1)
    # Numbers 2..49 and letters B..Y; months and days wrap around.
    assert found["greater"].shape == (4, 48 + 24)
    assert bias[1].abs() < 1e-3
    assert bias[3] > 1.0
    # The copying head names its source where that is a target, else something arbitrary.
    assert found["wrong"][0].tolist() == [0.0, 0.0]
    assert found["wrong"][1, 0] == 49 + 25
    assert found["wrong"][3, 1] == found["wrong"][3, 0]


def test_heads_are_scored_each_on_its_own(model_and_sets):
    model, sets = model_and_sets
    order = [2, 0, 3, 1]
    mixed = PlantedWeights(
        model.tokenizer,
        model.weights["W_E"],
        model.weights["W_U"],
        model.heads[:, order],
        model.mlp,
    )
    found, expected = scores(mixed, sets), scores(model, sets)
    # The head of larger items is full of ties, which rounding may break either way.
    assert torch.equal(found["found"][[0, 1, 3]], expected["found"][[2, 0, 1]])
    torch.testing.assert_close(found["greater"], expected["greater"][order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [0.25, 64.0])
def test_scores_do_not_depend_on_the_size_of_what_a_head_writes(model_and_sets, factor):
    model, sets = model_and_sets
    scaled = PlantedWeights(
        model.tokenizer,
        model.weights["W_E"],
        model.weights["W_U"],
        model.heads * factor,
        model.mlp,
    )
    found, expected = scores(scaled, sets), scores(model, sets)
    assert torch.equal(found["found"], expected["found"])
    torch.testing.assert_close(found["greater"], expected["greater"], rtol=1e-3, atol=1e-4)


# Card section 10, check 2: a factored head fails exactly at carries


def test_a_factored_head_fails_exactly_where_it_must_carry():
    units, tens = torch.eye(10), torch.eye(10)
    index = torch.arange(100)
    reps = torch.cat([units[index % 10], tens[index // 10]], dim=1)
    turn = torch.block_diag(torch.eye(10).roll(1, dims=1), torch.eye(10))
    logits = reps[:-1] @ turn @ reps.T
    found = is_strict_maximum(logits, torch.arange(1, 100))
    assert found.float().mean().item() == pytest.approx(90 / 99)
    assert (~found).nonzero().flatten().tolist() == [9, 19, 29, 39, 49, 59, 69, 79, 89]


# Refusals


def test_weights_that_overflow_are_refused(model_and_sets):
    model, sets = model_and_sets
    with pytest.raises(EngineError, match="must be finite"):
        scores(
            PlantedWeights(
                model.tokenizer,
                model.weights["W_E"],
                model.weights["W_U"],
                model.heads * torch.inf,
                model.mlp,
            ),
            sets,
        )
    broken = PlantedWeights(
        model.tokenizer, model.weights["W_E"] * torch.nan, model.weights["W_U"], model.heads
    )
    with pytest.raises(EngineError, match="first MLP of planted"):
        vocabulary_of(broken, sets, TokenPath())


def test_a_model_without_a_first_mlp_is_refused_with_the_way_out():
    class Bare(PlantedModel):
        def weight(self, name, layer=None):
            return torch.zeros(5, 4)

    model = Bare(identity_pattern(4)[None, None, None])
    with pytest.raises(CapabilityError, match=r"mlp_of_embedding.*use mlp0=false"):
        TokenPath().represent(model, torch.tensor([1]))
