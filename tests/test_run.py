"""``wb.run``: keys, the store, requests, batch sizes and edited models."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from tests.zoo import padded, random_tokens, tiny_model
from workbench.errors import (
    CapabilityError,
    ConfigError,
    DataError,
    EngineError,
    StoreError,
    UnknownNameError,
    WorkbenchError,
)
from workbench.identity import describe_intervention
from workbench.run import Reporter

PROBE = "attention-sinks"


@pytest.fixture
def model():
    return wb.wrap(tiny_model("llama"))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(path)
    return str(path)


@pytest.fixture
def tokens():
    return random_tokens(3, 16)


def run(model, tokens, **options):
    return wb.run(PROBE, model, tokens, **options)


def test_result_has_the_names_of_the_contract(model, tokens):
    result = run(model, tokens)
    assert result.score.shape == (3, 2, 4, 16)
    assert result.key_norm.shape == result.value_norm.shape == (2, 2, 16)
    assert result.ov_norm.shape == (2, 4, 16)
    assert result.resid_norm.shape == (3, 16)
    names = {"sink_rate", "mean_score", "value_drain", "resid_peak_ratio", "n_prompts", "n_pos"}
    assert set(result.metrics()) == names
    assert result.metrics()["n_prompts"] == 3
    assert len(result.to_dataframe()) == 8


def test_same_run_has_the_same_key_and_bits(model, tokens):
    first, second = run(model, tokens), run(model, tokens)
    assert first.key == second.key
    assert torch.equal(first.score, second.score)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"threshold": 0.4},
        {"position": 1},
        {"inputs": "random"},
        {"bos": "never"},
    ],
)
def test_everything_that_can_change_the_numbers_changes_the_key(model, tokens, change):
    assert run(model, tokens).key != run(model, tokens, **change).key


def test_key_depends_on_tokens_weights_dtype_and_edits_but_not_on_batches(model, tokens):
    key = run(model, tokens).key
    other = random_tokens(3, 16, seed=1)
    assert run(model, other).key != key
    assert run(wb.wrap(tiny_model("llama", seed=1)), tokens).key != key
    assert run(wb.wrap(tiny_model("llama").to(torch.bfloat16)), tokens).key != key
    assert run(model, tokens, batch_size=1).key == key
    with model.edit(wb.ZeroTuning(2.0)):
        edited = run(model, tokens)
    assert edited.key != key
    assert edited.metrics()["mean_score"] > run(model, tokens).metrics()["mean_score"]


def test_left_and_right_padding_are_the_same_run(model):
    right, left = (padded(random_tokens(2, 16), [16, 12], side) for side in ("right", "left"))
    runs = [run(model, {"tokens": t, "attention_mask": m}) for t, m in (right, left)]
    assert runs[0].key == runs[1].key


def test_kept_result_is_reused_and_refreshed(model, tokens, tmp_path):
    first = run(model, tokens, store=tmp_path)
    again = run(model, tokens, store=tmp_path)
    assert (first.cached, again.cached) == (False, True)
    assert torch.equal(first.score, again.score)
    assert not run(model, tokens, store=tmp_path, cache="refresh").cached
    assert not run(model, tokens, store=tmp_path, cache="off").cached
    assert [entry.key for entry in wb.Store(tmp_path).list()] == [first.key]


def test_damaged_result_is_computed_again(model, tokens, tmp_path, capsys):
    first = run(model, tokens, store=tmp_path)
    expected = first.score
    arrays = first.path / "arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-4] + b"\0\1\2\3")
    again = run(model, tokens, store=tmp_path)
    assert not again.cached
    assert torch.equal(expected, again.score)
    assert "set aside" in capsys.readouterr().err


def test_repeated_request_is_answered_without_torch(folder, tmp_path):
    code = (
        "import sys, workbench as wb\n"
        f"r = wb.run({PROBE!r}, {folder!r}, [list(range(3, 19))], store={str(tmp_path / 'store')!r})\n"
        "print(r.cached, 'torch' in sys.modules, r.key)"
    )
    lines = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert lines[0][:2] == ["False", "True"]
    assert lines[1][:2] == ["True", "False"]
    assert lines[0][2] == lines[1][2]


def test_changed_weights_are_another_request(folder, tmp_path):
    prompts = [list(range(3, 19))]
    first = run(folder, prompts, store=tmp_path / "store")
    tiny_model("llama", seed=1).save_pretrained(folder)
    second = run(folder, prompts, store=tmp_path / "store")
    assert not second.cached
    assert first.key != second.key


def test_progress_counts_prompts(model, tokens):
    seen = []
    run(model, tokens, batch_size=2, reporter=Reporter(progress=lambda *at: seen.append(at)))
    assert seen == [(2, 3), (3, 3)]


def test_interrupted_run_leaves_nothing_behind(model, tokens, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tokens, store=tmp_path, reporter=Reporter(progress=stop))
    assert wb.Store(tmp_path).list() == []
    assert not list((tmp_path / "leases").iterdir())
    assert not run(model, tokens, store=tmp_path).cached


# Refusals


def test_unknown_probe_and_setting_offer_the_nearest(model, tokens):
    with pytest.raises(UnknownNameError, match="Did you mean 'attention-sinks'"):
        wb.run("attention-sink", model, tokens)
    with pytest.raises(UnknownNameError, match="Did you mean 'threshold'"):
        run(model, tokens, treshold=0.2)
    with pytest.raises(ConfigError, match="threshold must be a number"):
        run(model, tokens, threshold="high")


def test_missing_prompts_are_asked_for(model):
    with pytest.raises(DataError, match="needs prompts"):
        wb.run(PROBE, model)


def test_model_without_attention_is_refused_with_what_is_missing(tokens):
    with pytest.raises(CapabilityError, match=r"attention-sinks needs attention .*mamba"):
        run(wb.wrap(tiny_model("mamba")), tokens)


def test_texts_need_a_tokenizer(model):
    with pytest.raises(DataError, match="tokenizer"):
        run(model, ["some words"])


def test_overflow_is_an_error_and_never_a_result(tokens):
    inner = tiny_model("gpt2").to(torch.float16)
    model = wb.wrap(inner)
    with torch.no_grad():
        inner.transformer.h[0].mlp.c_proj.weight.fill_(6e4)  # finite, but not what it makes
    with pytest.raises(EngineError, match="--dtype float32"):
        run(model, tokens)


def test_intervention_without_an_identity_cannot_be_kept():
    class Nameless:
        name = "nameless"

        def plan(self, spec):
            return []

    with pytest.raises(StoreError, match="dataclass"):
        describe_intervention(Nameless())


def test_vectors_are_told_apart_by_their_numbers():
    ones, twos = (
        describe_intervention(wb.AddVector("embed", torch.full((4,), x))) for x in (1.0, 2.0)
    )
    assert ones != twos


@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
def test_probe_agrees_across_backends(folder, tokens, backend):
    ours = run(wb.load(folder), tokens)
    theirs = run(wb.load(folder, backend=backend), tokens)
    assert ours.key != theirs.key
    for name in ours.arrays:
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-4, atol=1e-4)


OPTIONAL = (
    "plotly streamlit pydantic transformer_lens nnsight pandas pyarrow sklearn datasets accelerate"
)


def test_loading_editing_running_and_storing_need_no_optional_package(folder, tmp_path):
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}.split()))\n"
        "import workbench as wb\n"
        f"model = wb.load({folder!r})\n"
        "with model.edit(wb.ZeroTuning(2.0)):\n"
        f"    r = wb.run({PROBE!r}, model, [list(range(3, 19))], store={str(tmp_path / 'store')!r})\n"
        "    model.capture([list(range(3, 19))], ['L0.pattern'])\n"
        f"print(r.cached, wb.Store({str(tmp_path / 'store')!r}).get(r.key).score.shape)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert run.stderr == ""
    assert run.stdout.strip() == "False torch.Size([1, 2, 4, 16])"


def test_device_map_is_passed_on(folder, tokens):
    model = wb.load(folder, device_map={"": "cpu"})
    assert torch.equal(run(model, tokens).score, run(wb.load(folder), tokens).score)


@pytest.fixture
def optional_data_probe(monkeypatch):
    """A probe that uses prompts when it is given some."""
    from dataclasses import dataclass

    from workbench import registry

    @dataclass(frozen=True)
    class Config:
        """No settings."""

    @dataclass(frozen=True)
    class Counted:
        config: Config
        count: torch.Tensor

        def metrics(self):
            return {"n_prompts": self.count.item()}

        def table(self):
            return {"count": [self.count.item()]}

    def measure_counting(model, tokens, config, context):
        """Count the prompts."""
        return Counted(config, torch.tensor(float(len(tokens))))

    monkeypatch.setattr(registry, "_PROBES", dict(registry._PROBES))
    named = {"config": Config, "result": Counted, "paper": "arXiv:0"}
    registry.probe("counting", **named, needs_data=False, takes_data=True)(measure_counting)
    registry.probe("ignoring", **named, needs_data=False)(measure_counting)


def test_optional_prompts_reach_the_probe_only_when_it_takes_them(
    optional_data_probe, model, tokens
):
    assert wb.run("counting", model).metrics()["n_prompts"] == 0
    assert wb.run("counting", model, tokens).metrics()["n_prompts"] == 3
    assert wb.run("ignoring", model, tokens).metrics()["n_prompts"] == 0
    assert wb.run("counting", model).key != wb.run("counting", model, tokens).key


def test_a_request_is_another_when_a_part_of_the_probe_changes(tmp_path):
    from workbench.requests import _sources_hash

    source = tmp_path / "walk.py"
    source.write_text("a")
    (tmp_path / "walking.py").write_text("another probe")
    alone = _sources_hash(source)
    (tmp_path / "walk_lens.py").write_text("b")
    whole = _sources_hash(source)
    (tmp_path / "walk_lens.py").write_text("c")
    changed = _sources_hash(source)
    (tmp_path / "walking.py").write_text("changed")
    assert len({alone, whole, changed}) == 3
    assert _sources_hash(source) == changed


EDIT = {"name": "zerotuning", "gamma": 3.0, "heads": [[0, 1], [1, 2]]}


def test_an_intervention_of_the_run_is_measured_as_one_that_is_active(model, tokens, tmp_path):
    stock = run(model, tokens)
    with model.edit(wb.ZeroTuning(gamma=3.0, heads=[(0, 1), (1, 2)])):
        active = run(model, tokens)
    given = run(model, tokens, intervention=EDIT)
    assert given.key == active.key != stock.key
    assert torch.equal(given.score, active.score)
    assert not torch.equal(given.score, stock.score)
    path = tmp_path / "edit.json"
    path.write_text(json.dumps(EDIT))
    assert run(model, tokens, intervention=path).key == active.key
    assert model.interventions == ()


def test_an_edited_run_is_found_again_and_is_not_the_stock_one(folder, store_path):
    store, data = wb.Store(store_path), random_tokens(2, 16)
    edited = run(folder, data, store=store, intervention=EDIT)
    assert run(folder, data, store=store, intervention=dict(EDIT)).cached
    assert not run(folder, data, store=store).cached
    other = run(folder, data, store=store, intervention={**EDIT, "gamma": 2.0})
    assert not other.cached
    words = {entry.key: entry.subject for entry in store.list()}
    assert words[edited.key] == "tiny under ZeroTuning gamma=3.0 L0H1,L1H2 mode=score"
    assert words[other.key] == "tiny under ZeroTuning gamma=2.0 L0H1,L1H2 mode=score"


def test_an_edited_run_follows_the_content_of_its_files(folder, store_path, tmp_path):
    path, store = tmp_path / "vector.safetensors", wb.Store(store_path)
    edit = {"name": "add-vector", "site": "L0.resid_post", "vector": str(path)}
    keys = set()
    for size in (1.0, 2.0):
        save_file({"vector": torch.full((32,), size)}, path)
        keys |= {
            run(folder, random_tokens(2, 16), store=store, intervention=edit).key for _ in "ab"
        }
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"name": "zerotuning", "gamma": 10**400}, "401 digits"),
        ({"name": "add-vector", "site": "L0.resid_post", "vector": "a\0b"}, "no such file"),
        ({"name": "zerotunin", "gamma": 1.5}, "Did you mean 'zerotuning'"),
        ({"name": "zerotuning"}, "zerotuning needs gamma"),
        ({"name": "zerotuning", "gama": 1.5}, "Did you mean 'gamma'"),
        ({"name": "zerotuning", "gamma": 1.5, "heads": "L0H1"}, "heads must be"),
        ({"name": "zerotuning", "gamma": 1.5, "version": "new"}, "version must be a whole number"),
        ({"name": "zerotuning", "gamma": 1.5, "heads": [[9, 0]]}, "must lie in"),
        ("no-such.json", "must be readable"),
    ],
)
def test_an_intervention_that_cannot_be_meant_is_refused(model, tokens, edit, words):
    with pytest.raises(WorkbenchError, match=words):
        run(model, tokens, intervention=edit)
