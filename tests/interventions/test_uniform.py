"""Uniform attention: the output form, the pattern form and a plain average agree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.zoo import padded, random_tokens, tiny_model
from workbench.attention.statistics import RowEntropy
from workbench.errors import ConfigError
from workbench.interventions.uniform import UniformAttention, uniform_weights, visible_keys
from workbench.models.base import Site
from workbench.testing import sink_pattern, uniform_pattern

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]


def test_weights_worked_by_hand():
    visible = torch.ones(3, 3).tril().bool()[None, None]
    first = torch.zeros(1, dtype=torch.long)
    whole = uniform_weights(visible, first, skip_first=False)[0, 0]
    torch.testing.assert_close(whole, uniform_pattern(3))
    rest = uniform_weights(visible, first, skip_first=True)[0, 0]
    torch.testing.assert_close(rest, torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5]]))


@given(window=st.integers(1, 8), first=st.integers(0, 3), n_q=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_visible_keys_are_read_from_the_pattern(window, first, n_q):
    # 8 keys, the last n_q of them queries; keys before ``first`` are padding.
    keys, query = torch.arange(8), torch.arange(8 - n_q, 8)[:, None]
    seen = (keys <= query) & (keys > query - window) & (keys >= first)
    pattern = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    found = visible_keys(pattern[None, None], torch.tensor([first]))
    assert torch.equal(found[0, 0], seen)


def test_weights_that_underflowed_are_still_visible():
    pattern = sink_pattern(6, 2)[None, None]
    pattern[..., 5, :] = uniform_pattern(6)[5]
    assert torch.equal(
        visible_keys(pattern, torch.tensor([0]))[0, 0], torch.ones(6, 6).tril().bool()
    )


def test_where_queries_look_ahead_all_see_the_same_keys():
    # Keys 0 and 4 are padding; row 0 is padding too, and holds anything.
    pattern = torch.zeros(1, 2, 5, 5)
    pattern[:, :, 0] = 0.2
    pattern[:, 0, 1:, 1] = pattern[:, 1, 1:, 3] = pattern[:, 1, 2, 2] = 0.5
    expected = torch.tensor([False, True, True, True, False]).expand(5, 5)
    assert torch.equal(visible_keys(pattern, torch.tensor([1]))[0, 0], expected)
    # The first token alone has another after it: the last one never looks ahead.
    two = torch.full((1, 1, 2, 2), 0.5)
    assert torch.equal(visible_keys(two, torch.tensor([0]))[0, 0], torch.ones(2, 2).bool())


def test_one_head_that_attends_is_enough_and_padding_on_the_left_is_hidden():
    # The other head's weights have underflowed to 0 but on the query itself.
    pattern = torch.stack([torch.eye(5), uniform_pattern(5)])[None]
    expected = torch.ones(5, 5).tril().bool()
    assert torch.equal(visible_keys(pattern, torch.tensor([0]))[0, 0], expected)
    expected[:, :2] = False
    assert torch.equal(visible_keys(pattern, torch.tensor([2]))[0, 0], expected)


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2", "mistral", "gpt_oss"])
def test_z_is_the_mean_of_the_visible_values(family, skip_first):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, 12)
    edit = UniformAttention(skip_first=skip_first)
    sites = [Site(name, layer) for layer in range(2) for name in ("v", "z")]
    plain = model.capture(tokens, [Site("pattern", layer) for layer in range(2)])
    with model.edit(edit):
        found = model.capture(tokens, sites)
    for layer in range(2):
        value = found[Site("v", layer)].repeat_interleave(
            4 // found[Site("v", layer)].shape[2], dim=2
        )
        for pos in range(12):
            # The random models' patterns never underflow: what is seen is above 0.
            seen = plain[Site("pattern", layer)][:, :, pos].amin((0, 1)) > 0
            if skip_first and pos > 0:
                seen[0] = False
            expected = value[:, seen].mean(1)
            torch.testing.assert_close(found[Site("z", layer)][:, pos], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_averaged(side):
    model = wb.wrap(tiny_model("llama"))
    tokens, mask = padded(random_tokens(2, 12), [12, 7], side)
    with model.edit(UniformAttention()):
        together = model.logits(tokens, mask)
        alone = model.logits(random_tokens(2, 12)[1:, :7])
    torch.testing.assert_close(together[1][mask[1].bool()], alone[0], rtol=0, atol=1e-4)


def test_statistics_see_the_uniform_pattern():
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(2, 12)
    site = Site("pattern", 1)
    with model.edit(UniformAttention(heads=((1, 2),))):
        entropy = model.capture(tokens, [site], {"pattern": RowEntropy()})[site]
    expected = torch.log(torch.arange(1.0, 13.0))
    torch.testing.assert_close(entropy[:, 2], expected.expand(2, 12))
    assert (entropy[:, 0, 2:] < expected[2:] - 1e-3).all()


@pytest.mark.parametrize("skip_first", [False, True])
def test_the_backends_agree(skip_first):
    edit = UniformAttention(heads=((0, 1), (1, 0), (1, 3)), skip_first=skip_first)
    tokens = random_tokens(2, 9)
    stock = wb.wrap(tiny_model("gpt2"))
    others = [
        through_bridge(tiny_model("gpt2")),
        through_nnsight(tiny_model("gpt2", attn_implementation="eager")),
    ]
    with stock.edit(edit):
        expected = stock.logits(tokens)
    assert not torch.allclose(expected, stock.logits(tokens), atol=1e-3)
    for model in others:
        with model.edit(edit):
            torch.testing.assert_close(model.logits(tokens), expected, rtol=0, atol=1e-4)


def test_generation_with_a_cache_averages_the_whole_prefix():
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(1, 6)
    with model.edit(UniformAttention()):
        made = model.generate(tokens, max_new_tokens=4, do_sample=False)
        for end in range(6, made.shape[1]):
            assert model.logits(made[:, :end])[0, -1].argmax() == made[0, end]


def test_a_head_that_does_not_exist_is_refused():
    model = wb.wrap(tiny_model("gpt2"))
    with (
        pytest.raises(ConfigError, match="layer 0, head 9"),
        model.edit(UniformAttention(heads=((0, 9),))),
    ):
        pass
