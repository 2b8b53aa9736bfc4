"""The whole successor-heads probe on planted weights: scores, features, steering, figures, going on."""

import math

import pytest
import torch

import workbench as wb
from probes.figures.successor_heads import figures, finding
from probes.successor_heads import SuccessorHeadsConfig, measure_successor_heads
from probes.successor_heads_tokens import find_token_sets
from tests.models.agreement import LIBRARY_WARNINGS
from tests.probes.factored_successors import N_DIGITS, N_DOMAINS, N_TENS, NO_TOKENS, QUICK, factored
from tests.probes.planted_successors import N_POS, PlantedWeights
from workbench.context import Context

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]


# Card section 10, checks 2 and 3, through the whole probe: rep = digit + tens + domain


@pytest.fixture(scope="module")
def result():
    config = SuccessorHeadsConfig(ln="none", forms="space")
    return measure_successor_heads(factored(), NO_TOKENS, config)


def test_the_factored_head_fails_exactly_at_carries(result):
    assert result.best == (0, 0)
    assert result.labels["task"] == ("numbers", "number words", "months")
    # Numbers: 10 carries of 99 pairs; words: 9 to ten and 19 to twenty; months: 9 to October, and
    # December, which the head does not send back to January.
    expected = torch.tensor([89 / 99, 17 / 19, 10 / 12])
    torch.testing.assert_close(result.score_by_task[:, 0, 0], expected)
    torch.testing.assert_close(result.score[0, 0], torch.tensor(116 / 130))
    assert result.score[0, 1] == 0.0
    assert result.score[0, 3] == 0.0, "a head that writes nothing has nothing but ties"
    assert result.metrics()["chance"] == pytest.approx(3 / 130)
    assert result.metrics()["best_macro_score"] == pytest.approx(expected.mean().item())


def test_planted_digits_are_found(result):
    planted = torch.eye(N_DIGITS + N_TENS + N_DOMAINS)[:10]
    assert result.mod10_features.shape == (10, 25)
    cosine = torch.nn.functional.cosine_similarity(result.mod10_features, planted, dim=1)
    assert cosine.min() > 0.9
    metrics = result.metrics()
    assert metrics["probe_accuracy"] == 1.0
    assert metrics["probe_tokens"] == 32
    assert metrics["probe_accuracy_held_out_tens"] == 1.0
    assert metrics["feature_probe_cosine"] > 0.9
    assert metrics["feature_names_next"] == 1.0
    assert metrics["factoring_accuracy"] == 1.0
    assert metrics["factoring_accuracy_roman"] == 1.0


def test_steering_the_planted_head(result):
    row = result.labels["source"].index("numbers: 35")
    assert result.steered_index[row, 7] == 38
    assert result.steering_table[row, 7] == 1.0
    assert result.steering_table[row, 9] == 0.0
    # Sources with their own digit put in again do not count; digit 9 needs a carry.
    assert result.metrics()["steering_20_29"] == pytest.approx(81 / 90)
    assert result.steering_success.shape == (3,)
    assert result.steering_by_scale.shape == (4, 3)
    torch.testing.assert_close(result.steering_by_scale[1], result.steering_success)
    assert result.steering_success[0] > 0.8


def test_a_weak_push_steers_less(result):
    assert result.steering_by_scale[0, 0] < 0.5 < result.steering_by_scale[1, 0]


def test_permuted_heads_have_permuted_scores(result):
    config = SuccessorHeadsConfig(ln="none", forms="space", sae_steps=1, sae_seeds=1)
    order = [3, 1, 0, 2]
    found = measure_successor_heads(factored(order), NO_TOKENS, config)
    assert found.best == (0, 2)
    torch.testing.assert_close(found.score, result.score[:, order])
    torch.testing.assert_close(found.greater_than_bias, result.greater_than_bias[:, order])


def test_random_weights_have_no_successor_head():
    model = factored()
    generator = torch.Generator().manual_seed(1)
    embed = torch.randn(model.weight("W_E").shape, generator=generator)
    random = PlantedWeights(
        model.tokenizer, embed, embed.T, torch.randn(2, 4, 25, 25, generator=generator)
    )
    found = measure_successor_heads(random, NO_TOKENS, QUICK)
    metrics = found.metrics()
    assert metrics["best_score"] < 0.15
    assert found.score.mean() == pytest.approx(metrics["chance"], abs=0.02)
    assert found.greater_than_bias.abs().mean() < 0.15
    assert metrics["probe_accuracy"] < 0.35
    assert metrics["factoring_accuracy"] < 0.2
    assert metrics["list_attention"] == 0.0, "the planted pattern attends to itself alone"


def test_every_metric_is_a_number_and_every_label_fits(result):
    metrics = result.metrics()
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert {"best_layer", "best_head", "best_score", "second_score"} <= set(metrics)
    assert {"probe_accuracy", "feature_probe_cosine"} <= set(metrics)
    assert len(result.labels["source"]) == len(result.steering_table)
    assert len(result.labels["filter"]) == len(result.filter_counts)
    assert len(result.labels["task"]) == len(result.n_pairs)
    table = result.table()
    assert {len(column) for column in table.values()} == {4}
    assert table["score months"][0] == pytest.approx(10 / 12)


def test_figures_show_what_was_measured(result):
    drawn = figures(result)
    assert set(drawn) == {
        "heads",
        "tasks",
        "filter",
        "attention",
        "steering",
        "steering_by_scale",
        "digit_features",
        "probe",
    }
    for figure in drawn.values():
        assert "n = " in figure.layout.title.subtitle.text
        titles = [axis.title.text for axis in figure.select_xaxes()]
        titles += [axis.title.text for axis in figure.select_yaxes()]
        assert all("(" in title for title in titles), titles
    heat = drawn["heads"].data[0]
    assert heat.z[0][0] == pytest.approx(116 / 130)
    bars = drawn["tasks"].data[0]
    assert bars.name == "L0H0"
    assert list(bars.y) == pytest.approx([89 / 99, 17 / 19, 10 / 12])
    assert "L0H0 finds the next item of 89.2% of 130 pairs" in finding(result)
    steering = drawn["steering"].data[0]
    row = list(steering.y).index("numbers: 35")
    assert steering.z[row][7] == 1.0
    assert steering.customdata[row][7] == 38


# Going on in the middle


def test_a_killed_run_goes_on_where_it_was():
    kept, computed = {}, []

    class KilledError(Exception):
        pass

    def keep(limit):
        def get(name, compute):
            if name not in kept:
                if len(computed) == limit:
                    raise KilledError
                computed.append(name)
                kept[name] = compute()
            return kept[name]

        return Context(keep=get)

    with pytest.raises(KilledError):
        measure_successor_heads(factored(), NO_TOKENS, QUICK, keep(2))
    assert computed == ["layer-0", "autoencoder-0"]
    found = measure_successor_heads(factored(), NO_TOKENS, QUICK, keep(100))
    assert computed == ["layer-0", "autoencoder-0", "autoencoder-1", "lists-0"]
    whole = measure_successor_heads(factored(), NO_TOKENS, QUICK)
    assert found.metrics() == whole.metrics()
    assert torch.equal(found.mod10_features, whole.mod10_features)


def test_seeds_give_other_features_and_the_same_scores():
    one, two = (
        measure_successor_heads(factored(), NO_TOKENS, QUICK, Context(seed=seed)) for seed in (0, 1)
    )
    assert torch.equal(one.score, two.score)
    assert not torch.equal(one.mod10_features, two.mod10_features)


def test_a_result_survives_the_store(tmp_path, tiny_folder):
    settings = {"sae_steps": 1, "sae_seeds": 1, "store": tmp_path}
    first = wb.run("successor-heads", str(tiny_folder), **settings)
    second = wb.run("successor-heads", str(tiny_folder), **settings)
    assert second.cached
    assert second.metrics() == first.metrics()
    assert second.tasks == ["numbers", "letters"]
    assert "mod10_features" not in second.arrays
    assert second.figures().keys() == first.figures().keys()


def test_the_planted_lists_fit_the_model():
    model = factored()
    assert model.spec.n_ctx == N_POS
    sets = find_token_sets(model.tokenizer, "space", "m")
    assert sets.tasks == ("numbers", "number words", "months")
