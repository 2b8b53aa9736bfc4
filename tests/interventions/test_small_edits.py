"""Small edits by name, by file and in Python: what each does, alone, together and under a probe."""

import json

import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from tests.zoo import random_tokens, tiny_model
from workbench.errors import ConfigError, DataError
from workbench.interventions.files import INTERVENTIONS
from workbench.interventions.move_to_first import MoveToFirst
from workbench.models.base import Site


@pytest.fixture
def files(tmp_path):
    """A vector and the means of two heads, of models with d_model 32 and d_head 8."""
    generator = torch.Generator().manual_seed(0)
    save_file({"vector": torch.randn(32, generator=generator)}, tmp_path / "vector.safetensors")
    save_file({"mean": torch.randn(2, 8, generator=generator)}, tmp_path / "mean.safetensors")
    return tmp_path


def contents(folder):
    heads = [[0, 1], [1, 2]]
    return {
        "act": {"alpha": 1.2, "beta": 0.2},
        "zerotuning": {"gamma": 3.0},
        "scale-keys": {"positions": [0, 3], "factor": 3.0, "heads": heads},
        "move-to-first": {"heads": heads},
        "uniform-attention": {"heads": heads},
        "zero-heads": {"heads": heads},
        "mean-heads": {"heads": heads, "mean": str(folder / "mean.safetensors")},
        "add-vector": {"site": "L0.resid_post", "vector": str(folder / "vector.safetensors")},
    }


@pytest.mark.parametrize("name", sorted(INTERVENTIONS))
def test_every_listed_intervention_comes_from_a_file_and_changes_the_model(files, name):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens()
    stock = model.logits(tokens)
    path = files / "change.json"
    path.write_text(json.dumps({"name": name, "version": 1, **contents(files)[name]}))
    with model.edit(path):
        edited = model.logits(tokens)
    assert (edited - stock).abs().max() > 1e-2
    assert torch.equal(model.logits(tokens), stock)


@pytest.mark.parametrize("name", ["zero-heads", "mean-heads", "add-vector", "move-to-first"])
@pytest.mark.parametrize(
    "other", [wb.ACT(alpha=1.2, beta=0.2), wb.ZeroTuning(3.0)], ids=["act", "zt"]
)
def test_small_edits_compose_with_the_two_methods_and_are_decoded(files, name, other):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, 6)
    small = {"name": name, **contents(files)[name]}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with model.edit(other, small):
        both = model.generate(tokens, **options)
        assert torch.equal(both, model.generate(tokens, use_cache=False, **options))
        teacher = model.logits(both)
    with model.edit(other), model.edit(small):
        torch.testing.assert_close(model.logits(both), teacher, rtol=0, atol=0)
    for alone in (other, small):
        with model.edit(alone):
            assert (model.logits(both) - teacher).abs().max() > 1e-3


def test_a_masked_head_stays_masked_beside_an_attention_edit():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens()
    with model.edit(wb.ZeroTuning(3.0), wb.ZeroHeads(((0, 1),))):
        z = model.capture(tokens, ["L0.z"])["L0.z"]
    with model.edit(wb.ZeroTuning(3.0)):
        tuned = model.capture(tokens, ["L0.z"])["L0.z"]
    assert bool((z[:, :, 1] == 0).all())
    assert torch.equal(z[:, :, [0, 2, 3]], tuned[:, :, [0, 2, 3]])


@pytest.mark.parametrize("edit", [wb.ZeroTuning(4.0), wb.ACT(alpha=1.2), MoveToFirst()])
def test_a_probe_inside_an_edit_measures_the_edited_pattern(edit):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens()
    with model.edit(edit):
        measured = wb.run("attention-sinks", model, tokens)
        pattern = model.capture(tokens, [Site("pattern", 0)])[Site("pattern", 0)].double()
    received = pattern.sum(dim=-2) / torch.arange(tokens.shape[1], 0, -1)
    torch.testing.assert_close(measured.score[:, 0].double(), received, rtol=0, atol=1e-5)
    assert measured.key != wb.run("attention-sinks", model, tokens).key


def test_a_vector_from_a_file_is_the_vector():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens()
    plain = model.capture(tokens, ["L0.resid_post"])["L0.resid_post"]
    vector = torch.linspace(-1, 1, 32)
    with model.edit(wb.AddVector("L0.resid_post", vector, 2.0)):
        steered = model.capture(tokens, ["L1.resid_pre"])["L1.resid_pre"]
    torch.testing.assert_close(steered, plain + 2.0 * vector, rtol=0, atol=1e-5)


def test_a_vector_has_a_site_of_the_residual_stream_up_to_the_last_layer():
    spec, vector = wb.wrap(tiny_model("llama")).spec, torch.ones(32)
    assert len(wb.AddVector("L1.resid_post", vector).plan(spec)) == 1
    with pytest.raises(ConfigError, match="layer must be below 2"):
        wb.AddVector("L2.resid_post", vector).plan(spec)
    with pytest.raises(ConfigError, match="residual stream"):
        wb.AddVector("L0.z", vector).plan(spec)
    assert wb.AddVector("L0.resid_post", vector, 0.0).plan(spec) == []
    assert wb.AddVector("L0.resid_post", torch.zeros(32)).plan(spec) == []


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    model = wb.wrap(tiny_model("llama"))
    good, short = tmp_path / "good.safetensors", tmp_path / "short.safetensors"
    save_file({"other": torch.zeros(32)}, good)
    save_file({"vector": torch.ones(31)}, short)
    whole = tmp_path / "whole.safetensors"
    save_file({"vector": torch.arange(32)}, whole)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x80\x04pickle")
    nan = tmp_path / "nan.safetensors"
    save_file({"vector": torch.full((32,), torch.nan)}, nan)
    cases = {
        tmp_path / "none.safetensors": (DataError, "no such file"),
        good: (DataError, "must hold a tensor vector"),
        whole: (DataError, "floating-point"),
        bad: (DataError, "safetensors file"),
        nan: (ConfigError, "finite"),
        short: (ConfigError, r"\[d_model\] = \[32\]"),
    }
    for path, (kind, words) in cases.items():
        content = {"name": "add-vector", "site": "L0.resid_post", "vector": str(path)}
        with pytest.raises(kind, match=words) as caught, model.edit(content):
            pass
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"name": "zerotuning", "gamma": [2.0, 3.0], "heads": [[0, 1]]}, "2 for 1 heads"),
        ({"name": "zerotuning", "gamma": [2.0, 3.0], "heads": [[0, 1], [0, 1]]}, "different"),
        ({"name": "zerotuning", "gamma": [2.0, 3.0]}, "2 x 4 = 8 heads"),
        ({"name": "zerotuning", "gamma": [2.0, 0.0], "heads": [[0, 1], [1, 1]]}, "above 0"),
        (
            {"name": "zerotuning", "gamma": ["a"], "heads": [[0, 1]]},
            "a number or a list of numbers",
        ),
        ({"name": "zerotuning", "gamma": 0.0}, "above 0"),
        ({"name": "act", "heads": [[0]]}, "a list of pairs of whole numbers"),
        ({"name": "act", "heads": [[0.5, 1]]}, "whole numbers"),
        ({"name": "act", "heads": 3}, "heads must be a list of pairs"),
        ({"name": "act", "heads": [[0, 4]]}, "layer 0, head 4"),
        ({"name": "act", "heads": [[2, 0]]}, "layer 2, head 0"),
        ({"name": "zero-heads", "heads": [[-1, 0]]}, "layer -1, head 0"),
        ({"name": "zero-heads", "heads": [[0, -1]]}, "layer 0, head -1"),
        ({"name": "act", "revision": "another"}, "its revision is another"),
        ({"name": "act", "layers": 12}, "its layers is 12"),
        ({"name": "act", "version": "1"}, "whole number up to 1"),
        ({"name": "act", "version": True}, "whole number up to 1"),
        ({"name": "act", "version": 2}, "up to 1; got 2"),
        ({"name": "act", "n_heads": 5}, "its n_heads is 5"),
        ({"name": "scale-keys", "positions": ["a"], "factor": 2.0}, "whole numbers"),
        ({"name": "mean-heads", "heads": [[0, 1]], "mean": "none.safetensors"}, "no such file"),
    ],
)
def test_contents_that_do_not_fit_the_model_are_refused(content, words):
    from workbench.models.huggingface import HuggingFaceModel

    model = HuggingFaceModel(tiny_model("llama"), name="tiny", revision="abc")
    with pytest.raises((ConfigError, DataError), match=words), model.edit(content):
        pass
