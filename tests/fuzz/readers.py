"""What reads a file or a URL: each takes a folder and what was drawn, and leaves the folder as it was."""

import json

from tests.fuzz.valid import SWEEP
from tests.store.conftest import build_result
from workbench.discovery import load_probes
from workbench.errors import WorkbenchError
from workbench.evaluation.task import find_task
from workbench.execute.kept import read_sweep
from workbench.execute.plan import make_plan
from workbench.execute.plan_file import read_plan
from workbench.interventions.files import as_intervention
from workbench.models.base import ModelSpec
from workbench.raw_prompts import raw_hash
from workbench.settings import make_config
from workbench.sources import read_source
from workbench.store.record import write_manifest
from workbench.store.results import Store

SPEC = ModelSpec(
    name="tiny",
    family="gpt2",
    revision="r",
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_model=8,
    d_head=4,
    d_mlp=16,
    d_vocab=32,
    n_ctx=16,
)


def assert_one_line(error):
    text = str(error)
    assert text.strip()
    assert "\n" not in text.strip(), text
    assert len(text) < 2000, text


def stored(folder):
    """A store with one result, made once; its files are put back by every reader."""
    store = Store(folder / "store", report=lambda message: None)
    result = build_result(1)
    if store.folder(result.key).is_dir():
        return store, result.key, store.folder(result.key)
    kept = store.publish(result)
    return store, kept.key, kept.path


def look_at(store, key):
    """Everything that shows a result."""
    found = store.find(key)
    store.list()
    if found is not None:
        json.dumps(found.document())
        repr(found)
        found._repr_html_()
        found.array_shapes()
        for name in found.arrays:
            _ = found.arrays[name]
        _ = found.measured.metrics()


def result_file(name, *, consistent):
    """Puts content in the place of a result's file; ``consistent``: with a manifest that agrees."""

    def read(folder, content):
        store, key, path = stored(folder)
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        try:
            (path / name).write_bytes(content)
            if consistent:
                (path / "manifest.json").unlink()
                write_manifest(path, ["arrays.safetensors", "result.json"])
            look_at(store, key)
        finally:
            for aside in (store.path / "damaged").glob("*"):
                for file in aside.iterdir():
                    file.unlink()
                aside.rmdir()
            path.mkdir(exist_ok=True)
            for file, original in files.items():
                (path / file).write_bytes(original)

    return read


def data_file(name):
    def read(folder, content):
        (folder / name).write_bytes(content)
        raw_hash(read_source(folder / name, limit=4))

    return read


def plan_file(folder, content):
    (folder / "plan.yaml").write_bytes(content)
    make_plan(read_plan(folder / "plan.yaml"), folder / "hashes")


def intervention_file(folder, content):
    (folder / "i.json").write_bytes(content)
    as_intervention(folder / "i.json", SPEC).plan(SPEC)


def task_file(folder, content):
    (folder / "task.json").write_bytes(content)
    task = find_task(str(folder / "task.json"))
    rows = [{"text": "a", "label": 1}, {"question": "q", "choices": ["a", "b"], "answer": "A"}, {}]
    for row in rows:
        try:
            question = task.question(row, "row 0")
        except WorkbenchError:
            continue
        task.with_examples(question, [question])


def archive(folder, content):
    (folder / "x.zip").write_bytes(content)
    Store(folder / "imported", report=lambda message: None).import_from(folder / "x.zip")


def settings_of(folder, drawn):
    index, pairs = drawn
    kinds = [probe.config for probe in load_probes()]
    make_config(kinds[index % len(kinds)], pairs, "x")


def url_number(folder, drawn):
    from app import url

    kind, low, high, text = drawn
    value = url.number(kind, low, high, "x")(text)
    assert isinstance(value, kind)
    assert low is None or low <= value
    assert high is None or value <= high


def url_word(folder, text):
    from app import url
    from app.components.intervention_form import _positions

    for parse in (url.one_of(["a", "demo"], "word"), url.whole(0, 5, "n"), _positions):
        try:
            parse(text)
        except WorkbenchError as error:
            assert_one_line(error)
    Store(folder / "store", report=lambda message: None).resolve(text)


def job_folder(folder, drawn):
    from app import jobs

    place = folder / "jobs" / ("a" * 20)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in zip(
        ("request.json", "status.json", "out.json", "log"), drawn, strict=True
    ):
        (place / name).write_bytes(content)
    for job in jobs.listing(folder):
        jobs.log_tail(job)
        assert job.state in jobs.STATES


def sweep_folder(folder, drawn):
    from app import sweeps

    place = folder / "sweeps" / ("a" * 64)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in zip(SWEEP, drawn, strict=True):
        (place / name).write_bytes(content)
    for sweep in sweeps.listing(folder):
        assert sweep.state in sweeps.STATES
        assert all(cell.state in sweeps.CELL_STATES for cell in sweeps.cells(folder, sweep))
    read_sweep(Store(folder, report=lambda message: None), "a" * 12)
