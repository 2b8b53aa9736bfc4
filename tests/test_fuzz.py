"""Whatever stands in a file or a URL, the answer is a value or one line, never a traceback.

Every reader is given valid content that was damaged: bytes changed, cut, repeated, or one place of its
structure replaced by any JSON value. ``WORKBENCH_FUZZ=20000`` sets the number of cases a reader.
"""

import copy
import gzip
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.conftest import build_result
from workbench.discovery import load_probes
from workbench.errors import WorkbenchError
from workbench.evaluation.task import find_task
from workbench.execute.plan import make_plan
from workbench.execute.plan_file import read_list, read_plan
from workbench.interventions.files import INTERVENTIONS, as_intervention
from workbench.models.base import ModelSpec
from workbench.raw_prompts import raw_hash
from workbench.settings import make_config
from workbench.sources import read_source
from workbench.store.record import write_manifest
from workbench.store.results import Store

N_CASES = int(os.environ.get("WORKBENCH_FUZZ", "40"))
FUZZ = settings(
    max_examples=N_CASES,
    deadline=None,
    # The same cases every time in the ordinary run; new ones in a long run.
    derandomize="WORKBENCH_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
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


# What is drawn

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([2**63, -1, 10**400, "../x", "\ud800", "1e999", "NaN", "\x00", "{", "inf"]),
)
anything = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """The path of every place in a structure."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, inner in items:
        yield from places(inner, (*path, name))


@st.composite
def damaged_structure(draw, *valid):
    """One of some valid structures with one to three places replaced, removed or added."""
    value = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                value = draw(anything)
            elif isinstance(value, dict):
                value[draw(st.text(max_size=8))] = draw(anything)
            continue
        parent = value
        for name in path[:-1]:
            parent = parent[name]
        if draw(st.integers(0, 4)) == 0:
            del parent[path[-1]]
        else:
            parent[path[-1]] = draw(anything)
    return value


@st.composite
def damaged_bytes(draw, *valid):
    """Valid content with pieces changed, cut out, repeated or put in."""
    content = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content), 1)))
        length = draw(st.integers(0, 8))
        how = draw(st.sampled_from(["flip", "cut", "put", "repeat", "end"]))
        if how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[at : at + length]
        elif how == "put":
            content[at:at] = draw(st.binary(max_size=8))
        elif how == "repeat":
            content[at:at] = content[at : at + length] * draw(st.integers(1, 50))
        elif how == "end":
            del content[at:]
    return bytes(content)


def as_json(structures):
    return structures.map(lambda value: json.dumps(value).encode())


def yaml_of(structures):
    import yaml

    return structures.map(lambda value: yaml.safe_dump(json.loads(json.dumps(value))).encode())


# What reads it: each takes a folder and what was drawn


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


# What is valid, and how it is damaged


def _safetensors(**arrays):
    return safetensors.numpy.save(arrays)


TOKENS = [
    _safetensors(tokens=np.arange(12).reshape(3, 4)),
    _safetensors(tokens=np.ones((2, 3), np.int32), attention_mask=np.ones((2, 3), np.int64)),
    _safetensors(tokens=np.ones((2, 3), np.float32)),
]
ROWS = [
    {"text": "one two"},
    {"question": "q?", "choices": ["a", "b"], "answer": 1},
    {"tokens": [1, 2, 3]},
    {"text": "a", "items": ["a"], "label": 0},
    {"state": [1, 2], "target": 3},
]
PLANS = [
    {
        "models": ["demo"],
        "probes": {"attention-sinks": {"threshold": [0.2, 0.3]}},
        "data": "builtin:natural",
        "seeds": [0, 1],
        "n_pos": 16,
        "limit": 2,
        "interventions": ["none", {"name": "zerotuning", "gamma": 2.0}],
    },
    {"models": "demo", "probes": ["successor-heads"], "dtypes": ["float32"], "bos": "auto"},
]
FILES_OF_INTERVENTIONS = [
    {"name": "zerotuning", "version": 1, "gamma": 1.5, "mode": "score", "heads": [[0, 1]]},
    {
        "name": "act",
        "alpha": 5,
        "beta": 0.4,
        "protect_first": True,
        "mode": "full",
        "heads": [[1, 0]],
    },
    {"name": "scale-keys", "factor": 0.5, "positions": [0, 3], "heads": None},
    {"name": "zero-heads", "heads": [[0, 0]], "model": "tiny", "revision": "r", "layers": 2},
    {"name": "move-to-first", "heads": [[0, 0]], "calibration": {"task": "x", "n": 3}},
    {"name": "mean-heads", "heads": [[0, 0]], "mean": "none.safetensors"},
    {"name": "add-vector", "site": "L0.resid_post", "vector": "none.safetensors", "scale": 2.0},
]
TASKS = [
    {
        "name": "a",
        "prompt": "{text}:",
        "labels": [" x", " y"],
        "answer": "label",
        "instruction": "i",
    },
    {"name": "b", "prompt": "{question}\n{choices}", "labels": "letters", "answer": "answer"},
]
RESULT = build_result(1)
DOCUMENT = RESULT.document()
MANIFEST = {
    "schema": 1,
    "files": {
        "arrays.safetensors": {"size": 192, "sha256": "a" * 64},
        "result.json": {"size": 300, "sha256": "b" * 64},
    },
}
ARRAYS = [
    _safetensors(score=np.zeros((2, 3, 4), np.float32)),
    _safetensors(a=np.zeros(0), b=np.ones(2, bool)),
]


def _zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        document = json.dumps(DOCUMENT).encode()
        listed = {"arrays.safetensors": ARRAYS[0], "result.json": document}
        sizes = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in listed.items()
        }
        for name, data in (
            *listed.items(),
            ("manifest.json", json.dumps({"schema": 1, "files": sizes})),
        ):
            opened.writestr(f"{RESULT.key}/{name}", data)
    return buffer.getvalue()


def both(*structures):
    """A structure damaged as JSON, and its text damaged as bytes."""
    texts = [json.dumps(value).encode() for value in structures]
    return as_json(damaged_structure(*structures)) | damaged_bytes(*texts)


TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["nan", "inf", "-1", "1e400", "9" * 5000, "a" * 64, "١٢", "", ",", "0x10", "1_0"]
    ),
)
_rows = st.lists(as_json(damaged_structure(*ROWS)), min_size=1, max_size=3).map(b"\n".join)
_jsonl = _rows | damaged_bytes(*[json.dumps(row).encode() + b"\n" for row in ROWS])
_field_names = sorted(
    {field for probe in load_probes() for field in probe.config.__dataclass_fields__}
)

READERS = {
    "manifest": (result_file("manifest.json", consistent=False), both(MANIFEST)),
    "result.json": (result_file("result.json", consistent=True), both(DOCUMENT)),
    "arrays": (result_file("arrays.safetensors", consistent=True), damaged_bytes(*ARRAYS)),
    "tokens": (data_file("t.safetensors"), damaged_bytes(*TOKENS)),
    "jsonl": (data_file("d.jsonl"), _jsonl),
    "jsonl.gz": (
        data_file("d.jsonl.gz"),
        damaged_bytes(gzip.compress(json.dumps(ROWS[0]).encode())),
    ),
    "txt": (data_file("d.txt"), damaged_bytes(b"one\n\ntwo\r\nthree\n", "\ufeffÄ\u2028".encode())),
    "plan": (plan_file, yaml_of(damaged_structure(*PLANS))),
    "plan, bytes": (
        plan_file,
        damaged_bytes(b"models: [demo]\nprobes: &a {attention-sinks: {}}\nseeds: *a\n"),
    ),
    "intervention": (intervention_file, both(*FILES_OF_INTERVENTIONS)),
    "task": (task_file, both(*TASKS)),
    "import": (archive, damaged_bytes(_zip())),
    "comma list": (lambda folder, text: read_list(text), TEXTS),
    "settings": (
        settings_of,
        st.tuples(
            st.integers(0, 20), st.dictionaries(st.sampled_from(_field_names), TEXTS, max_size=3)
        ),
    ),
    "URL numbers": (
        url_number,
        st.tuples(
            st.sampled_from([int, float]),
            st.none() | st.integers(-5, 5),
            st.none() | st.integers(5, 50),
            TEXTS | st.floats().map(str) | st.integers().map(str),
        ),
    ),
    "URL words": (url_word, TEXTS),
    "jobs": (
        job_folder,
        st.tuples(
            both(
                {
                    "kind": "run",
                    "name": "x",
                    "arguments": ["run"],
                    "created": "2026-01-01T00:00:00+00:00",
                }
            ),
            both(
                {"state": "done", "pid": 1, "birth": 2.5, "finished": "2026-01-01T00:00:00+00:00"}
            ),
            both({"key": "a" * 64}),
            damaged_bytes(b'{"event": "advanced", "done": 1, "total": 2}\nplain\n'),
        ),
    ),
}


def assert_one_line(error):
    text = str(error)
    assert text.strip()
    assert "\n" not in text.strip(), text
    assert len(text) < 2000, text


@pytest.mark.parametrize("name", READERS)
def test_no_input_is_worse_than_one_line(name, tmp_path):
    read, content = READERS[name]

    @FUZZ
    @given(content)
    def fuzz(drawn):
        try:
            read(tmp_path, drawn)
        except WorkbenchError as error:
            assert_one_line(error)

    fuzz()


def test_every_intervention_that_a_file_can_hold_is_fuzzed():
    fuzzed = {content["name"] for content in FILES_OF_INTERVENTIONS}
    assert fuzzed >= set(INTERVENTIONS) - {"uniform-attention"}
    assert Path(__file__).name == "test_fuzz.py"
