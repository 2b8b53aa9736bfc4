"""One block's MLP and the final norm as functions: what the forward pass itself computes."""

import pytest
import torch

from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.zoo import ALL_FAMILIES, ATTENTION_FAMILIES, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.errors import CapabilityError
from workbench.models.huggingface import HuggingFaceModel
from workbench.models.load import wrap
from workbench.models.sublayers import HasSublayers

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

NORM_AFTER = ("olmo2", "gemma2", "gemma3_text")
"""They normalise what the MLP adds, which the function leaves out."""


@pytest.fixture(params=ATTENTION_FAMILIES)
def family(request):
    return request.param


def other_backends(model):
    return {"transformer-lens": through_bridge(model), "nnsight": through_nnsight(model)}


def test_the_mlp_is_the_one_of_the_forward_pass(family):
    model = HuggingFaceModel(tiny_model(family))
    if family in NORM_AFTER:
        pytest.skip(f"{family} has a norm after the MLP")
    before = "resid_pre" if model.family.mid is None else "resid_mid"
    seen = model.capture(random_tokens(1), [f"L1.{before}", "L1.mlp_out"])
    found = model.mlp_of_embedding(1, seen[f"L1.{before}"][0], norm=True)
    torch.testing.assert_close(found, seen["L1.mlp_out"][0], rtol=1e-4, atol=1e-4)


def test_the_final_norm_is_the_one_of_the_forward_pass(family):
    model = HuggingFaceModel(tiny_model(family))
    seen = model.capture(random_tokens(2), ["L1.resid_post", "ln_final"])
    found = model.final_norm(seen["L1.resid_post"])
    torch.testing.assert_close(found, seen["ln_final"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [True, False])
def test_the_backends_agree(family, norm):
    model, x = tiny_model(family), torch.randn(5, 32)
    wanted = HuggingFaceModel(model)
    for name, other in other_backends(model).items():
        assert isinstance(other, HasSublayers)
        for layer in (0, 1):
            found = other.mlp_of_embedding(layer, x, norm=norm)
            expected = wanted.mlp_of_embedding(layer, x, norm=norm)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)
        torch.testing.assert_close(other.final_norm(x[None]), wanted.final_norm(x[None]))


@pytest.mark.parametrize("family", [name for name in ALL_FAMILIES if name in ("gptj", "gpt_neo")])
def test_families_outside_the_hf_backend_have_theirs(family):
    model = through_bridge(tiny_model(family))
    before = "resid_pre" if family == "gptj" else "resid_mid"
    seen = model.capture(random_tokens(1), [f"L1.{before}", "L1.mlp_out"])
    found = model.mlp_of_embedding(1, seen[f"L1.{before}"][0], norm=True)
    torch.testing.assert_close(found, seen["L1.mlp_out"][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_an_mlp_that_is_no_function_of_one_vector_is_refused(family):
    model = through_nnsight(tiny_model(family))
    with pytest.raises(CapabilityError, match=f"{family} has none"):
        model.mlp_of_embedding(0, torch.randn(2, 32), norm=True)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_toy_has_them_too(norm):
    config = ToyModelConfig(d_vocab=101, d_model=16, d_mlp=32, n_heads=2, norm=norm)
    model = wrap(make_model(config, seed=0))
    assert isinstance(model, HasSublayers)
    seen = model.capture(random_tokens(2), ["L0.resid_post", "ln_final"])
    torch.testing.assert_close(model.final_norm(seen["L0.resid_post"]), seen["ln_final"])
