"""Whatever stands in a file or a URL, the answer is a value or one line, never a traceback.

Every reader is given valid content that was damaged: bytes changed, cut, repeated, or one place of its
structure replaced by any JSON value. ``WORKBENCH_FUZZ=20000`` sets the number of cases a reader.
"""

import gzip
import json
import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import readers, valid
from tests.fuzz.damage import TEXTS, as_json, both, damaged_bytes, damaged_structure, yaml_of
from tests.fuzz.readers import assert_one_line
from workbench.discovery import load_probes
from workbench.errors import WorkbenchError
from workbench.execute.plan_file import read_list
from workbench.interventions.files import INTERVENTIONS

N_CASES = int(os.environ.get("WORKBENCH_FUZZ", "40"))
FUZZ = settings(
    max_examples=N_CASES,
    deadline=None,
    # The same cases every time in the ordinary run; new ones in a long run.
    derandomize="WORKBENCH_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
_rows = st.lists(as_json(damaged_structure(*valid.ROWS)), min_size=1, max_size=3).map(b"\n".join)
_jsonl = _rows | damaged_bytes(*[json.dumps(row).encode() + b"\n" for row in valid.ROWS])
_field_names = sorted(
    {field for probe in load_probes() for field in probe.config.__dataclass_fields__}
)

READERS = {
    "manifest": (readers.result_file("manifest.json", consistent=False), both(valid.MANIFEST)),
    "result.json": (readers.result_file("result.json", consistent=True), both(valid.DOCUMENT)),
    "arrays": (
        readers.result_file("arrays.safetensors", consistent=True),
        damaged_bytes(*valid.ARRAYS),
    ),
    "tokens": (readers.data_file("t.safetensors"), damaged_bytes(*valid.TOKENS)),
    "jsonl": (readers.data_file("d.jsonl"), _jsonl),
    "jsonl.gz": (
        readers.data_file("d.jsonl.gz"),
        damaged_bytes(gzip.compress(json.dumps(valid.ROWS[0]).encode())),
    ),
    "txt": (
        readers.data_file("d.txt"),
        damaged_bytes(b"one\n\ntwo\r\nthree\n", "\ufeffÄ\u2028".encode()),
    ),
    "plan": (readers.plan_file, yaml_of(damaged_structure(*valid.PLANS))),
    "plan, bytes": (
        readers.plan_file,
        damaged_bytes(b"models: [demo]\nprobes: &a {attention-sinks: {}}\nseeds: *a\n"),
    ),
    "intervention": (readers.intervention_file, both(*valid.FILES_OF_INTERVENTIONS)),
    "task": (readers.task_file, both(*valid.TASKS)),
    "import": (readers.archive, damaged_bytes(valid.archive())),
    "comma list": (lambda folder, text: read_list(text), TEXTS),
    "settings": (
        readers.settings_of,
        st.tuples(
            st.integers(0, 20), st.dictionaries(st.sampled_from(_field_names), TEXTS, max_size=3)
        ),
    ),
    "URL numbers": (
        readers.url_number,
        st.tuples(
            st.sampled_from([int, float]),
            st.none() | st.integers(-5, 5),
            st.none() | st.integers(5, 50),
            TEXTS | st.floats().map(str) | st.integers().map(str),
        ),
    ),
    "URL words": (readers.url_word, TEXTS),
    "jobs": (
        readers.job_folder,
        st.tuples(
            both(*valid.JOBS["request.json"]),
            both(*valid.JOBS["status.json"]),
            both(*valid.JOBS["out.json"]),
            damaged_bytes(b'{"event": "advanced", "done": 1, "total": 2}\nplain\n'),
        ),
    ),
    "sweeps": (
        readers.sweep_folder,
        st.tuples(*(both(*contents) for contents in valid.SWEEP.values())),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_no_input_is_worse_than_one_line(name, tmp_path):
    read, content = READERS[name]
    n_cases = 0

    @FUZZ
    @given(content)
    def fuzz(drawn):
        nonlocal n_cases
        n_cases += 1
        try:
            read(tmp_path, drawn)
        except WorkbenchError as error:
            assert_one_line(error)

    fuzz()
    sys.stdout.write(f"{name}: {n_cases} cases\n")


def test_every_intervention_that_a_file_can_hold_is_fuzzed():
    fuzzed = {content["name"] for content in valid.FILES_OF_INTERVENTIONS}
    assert fuzzed >= set(INTERVENTIONS) - {"uniform-attention"}
