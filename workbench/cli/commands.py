"""Joins the commands into one application; nothing heavy is imported here."""

from typing import Annotated

import typer

from workbench import __version__
from workbench.cli import (
    app as dashboard,
)
from workbench.cli import (
    calibrate,
    demo,
    doctor,
    evaluate,
    generate,
    listing,
    report,
    results,
    run,
    sweep,
    train,
    validate,
)

app = typer.Typer(
    help="Run interpretability probes on language models and look at what they found.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"workbench {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


app.command("demo")(demo.demo_command)
app.command("run", cls=run.RunCommand)(run.run_command)
app.command("sweep")(sweep.sweep_command)
app.command("list")(listing.list_command)
app.command("generate")(generate.generate_command)
app.command("calibrate")(calibrate.calibrate_command)
app.command("evaluate")(evaluate.evaluate_command)
app.command("train")(train.train_command)
app.command("validate")(validate.validate_command)
app.add_typer(results.app, name="results")
app.command("report")(report.report_command)
app.command("app")(dashboard.app_command)
app.command("doctor")(doctor.doctor_command)
