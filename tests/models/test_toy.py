"""A toy model is a model like any other."""

import json

import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from tests.toy_tasks.test_model import build, tokens
from toy_tasks.model import BIASES, KERNELS, describe_model
from workbench.attention.edits import AttentionEdit
from workbench.errors import CapabilityError, ConfigError, DataError, ModelError
from workbench.interventions.zero_heads import ZeroHeads
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import ModelAdapter, Site
from workbench.models.validate import validate_model


@pytest.fixture
def folder(tmp_path):
    return save(build(), tmp_path / "my-toy")


def save(model, folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(describe_model(model.config)))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"positions": "rotary", "n_layers": 3},
        {"positions": "none", "bias": "value"},
        {"bias": "key-value"},
        {"bias": "sink-token"},
        {"attention": "sigmoid-normalised", "bias": "key"},
        {"attention": "relu"},
        {"attention": "elu", "d_mlp": 0},
    ],
    ids=str,
)
def test_every_proof_of_validate_holds(variant):
    model = wb.wrap(build(n_ctx=32, **variant))
    checks = {check.name: check for check in validate_model(model)}
    # Rows beside a learned key, and rows of kernels that do not normalise, sum to something else.
    odd = variant.get("bias") in ("key", "key-value", "sink-token") or "relu" in str(variant)
    odd = odd or variant.get("attention") == "elu"
    failed = {name for name, check in checks.items() if check.passed is False}
    assert failed == ({"rows-sum-to-one"} if odd else set())
    passed = {name for name, check in checks.items() if check.passed}
    assert {"stock-logits", "streaming-equals-whole", "padded-left", "heads-are-zeroed"} <= passed


def test_it_is_an_adapter_with_the_sizes_of_the_model():
    model = wb.wrap(build())
    assert isinstance(model, ModelAdapter)
    assert (model.backend, model.dtype, model.attention) == ("toy", "float32", "softmax")
    spec = model.spec
    assert (spec.n_layers, spec.n_heads, spec.d_head, spec.d_vocab, spec.n_ctx) == (2, 2, 8, 11, 12)
    assert wb.wrap(model) is model


@pytest.mark.parametrize("bias", BIASES)
def test_zerotuning_is_exact_beside_learned_keys(bias):
    """By hand on the row with the learned key's share: scale the first token, renormalise."""
    inner = build(bias=bias, n_layers=1)
    model = wb.wrap(inner)
    site = Site("pattern", 0)
    before = model.capture(tokens(), [site])[site]
    with model.edit(ZeroTuning(3.0)):
        after = model.capture(tokens(), [site])[site]
    scaled = before.clone()
    scaled[..., 0] *= 3.0
    wanted = scaled / (1.0 + 2.0 * before[..., :1])
    assert torch.allclose(after, wanted, atol=1e-6)


def test_an_edit_of_the_rows_is_refused_where_they_are_no_distributions():
    model = wb.wrap(build(attention="relu"))
    with pytest.raises(CapabilityError, match="sum to 1"), model.edit(ZeroTuning(2.0)):
        pass


def test_edits_act_in_order_and_end():
    model, ids = wb.wrap(build()), tokens()
    before = model.logits(ids)
    with model.edit(ZeroHeads(((0, 0),))), model.edit(ZeroHeads(((0, 1),))):
        z = model.capture(ids, ["L0.z"])["L0.z"]
        assert len(model.interventions) == 2
    assert z.abs().max() == 0.0
    assert torch.equal(model.logits(ids), before)


def test_left_padding_shifts_the_first_key():
    model, ids = wb.wrap(build()), tokens(n_pos=8)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], dim=1)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[:, :2] = 0
    with model.edit(ZeroTuning(4.0)):
        alone, moved = model.logits(ids), model.logits(padded, mask)[:, 2:]
    assert torch.allclose(alone, moved, atol=1e-5)


def test_weights_rebuild_the_attention():
    model, ids = wb.wrap(build()), tokens()
    found = model.capture(ids, ["L0.q", "L0.z", "L0.attn_out", "ln_final"])
    w_o = model.weight("W_O", 0)
    out = torch.einsum("bphd,hdm->bpm", found["L0.z"], w_o)
    assert torch.allclose(out, found["L0.attn_out"], atol=1e-5)
    logits = found["ln_final"] @ model.weight("W_U")
    assert torch.allclose(logits, model.logits(ids), atol=1e-5)
    x = torch.nn.functional.layer_norm(model.weight("W_E")[ids] + model.weight("W_pos")[:10], (16,))
    q = torch.einsum("bpm,hmd->bphd", x, model.weight("W_Q", 0))
    assert torch.allclose(q, found["L0.q"], atol=1e-5)


def test_generation_takes_the_most_likely_token():
    model, ids = wb.wrap(build()), tokens(n_pos=4)
    made = model.generate(ids, max_new_tokens=3)
    assert made.shape == (3, 7)
    assert torch.equal(made[:, 4], model.logits(ids)[:, -1].argmax(dim=-1))
    with pytest.raises(ConfigError, match="top_k"):
        model.generate(ids, max_new_tokens=3, top_k=2)
    with pytest.raises(DataError, match="n_ctx"):
        model.generate(ids, max_new_tokens=30)


@pytest.mark.parametrize("attention", KERNELS)
def test_the_sink_probe_runs_on_every_kernel(attention):
    found = wb.run("attention-sinks", wb.wrap(build(attention=attention)), tokens(n_pos=12))
    assert found.score.shape == (3, 2, 2, 12)


def test_a_folder_loads_by_its_toy_name(folder):
    model = wb.load(f"toy:{folder}")
    assert model.backend == "toy"
    assert model.spec.name == "my-toy"
    assert len(model.spec.revision) == 64
    assert torch.equal(model.logits(tokens()), wb.wrap(build()).logits(tokens()))
    half = wb.load(f"toy:{folder}", dtype="bfloat16")
    assert half.dtype == "bfloat16"
    assert torch.allclose(half.logits(tokens()), model.logits(tokens()), atol=0.2)


def test_another_backend_is_refused(folder):
    with pytest.raises(ModelError, match="backend"):
        wb.load(f"toy:{folder}", backend="nnsight")


def test_unfinished_and_damaged_toys_are_refused(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(ModelError, match="whole"):
        wb.load(f"toy:{folder}")
    weights.unlink()
    with pytest.raises(ModelError, match="go on training"):
        wb.load(f"toy:{folder}")
    state = {name: weight.clone() for name, weight in build().state_dict().items()}
    state["embed.weight"][0, 0] = torch.nan
    save_file(state, weights)
    with pytest.raises(ModelError, match=r"embed\.weight"):
        wb.load(f"toy:{folder}")


def test_a_run_that_is_no_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "state-space"}')
    with pytest.raises(ModelError, match="is a run of state-space") as caught:
        wb.load(f"toy:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_what_a_toy_lacks_is_said():
    model = wb.wrap(build(d_mlp=0, positions="none"))
    with pytest.raises(CapabilityError, match="needs an MLP"):
        model.capture(tokens(), ["L0.mlp_out"])
    with pytest.raises(CapabilityError, match="W_pos"):
        model.weight("W_pos")
    with pytest.raises(ConfigError, match="below 2"):
        model.capture(tokens(), ["L2.z"])


def test_an_edit_sees_the_learned_key_too():
    seen = []

    class Look:
        name = "look"

        def plan(self, spec):
            def pattern(pattern, first_key):
                seen.append((tuple(pattern.shape), first_key.tolist()))
                return pattern

            return [AttentionEdit(0, lambda call, z: z, pattern)]

    model = wb.wrap(build(bias="key"))
    with model.edit(Look()):
        model.logits(tokens())
    assert seen == [((3, 2, 10, 11), [1, 1, 1])]
