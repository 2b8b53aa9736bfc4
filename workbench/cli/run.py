"""``workbench run``: one probe on one model."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from workbench.cli import options as given
from workbench.cli.console import message, print_json, print_metrics, reporting
from workbench.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from workbench.result import Result


_NOT_SETTINGS = {"probe", "model", "data", "store", "reporter", "intervention"}


class RunCommand(TyperCommand):
    """Adds the settings of a probe to the help when the probe is named before ``--help``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note the probe before the library meets ``--help``."""
        first = next((word for word in args if word != "--help"), "-")
        ctx.meta["workbench.probe"] = None if first.startswith("-") else first
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the usual help, then the probe's settings."""
        super().format_help(ctx, formatter)
        probe = ctx.meta.get("workbench.probe")
        if probe:
            from workbench.cli.listing import probe_settings

            with formatter.section(f"Settings of {probe}"):
                formatter.write_dl(probe_settings(probe), col_max=40)


@dataclass(frozen=True)
class RunRequest:
    """The options of ``workbench run``."""

    probe: Annotated[
        str, typer.Argument(metavar="PROBE", help="Its name; 'workbench list probes' has them.")
    ]
    model: given.ModelName
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="D",
            help="builtin:NAME, random, repeat, a .txt, .jsonl or .safetensors, hf:NAME; or "
            "NAME=D once per domain. 'workbench list datasets' says more.",
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first N prompts.")] = None
    settings: given.Settings = None
    intervention: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json|NAME",
            help="Measure the edited model; its settings are --set intervention.KEY=VALUE.",
        ),
    ] = None
    backend: given.Backend = "hf"
    dtype: given.Dtype = "auto"
    device: given.Device = "auto"
    revision: given.Revision = None
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Prompts a forward pass; never changes numbers.")
    ] = "auto"
    seed: Annotated[int, typer.Option(metavar="S", help="Of everything random.")] = 0
    n_pos: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut prompts to N tokens and leave shorter ones out."),
    ] = None
    bos: Annotated[
        str, typer.Option(metavar="B", help="auto (as the tokenizer does), always or never.")
    ] = "auto"
    store: given.StoreFolder = None
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="Write the result to a file as well."),
    ] = None
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="F",
            help="json, csv, parquet or html: of -o (else its suffix says), or of stdout.",
        ),
    ] = None
    cache: Annotated[
        str, typer.Option(metavar="C", help="read the store first, refresh it, or off.")
    ] = "read"
    progress: given.Progress = "auto"
    as_json: given.AsJson = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what is done, on stderr.")
    ] = False

    @property
    def flags(self) -> dict[str, Any]:
        """The fields of ``workbench.requests.Options`` that have an option of their own."""
        names = ("limit", "backend", "dtype", "device", "revision", "seed", "n_pos", "bos", "cache")
        read = {name: getattr(self, name) for name in names}
        return read | {"batch_size": given.read_batch_size(self.batch_size)}

    @property
    def has_several_revisions(self) -> bool:
        """Whether ``--revision`` is a comma list."""
        return self.revision is not None and "," in self.revision


@given.takes(RunRequest)
def run_command(request: RunRequest) -> None:
    """Run a probe on a model and keep the result.

    A request that was answered before is answered from the store, without loading the model.
    'workbench run PROBE --help' adds the settings of the probe.

    Example: workbench run attention-sinks --model gpt2 --data my.txt -o sinks.html
    """
    several = request.has_several_revisions
    write = None if several else _writer(request.output, request.kind, request.as_json)
    options, own = given.split_settings(given.read_settings(request.settings))
    edit, own = given.split_intervention(request.intervention, own)
    if _NOT_SETTINGS & set(own):  # they would collide with the arguments of ``run``
        given.offer_nearest(request.probe, own)
    if request.verbose:
        log_to_stderr()
    how = {**request.flags, **options, **own, "intervention": edit}
    if several:
        from workbench.cli.revisions import Shown, run_revisions

        shown = Shown(request.output, request.kind, request.as_json, request.progress)
        how["data"] = given.read_data(request.data)
        run_revisions(request.probe, request.model, how, _open_store(request.store), shown)
        return
    start = time.perf_counter()
    result = _run(request, how, own)
    seconds = time.perf_counter() - start
    if write is not None:
        write(result)
    quiet = request.kind is not None and request.output is None
    _show(result, seconds, request.output, as_json=request.as_json, quiet=quiet)


def _run(request: RunRequest, how: dict[str, Any], own: dict[str, str]) -> "Result":
    """The result; an unknown setting is refused with the nearest of the probe's and the run's."""
    with reporting(request.progress) as reporter:
        from workbench.run import run

        data, store = given.read_data(request.data), _open_store(request.store)
        try:
            with given.offering_models(request.model):
                return run(
                    request.probe, request.model, data, store=store, reporter=reporter, **how
                )
        except UnknownNameError:
            given.offer_nearest(request.probe, own)
            raise


def _open_store(store: Path | None) -> Any:
    from workbench.store.results import Store

    return Store(store)


def log_to_stderr() -> None:
    """Show what the workbench logs."""
    import logging

    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("workbench").setLevel(logging.INFO)


def _writer(output: Path | None, kind: str | None, as_json: bool) -> Any:
    """What writes the result besides the store, checked before anything is computed."""
    if output is None and kind is None:
        return None
    from workbench.store.formats import FORMATS

    suffix = f".{kind.lower().lstrip('.')}" if kind else output.suffix.lower() if output else ""
    if suffix not in FORMATS:
        known = [name.lstrip(".") for name in FORMATS]
        raise UnknownNameError("file format", suffix.lstrip(".") or str(output), known)
    if output is None and as_json:
        raise typer.BadParameter(
            "--json and --format both want stdout; give -o PATH to one of them"
        )
    given.check_output(output)

    def write(result: "Result") -> None:
        content = FORMATS[suffix](result)
        if output is None:
            _write_stdout(content)
            return
        given.write_output(output, content)

    return write


def _write_stdout(content: bytes) -> None:
    if sys.stdout.isatty() and b"\0" in content:
        raise ConfigError("a binary format must go to a file; stdout is a terminal; give -o PATH")
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def _show(
    result: "Result", seconds: float, output: Path | None, *, as_json: bool, quiet: bool
) -> None:
    if as_json:
        print_json(
            {
                "key": result.key,
                "probe": result.probe,
                "metrics": result.metrics(),
                "path": result.path,
                "cached": result.cached,
                "seconds": round(seconds, 3),
            }
        )
    elif not quiet:
        print_metrics(result.metrics())
        _say_what_next(result, seconds, output)


def _say_what_next(result: "Result", seconds: float, output: Path | None) -> None:
    from workbench.result import SHORT_KEY

    how = "found in the store" if result.cached else "computed"
    under = f" under {result.edit}" if result.edit else ""
    message(f"{result.probe} on {result.model}{under}: {how} in {seconds:.2g} s")
    if output is not None:
        message(f"written: {output}")
    if result.path is not None:
        key = result.key[:SHORT_KEY]
        message(f"next: workbench results show {key}; workbench results export {key} result.html")
