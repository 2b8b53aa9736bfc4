"""The form that starts a run of a probe, and the job it became."""

from dataclasses import dataclass
from typing import Any

import streamlit as st

from app import data, jobs, url
from app.components import pickers
from app.components.config_form import as_arguments, config_form
from app.components.intervention_form import intervention_form
from app.components.job_view import job_view
from app.components.text import plain
from app.models import head_counts, refuse_too_large
from workbench.errors import ConfigError, WorkbenchError
from workbench.models.names import resolve_model
from workbench.registry import Probe
from workbench.requests import MAX_SEED


def run_form(probe: Probe) -> None:
    """Model, prompts, how to run and the probe's own settings; a button that starts a job."""
    scope = f"run {probe.name}"
    left, right = st.columns(2)
    with left:
        model = pickers.model_picker(scope)
    chosen = ""
    with right:
        if probe.takes_data:
            default = "builtin:natural" if probe.needs_data else "none"
            chosen = pickers.data_picker(scope, default)
        else:
            st.caption("This probe reads weights and needs no prompts.")
    typed = ""
    if probe.takes_data:
        with st.popover("Type prompts instead", icon=":material/edit:"):
            typed = st.text_area(
                "Prompts, separated by blank lines", key=f"{scope} typed", max_chars=200_000
            )
    how = _how(scope)
    st.markdown("**Settings of the probe**")
    problem = ""
    settings: dict[str, Any] = {}
    edit: dict[str, Any] | None = None
    try:
        settings = config_form(probe.config, probe.name, scope)
        edit = _edit(probe, model, scope)
    except WorkbenchError as error:
        problem = str(error)
        st.error(plain(problem))
    if st.button("Start", type="primary", key=f"{scope} start", disabled=bool(problem)):
        try:
            source = pickers.keep_prompts(typed) if typed.strip() else chosen
            _start(_Asked(probe, model, source, how, settings, edit))
        except WorkbenchError as error:
            st.error(plain(str(error)))


@dataclass(frozen=True)
class _Asked:
    """What the form says."""

    probe: Probe
    model: str
    source: str
    """Of prompts."""
    how: dict[str, Any]
    settings: dict[str, Any]
    edit: dict[str, Any] | None
    """The content of an intervention file; None: the stock model."""


def _edit(probe: Probe, model: str, scope: str) -> dict[str, Any] | None:
    """An intervention that is switched on while the probe measures; None: the stock model."""
    key = f"{scope} edited"
    url.seed("edited", lambda text: url.one_of(("yes", "no"), "edited")(text) == "yes", False, key)
    edited = st.toggle(
        "Measure an edited model",
        key=key,
        help="The result is kept beside that of the stock model: put both on the page Compare.",
    )
    url.keep("edited", "yes" if edited else "no", "no")
    if not edited:
        return None
    with st.container(border=True):
        return intervention_form(*head_counts(model))


def _how(scope: str) -> dict[str, Any]:
    """The fields of a run that matter most; the rest are for the command line."""
    n_pos, limit, seed, dtype = st.columns(4)
    found: dict[str, Any] = {}
    with n_pos:
        found["n_pos"] = _whole("n_pos", "Tokens a prompt", scope, "Cut prompts to so many tokens, "
                                "leave shorter ones out; empty: whole prompts.")  # fmt: skip
    with limit:
        found["limit"] = _whole("limit", "Prompts at most", scope, "Empty: all.")
    with seed:
        found["seed"] = _whole("seed", "Seed", scope, "Of everything random.", low=0)
    with dtype:
        key, options = f"{scope} dtype", ("auto", "float32", "float16", "bfloat16")
        url.seed("dtype", url.one_of(options, "dtype"), "auto", key)
        found["dtype"] = st.selectbox("dtype", options, key=key, help="auto: the checkpoint's.")
        url.keep("dtype", found["dtype"], "auto")
    return {name: value for name, value in found.items() if value not in (None, "auto")}


def _whole(name: str, label: str, scope: str, about: str, low: int = 1) -> int | None:
    key, high = f"{scope} {name}", min(MAX_SEED, 2**53 - 1)
    url.seed(name, url.whole(low, high, name), None, key)
    value = st.number_input(label, low, None, value=None, step=1, key=key, help=about)
    url.keep(name, "" if value is None else str(value))
    return None if value is None else int(value)


def _start(asked: _Asked) -> None:
    probe, source = asked.probe, asked.source
    if probe.needs_data and not source:
        raise ConfigError(f"{probe.name} needs prompts; none were chosen; choose or type some")
    refuse_too_large(asked.model, asked.how.get("dtype", "auto"))
    arguments = ["run", probe.name, f"--model={asked.model}", "--progress=json", "--json"]
    if probe.takes_data and source != "none":
        arguments += pickers.data_arguments(source)
    arguments += [
        f"--{name.replace('_', '-')}={value}" for name, value in sorted(asked.how.items())
    ]
    arguments += as_arguments(asked.settings)
    if asked.edit is not None:
        arguments.append(f"--intervention={pickers.keep_intervention(asked.edit)}")
    about = {
        "model": asked.model,
        "place": resolve_model(asked.model) if asked.model != "demo" else "demo",
        "data": source if probe.takes_data else None,
        "options": asked.how,
        "settings": {name: _plain_value(value) for name, value in asked.settings.items()},
        "intervention": asked.edit,
    }
    request = jobs.Request("run", probe.name, tuple(arguments), about)
    job, new = jobs.start(data.store_path(), request)
    if not new:
        st.session_state[f"job told {job.id}"] = True
    url.go("job", job.id)
    url.run_page_again()


def _plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def current_job() -> str:
    """Show the job that the URL names; returns the key of its result once it is there."""
    job_id = job_of_url("page")
    if not job_id:
        return ""
    job = jobs.read(data.store_path(), job_id)
    if job is not None and job.state == "done":
        return job.key
    if st.session_state.pop(f"job told {job_id}", False):
        st.info("The same run was under way already: this is it, nothing was started twice.")
    with st.container(border=True):
        job_view(job_id, scope="page")
    return ""


def job_of_url(scope: str) -> str:
    """The id of the job that the URL names; "" where it names none."""
    key = f"job of the {scope}"
    url.seed("job", _job_id, "", key)
    job_id = str(st.session_state[key])
    if job_id:
        url.keep("job", job_id)
    return job_id


def _job_id(text: str) -> str:
    if jobs.ID.fullmatch(text) is None or jobs.read(data.store_path(), text) is None:
        raise ConfigError(f"job must be the id of a job of this store; got {text!r}")
    return text
