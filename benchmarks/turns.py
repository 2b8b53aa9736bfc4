"""Methods in processes of their own that are asked in turn.

Rounds are interleaved, so that what the machine does meanwhile hits all alike; a process of its own keeps
one method's memory out of another's.
"""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from record import OURS

Answer = dict[str, Any]
Built = tuple[Answer, Callable[[], Any], Callable[[Any], Answer]]
"""What is said once, what is timed, and what is said of its result each time."""


def nothing(result: Any) -> Answer:
    """Of a result of which only the time is wanted."""
    return {}


def serve(pipe: Connection, build: Callable[[], Built]) -> None:
    """Be one of the processes: build, then run whenever asked; a method that fails says so."""
    try:
        first, run, said = build()
        pipe.send(first)
        while pipe.recv() == "run":
            start, cpu = time.perf_counter(), time.process_time()
            result = run()
            taken = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
            pipe.send(taken | said(result))
            del result
    except ModuleNotFoundError as error:
        pipe.send({"error": f"{error.name} is not installed"})
    except Exception as error:  # a peer that fails is a row of the table
        pipe.send({"error": f"{type(error).__name__}: {error}"[:200]})


def in_turn(
    target: Callable[..., None], tasks: Mapping[str, tuple[Any, ...]], rounds: int
) -> dict[str, Answer]:
    """Ask every process once a round.

    Args:
        target: Called in each process with its task and a pipe, which it gives to ``serve``.
        tasks: What each is told, by name.
        rounds: How often each is asked.

    Returns:
        By name what was said once, with a list of what was said each time; or ``error`` where it failed.

    Raises:
        SystemExit: A method of ours failed; a peer that does is a row of the table.
    """
    context = multiprocessing.get_context("spawn")
    workers, found = {}, {}
    for name, task in tasks.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(*task, theirs), daemon=True)
        process.start()
        theirs.close()  # or nobody would notice a process that has died
        found[name] = _answer(ours)
        if "error" not in found[name]:
            workers[name] = process, ours
    for _ in range(rounds):
        for name, (_, pipe) in list(workers.items()):
            pipe.send("run")
            answer = _answer(pipe)
            if "error" in answer:
                found[name] = answer
                del workers[name]
            for key, value in answer.items() if name in workers else ():
                found[name].setdefault(key, []).append(value)
    for process, pipe in workers.values():
        pipe.send("stop")
        process.join()
    for name, answer in found.items():
        if name.startswith(OURS) and "error" in answer:
            raise SystemExit(f"{name} failed: {answer['error']}")
    return found


def _answer(pipe: Connection) -> Answer:
    """What a process says next; one that was killed says nothing."""
    try:
        answer: Answer = pipe.recv()
    except EOFError:
        return {"error": "the process ended without an answer (out of memory?)"}
    return answer
