"""Kernels and biases against their definitions, and the forward pass against a plain one."""

import pytest
import torch
from torch.nn.functional import elu, layer_norm

from toy_tasks.model import (
    BIASES,
    KERNELS,
    NORMALISED,
    WHOLE_PATTERN,
    ToyModelConfig,
    describe_model,
    make_model,
    model_from,
)
from workbench.errors import ConfigError
from workbench.models.base import Site

SMALL = {"d_vocab": 11, "n_ctx": 12, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_mlp": 24}


def build(seed=0, **changes):
    model = make_model(ToyModelConfig(**{**SMALL, **changes}), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        if name.endswith("_bias"):  # learned keys and values begin at 0
            weight.data = torch.randn(weight.shape, generator=generator)
    return model


def tokens(seed=0, batch=3, n_pos=10):
    return torch.randint(0, 11, (batch, n_pos), generator=torch.Generator().manual_seed(seed))


def seen_by(model, ids, **options):
    seen = {}

    def tap(site, x):
        seen[site] = x
        return x

    logits = model(ids, tap=tap, **options).logits
    return logits, seen


def test_kernels_by_hand():
    scores = torch.tensor([[[[2.0, -1.0, -torch.inf]]]])
    weights = {name: kernel(scores)[0, 0, 0, :2].tolist() for name, kernel in KERNELS.items()}
    assert weights["relu"] == [1.0, 0.0]
    assert weights["softmax"] == pytest.approx([0.95257, 0.04743], abs=1e-5)
    assert weights["sigmoid"] == pytest.approx([0.88080, 0.26894], abs=1e-5)
    assert weights["sigmoid-normalised"] == pytest.approx([0.76608, 0.23392], abs=1e-5)
    assert weights["elu"] == pytest.approx([3.0, 0.36788], abs=1e-5)
    assert weights["elu-normalised"] == pytest.approx([0.89077, 0.10923], abs=1e-5)
    assert weights["elu-kernel"] == [2.0, -1.0]  # features made them positive before
    assert weights["elu-kernel-normalised"] == pytest.approx([2.0, -1.0])
    assert KERNELS["softmax-scale"](scores, 0.5).sum().item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", KERNELS)
def test_hidden_keys_get_nothing_and_empty_rows_are_zero(name):
    scores = torch.tensor([[[[1.0, -torch.inf], [-torch.inf, -torch.inf]]]])
    weights = KERNELS[name](scores)
    assert weights[..., 1].abs().max() == 0.0
    assert weights[0, 0, 1].abs().max() == 0.0


def test_a_plain_forward_pass_gives_the_same_logits():
    model, ids = build(n_layers=1, n_heads=1, seed=2), tokens()
    block = model.blocks[0]
    h = model.embed(ids) + model.position.weight[: ids.shape[1]]
    x = layer_norm(h, (16,))
    q, k, v = (x @ block.attention.get_submodule(w).weight.T for w in ("W_Q", "W_K", "W_V"))
    mask = torch.ones(10, 10).tril() == 0
    pattern = (q @ k.transpose(1, 2) / 4.0).masked_fill(mask, -torch.inf).softmax(dim=-1)
    h = h + pattern @ v @ block.attention.W_O.weight.T
    h = h + (layer_norm(h, (16,)) @ block.mlp[0].weight.T).relu() @ block.mlp[2].weight.T
    wanted = layer_norm(h, (16,)) @ model.unembed.weight.T
    assert torch.allclose(model(ids).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("attention", KERNELS)
def test_no_variant_sees_the_future(attention, bias):
    model, ids = build(attention=attention, bias=bias, positions="rotary"), tokens()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    first, second = model(ids).logits, model(changed).logits
    assert torch.allclose(first[:, :6], second[:, :6], atol=1e-6)
    assert not torch.allclose(first[:, 6:], second[:, 6:], atol=1e-3)


def test_a_key_bias_is_softmax_times_a_gate():
    model, ids = build(bias="key", n_layers=1), tokens()
    _, seen = seen_by(model, ids)
    scores = seen[Site("attn_scores", 0)]
    gate = torch.sigmoid(
        scores.logsumexp(dim=-1)
        - torch.einsum("bqhd,hd->bhq", seen[Site("q", 0)], model.blocks[0].attention.k_bias)
        / 8**0.5
    )
    wanted = scores.softmax(dim=-1) * gate[..., None]
    assert torch.allclose(seen[Site("pattern", 0)], wanted, atol=1e-6)


def test_a_key_value_bias_adds_its_value_by_the_rest_of_the_row():
    model, ids = build(bias="key-value", n_layers=1), tokens()
    _, seen = seen_by(model, ids)
    pattern = seen[Site("pattern", 0)]
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, seen[Site("v", 0)])
    left = (1 - pattern.sum(dim=-1)).transpose(1, 2)[..., None]
    wanted = mixed + left * model.blocks[0].attention.v_bias
    assert torch.allclose(seen[Site("z", 0)], wanted, atol=1e-6)


def test_a_value_bias_is_added_to_the_mix():
    model, ids = build(bias="value", n_layers=1), tokens()
    _, seen = seen_by(model, ids)
    mixed = torch.einsum("bhqk,bkhd->bqhd", seen[Site("pattern", 0)], seen[Site("v", 0)])
    assert torch.allclose(seen[Site("z", 0)], mixed + model.blocks[0].attention.v_bias, atol=1e-6)


@pytest.mark.parametrize("bias", BIASES)
def test_sites_have_the_shapes_of_the_tokens_alone(bias):
    model, ids = build(bias=bias), tokens()
    logits, seen = seen_by(model, ids)
    assert logits.shape == (3, 10, 11)
    extra = {"key": (10, 11), "key-value": (10, 11), "sink-token": (11, 11)}.get(bias, (10, 10))
    for site, x in seen.items():
        if site.name == WHOLE_PATTERN:
            assert x.shape[2:] == extra
        elif site.name in ("pattern", "attn_scores"):
            assert x.shape == (3, 2, 10, 10)
        else:
            assert x.shape[:2] == (3, 10), site


@pytest.mark.parametrize("bias", BIASES)
def test_what_a_tap_returns_is_used(bias):
    model, ids = build(bias=bias), tokens()
    for name in ("z", "attn_out", "mlp_out", "resid_pre", "pattern", "v"):
        site = Site(name, 1)
        changed = model(ids, tap=lambda at, x, site=site: 2 * x if at == site else x).logits
        assert not torch.allclose(changed, model(ids).logits, atol=1e-4), name


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("bias", BIASES)
def test_softmax_at_once_is_softmax_by_its_definition(bias, positions):
    """What nobody watches is computed in one kernel: values and gradients, padding and all."""
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = 0
    for given in (None, mask):
        model = build(bias=bias, positions=positions)
        told = {"attention_mask": given}
        found = model(tokens(), **told).logits
        wanted, seen = seen_by(model, tokens(), **told)
        assert Site("pattern", 0) in seen
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        weights = list(model.parameters())
        target = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
        found_grads = torch.autograd.grad((found * target).sum(), weights)
        wanted_grads = torch.autograd.grad((wanted * target).sum(), weights)
        for one, other in zip(found_grads, wanted_grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_scaled_softmax_is_the_same_as_scaled_output_weights():
    scaled = build(attention="softmax-scale", row_sum=0.5, n_layers=1)
    plain = build(n_layers=1)
    plain.blocks[0].attention.W_O.weight.data *= 0.5
    assert torch.allclose(scaled(tokens()).logits, plain(tokens()).logits, atol=1e-5)


@pytest.mark.parametrize("attention", ["elu-kernel", "elu-kernel-normalised"])
def test_an_elu_kernel_is_linear_attention(attention):
    """No pattern is needed: running sums of keys and values do."""
    _, seen = seen_by(build(attention=attention, n_layers=1), tokens())
    q, k, v = (seen[Site(name, 0)] for name in ("q", "k", "v"))
    q, k = elu(q) + 1, elu(k) + 1
    state = torch.einsum("bqhd,bqhe->bqhde", k, v).cumsum(dim=1)
    wanted = torch.einsum("bqhd,bqhde->bqhe", q, state) / 8**0.5
    if attention.endswith("normalised"):
        wanted = wanted / ((q * k.cumsum(dim=1)).sum(dim=-1, keepdim=True) / 8**0.5)
    assert torch.allclose(seen[Site("z", 0)], wanted, atol=1e-5)


def test_rotary_positions_depend_on_distances_only():
    model, ids = build(positions="rotary"), tokens()
    positions = torch.arange(10).expand(3, 10)
    moved = model(ids, position_ids=positions + 5).logits
    assert torch.allclose(model(ids).logits, moved, atol=1e-4)
    assert not torch.allclose(model(ids).logits, model(ids, position_ids=2 * positions).logits)


def test_without_positions_a_repeated_token_is_attended_evenly():
    _, seen = seen_by(build(positions="none"), torch.full((1, 8), 3))
    even = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    assert torch.allclose(seen[Site("pattern", 1)][0, 0], even, atol=1e-6)


def test_post_norm_streams_are_normalised():
    _, seen = seen_by(build(norm="post"), tokens())
    for layer in (0, 1):
        stream = seen[Site("resid_post", layer)]
        assert stream.mean(dim=-1).abs().max() < 1e-5
        assert torch.allclose(stream.var(dim=-1, unbiased=False), torch.ones(3, 10), atol=1e-3)


def test_a_model_without_mlp_has_none():
    model = build(d_mlp=0)
    _, seen = seen_by(model, tokens())
    assert Site("mlp_out", 0) not in seen
    assert not any("mlp" in name for name, _ in model.named_parameters())


def test_normalised_kernels_are_those_whose_rows_sum_to_one():
    scores = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sums = {name: kernel(scores).sum(dim=-1) for name, kernel in KERNELS.items()}
    ones = {name for name, total in sums.items() if torch.allclose(total, torch.ones(2, 2, 4))}
    assert ones == NORMALISED | {"softmax-scale"}  # whose row_sum is 1 by default


def test_weights_come_from_the_seed_and_nothing_else_moves():
    state = torch.random.get_rng_state()
    first, second, third = make_model(ToyModelConfig(**SMALL), 1), build(1), build(2)
    assert torch.equal(first.embed.weight, second.embed.weight)
    assert not torch.equal(first.embed.weight, third.embed.weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_description_makes_the_same_kind_of_model():
    model = build(attention="relu", bias="key", norm="post", positions="none")
    again = model_from(describe_model(model.config))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_heads": 3},
        {"attention": "linear"},
        {"n_heads": 16, "positions": "rotary"},
        {"bias": "yes"},
        {"norm": "rms"},
    ],
)
def test_impossible_models_are_refused(wrong):
    with pytest.raises(ConfigError):
        ToyModelConfig(**{**SMALL, **wrong})


def test_elu_is_torchs():
    scores = torch.linspace(-3, 3, 7)[None, None, None]
    assert torch.equal(KERNELS["elu"](scores), elu(scores) + 1)
