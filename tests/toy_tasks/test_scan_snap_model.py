"""A trained scan-snap is a model like any other: it loads, is read, edited and probed."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import workbench as wb
from toy_tasks.scan_snap import ScanSnapConfig, train_scan_snap
from toy_tasks.scan_snap_data import SYN_MEDIUM, class_law, draw_batch, draw_sequences
from toy_tasks.scan_snap_dynamics import Weights, attention, forward
from toy_tasks.scan_snap_model import model_from
from workbench.errors import CapabilityError, ModelError
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import Site
from workbench.models.validate import validate_model

CONFIG = replace(SYN_MEDIUM, n_queries=3, lr_z=3.0, n_pos=48, steps=60)
PATTERN = Site("pattern", 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan-snap")
    return folder, train_scan_snap(CONFIG, folder)


@pytest.fixture(scope="module")
def model(run):
    return wb.load(f"toy:{run[0]}")


@pytest.fixture(scope="module")
def sequences():
    return draw_sequences(
        class_law(CONFIG), (200, CONFIG.n_pos - 1), torch.Generator().manual_seed(1)
    )


def counted(tokens):
    return torch.nn.functional.one_hot(tokens, CONFIG.n_tokens).sum(dim=1).double()


def test_sequences_end_with_their_query_and_follow_their_class(sequences):
    tokens, target = sequences
    law = class_law(CONFIG)
    row = target - law.next_token[0]
    assert torch.equal(tokens[:, -1], CONFIG.n_context + law.query[row])
    assert (law.prob[row[:, None], tokens[:, :-1]] > 0).all()
    counts = draw_batch(law, (200, CONFIG.n_pos - 1), [torch.Generator().manual_seed(1)]).counts[0]
    assert torch.equal(counted(tokens[:, :-1]), counts)


def test_logits_at_the_query_are_those_of_training(run, model, sequences):
    """The closed form on counts, with the weights of the folder."""
    tokens, target = sequences
    saved = load_file(run[0] / "model.safetensors")
    weights = Weights(saved["Y"][None], saved["Z"][None])
    law = class_law(CONFIG)
    batch = draw_batch(law, (200, CONFIG.n_pos - 1), [torch.Generator().manual_seed(1)])
    found = model.logits(tokens)[:, -1]
    wanted = forward(weights, batch).log_alpha[0]
    torch.testing.assert_close(found.log_softmax(dim=-1), wanted.float(), atol=1e-5, rtol=1e-5)
    assert (found.argmax(dim=-1) == target).float().mean() > 0.95


def test_attention_of_the_query_agrees_with_the_record(run, model, sequences):
    """By token, the pattern's last row is exp(z) times the count; z is the record's last entry."""
    tokens, _ = sequences
    z = run[1].z[-1].double()
    row = model.capture(tokens, [PATTERN])[PATTERN][:, 0, -1]
    by_token = torch.zeros(200, CONFIG.n_tokens).scatter_add_(1, tokens, row)
    query = tokens[:, -1] - CONFIG.n_context
    wanted = attention(z[query], counted(tokens[:, :-1]))
    torch.testing.assert_close(by_token, wanted.float(), atol=1e-5, rtol=1e-4)
    # In the mean over many sequences of a class it is near c_n of the record.
    longer = draw_sequences(class_law(CONFIG), (120, 1000), torch.Generator().manual_seed(2))
    row = model.capture(longer[0], [PATTERN], {"pattern": lambda p: p[:, 0, -1]})[PATTERN]
    by_token = torch.zeros(120, CONFIG.n_tokens).scatter_add_(1, longer[0], row.float())
    classes = longer[1] - class_law(CONFIG).next_token[0]
    for index, c in enumerate(run[1].attention[-1]):
        assert (by_token[classes == index].mean(dim=0) - c).abs().max() < 0.02


def test_no_query_attends_to_itself_and_the_first_position_sees_nothing(model, sequences):
    tokens = sequences[0][:5]
    pattern = model.capture(tokens, [PATTERN])[PATTERN]
    assert pattern.diagonal(dim1=-2, dim2=-1).abs().max() == 0
    assert pattern.triu().abs().max() == 0
    sums = pattern.sum(dim=-1)
    assert (sums[..., 0] == 0).all()
    torch.testing.assert_close(sums[..., 1:], torch.ones(5, 1, CONFIG.n_pos - 1))
    assert model.logits(tokens)[:, 0].abs().max() == 0
    # From a token that is no query attention is even.
    torch.testing.assert_close(pattern[:, 0, 3, :3], torch.full((5, 3), 1 / 3))


def test_weights_rebuild_the_model(model, sequences):
    tokens = sequences[0][:4]
    found = model.capture(
        tokens, ["embed", "L0.q", "L0.k", "L0.v", "L0.z", "L0.attn_out", "ln_final"]
    )
    x = model.weight("W_E")[tokens]
    assert torch.equal(x, found["embed"])
    for name in "qkv":
        wanted = torch.einsum("bpm,hmd->bphd", x, model.weight(f"W_{name.upper()}", 0))
        torch.testing.assert_close(found[f"L0.{name}"], wanted)
    out = torch.einsum("bphd,hdm->bpm", found["L0.z"], model.weight("W_O", 0))
    torch.testing.assert_close(out, found["L0.attn_out"])
    f = out / out.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(f, found["ln_final"])
    torch.testing.assert_close(f @ model.weight("W_U"), model.logits(tokens), atol=1e-5, rtol=1e-5)


def test_the_proofs_of_validate_hold_but_for_the_row_that_sees_nothing(model):
    failed = [check.name for check in validate_model(model) if check.passed is False]
    assert failed == ["rows-sum-to-one"]
    passed = {check.name for check in validate_model(model) if check.passed}
    assert {"stock-logits", "streaming-equals-whole", "padded-left", "heads-are-zeroed"} <= passed


def test_zerotuning_scales_the_first_key_and_leaves_no_nan(model, sequences):
    tokens = sequences[0][:5]
    before = model.capture(tokens, [PATTERN])[PATTERN]
    with model.edit(ZeroTuning(3.0)):
        after, logits = model.capture(tokens, [PATTERN])[PATTERN], model.logits(tokens)
    scaled = before.clone()
    scaled[..., 0] *= 3
    scaled[..., 1:, :] /= scaled[..., 1:, :].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(after, scaled)
    assert logits.isfinite().all()


def test_the_sink_probe_runs_from_the_sample_of_the_folder(run):
    found = wb.run("attention-sinks", f"toy:{run[0]}", str(run[0] / "sample.safetensors"), n_pos=48)
    assert found.score.shape[1:] == (1, 1, 48)
    # Nothing sinks: tokens of a class are drawn without order.
    assert found.metrics()["sink_rate"] == 0


def test_it_goes_on_from_a_changed_stream_and_its_gradient_is_finite(model, sequences):
    tokens = sequences[0][:3]
    resid = model.capture(tokens, ["L0.resid_pre"])["L0.resid_pre"]
    torch.testing.assert_close(model.continue_from(0, resid), model.logits(tokens))
    resid = resid.requires_grad_()
    model.continue_from(0, resid)[:, -1].logsumexp(dim=-1).sum().backward()
    assert resid.grad.isfinite().all()
    assert resid.grad[:, -1].abs().max() > 0
    z = model.capture(tokens, ["L0.resid_post", "ln_final"])
    torch.testing.assert_close(model.final_norm(z["L0.resid_post"]), z["ln_final"])


def test_there_is_no_mlp_and_a_half_trained_folder_is_refused(model, tmp_path):
    with pytest.raises(CapabilityError, match="needs an MLP"):
        model.capture(torch.zeros(1, 2, dtype=torch.long), ["L0.mlp_out"])
    (tmp_path / "config.json").write_text('{"model_type": "scan-snap"}', encoding="utf-8")
    with pytest.raises(ModelError, match="go on training"):
        wb.load(f"toy:{tmp_path}")


def test_an_object_in_memory_can_be_wrapped():
    inner = model_from({"model_type": "scan-snap", "n_pos": 9})
    model = wb.wrap(inner)
    assert (model.backend, model.dtype, model.spec.d_vocab) == ("toy", "float64", 34)
    assert ScanSnapConfig().n_tokens == 34
    assert model.generate(torch.zeros(1, 3, dtype=torch.long), max_new_tokens=2).shape == (1, 5)
