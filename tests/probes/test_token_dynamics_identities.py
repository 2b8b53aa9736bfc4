"""The walk against plain transformers, on every family."""

import pytest
import torch

import workbench as wb
from probes.token_dynamics import TokenDynamicsConfig
from probes.token_dynamics_lens import decode, kl_divergence
from probes.token_dynamics_walk import (
    by_source,
)
from tests.probes.walks import walk
from tests.zoo import random_tokens, tiny_model
from workbench.models.base import Site


def expected_path(family, tokens):
    """Waypoints, attention outputs and logits by hooks of our own on plain transformers."""
    model = tiny_model(family, attn_implementation="eager")
    base = model.base_model
    blocks = base.h if family == "gpt2" else base.layers
    outputs = {"attn": [], "mlp": [], "pre": []}
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    for block in blocks:
        attn = (
            block.attention
            if family == "gpt_neox"
            else getattr(block, "attn", None) or block.self_attn
        )
        attn.register_forward_hook(lambda m, i, o: outputs["attn"].append(first(o).clone()))
        block.mlp.register_forward_hook(lambda m, i, o: outputs["mlp"].append(first(o).clone()))
        block.register_forward_pre_hook(lambda m, i: outputs["pre"].append(i[0].clone()))
    with torch.no_grad():
        logits = model(tokens).logits
    points = [outputs["pre"][0]]
    for attn, mlp in zip(outputs["attn"], outputs["mlp"], strict=True):
        points += [points[-1] + attn, points[-1] + attn + mlp]
    return model, torch.stack(points), outputs, logits


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_walk_equals_plain_hooks(family):
    tokens = random_tokens(2, 10)
    model, path, _, logits = expected_path(family, tokens)
    found = walk(wb.wrap(tiny_model(family)), tokens)
    steps = path.diff(dim=0)
    torch.testing.assert_close(
        found.step_norm, steps.norm(dim=-1).movedim(0, -1), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        found.waypoint_cosine,
        torch.nn.functional.cosine_similarity(path, path[-1:], dim=-1).movedim(0, -1),
        rtol=0,
        atol=1e-4,
    )
    norm = {"gpt2": "ln_f", "llama": "norm", "gpt_neox": "final_layer_norm"}[family]
    with torch.no_grad():
        read = model.get_output_embeddings()(getattr(model.base_model, norm)(path))
    top = read.argmax(-1)
    for b in range(2):
        for pos in range(10):
            wrong = [i for i in range(5) if top[i, b, pos] != logits[b, pos].argmax()]
            assert found.arrival[b, pos] == (max(wrong) + 1 if wrong else 0)
    full = logits.log_softmax(-1).expand_as(read)
    distance = kl_divergence(full, read.log_softmax(-1))[:, :, 1:].mean(-1).T
    torch.testing.assert_close(found.lens_kl, distance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "llama", "mistral", "gpt_neox", "gemma2", "olmo2", "gpt_oss"]
)
def test_steps_telescope_and_sources_add_up(family):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, 10)
    found = walk(model, tokens, TokenDynamicsConfig(new_tokens=0, queries=(-1, 0, 6)))
    assert found.telescoping_error.max() < 1e-5
    total = found.attribution_share.sum(-1) + found.attribution_rest
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    assert (found.attribution_share[:, 1, :, 1:] == 0).all()  # query 0 sees token 0 alone
    assert (found.attribution_norm[:, 2, :, 7:] == 0).all()
    if family not in ("gpt2", "opt", "gpt_neox"):  # no output bias: tokens explain it all
        sinks = family == "gpt_oss"  # its attention has a bias
        assert sinks or found.attribution_rest.abs().max() < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_sources_and_output_bias_equal_attn_out(family):
    tokens = random_tokens(2, 10)
    plain, _, outputs, _ = expected_path(family, tokens)
    model = wb.wrap(tiny_model(family))
    rows = model.capture(tokens, [Site("pattern", 1), Site("v", 1)])
    written = by_source(
        rows[Site("pattern", 1)][:, :, -1:], rows[Site("v", 1)], model.weight("W_O", 1)
    )
    base = plain.base_model
    bias = base.h[1].attn.c_proj.bias if family == "gpt2" else base.layers[1].attention.dense.bias
    expected = outputs["attn"][1][:, -1]
    found = written.sum(2)[:, 0] + bias.detach()
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_filters_do_not_see_other_tokens_and_attention_does(family):
    # Card section 4: hold the residual stream at p, change it everywhere else.
    from workbench.interventions.replace import ReplacePositions

    model, tokens, pos = wb.wrap(tiny_model(family)), random_tokens(1, 8), 5
    sites = [Site(name, 1) for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    clean = model.capture(tokens, sites)
    keep = torch.zeros(1, 8, dtype=torch.bool)
    keep[:, pos] = True
    noise = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(3))
    other = ReplacePositions("L1.resid_pre", keep, noise)
    with model.edit(other):
        changed = model.capture(tokens, sites)
    assert (changed[Site("attn_out", 1)] - clean[Site("attn_out", 1)])[:, pos].norm() > 0.01
    # The same attention output at p gives the MLP the same input, whatever lies elsewhere.
    same = ReplacePositions("L1.attn_out", ~keep, clean[Site("attn_out", 1)])
    with model.edit(other, same):
        held = model.capture(tokens, sites)
    for name in ("mlp_out", "resid_post"):
        assert torch.equal(held[Site(name, 1)][:, pos], clean[Site(name, 1)][:, pos])
        assert not torch.equal(held[Site(name, 1)][:, 0], clean[Site(name, 1)][:, 0])


def test_the_last_waypoint_reads_as_the_model_itself():
    for family in ("gpt2", "gemma2", "gpt_neox"):
        model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, 10)
        end = model.capture(tokens, [Site("resid_post", 1)])[Site("resid_post", 1)]
        log_p, normed = decode(model, end, None)
        torch.testing.assert_close(log_p, model.logits(tokens).log_softmax(-1), rtol=0, atol=1e-5)
        expected = model.capture(tokens, [Site("ln_final")])[Site("ln_final")]
        torch.testing.assert_close(normed, expected, rtol=0, atol=1e-5)
        found = walk(model, tokens)
        assert found.lens_agreement[:, -1].min() == 1.0
        assert found.lens_kl[:, -1].max() < 1e-5


def test_association_bias_changes_one_layer_at_a_time():
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(2, 10)
    from workbench.interventions.uniform import UniformAttention

    found = walk(model, tokens)
    for layer in range(2):
        site = Site("attn_out", layer)
        clean = model.capture(tokens, [site])[site]
        heads = tuple((layer, head) for head in range(4))
        with model.edit(UniformAttention(heads=heads)):
            uniform = model.capture(tokens, [site])[site]
        expected = ((clean - uniform).norm(dim=-1) / clean.norm(dim=-1))[:, 1:].mean(1)
        torch.testing.assert_close(found.association_bias[:, layer], expected, rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_the_model():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(3, 10)
    found = walk(model, tokens)
    logits = model.logits(tokens)
    expected = torch.stack(
        [torch.nn.functional.cross_entropy(logits[i, :-1], tokens[i, 1:]) for i in range(3)]
    )
    torch.testing.assert_close(found.loss[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert (found.loss[:, 1:] != found.loss[:, :1]).all()
