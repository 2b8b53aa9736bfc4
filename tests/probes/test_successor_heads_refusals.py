"""Successor heads: what a tokenizer or a model cannot show is absent or refused."""

import pytest

import workbench as wb
from probes.figures.successor_heads import figures, finding
from probes.successor_heads import SuccessorHeadsConfig, measure_successor_heads
from tests.models.agreement import LIBRARY_WARNINGS
from tests.probes.factored_successors import MONTHS, NO_TOKENS, WEIGHTS, factored
from tests.probes.planted_successors import WordTokenizer
from tests.zoo import tiny_model
from workbench.errors import CapabilityError, ConfigError, DataError

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]


def test_what_a_tokenizer_cannot_show_is_absent(tiny_folder):
    found = measure_successor_heads(wb.load(str(tiny_folder)), NO_TOKENS, WEIGHTS)
    assert found.mod10_features is None
    assert found.steering_success is None
    assert found.direct_effect is None
    assert "probe_accuracy" not in found.metrics()
    assert "there are 0 with 0 and 9 numbers in all" in found.labels["left_out"][0]
    assert "features and steering left out" in finding(found)
    assert "steering" not in figures(found)


def test_without_an_ordered_series_there_is_no_greater_than_bias():
    tokenizer = WordTokenizer(MONTHS)
    model = wb.wrap(tiny_model("gpt2"), tokenizer)
    found = measure_successor_heads(model, NO_TOKENS, WEIGHTS)
    assert found.greater_than_bias is None
    assert found.wrong_above is None
    assert "greater_than_bias" not in found.metrics()
    assert "factoring_accuracy" not in found.metrics()
    assert all(figure.data for figure in figures(found).values())


def test_a_model_of_one_head_has_no_second_score():
    model = factored(order=(0,))
    found = measure_successor_heads(model, NO_TOKENS, WEIGHTS)
    assert "second_score" not in found.metrics()


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(DataError, match=r"has none; give one with wb\.wrap"):
        measure_successor_heads(wb.wrap(tiny_model("gpt2")), NO_TOKENS, WEIGHTS)


def test_a_model_without_heads_is_refused():
    model = wb.wrap(tiny_model("mamba"), WordTokenizer(MONTHS))
    with pytest.raises(CapabilityError, match="probe successor-heads needs attention"):
        wb.run("successor-heads", model)
    with pytest.raises(CapabilityError, match="needs attention heads"):
        measure_successor_heads(model, NO_TOKENS, WEIGHTS)


def test_a_tokenizer_without_series_is_refused():
    model = wb.wrap(tiny_model("gpt2"), WordTokenizer([" Monday"]))
    with pytest.raises(DataError, match=r"as single tokens; it has none: numbers \(space\) 0 of"):
        measure_successor_heads(model, NO_TOKENS, WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forms": "upper"}, "forms must be one of all, space, bare"),
        ({"ln": "ln1"}, "ln must be one of ln2, none"),
        ({"sae_features": 9}, "sae_features must be at least 10"),
        ({"steering_scale": 0.0}, "steering_scale must be above 0"),
    ],
    ids=["forms", "ln", "features", "scale"],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SuccessorHeadsConfig(**settings)
