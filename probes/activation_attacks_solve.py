"""Solves problems together: batches are searched, what ends is judged and told, what is under way noted."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from probes.activation_attacks_bench import (
    Bench,
    Outcome,
    Problem,
    ask,
    logits_of_group,
    problems_at_once,
    similar_lengths,
    verify,
)
from probes.activation_attacks_optimise import (
    Descent,
    Listener,
    Problems,
    Reached,
    Slots,
    force_tokens,
)


def _ignore(*_: object) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Report:
    """Who is told what while problems are solved."""

    finished: Callable[[Problem, Outcome], None]
    """A problem has ended; at once."""
    passed: Callable[[float], None] = _ignore
    """After every pass, with the lowest loss in work."""
    note: Callable[[dict[str, Tensor]], None] = _ignore
    """Where the problems in work stand, before more than one problem's steps would be lost."""
    noted: dict[str, Tensor] | None = None
    """What ``note`` was told last in a run that was killed."""


def solve(
    bench: Bench,
    problems: Sequence[Problem],
    descent: Descent,
    report: Report,
) -> Bench:
    """Attack all problems, those of similar length together.

    Args:
        bench: The model under attack.
        problems: In any order.
        descent: The search.
        report: Told what happens; what it has ``noted`` of these problems is gone on with.

    Returns:
        The bench, with smaller passes where memory did not suffice.
    """
    for group in similar_lengths(problems):
        asked = ask(bench, group)
        # One pass is then never more than one problem's steps; see ``Listener.standing``.
        at_once = min(problems_at_once(bench, group), descent.steps)
        listener = Listener(
            partial(_tell, bench, group, report.finished),
            report.passed,
            lambda slots, group=group: report.note(_described(slots, group)),
        )
        begun = _begun(report.noted, group, asked)
        left = force_tokens(
            logits_of_group(bench, group), asked, descent, at_once, listener, begun=begun
        )
        if left < at_once:
            bench = replace(bench, at_most=left)
    return bench


def _tell(
    bench: Bench,
    group: list[Problem],
    finished: Callable[[Problem, Outcome], None],
    index: int,
    reached: Reached,
) -> None:
    problem = group[index]
    own = reached.perturbation[: len(problem.cell.positions)]
    finished(problem, verify(bench, problem, reached._replace(perturbation=own)))


def _described(slots: Slots, group: Sequence[Problem]) -> dict[str, Tensor]:
    """The problems in work as tensors, by their names."""
    names = json.dumps([group[index].name for index in slots.problem.tolist()])
    described = {**slots._asdict(), "names": torch.tensor(list(names.encode()), dtype=torch.uint8)}
    del described["problem"]
    return described


def _begun(
    noted: dict[str, Tensor] | None, group: Sequence[Problem], problems: Problems
) -> Slots | None:
    """Those of the problems that were noted in work, with what they had reached."""
    if noted is None:
        return None
    places = {problem.name: index for index, problem in enumerate(group)}
    names = json.loads(bytes(noted["names"].tolist()))
    rows = [row for row, name in enumerate(names) if name in places]
    if not rows:
        return None
    n_attacked, device = problems.free.shape[1], problems.free.device
    fields = {name: tensor[rows].to(device) for name, tensor in noted.items() if name != "names"}
    for name, tensor in fields.items():
        if tensor.dim() == 3:  # places beyond a problem's own hold zeros, more or fewer of them
            fields[name] = pad(tensor, (0, 0, 0, n_attacked - tensor.shape[1]))
    return Slots(torch.tensor([places[names[row]] for row in rows], device=device), **fields)
