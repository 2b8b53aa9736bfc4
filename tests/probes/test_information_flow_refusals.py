"""Information flow: items, settings and models that are refused, and why."""

import pytest
import torch

import workbench as wb
from probes.information_flow import InformationFlowConfig
from probes.information_flow_items import find_items
from tests.probes.flow_prompts import TEXTS, TWO_ITEMS, encoder, random_rows, run
from tests.probes.planted_flow import copying_toy
from tests.zoo import tiny_model
from workbench.errors import CapabilityError, ConfigError, DataError


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"tokens": [1, 5, 2], "items": []}], "at least one"),
        ([{"tokens": [1, 5, 2]}], "must have items"),
        ([{"tokens": [1, 5, 2], "items": [[9]]}], r"no \[9\] after position 0"),
        ([{"tokens": [1, 5, 2], "items": [[2], [5]]}], r"no \[5\] after position 3"),
        ([{"tokens": [1, 5, 2], "items": [[5], "x"]}], "all texts or all lists"),
        ([{"tokens": [1, 5, 2], "items": ["x"]}], "fast"),
        ([[1, 5, 2]], "builtin:items"),
    ],
    ids=["empty", "none", "absent", "order", "mixed", "text", "no rows"],
)
def test_items_that_cannot_be_found_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        run(copying_toy({}), rows)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["red dog"], "no 'red dog'"),
        (["cat", "red"], "no 'red' in ' by"),
        (["cat", " "], "no ' '"),
        (["sta", "tarfish"], "in order"),
        (["pool t", "able"], "share a token"),
    ],
)
def test_items_that_are_not_in_the_text_are_refused(items, message, tmp_path):
    row = {"text": "the red cat by a pool table and starfish", "items": items}
    with pytest.raises(DataError, match=message):
        run(encoder("t5", tmp_path), [row])


def test_settings_that_do_not_fit_the_model_are_refused(tmp_path):
    toy = copying_toy({})
    with pytest.raises(ConfigError, match="layer must be at most 2"):
        run(toy, TWO_ITEMS, layer=3)
    with pytest.raises(ConfigError, match="pad_to must lie between 5"):
        run(toy, TWO_ITEMS, pad_to=4)
    with pytest.raises(DataError, match="pad must be"):
        run(toy, TWO_ITEMS, pad=99)
    with pytest.raises(ConfigError, match="at least 2"):
        InformationFlowConfig(classifier_folds=1)
    with pytest.raises(CapabilityError, match="attention"):
        run(wb.wrap(tiny_model("mamba")), random_rows(), knockout=True)


def test_the_classifier_says_how_many_prompts_it_needs_and_what_it_found():
    model = wb.wrap(tiny_model("llama"))
    with pytest.raises(DataError, match="classifier_folds=5 needs at least as many prompts; got 4"):
        run(model, random_rows(), classifier_folds=5)
    with pytest.raises(DataError, match="items of several tokens"):
        run(copying_toy({}), TWO_ITEMS, classifier_folds=2)
    result = run(model, random_rows(12), classifier_folds=3)
    several = result.measured.item_mask()[:, [0, 2]].any(dim=1)
    assert not bool((result.predicted_redundant & ~several).any())
    found = result.metrics()
    truth, said = ~result.representative[several], result.predicted_redundant[several]
    assert found["classifier_accuracy"] == pytest.approx((truth == said).double().mean().item())
    assert found["classifier_base_rate"] == pytest.approx(found["redundant_rate"])


def test_an_item_behind_the_cut_is_refused(tmp_path):
    model = encoder("t5", tmp_path)
    with pytest.raises(DataError, match="behind the 4"):
        run(model, TEXTS[:1], n_pos=4)
    tokens = torch.tensor(
        [model.tokenizer(TEXTS[0]["text"], add_special_tokens=False)["input_ids"]]
    )

    def places(length):
        return find_items(TEXTS[:1], tokens[:, :length], torch.tensor([length]), model.tokenizer)

    # the red cat by a pool table: the last token of the second item is the seventh.
    assert places(7).of_pos[0].tolist() == [-1, 0, 0, -1, -1, 1, 1]
    with pytest.raises(DataError, match=r"'pool table' of .* lies behind the 6 that were kept"):
        places(6)
