"""Runs a command line, in this process or in one of its own, and looks at what it left."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from workbench.cli.main import run_command_line


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    def failed_with(self, *words: str) -> bool:
        """Exit code 1, nothing on stdout, one line on stderr that has all the words."""
        assert self.code == 1, (self.code, self.err)
        assert self.out == ""
        assert self.err.startswith("workbench: ")
        assert self.err.count("\n") == 1, self.err
        for word in words:
            assert word in self.err, self.err
        return True


class Command:
    """``command("run", ...)`` in this process; ``command.alone(...)`` in a new one."""

    def __init__(self, capfd: Any) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: object) -> Outcome:
        self._capfd.readouterr()
        code = run_command_line([str(argument) for argument in arguments])
        out, err = self._capfd.readouterr()
        return Outcome(code, out, err)

    def alone(
        self, *arguments: object, python: tuple[str, ...] = (), **environment: str
    ) -> Outcome:
        done = subprocess.run(
            [sys.executable, *python, "-m", "workbench", *map(str, arguments)],
            capture_output=True,
            env={**os.environ, **environment},
            timeout=300,
            check=False,
        )
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
