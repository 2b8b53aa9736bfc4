"""What a result was asked for, as ``wb.run`` takes it: from its job, or from its provenance."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.components.pickers import data_value
from app.jobs import Job
from workbench.builtin import BUILTIN
from workbench.discovery import TOY_TASKS, find_probe
from workbench.errors import WorkbenchError
from workbench.result import Result
from workbench.sources import GENERATED
from workbench.store.strict_json import jsonable

COMMIT_CHARACTERS = 40
"""Of a hub's revision; that of a folder is a SHA-256, and where the folder lies is told nowhere."""


@dataclass(frozen=True)
class Asked:
    """The arguments of ``wb.run`` that lead to a result's key."""

    model: str
    data: Any
    given: Mapping[str, Any]
    """Options of the run and settings of the probe."""
    intervention: Any = None


def asked_by_job(job: Job) -> Asked:
    """What a person chose in the form."""
    about = job.request.about
    source = about.get("data")
    return Asked(
        str(about.get("model")),
        data_value(source) if source and source != "none" else None,
        {**about.get("options", {}), **about.get("settings", {})},
        about.get("intervention"),
    )


def asked_by_provenance(result: Result) -> Asked | None:
    """The same of a run that was started elsewhere; None where its parts cannot be found by name.

    The model must be the embedded one or a hub's, the prompts must be embedded or drawn: a result
    tells of files their names and hashes, not where they lie.
    """
    made = result.provenance
    prompts = made.get("prompts") or {}
    source = prompts.get("source")
    revision = str(made.get("revision") or "")
    from_hub = len(revision) == COMMIT_CHARACTERS
    named = [f"builtin:{name}" for name in BUILTIN] + list(GENERATED)
    edits = made.get("interventions") or []
    findable = result.model == "demo" or from_hub
    if result.probe in TOY_TASKS or not findable or len(edits) > 1:
        return None
    if prompts and source not in named:
        return None
    given: dict[str, Any] = {
        name: made[name] for name in ("seed", "dtype", "backend", "bos") if name in made
    }
    if from_hub:
        given["revision"] = revision
    if prompts:
        given["limit"] = prompts["n_prompts"] + prompts.get("n_left_out", 0)
        if prompts.get("n_pos_min") == (n_pos := prompts.get("n_pos_max")):
            given["n_pos"] = n_pos
    try:
        return Asked(result.model, source, {**given, **_changed(result)}, _content(edits))
    except WorkbenchError:  # a probe or an intervention that is not installed here
        return None


def _content(edits: list[Any]) -> dict[str, Any] | None:
    """An intervention as a file holds it; a result notes its class besides."""
    from workbench.interventions.files import from_content

    if not edits:
        return None
    content = {name: value for name, value in edits[0].items() if name != "type"}
    from_content(content)
    return content


def _changed(result: Result) -> dict[str, Any]:
    """The probe's settings that are not its defaults."""
    default = jsonable(dataclasses.asdict(find_probe(result.probe).config()))
    return {name: value for name, value in result.config.items() if default.get(name, ...) != value}
