"""The walk: hand-worked paths, hand-built models, and plain transformers as the second opinion."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from probes.token_dynamics import TokenDynamicsConfig, measure_token_dynamics
from probes.token_dynamics_concepts import concept_vector, parameterless_attention
from probes.token_dynamics_decoding import context_path, correlation, proximity
from probes.token_dynamics_lens import arrival, decode, kl_divergence
from probes.token_dynamics_walk import (
    attribution,
    by_source,
    centred,
    frozen_norm,
    mean_over,
    pair_cosine,
    path_numbers,
    shuffled,
    straightness,
    turning,
    waypoints,
)
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.zoo import padded, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.models.base import Site
from workbench.models.toy import ToyAdapter

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

QUIET = TokenDynamicsConfig(new_tokens=0)


def walk(model, tokens, config=QUIET, **context):
    return measure_token_dynamics(model, tokens, config, Context(**context))


# Mathematics, by hand


def test_a_square_walked_on_three_sides():
    # (0,0) -> (1,0) -> (1,1) -> (0,1): length 3, displacement 1, two right angles.
    path = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])[:, None, None]
    numbers = path_numbers(path)
    assert straightness(path).item() == pytest.approx(1 / 3)
    assert numbers["step_norm"][0, 0].tolist() == [1, 1, 1]
    assert numbers["turning_cosine"][0, 0].tolist() == [0, 0]
    half = math.sqrt(0.5)
    expected = torch.tensor([0.0, 0, half, 1])  # the origin has no direction
    torch.testing.assert_close(numbers["waypoint_cosine"][0, 0], expected)
    torch.testing.assert_close(numbers["radial_cosine"][0, 0], torch.tensor([0.0, 0, -half]))


def test_waypoints_add_attention_before_the_mlp():
    entry, a, m = (torch.full((1, 1, 2), x) for x in (1.0, 10.0, 100.0))
    path = waypoints(entry, [a, 2 * a], [m, 2 * m])
    assert path[:, 0, 0, 0].tolist() == [1, 11, 111, 131, 331]


@given(n_steps=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_straightness_is_a_share_that_rotations_and_lengths_leave_alone(n_steps, seed):
    generator = torch.Generator().manual_seed(seed)
    path = torch.randn(n_steps + 1, 2, 3, 5, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    found = straightness(path)
    assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(straightness(7 * path @ rotation), found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turning(path @ rotation), turning(path), rtol=1e-4, atol=1e-5)


def test_a_path_of_length_zero_is_straight():
    assert straightness(torch.ones(4, 1, 1, 3)).item() == 1.0


def test_shuffled_steps_keep_ends_and_length_but_not_the_turns():
    path = torch.tensor([[0.0, 0], [1, 0], [2, 0], [2, 1], [2, 2]])[:, None, None]
    mixed = shuffled(path, torch.tensor([0, 2, 1, 3]))
    torch.testing.assert_close(mixed[-1], path[-1])
    torch.testing.assert_close(straightness(mixed), straightness(path))
    assert turning(path)[0, 0].tolist() == [1, 0, 1]
    assert turning(mixed)[0, 0].tolist() == [0, 0, 0]


def test_centring_takes_out_what_all_tokens_share():
    shared = torch.tensor([100.0, 0.0])
    path = torch.randn(3, 1, 4, 2) + shared
    weight = torch.tensor([[0.0, 1, 1, 1]])
    moved = centred(path, weight)
    torch.testing.assert_close(moved[:, :, 1:].mean(2), torch.zeros(3, 1, 2), atol=1e-4, rtol=0)
    assert (pair_cosine(path, weight) > 0.95).all()
    # Three centred vectors: the mean cosine of pairs is negative.
    assert (pair_cosine(moved, weight) < 0).all()


def test_pair_cosine_is_the_mean_over_pairs():
    path, weight = torch.randn(2, 1, 5, 3), torch.tensor([[0.0, 1, 1, 1, 0]])
    unit = torch.nn.functional.normalize(path[:, 0, 1:4], dim=-1)
    pairs = [(unit[:, a] * unit[:, b]).sum(-1) for a, b in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(pair_cosine(path, weight)[0], torch.stack(pairs).mean(0))


def test_mean_over_leaves_positions_out():
    x = torch.tensor([[[1.0], [2], [6]]])
    assert mean_over(x, torch.tensor([[0.0, 1, 1]])).item() == 4.0


@pytest.mark.parametrize(
    ("first", "expected"),
    [((0, 1, 0, 1, 1), 3), ((1, 1, 1, 1, 1), 0), ((1, 1, 1, 0, 1), 4), ((0, 0, 0, 0, 0), 4)],
)
def test_arrival_is_where_the_final_token_stays_first(first, expected):
    assert arrival(torch.tensor(first).bool()[None, None]).item() == expected


def test_kl_by_hand():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(p, p).item() == 0.0


def test_sources_by_hand():
    # Two heads, values 1 and 2 for tokens 0 and 1, W_O = 1 and 10 times a basis vector.
    rows = torch.tensor([[[[0.25, 0.75]], [[0.5, 0.5]]]])
    value = torch.tensor([[[[1.0], [1.0]], [[2.0], [2.0]]]])
    w_o = torch.tensor([[[1.0, 0.0]], [[0.0, 10.0]]])
    written = by_source(rows, value, w_o)
    torch.testing.assert_close(written, torch.tensor([[[[0.25, 5.0], [1.5, 10.0]]]]))
    numbers = attribution(written, written.sum(2) + torch.tensor([0.0, 1.0]))
    shares = numbers["share"].sum() + numbers["rest"].sum()
    assert shares.item() == pytest.approx(1.0)
    assert numbers["rest"].item() == pytest.approx(16 / (1.75**2 + 16**2))


def test_a_frozen_norm_is_linear():
    written = torch.randn(1, 1, 3, 4)
    whole, gain = written.sum(2), torch.rand(4) + 0.5
    normed = gain * whole / whole.square().mean(-1, keepdim=True).sqrt()
    passed = frozen_norm(written, normed)
    torch.testing.assert_close(passed.sum(2), normed)
    scale = gain / whole.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(passed, written * scale[:, :, None])


def test_w1mean_weights_grow_with_position():
    h = torch.randn(1, 3, 4)
    expected = (h[:, 0] + 2 * h[:, 1] + 3 * h[:, 2]) / 6
    torch.testing.assert_close(concept_vector(h), expected)
    torch.testing.assert_close(concept_vector(h, how="mean"), h.mean(1))
    torch.testing.assert_close(concept_vector(h, how="last"), h[:, 2])
    with pytest.raises(ConfigError, match="w1mean"):
        concept_vector(h, how="median")


@pytest.mark.parametrize("how", ["mean", "last", "w1mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_concepts_ignore_padding(how, side):
    h = torch.randn(1, 3, 4)
    junk = torch.full((1, 2, 4), 1e6)
    whole, mask = (torch.cat([h, junk], 1), [1, 1, 1, 0, 0])
    if side == "left":
        whole, mask = torch.cat([junk, h], 1), [0, 0, 1, 1, 1]
    found = concept_vector(whole, torch.tensor([mask]), how)
    torch.testing.assert_close(found, concept_vector(h, how=how))


def test_parameterless_attention_averages_the_prefix():
    x = torch.randn(2, 1, 4)
    torch.testing.assert_close(parameterless_attention(x, 3), x)  # one token: itself
    long = 0.1 * torch.randn(1, 300, 4, dtype=torch.float64)
    scores = (long @ long.transpose(1, 2)).masked_fill(
        torch.ones(300, 300).triu(1).bool(), -torch.inf
    )
    torch.testing.assert_close(parameterless_attention(long), scores.softmax(-1) @ long)
    ones = torch.ones(1, 300, 4)
    torch.testing.assert_close(parameterless_attention(ones), ones)  # rows sum to 1


def test_proximity_and_the_path_of_context_vectors_by_hand():
    x, y = torch.tensor([[1.0, 2, 3]]), torch.tensor([[2.0, 4, 7]])
    assert correlation(x, y).item() == pytest.approx(5 / math.sqrt(2 * 38 / 3), rel=1e-5)
    vectors = torch.tensor([[1.0, 0], [1, 1]])
    log_p = torch.tensor([[0.8, 0.1, 0.1], [0.4, 0.5, 0.1]]).log()
    unembedding = torch.tensor([[2.0, 0, -1], [0, 1, 0]])
    half = math.sqrt(0.5)
    expected = correlation(torch.tensor([[1.0, 0, -1], [half, half, -half]]), log_p)
    torch.testing.assert_close(proximity(vectors, log_p, unembedding), expected)
    # A straight line with steps 1 and 2, then a right angle of length 4.
    path = torch.tensor([[0.0, 0], [1, 0], [3, 0], [3, 4]])[:, None]
    found = context_path(path)
    assert found["decoding_step"].tolist() == [[1, 2, 4]]
    assert found["decoding_turning"].tolist() == [[1, 0]]
    assert found["decoding_straightness"].item() == pytest.approx(5 / 7)


# Hand-built models


def silent_gpt2(**changes):
    """A GPT-2 whose blocks write nothing."""
    model = tiny_model("gpt2", **changes)
    with torch.no_grad():
        for block in model.transformer.h:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
    return model


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


# Identities on every family


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


# Invariances


def everything(result):
    return {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}


BATCH_SECOND = ("straightness_by_view", "view_cosine", "view_turning")


def rows_of(result, rows):
    return {
        name: value[:, rows] if name in BATCH_SECOND else value[rows]
        for name, value in everything(result).items()
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=2e-5, equal_nan=True, msg=name
        )


CONFIG = TokenDynamicsConfig(new_tokens=3, queries=(-1, 4))


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


# Lenses and the decoding path


def save_lens(folder, weights, biases, kind):
    folder.mkdir()
    state = {f"{i}.weight": w.clone() for i, w in enumerate(weights)}
    state |= {f"{i}.bias": b.clone() for i, b in enumerate(biases)}
    sizes = {"num_hidden_layers": len(weights), "d_model": len(weights[0])}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    if kind == "pt":
        torch.save(state, folder / "params.pt")
    else:
        from safetensors.torch import save_file

        save_file(state, folder / "params.safetensors")


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_tuned_lens_adds_its_map(tmp_path, kind):
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(2, 10)
    generator = torch.Generator().manual_seed(0)
    weights = [0.2 * torch.randn(32, 32, generator=generator) for _ in range(2)]
    biases = [torch.randn(32, generator=generator) for _ in range(2)]
    save_lens(tmp_path / "lens", weights, biases, kind)
    config = TokenDynamicsConfig(new_tokens=0, tuned_lens=str(tmp_path / "lens"))
    found = walk(model, tokens, config)
    full = model.logits(tokens).log_softmax(-1)
    for layer in range(2):
        site = Site("resid_pre", layer)
        resid = model.capture(tokens, [site])[site]
        moved = resid + resid @ weights[layer].T + biases[layer]
        expected = kl_divergence(full, decode(model, moved, None)[0])[:, 1:].mean(1)
        torch.testing.assert_close(found.tuned_kl[:, layer], expected, rtol=1e-4, atol=1e-5)


def test_a_zero_lens_is_the_logit_lens_and_is_named_by_its_content(tmp_path):
    zero = [torch.zeros(32, 32)] * 2
    save_lens(tmp_path / "a", zero, [torch.zeros(32)] * 2, "safetensors")
    save_lens(tmp_path / "b", zero, [torch.ones(32)] * 2, "safetensors")
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(2, 10)
    config = TokenDynamicsConfig(new_tokens=0, tuned_lens=str(tmp_path / "a"))
    found = walk(model, tokens, config)
    torch.testing.assert_close(found.tuned_kl, found.lens_kl[:, :-1:2])
    assert config.tuned_lens.startswith("a@")
    assert str(tmp_path) not in config.tuned_lens
    other = TokenDynamicsConfig(tuned_lens=str(tmp_path / "b")).tuned_lens
    assert other.split("@")[1] != config.tuned_lens.split("@")[1]
    with pytest.raises(DataError, match=r"1 layers of 32 .* has 2 of 32"):
        walk(wb.wrap(tiny_model("gpt2", n_layer=1)), tokens, config)


def test_another_lens_in_the_same_folder_is_another_result(tiny_folder, tmp_path):
    # Asked for by the model's name, so that the store's memory of requests is used.
    found = []
    for rank in range(2):
        save_lens(
            tmp_path / "lens", [torch.eye(16)] * 2, [rank * torch.arange(16.0)] * 2, "safetensors"
        )
        found.append(
            wb.run(
                "token-dynamics",
                str(tiny_folder),
                random_tokens(2, 8),
                store=tmp_path / "store",
                new_tokens=0,
                tuned_lens=str(tmp_path / "lens"),
            )
        )
        for path in (tmp_path / "lens").iterdir():
            path.unlink()
        (tmp_path / "lens").rmdir()
    assert found[0].key != found[1].key
    assert not torch.equal(found[0].tuned_kl, found[1].tuned_kl)
    assert found[0].measured.config.tuned_lens == found[0].config["tuned_lens"]


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


def test_a_folder_without_a_lens_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json and params\.safetensors"):
        TokenDynamicsConfig(tuned_lens=str(tmp_path))


def test_the_decoding_path_is_that_of_a_greedy_loop():
    plain, tokens = tiny_model("gpt2"), random_tokens(2, 6)
    found = walk(wb.wrap(tiny_model("gpt2")), tokens, TokenDynamicsConfig(new_tokens=4))
    for row in range(2):
        prompt, vectors, log_p, chosen = tokens[row : row + 1], [], [], []
        for _ in range(4):
            with torch.no_grad():
                hidden = plain.transformer(prompt).last_hidden_state[0, -1]
                logits = plain.lm_head(hidden)
            vectors.append(hidden)
            log_p.append(logits.log_softmax(-1))
            chosen.append(int(logits.argmax()))
            prompt = torch.cat([prompt, torch.tensor([[chosen[-1]]])], 1)
        u = plain.lm_head.weight.detach()
        gaps = torch.stack(vectors).diff(dim=0).norm(dim=-1)
        torch.testing.assert_close(found.decoding_step[row], gaps, rtol=1e-4, atol=1e-4)
        for i, (c, log) in enumerate(zip(vectors, log_p, strict=True)):
            angle = torch.nn.functional.cosine_similarity(c[None], u, dim=-1)
            expected = torch.corrcoef(torch.stack([angle, log]))[0, 1]
            assert found.proximity[row, i].item() == pytest.approx(expected.item(), abs=1e-4)
            assert found.chosen_cosine[row, i].item() == pytest.approx(
                angle[chosen[i]].item(), abs=1e-4
            )


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
