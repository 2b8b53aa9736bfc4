"""Route graphs: the formula by hand, against plain loops, and on planted edges."""

import pytest
import torch

import workbench as wb
from probes.information_flow_routes import (
    MLP,
    RESIDUAL,
    attention_importance,
    prompt_routes,
    proximity,
    read_blocks,
)
from tests.encoders import tiny_encoder
from tests.probes.planted_flow import copying_toy, rows_of
from tests.zoo import random_tokens, tiny_model
from workbench.errors import CapabilityError


def test_proximity_by_hand():
    whole = torch.tensor([3.0, -1.0])
    parts = torch.tensor([[3.0, -1.0], [3.0, 0.0], [0.0, 0.0], [-1.0, 1.0], [6.0, -2.0]])
    # |y| = 4; what is left of it after each part: 0, 1, 4, 6, 4.
    assert proximity(parts, whole).tolist() == [4.0, 3.0, 0.0, 0.0, 0.0]


def test_importance_by_hand_sums_to_one():
    # y = x + 0.5 w1 + 0.5 w2 with x = (1, 0), w1 = (0, 2), w2 = (2, 0): y = (2, 1).
    written = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]])
    edges, stream = attention_importance(
        torch.tensor([[0.5, 0.5]]), written, torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])
    )
    # Each part takes 1 of the 3: the three are equally important.
    torch.testing.assert_close(edges, torch.full((1, 2), 1 / 3))
    assert stream.item() == pytest.approx(1 / 3)


def keeping(kept, layer, read):
    def hook(module, args, out):
        kept[layer] = read(args, out)

    return hook


def eager_pass(family, tokens):
    """What transformers' eager pass on one prompt shows to hooks, a dict by layer each; and W_O."""
    model = tiny_model(family, attn_implementation="eager")
    pre, post, value, added, w_o = {}, {}, {}, {}, {}
    for layer, block in enumerate(model.model.layers if family == "llama" else model.transformer.h):
        attn = block.self_attn if family == "llama" else block.attn
        whole = lambda args, out: (out[0] if isinstance(out, tuple) else out)[0]  # noqa: E731
        block.register_forward_hook(keeping(pre, layer, lambda args, out: args[0][0]))
        block.register_forward_hook(keeping(post, layer, whole))
        attn.register_forward_hook(keeping(added, layer, lambda args, out: out[0][0]))
        if family == "llama":
            attn.v_proj.register_forward_hook(keeping(value, layer, lambda args, out: out[0]))
            w_o[layer] = attn.o_proj.weight.T
        else:
            last = lambda args, out: out[0][:, 64:]  # noqa: E731
            attn.c_attn.register_forward_hook(keeping(value, layer, last))
            w_o[layer] = attn.c_proj.weight
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    return attentions, pre, post, value, added, w_o


def near(part, whole):
    """The formula in one line, on one vector each."""
    return max((whole.abs().sum() - (whole - part).abs().sum()).item(), 0.0)


def by_loops(family, tokens, roots, threshold):
    """The same graph from transformers' eager pass, with nothing but loops."""
    attentions, pre, post, value, added, w_o = eager_pass(family, tokens)
    active, found = set(roots), {}
    for layer in (1, 0):
        following = set()
        for i in active:
            mid, out = pre[layer][i] + added[layer][i], post[layer][i]
            stream, mlp = near(mid, out), near(out - mid, out)
            total = stream + mlp
            if mlp / total >= threshold:
                found[layer, MLP, i, i] = mlp / total
            if max(mlp, stream) / total < threshold:
                continue
            parts = {(RESIDUAL, i): near(pre[layer][i], mid)}
            for head in range(4):
                group = head // 2 if family == "llama" else head
                for j in range(i + 1):
                    v = value[layer][j][group * 8 : group * 8 + 8]
                    write = v @ w_o[layer][head * 8 : head * 8 + 8]
                    parts[head, j] = near(attentions[layer][0, head, i, j] * write, mid)
            total = sum(parts.values())
            for (head, j), part in parts.items():
                if part / total >= threshold:
                    found[layer, head, j, i] = part / total
                    following.add(j)
        active = following
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_graph_equals_one_made_of_loops(family):
    tokens = random_tokens(1, 9)
    model = wb.wrap(tiny_model(family))
    roots = torch.zeros(9, dtype=torch.bool)
    roots[[4, 8]] = True
    graph, share = prompt_routes(model, read_blocks(model, tokens, None), 0, roots, 0.04)
    found = {tuple(edge): part for edge, part in zip(graph.tolist(), share.tolist(), strict=True)}
    expected = by_loops(family, tokens, [4, 8], 0.04)
    assert len(found) > 10
    assert set(found) == set(expected)
    for edge, part in expected.items():
        assert found[edge] == pytest.approx(part, abs=2e-4), edge


def test_a_planted_edge_is_the_route():
    # In block 1 position 3 copies position 1; the item at position 3 is the only root.
    model = copying_toy({3: 1}, gain=1.0)
    rows = rows_of(([1, 5, 2, 6, 3], [[6]]))
    result = wb.run("information-flow", model, rows, routes=True, route_threshold=0.1)
    edges = {tuple(edge) for edge in result.route_edges.tolist()}
    assert (0, 1, 0, 1, 3) in edges
    assert (0, 1, RESIDUAL, 3, 3) in edges
    # Below, every position reads itself: nothing leads to a third one.
    assert {edge[3] for edge in edges} == {1, 3}
    assert not any(edge[2] == MLP for edge in edges)


def test_a_higher_threshold_gives_a_part_of_the_graph():
    model = wb.wrap(tiny_model("llama"))
    tokens, roots = random_tokens(1, 8), torch.ones(8, dtype=torch.bool)
    read = read_blocks(model, tokens, None)
    sets = []
    for threshold in (0.02, 0.1, 0.3):
        graph, share = prompt_routes(model, read, 0, roots, threshold)
        assert bool((share >= threshold).all())
        sets.append({tuple(edge) for edge in graph.tolist()})
    assert sets[2] < sets[1] < sets[0]


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_encoders_have_routes_too(kind):
    model = wb.wrap(tiny_encoder(kind))
    tokens = torch.randint(3, 80, (1, 6), generator=torch.Generator().manual_seed(0))
    roots = torch.zeros(6, dtype=torch.bool)
    roots[2] = True
    graph, _ = prompt_routes(model, read_blocks(model, tokens, None), 0, roots, 0.01)
    ahead = bool((graph[:, 2] > graph[:, 3]).any())
    assert ahead == (kind == "t5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_after_attention_is_refused(dtype):
    model = wb.wrap(tiny_model("olmo2").to(dtype))
    with pytest.raises(CapabilityError, match="routes=false"):
        prompt_routes(
            model, read_blocks(model, random_tokens(1), None), 0, torch.ones(12).bool(), 0.1
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_half_precision_has_the_routes_of_the_same_weights_in_float32(family, dtype):
    tokens, roots = random_tokens(1, 9), torch.ones(9, dtype=torch.bool)
    half = tiny_model(family).to(dtype)
    rounded = tiny_model(family)
    rounded.load_state_dict({name: x.float() for name, x in half.state_dict().items()})

    def edges(module, threshold):
        model = wb.wrap(module)
        graph, _ = prompt_routes(model, read_blocks(model, tokens, None), 0, roots, threshold)
        return set(map(tuple, graph.tolist()))

    found = edges(half, 0.1)
    assert len(found) > 20
    # What is far from the threshold does not depend on rounding.
    assert edges(rounded, 0.15) <= found <= edges(rounded, 0.07)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_what_attention_adds_is_proved_at_every_size_of_the_stream(size):
    tokens, roots = random_tokens(1, 9), torch.ones(9, dtype=torch.bool)
    model = wb.wrap(tiny_model("llama"))
    read = {
        site: x if site.name == "pattern" else size * x
        for site, x in read_blocks(model, tokens, None).items()
    }
    graph, _ = prompt_routes(model, read, 0, roots, 0.1)
    assert len(graph) > 0
    # What an MLP or the heads wrote is no longer what was added.
    for name in ("mlp_out", "v"):
        other = {site: 1.1 * x if site.name == name else x for site, x in read.items()}
        with pytest.raises(CapabilityError, match="routes=false"):
            prompt_routes(model, other, 0, roots, 0.1)
