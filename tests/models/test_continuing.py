"""A forward pass that starts in the middle gives what the whole one gives."""

import pytest
import torch

import workbench as wb
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.zoo import ATTENTION_FAMILIES, FAMILIES, padded, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.interventions.add_vector import AddVector
from workbench.interventions.zero_heads import ZeroHeads
from workbench.models.base import Site
from workbench.models.toy import ToyAdapter

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

N_POS = 9


def toy():
    config = ToyModelConfig(d_vocab=101, n_layers=3, n_heads=2, d_model=16, n_ctx=32)
    return ToyAdapter(make_model(config, 0))


def resid_pre(model, layer, tokens, mask=None):
    site = Site("resid_pre", layer)
    return model.capture(tokens, [site], attention_mask=mask)[site]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_ends_where_the_whole_pass_ends(family):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(3, N_POS)
    whole = model.logits(tokens)
    for layer in range(model.spec.n_layers):
        continued = model.continue_from(layer, resid_pre(model, layer, tokens))
        torch.testing.assert_close(continued, whole, rtol=0, atol=1e-5)
    assert torch.equal(model.logits(tokens), whole)  # nothing is left behind


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_padding_stays_hidden(family, side):
    model = wb.wrap(tiny_model(family))
    tokens, mask = padded(random_tokens(2, N_POS), [N_POS, 5], side)
    whole = model.logits(tokens, mask)
    continued = model.continue_from(1, resid_pre(model, 1, tokens, mask), mask)
    shown = mask.bool()
    torch.testing.assert_close(continued[shown], whole[shown], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight", "toy"])
def test_the_other_backends_end_there_too(backend):
    if backend == "toy":
        model = toy()
    elif backend == "nnsight":
        model = through_nnsight(tiny_model("gpt2", attn_implementation="eager"))
    else:
        model = through_bridge(tiny_model("gpt2"))
    tokens = random_tokens(2, N_POS)
    whole = model.logits(tokens)
    resid = resid_pre(model, 1, tokens)
    torch.testing.assert_close(model.continue_from(1, resid), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.continue_from(1, resid, last=3), whole[:, -3:], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("make", [lambda: wb.wrap(tiny_model("llama")), toy], ids=["hf", "toy"])
def test_edits_act_from_there_on_and_not_twice(make):
    model, tokens = make(), random_tokens(2, N_POS)
    vector = torch.linspace(-1.0, 1.0, model.spec.d_model)
    edits = [AddVector("L1.resid_pre", vector), ZeroHeads(((0, 1), (1, 0)))]
    with model.edit(*edits):
        whole = model.logits(tokens)
        continued = model.continue_from(1, resid_pre(model, 1, tokens))
    torch.testing.assert_close(continued, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(whole, model.logits(tokens))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mamba", "gpt_neox"])
def test_only_the_last_logits_are_made_when_asked(family):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, N_POS)
    resid = resid_pre(model, 1, tokens)
    whole = model.continue_from(1, resid)
    torch.testing.assert_close(model.continue_from(1, resid, last=2), whole[:, -2:])
    torch.testing.assert_close(model.logits(tokens, last=2), whole[:, -2:])


@pytest.mark.parametrize("edited", [False, True], ids=["stock", "edited"])
def test_the_last_mlp_reads_what_the_last_logits_need(edited):
    model = wb.wrap(tiny_model("gpt2"))
    resid = resid_pre(model, 0, random_tokens(2, N_POS))
    seen = []
    for block in model.model.transformer.h:
        block.mlp.c_fc.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with model.edit(*[ZeroHeads(((1, 0),))] * edited):
        model.continue_from(0, resid, last=2)
        assert seen == [N_POS, N_POS if edited else 2]  # an edit may look at the others
        model.continue_from(0, resid)
    assert seen[2:] == [N_POS, N_POS]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi3", "opt"])
def test_the_last_attention_makes_only_keys_and_values_of_every_position(family):
    model = wb.wrap(tiny_model(family))
    resid, counted = resid_pre(model, 0, random_tokens(2, N_POS)), []
    for path in filter(None, (model.family.w_q, model.family.w_o)):
        for (
            block
        ) in model.hooks.blocks:  # registered before the cut: sees what the module really made
            hook = block.get_submodule(path).register_forward_hook
            hook(lambda module, args, output: counted.append(output.shape[1]))
    model.continue_from(0, resid, last=2)
    n = 1 if family in ("gpt2", "gpt_neox", "phi3") else 2  # one projection makes q, k and v
    assert counted == [N_POS] * n + [2] * n


@pytest.mark.parametrize("last", [None, 1])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_an_attention_whose_z_is_given_is_not_run(family, last):
    model, edit = wb.wrap(tiny_model(family)), ZeroHeads(((0, 2), (1, 1)))
    tokens, mask = padded(random_tokens(2, N_POS), [N_POS, 6], "left")
    sites = [Site(name, layer) for name in ("resid_pre", "z") for layer in (0, 1)]
    for edits in ([], [edit]):
        with model.edit(*edits):
            found = model.capture(tokens, sites, attention_mask=mask)
            whole = model.logits(tokens, mask, last=last)
            for layer in (0, 1):
                block = model.hooks.blocks[layer]
                w_o = block.get_submodule(model.family.w_o)
                others = block.get_submodule(model.family.attn).children()
                hooks = [
                    part.register_forward_pre_hook(lambda *_: 1 / 0)
                    for part in others
                    if part is not w_o and not isinstance(part, torch.nn.Dropout)
                ]
                resid, z = found[Site("resid_pre", layer)], found[Site("z", layer)]
                logits = model.continue_from(layer, resid, mask, last=last, z=z)
                shown = slice(None) if last else mask.bool()
                torch.testing.assert_close(logits[shown], whole[shown], rtol=0, atol=2e-5)
                with pytest.raises(ZeroDivisionError):  # the hooks would tell
                    model.continue_from(layer, resid, mask)
                for hook in hooks:
                    hook.remove()


@pytest.mark.parametrize("family", [*FAMILIES, "toy"])
@pytest.mark.parametrize("edited", [False, True], ids=["stock", "edited"])
def test_the_gradient_is_that_of_finite_differences(family, edited):
    model = toy() if family == "toy" else wb.wrap(tiny_model(family))
    generator = torch.Generator().manual_seed(1)
    resid = torch.randn(1, 5, model.spec.d_model, generator=generator)
    direction = torch.randn(resid.shape, generator=generator)
    edits = [ZeroHeads(((1, 0),))] if edited and model.spec.n_heads else []

    def loss(resid):
        with model.edit(*edits):
            return model.continue_from(1, resid, last=1).double().log_softmax(-1)[0, 0, 7]

    wanted = resid.clone().requires_grad_()
    loss(wanted).backward()
    step = 1e-4 if family == "toy" else 1e-3  # before a ReLU changes sides
    numeric = (loss(resid + step * direction) - loss(resid - step * direction)) / (2 * step)
    slope = (wanted.grad * direction).sum().double()
    torch.testing.assert_close(slope, numeric.detach(), rtol=1e-2, atol=5e-3)
    assert slope.abs() > 0.02
    assert not loss(resid).requires_grad


def test_backends_without_gradients_say_who_has_them():
    model = through_bridge(tiny_model("gpt2"))
    assert "gradients" not in model.capabilities
    resid = torch.zeros(1, 3, model.spec.d_model, requires_grad=True)
    with pytest.raises(CapabilityError, match="--backend hf"):
        model.continue_from(0, resid)


def test_what_does_not_fit_is_refused():
    model = wb.wrap(tiny_model("gpt2"))
    with pytest.raises(ConfigError, match="layer must be below 2"):
        model.continue_from(2, torch.zeros(1, 3, 32))
    with pytest.raises(DataError, match="batch pos 32"):
        model.continue_from(0, torch.zeros(1, 3, 16))
    with pytest.raises(DataError, match="n_ctx"):
        model.continue_from(0, torch.zeros(1, 65, 32))


def test_an_error_on_the_way_leaves_the_model_whole():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(1, 4)
    whole = model.logits(tokens)
    hook = model.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.continue_from(1, torch.zeros(1, 4, 32))
    hook.remove()
    assert torch.equal(model.logits(tokens), whole)
