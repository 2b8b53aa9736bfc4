"""The ``workbench`` command: streams, signals, and errors as exit codes.

    0    done
    1    an error the user can mend: one line on stderr
    2    usage
    3    some cells of a sweep failed; the rest are kept
    130  interrupted (143 for SIGTERM); finished work is kept

A traceback means a bug of ours. The commands themselves are in ``workbench.cli.commands``, which is
imported only when signals are already in hand.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
PIPE_CLOSED = 141
"""What a shell reports for a program that SIGPIPE stopped."""


def main() -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    _prepare_streams()
    code = run_command_line(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _close_stdout()
    if code == INTERRUPTED:
        # Every ``with`` has unwound. Taking torch down in order costs seconds on a busy machine,
        # and whoever pressed Ctrl-C is waiting.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _terminate(signum: int, frame: FrameType | None) -> None:
    # An exception unwinds every ``with``: leases are given up, unfinished files removed.
    raise SystemExit(TERMINATED)


def _prepare_streams() -> None:
    """Make sure that no text is one the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _close_stdout() -> int:
    # Else the interpreter flushes again at exit and complains then.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


def run_command_line(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        return _run(list(arguments) or ["--help"])
    except KeyboardInterrupt:
        return _say("interrupted; what was finished is kept", INTERRUPTED)
    except BrokenPipeError:
        return _close_stdout()
    except (MemoryError, RuntimeError) as error:
        from workbench.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _say(
            f"the run must fit in memory; {_first_line(error)}; lower --batch-size, --n-pos or "
            "--limit, or use a smaller --dtype",
            1,
        )


def _run(arguments: list[str]) -> int:
    import typer

    from workbench.cli.commands import app
    from workbench.errors import WorkbenchError

    # The library's class for wrong usage, wherever this version of it lives.
    usage_error: Any = typer.BadParameter.__mro__[1]
    command = typer.main.get_command(app)
    try:
        # Not command.main, which would deal with Ctrl-C and closed pipes in its own way.
        with command.make_context("workbench", arguments) as context:
            command.invoke(context)
    except typer.Exit as error:
        return error.exit_code
    except usage_error as error:
        path = error.ctx.command_path if error.ctx else "workbench"
        return _say(f"{error.format_message()} (see '{path} --help')", 2)
    except WorkbenchError as error:
        return _say(str(error), 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.strerror is None:
            raise
        return _say(
            f"a file must be readable and writable; {error.filename or 'a file'}: "
            f"{error.strerror.lower()}; choose another place",
            1,
        )
    return 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "there was not enough").splitlines()[0][:200]


def _say(text: str, code: int) -> int:
    sys.stderr.write(f"workbench: {' '.join(text.split())}\n")
    return code
