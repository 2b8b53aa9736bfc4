"""Fuzzing that coverage guides: bytes that reach new lines of a reader are kept and changed further.

    pip install atheris
    python -m tests.fuzz.guided manifest -runs=50000

Hypothesis knows the structure and damages one place of it; this starts from the same valid files, knows
nothing, and looks where it gets. What follows the reader's name goes to libFuzzer. It ends with an error,
and the bytes in a file, when a reader raises anything but one line.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["workbench"]):
    from tests.fuzz import readers, valid
    from workbench.errors import WorkbenchError

READERS = {
    "manifest": (readers.result_file("manifest.json", consistent=False), [valid.MANIFEST]),
    "result.json": (readers.result_file("result.json", consistent=True), [valid.DOCUMENT]),
    "tokens": (readers.data_file("t.safetensors"), valid.TOKENS),
    "jsonl": (readers.data_file("d.jsonl"), valid.ROWS),
    "plan": (readers.plan_file, valid.PLANS),
    "intervention": (readers.intervention_file, valid.FILES_OF_INTERVENTIONS),
    "task": (readers.task_file, valid.TASKS),
}


def main():
    """Fuzz one reader until libFuzzer has had enough, or something was found."""
    name, *options = sys.argv[1:]
    read, contents = READERS[name]
    # libFuzzer ends the process itself: nothing after it runs, no folder is removed.
    fast = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=fast if fast.is_dir() else None))
    (place / "corpus").mkdir()
    for number, content in enumerate(contents):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (place / "corpus" / str(number)).write_bytes(data)

    def one(data):
        try:
            read(place, data)
        except WorkbenchError as error:
            readers.assert_one_line(error)

    atheris.Setup([sys.argv[0], str(place / "corpus"), *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
