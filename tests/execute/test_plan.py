"""A plan becomes cells: every combination once, keyed by content, and nothing impossible."""

import json

import pytest

from tests.execute.conftest import sinks
from workbench.errors import ConfigError, DataError, ModelError, UnknownNameError
from workbench.execute.plan import make_plan, split_revision
from workbench.execute.plan_file import read_list, read_plan

PROBES = {"attention-sinks": {"threshold": [0.2, 0.3]}, "successor-heads": {}}


def plan_of(tiny_folder, **changes):
    return sinks([tiny_folder], **{"models": [str(tiny_folder)], **changes})


def test_every_combination_is_a_cell(two_models, tmp_path):
    edit = tmp_path / "zt.json"
    edit.write_text('{"name": "zerotuning", "gamma": 1.5}')
    plan = sinks(
        two_models,
        probes=PROBES,
        seeds=[0, 1],
        dtypes=["float32", "bfloat16"],
        interventions=["none", str(edit)],
    )
    # 2 models x (2 thresholds + 1) x 2 seeds x 2 dtypes x 2 interventions
    assert len(plan.cells) == 2 * 3 * 2 * 2 * 2
    assert len({cell.key for cell in plan.cells}) == len(plan.cells)
    found = {
        (
            c.model,
            c.probe,
            c.settings.get("threshold"),
            c.options["seed"],
            c.options["dtype"],
            c.intervention_name,
        )
        for c in plan.cells
    }
    assert len(found) == len(plan.cells)
    assert (two_models[1], "attention-sinks", 0.3, 1, "bfloat16", "zt.json") in found
    assert {cell.options["n_pos"] for cell in plan.cells} == {16}


def test_a_default_that_is_written_out_is_no_second_cell(tiny_folder):
    once = plan_of(tiny_folder)
    again = plan_of(
        tiny_folder, probes={"attention-sinks": {"inputs": "natural", "position": [0, "0"]}}
    )
    assert [cell.key for cell in again.cells] == [cell.key for cell in once.cells]
    assert again.key == once.key


def test_keys_follow_content_not_names(tiny_folder, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one and two and three\n\nfour and five and six")
    (tmp_path / "c.txt").write_text("something else altogether")
    keys = [
        plan_of(tiny_folder, data=str(tmp_path / name)).cells[0].key
        for name in ("a.txt", "b.txt", "c.txt")
    ]
    assert keys[0] == keys[1] != keys[2]


def test_what_never_changes_numbers_is_in_no_key(tiny_folder):
    plain, placed = plan_of(tiny_folder), plan_of(tiny_folder, batch_size=1, device="cpu")
    assert plain.cells[0].key == placed.cells[0].key
    assert placed.cells[0].options["batch_size"] == 1


def test_data_is_one_a_list_entry_or_domains_or_by_probe(tiny_folder):
    def data_of(data, probes=("attention-sinks",)):
        cells = plan_of(tiny_folder, probes=list(probes), data=data).cells
        return [(cell.probe, cell.data) for cell in cells]

    a, c = "builtin:natural", "builtin:code"
    sink, successor = "attention-sinks", "successor-heads"
    assert data_of([a, c]) == [(sink, a), (sink, c)]
    assert data_of({"prose": a, "code": c}) == [(sink, {"prose": a, "code": c})]
    both = data_of({sink: [a, c], successor: a}, (sink, successor))
    assert both == [(sink, a), (sink, c), (successor, a)]


def test_an_option_of_one_probe_is_its_own(tiny_folder):
    plan = plan_of(
        tiny_folder, probes={"attention-sinks": {"n_pos": [8, 24]}, "active-dormant": {}}
    )
    assert [(cell.probe, cell.options["n_pos"]) for cell in plan.cells] == [
        ("attention-sinks", 8),
        ("attention-sinks", 24),
        ("active-dormant", 16),
    ]
    assert plan.cells[0].settings == {}


def test_a_list_inside_a_list_is_one_value(tiny_folder):
    plan = plan_of(
        tiny_folder, probes={"activation-attacks": {"n_attacked": [[1, 2], [4]]}}, data=None
    )
    assert [cell.settings["n_attacked"] for cell in plan.cells] == [[1, 2], [4]]


def test_revisions_follow_the_last_at_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    assert split_revision("gpt2@main") == ("gpt2", "main")
    assert split_revision("toy:runs/a@100") == ("toy:runs/a", "100")
    assert split_revision("a@b") == ("a@b", None)
    assert split_revision("demo") == ("demo", None)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": ["demo"]}, UnknownNameError, "Did you mean 'models'"),
        ({"models": []}, ConfigError, "must name models"),
        ({"probes": ["attention-sink"]}, UnknownNameError, "Did you mean 'attention-sinks'"),
        ({"probes": {"attention-sinks": {"treshold": 1}}}, UnknownNameError, "'threshold'"),
        (
            {"probes": {"attention-sinks": {"threshold": 2.0}}},
            ConfigError,
            r"between 0\.0 and 1\.0",
        ),
        ({"probes": {"attention-sinks": 3}}, ConfigError, "must be a mapping"),
        ({"probes": ["scan-snap"]}, ConfigError, "workbench train scan-snap"),
        ({"data": None}, DataError, "attention-sinks needs prompts"),
        ({"data": "nowhere.txt"}, DataError, "nowhere.txt"),
        ({"dtypes": ["float23"]}, UnknownNameError, "'float32'"),
        ({"backends": ["hff"]}, UnknownNameError, "'hf'"),
        ({"seeds": [-1]}, ConfigError, "seed must be"),
        ({"n_pos": "many"}, ConfigError, "n_pos must be"),
        ({"interventions": ["nowhere.json"]}, DataError, "nowhere.json"),
        ({"interventions": [{"name": "zerotunin"}]}, UnknownNameError, "'zerotuning'"),
        ({"models": [7]}, ConfigError, "a name or a folder"),
        ({"models": ["./missing"]}, ModelError, "there is no folder missing"),
        ({"models": ["toy:missing"]}, ModelError, "there is no folder missing"),
        ({"device_map": "nonsense"}, ConfigError, "auto, balanced.* got 'nonsense'"),
        ({"device_map": {"": "cuda:x"}}, ConfigError, "got 'cuda:x'"),
        ({"device_map": {"": True}}, ConfigError, "got True"),
        ({"interventions": [{"name": "act", "alpha": -1}]}, ConfigError, "alpha"),
        ({"interventions": [{"name": "act", "alfa": 1}]}, UnknownNameError, "'alpha'"),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_run_is_refused_before_anything_does(tiny_folder, changes, error, words):
    with pytest.raises(error, match=words):
        plan_of(tiny_folder, **changes)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        sinks([tmp_path], models=[str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [demo", "must be YAML"),
        ("- demo", "must be a mapping"),
        ("seeds: 0\nmodels: demo\nseeds: 1", "'seeds' is there twice"),
        ("models: !!python/object/apply:os.system ['true']", "must be YAML"),
    ],
    ids=["broken", "list", "twice", "code"],
)
def test_a_plan_file_must_be_plain_yaml(tmp_path, text, words):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_plan(tmp_path / "plan.yaml")


def test_a_missing_plan_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="readable file"):
        read_plan(tmp_path / "plan.yaml")


def test_merged_yaml_and_comma_lists_read_as_yaml(tmp_path):
    (tmp_path / "plan.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\n")
    assert read_plan(tmp_path / "plan.yaml")["b"] == {"x": 1, "y": 2}
    assert read_list("0.3,demo, 7") == [0.3, "demo", 7]


def test_a_cell_survives_its_document(tiny_folder):
    (cell,) = plan_of(tiny_folder, interventions=[{"name": "zerotuning", "gamma": 2.0}]).cells
    again = type(cell)(**json.loads(json.dumps(cell.document())))
    assert again.document() == cell.document()
    assert cell.describe().endswith("zerotuning")


def test_a_plan_is_keyed_by_its_cells_in_any_order(two_models):
    assert sinks(two_models).key == sinks(two_models[::-1]).key != sinks(two_models[:1]).key


def test_make_plan_needs_probes():
    with pytest.raises(ConfigError, match="must name probes"):
        make_plan({"models": ["demo"]})


@pytest.mark.parametrize("place", ["auto", "cpu", "cuda:1", 0, {"": "disk", "a.b": 1}])
def test_device_maps_of_transformers_are_taken(tiny_folder, place):
    (cell,) = plan_of(tiny_folder, device_map=place).cells
    assert cell.device_map == place
    assert cell.key == plan_of(tiny_folder).cells[0].key


def test_files_are_read_once_however_many_cells_there_are(two_models, tmp_path, monkeypatch):
    from workbench.execute import inputs, plan

    edit = tmp_path / "zt.json"
    edit.write_text('{"name": "zerotuning", "gamma": 1.5}')
    read = []
    for module, name in (
        (inputs, "read_source"),
        (inputs, "model_files"),
        (plan, "read_document"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=real, n=name: read.append(n) or f(*a))
    made = sinks(two_models, seeds=list(range(20)), interventions=["none", str(edit)])
    requests = {made.inputs.request(cell) for cell in made.cells}
    assert len(requests) == len(made.cells) == 80
    assert sorted(read) == ["model_files", "model_files", "read_document", "read_source"]


def test_what_a_plan_was_resolved_to_can_be_told(two_models):
    from pathlib import Path

    from workbench.revisions import folder_revision

    made = sinks(two_models)
    found = made.inputs.document()
    assert {name: one["revision"] for name, one in found["models"].items()} == {
        name: folder_revision(Path(name)) for name in two_models
    }
    (data,) = found["data"].values()
    assert data == {"source": "builtin:natural", "limit": 2, "prompts": 2}
    assert list(found["probes"]) == ["attention-sinks"]
