"""``workbench validate``: proof that hooks read and edit the real thing on this model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.card import number_text
from workbench.cli import options as given
from workbench.cli.console import message, print_json, print_table

_MARKS = {True: "passed", False: "FAILED", None: "skipped"}


def validate_command(
    model: given.ModelName,
    backend: given.Backend = "hf",
    dtype: given.Dtype = "auto",
    device: given.Device = "auto",
    revision: given.Revision = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="Write the checks as JSON as well."),
    ] = None,
    as_json: given.AsJson = False,
) -> None:
    """Prove on one model that hooks read and edit the real thing.

    Exit code 1 when a check fails.
    """
    given.check_output(output)
    from workbench.models.validate import companions, to_rows, validate_model

    loaded = given.load_model(model, backend, revision, dtype, device)
    checks = validate_model(loaded, other_backends=companions(loaded))
    document = {
        "model": loaded.spec.name,
        "revision": loaded.spec.revision,
        "backend": loaded.backend,
        "passed": not any(check.passed is False for check in checks),
        "checks": to_rows(checks),
    }
    if output is not None:
        from workbench.store.strict_json import to_json

        given.write_output(output, (to_json(document, indent=1) + "\n").encode())
    if as_json:
        print_json(document)
    else:
        print_table(("check", "", "value", "bound", "detail"), [_row(check) for check in checks])
    if not document["passed"]:
        failed = [
            f"{check.name} ({check.value}, bound {check.bound})"
            for check in checks
            if check.passed is False
        ]
        message(
            f"workbench: every check must pass on {loaded.spec.name}; failed: {', '.join(failed)}"
        )
        raise typer.Exit(1)


def _row(check: Any) -> tuple[str, str, str, str, str]:
    value, bound = ("" if x is None else number_text(float(x)) for x in (check.value, check.bound))
    return check.name, _MARKS[check.passed], value, bound, check.detail
