"""Stock and edited continuations against plain forward passes."""

import pytest
import torch

import workbench as wb
from workbench.errors import ModelError
from workbench.generation import compare_generation
from workbench.models.base import Site

PROMPT = "Monday, Tuesday,"
EDIT = wb.ZeroTuning(20.0)


@pytest.fixture(scope="module")
def model():
    return wb.load("demo")


@pytest.fixture(scope="module")
def comparison(model):
    return compare_generation(model, PROMPT, EDIT, max_new_tokens=6)


def test_texts_are_those_that_generate_gives(model, comparison):
    assert comparison.stock.text == model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    with model.edit(EDIT):
        assert comparison.edited.text == model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    assert comparison.stock.text != comparison.edited.text


def test_probabilities_and_entropies_are_those_of_plain_passes(model, comparison):
    prompt = model.tokenizer(PROMPT)["input_ids"]
    for path in (comparison.stock, comparison.edited):
        for index, token in enumerate(path.tokens.tolist()):
            seen = torch.tensor([[*prompt, *path.tokens[:index].tolist()]])
            with torch.no_grad():
                stock = model.model(seen).logits[0, -1].softmax(-1)
            with model.edit(EDIT):
                edited = model.logits(seen)[0, -1].softmax(-1)
            assert float(path.probability_stock[index]) == pytest.approx(
                float(stock[token]), abs=1e-5
            )
            assert float(path.probability_edited[index]) == pytest.approx(
                float(edited[token]), abs=1e-5
            )
            distance = float(0.5 * (stock - edited).abs().sum())
            assert float(path.total_variation[index]) == pytest.approx(distance, abs=1e-5)
            for probs, found in ((stock, path.entropy_stock), (edited, path.entropy_edited)):
                entropy = float(-(probs * probs.log()).sum())
                assert float(found[index]) == pytest.approx(entropy, abs=1e-4)


def test_attention_to_the_first_token_is_that_of_the_pattern(model, comparison):
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    for layer in range(model.spec.n_layers):
        site = Site("pattern", layer)
        stock = model.capture(tokens, [site])[site][0, :, 1:, 0].mean()
        assert float(comparison.sink_mass_stock[layer]) == pytest.approx(float(stock), abs=1e-6)
        with model.edit(EDIT):
            edited = model.capture(tokens, [site])[site][0, :, 1:, 0].mean()
        assert float(comparison.sink_mass_edited[layer]) == pytest.approx(float(edited), abs=1e-6)
    assert (comparison.sink_mass_edited > comparison.sink_mass_stock).all()


def test_a_no_op_moves_nothing(model):
    same = compare_generation(model, PROMPT, wb.ZeroTuning(1.0), max_new_tokens=3)
    assert same.stock.text == same.edited.text
    assert same.stock.total_variation.max() == 0.0
    assert torch.equal(same.stock.probability_stock, same.stock.probability_edited)
    assert torch.equal(same.sink_mass_stock, same.sink_mass_edited)


def test_a_model_without_a_tokenizer_is_refused():
    from tests.zoo import tiny_model

    with pytest.raises(ModelError, match="needs a tokenizer"):
        compare_generation(wb.wrap(tiny_model("gpt2")), PROMPT, EDIT)
