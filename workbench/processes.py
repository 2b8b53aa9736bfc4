"""Whether a process still runs, told apart from another one that got its number later."""

import os
import subprocess
from pathlib import Path


def birth_of(pid: int) -> str | None:
    """When a process was born, as the system writes it; None: there is no such process.

    A zombie, which has ended and waits to be asked, counts as gone.

    Raises:
        NotImplementedError: The system is no Unix.
    """
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            text = stat.read_text("utf-8", "replace")
        except OSError:
            return None
        # The name, in brackets, may hold spaces and brackets itself.
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    if os.name == "nt":
        raise NotImplementedError("jobs need a Unix system")
    told = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return None if not told or told.startswith("Z") else told.partition(" ")[2].strip()


def is_alive(pid: int, birth: str | None) -> bool:
    """Whether the process that was born then still runs."""
    now = birth_of(pid)
    return now is not None and now == birth
