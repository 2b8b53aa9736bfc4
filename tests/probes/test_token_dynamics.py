"""The walk: hand-built models, invariances, every backend, refusals."""

import pytest
import torch

import workbench as wb
from probes.token_dynamics import TokenDynamicsConfig
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.probes.walks import BATCH_SECOND, CONFIG, everything, rows_of, same, silent_gpt2, walk
from tests.zoo import padded, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.errors import CapabilityError, DataError
from workbench.models.toy import ToyAdapter

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]


# Hand-built models


def test_blocks_that_add_multiples_of_one_vector_walk_straight():
    model, vector = silent_gpt2(), torch.linspace(-1, 2, 32)
    with torch.no_grad():
        for rank, block in enumerate(model.transformer.h):
            block.attn.c_proj.bias.copy_((rank + 1) * vector)
            block.mlp.c_proj.bias.copy_(3 * vector)
    found = walk(wb.wrap(model), random_tokens(2, 10))
    torch.testing.assert_close(found.straightness_by_view[0], torch.ones(2, 10), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.turning_cosine, torch.ones(2, 10, 3), rtol=0, atol=1e-5)
    length = torch.tensor([1.0, 3, 2, 3]) * vector.norm()
    torch.testing.assert_close(found.step_norm, length.expand(2, 10, 4), rtol=1e-5, atol=1e-5)
    assert found.metrics()["aggregate_share"] == pytest.approx(3 / 9, abs=1e-5)
    # What is written does not depend on attention: no bias, all of it redundant.
    assert found.association_bias.abs().max() < 1e-6
    assert found.metrics()["redundancy"] == 1.0
    assert found.attribution_share.abs().max() == 0.0
    torch.testing.assert_close(found.attribution_rest, torch.ones(2, 1, 2))


def test_a_model_that_writes_nothing_does_not_walk():
    model, tokens = wb.wrap(silent_gpt2()), random_tokens(2, 10)
    found = walk(model, tokens)
    metrics = found.metrics()
    assert found.step_norm.abs().max() == 0.0
    assert metrics["redundancy"] == 1.0
    assert metrics["association_bias"] == 0.0
    assert metrics["straightness"] == 1.0
    assert metrics["aggregate_share"] == 0.0
    assert (found.arrival == 0).all()
    # Logits depend on the last token (and its position) alone.
    other = tokens.clone()
    other[:, :-1] = random_tokens(2, 9, seed=5)
    assert torch.equal(model.logits(tokens)[:, -1], model.logits(other)[:, -1])


def test_a_head_without_queries_attends_uniformly():
    model = tiny_model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :32] = 0.0
            block.attn.c_attn.bias[:32] = 0.0
    found = walk(wb.wrap(model), random_tokens(2, 10))
    assert found.association_bias.abs().max() < 1e-6
    assert found.entropy_gap.abs().max() < 1e-6
    assert found.metrics()["redundancy"] == pytest.approx(1.0, abs=1e-5)
    assert found.agreement_uniform.min() == 1.0


def test_one_layer_away_from_uniform_is_the_one_that_is_found():
    model = tiny_model("gpt2")
    with torch.no_grad():
        attn = model.transformer.h[0].attn.c_attn
        attn.weight[:, :32] = 0.0
        attn.bias[:32] = 0.0
    found = walk(wb.wrap(model), random_tokens(2, 10))
    assert found.association_bias[:, 0].max() < 1e-6
    assert found.association_bias[:, 1].min() > 0.05


# Invariances


@pytest.mark.parametrize("order", [(3, 1, 0, 2), (1, 0, 3, 2)])
def test_order_and_batches_of_prompts_do_not_matter(order):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(4, 10)
    whole = walk(model, tokens, CONFIG)
    shuffled_result = walk(model, tokens[list(order)], CONFIG, batch_size=3)
    same(rows_of(shuffled_result, slice(None)), rows_of(whole, list(order)))
    assert shuffled_result.metrics() == pytest.approx(whole.metrics(), rel=1e-3, abs=1e-5)


def test_padded_prompts_walk_as_alone():
    tokens, mask = padded(random_tokens(2, 10), [10, 7], "right")
    model = wb.wrap(tiny_model("gpt2"))
    together = walk(model, tokens, CONFIG, attention_mask=mask)
    alone = walk(model, tokens[1:, :7], CONFIG)
    expected = rows_of(alone, [0])
    for name, value in rows_of(together, [1]).items():
        if name in ("straightness_by_view",):
            value = value[..., :7]
        elif name.startswith("attribution_") and name != "attribution_rest":
            assert (value[..., 7:] == 0).all()
            value = value[..., :7]
        elif value.dim() >= 2 and value.shape[1] == 10 and name not in BATCH_SECOND:
            assert value[:, 7:].isnan().all(), name
            value = value[:, :7]
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=2e-5, equal_nan=True, msg=name
        )


def test_a_rotated_residual_basis_walks_the_same_way():
    # RMS norms without gain commute with rotations, so lengths and angles must stay.
    def make(rotation):
        model = tiny_model("llama")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.fill_(1.0)
                elif any(part in name for part in ("o_proj", "down_proj")):
                    weight.copy_(rotation @ weight)
                else:  # reads from the stream, or embeds and unembeds
                    weight.copy_(weight @ rotation.T)
        return wb.wrap(model)

    tokens = random_tokens(2, 10)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q
    same(everything(walk(make(rotation), tokens)), everything(walk(make(torch.eye(32)), tokens)))


def test_a_killed_run_goes_on_with_the_batches_that_are_missing():
    kept = {}

    def keep(name, compute):
        kept.setdefault(name, compute())
        return kept[name]

    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(4, 8)
    walk(model, tokens[:2], CONFIG, batch_size=1, keep=keep)
    assert len(kept) == 2
    assert all(tensor.numel() < 1000 for part in kept.values() for tensor in part.values())
    before = dict(kept)
    found = walk(model, tokens, CONFIG, batch_size=1, keep=keep)
    assert len(kept) == 4
    assert all(kept[name] is before[name] for name in before)
    same(rows_of(found, slice(None)), rows_of(walk(model, tokens, CONFIG), slice(None)))


# Every backend


def toy():
    config = ToyModelConfig(d_vocab=101, n_layers=2, n_heads=2, d_model=16, n_ctx=32)
    return ToyAdapter(make_model(config, 0))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
def test_the_other_backends_find_the_same(family, backend):
    tokens = random_tokens(2, 9)
    if backend == "nnsight":
        model = through_nnsight(tiny_model(family, attn_implementation="eager"))
    else:
        model = through_bridge(tiny_model(family))
    found = everything(walk(model, tokens, TokenDynamicsConfig(new_tokens=2)))
    expected = everything(
        walk(wb.wrap(tiny_model(family)), tokens, TokenDynamicsConfig(new_tokens=2))
    )
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
        )


def test_toy_models_walk_too():
    found = walk(toy(), random_tokens(2, 9), TokenDynamicsConfig(new_tokens=2))
    assert found.telescoping_error.max() < 1e-5
    assert found.step_norm.shape == (2, 9, 4)
    assert found.proximity.shape == (2, 2)


# Refusals


def test_a_mamba_does_not_walk():
    with pytest.raises(CapabilityError, match=r"mode=walk needs attention.*set mode=state-space"):
        walk(wb.wrap(tiny_model("mamba")), random_tokens(1, 8))


def test_the_walk_needs_prompts():
    with pytest.raises(DataError, match="mode=walk needs prompts; none were given"):
        walk(wb.wrap(tiny_model("gpt2")), torch.zeros(0, 0, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings_", "n_pos", "words"),
    [
        ({"new_tokens": 0}, 1, "at least 2 tokens.*prompt 0 has 1"),
        ({"new_tokens": 0, "queries": (7,)}, 6, "at least 8 tokens"),
        ({"new_tokens": 0, "queries": (-7,)}, 6, "at least 7 tokens"),
        ({"new_tokens": 60}, 10, r"n_ctx = 64.*got 10 \+ 60"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(settings_, n_pos, words):
    with pytest.raises(DataError, match=words):
        walk(wb.wrap(tiny_model("gpt2")), random_tokens(2, n_pos), TokenDynamicsConfig(**settings_))
