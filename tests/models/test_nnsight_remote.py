"""Models that run elsewhere, by way of nnsight's serialisation and its simulation of a server."""

import pytest
import torch

import workbench as wb
from tests import zoo
from workbench.attention.statistics import ColumnMean
from workbench.errors import CapabilityError

SITES = [
    "embed",
    *(f"L1.{name}" for name in ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out")),
    *("L1.attn_scores", "L1.mlp_out", "L1.resid_post"),
]


def assert_close(got, wanted):
    """1e-5: other kernels than eager attention's run behind the server."""
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def pair(request, tiny_folder):
    """A model here, and the same behind nnsight's simulation of a server."""
    nnsight = pytest.importorskip("nnsight")
    from transformers import AutoTokenizer

    from workbench.models.nnsight import NNsightModel

    module = zoo.tiny_model(request.param)
    # nnsight wants a tokenizer at hand; none is used.
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    lm = nnsight.TransformersModel(module, task="text-generation", tokenizer=tokenizer)
    return wb.wrap(zoo.tiny_model(request.param)), NNsightModel(lm, remote="local")


def test_every_site_is_that_of_the_model_here(pair):
    here, there = pair
    tokens = zoo.random_tokens(2)
    sites = [site for site in SITES if site != "L1.attn_scores"]
    found, expected = there.capture(tokens, sites), here.capture(tokens, sites)
    for site in sites:
        assert_close(found[site], expected[site])


def test_padding_and_statistics_are_those_of_the_model_here(pair):
    here, there = pair
    tokens = zoo.random_tokens(2)
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    how = {"reduce": {"pattern": ColumnMean()}, "attention_mask": mask}
    assert_close(
        there.capture(tokens, ["L0.pattern"], **how)["L0.pattern"],
        here.capture(tokens, ["L0.pattern"], **how)["L0.pattern"],
    )


def test_logits_and_their_end_come_back(pair):
    here, there = pair
    tokens = zoo.random_tokens(2)
    assert_close(there.logits(tokens), here.logits(tokens))
    assert_close(there.logits(tokens, last=2), here.logits(tokens, last=2))


def test_weights_come_when_they_are_asked_for(pair):
    here, there = pair
    for name, layer in (("W_O", 1), ("W_Q", 0), ("W_E", None), ("W_U", None)):
        assert_close(there.weight(name, layer), here.weight(name, layer))
    x = torch.ones(2, here.spec.d_model)
    assert_close(there.final_norm(x), here.final_norm(x))
    assert_close(there.mlp_of_embedding(1, x, norm=True), here.mlp_of_embedding(1, x, norm=True))


def test_edits_are_refused_with_the_reason(pair):
    _, there = pair
    assert "edits" not in there.capabilities
    with (
        pytest.raises(CapabilityError, match="edits need the model on this machine"),
        there.edit(wb.ZeroTuning(gamma=2.0)),
    ):
        pass
