"""The process of one job: ``python -m app.job_process FOLDER`` runs the command of its request."""

import json
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from workbench.cli.main import INTERRUPTED, TERMINATED, run_command_line
from workbench.processes import birth_of
from workbench.store.files import replace_file


def run_job(folder: Path) -> int:
    """Run the request in a job's folder and note there how it went; returns the exit code."""
    # A server that was started in the background has Ctrl-C switched off, and we inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    status: dict[str, Any] = {
        "state": "running",
        "pid": os.getpid(),
        "birth": birth_of(os.getpid()),
    }
    _write(folder, status)
    code = 1
    try:
        if (folder / "cancel.json").exists():
            raise KeyboardInterrupt  # asked to stop before it had announced itself
        request = json.loads((folder / "request.json").read_bytes())
        code = run_command_line([str(argument) for argument in request["arguments"]])
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        stopped = code in (INTERRUPTED, TERMINATED)
        state = "cancelled" if stopped else "done" if code == 0 else "failed"
        finished = datetime.now(UTC).isoformat(timespec="milliseconds")
        _write(folder, {**status, "state": state, "code": code, "finished": finished})
    return code


def _write(folder: Path, status: dict[str, Any]) -> None:
    replace_file(folder / "status.json", json.dumps(status).encode())


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1])))
