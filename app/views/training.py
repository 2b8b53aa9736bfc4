"""Train a toy, watch it while it trains, and go back through its checkpoints."""

from pathlib import Path
from typing import Any

import streamlit as st

from app import data, jobs, registry, url
from app.components import checkpoints
from app.components.config_form import as_arguments, config_form
from app.components.figures import show_figure
from app.components.head_view import pattern_figure
from app.components.job_view import look_at, show_job
from app.components.layout import page
from app.components.text import moment, plain
from app.pacing import LOOK_SECONDS
from workbench.errors import ConfigError, WorkbenchError

MOST_CURVES = 4


def training_page() -> None:
    """A form, the runs, and the run that is looked at."""
    with page("training", "Toy training"):
        data.listing()
        found = [job for job in jobs.listing(data.store_path()) if job.request.kind == "train"]
        with st.expander("Start a training", expanded=not found, icon=":material/play_arrow:"):
            _form()
        if not found:
            st.info("No toy has been trained from here yet. Start one above.")
        job = _choose(found)
        if job is not None:
            every = LOOK_SECONDS if job.is_running else None
            st.fragment(_watch, run_every=every)(job.id, job.is_running)


def _form() -> None:
    toys = registry.toy_names()
    url.seed("toy", url.one_of(toys, "toy"), toys[0], "training toy")
    toy = st.selectbox("Toy", toys, key="training toy")
    url.keep("toy", toy, toys[0])
    task = registry.probe_of(toy)
    st.markdown(plain(task.summary))
    problem = False
    settings: dict[str, Any] = {}
    try:
        settings = config_form(task.config, toy, f"train {toy}")
    except WorkbenchError as error:
        problem = True
        st.error(plain(str(error)))
    if st.button("Train", type="primary", disabled=problem):
        arguments = as_arguments(settings)
        # Equal settings train in one folder: a run that was stopped goes on there.
        place = jobs.Request("train", toy, arguments).hash
        folder = data.store_path() / "training" / place
        request = jobs.Request(
            "train",
            toy,
            ("train", toy, f"--output={folder}", *arguments, "--json"),
            {"folder": place, "settings": {name: str(value) for name, value in settings.items()}},
        )
        job, new = jobs.start(data.store_path(), request)
        if not new:
            st.session_state["training told"] = True
        url.go("job", job.id)
        url.run_page_again()


def _choose(found: list[jobs.Job]) -> jobs.Job | None:
    by_id = {job.id: job for job in found}

    def parse(text: str) -> str:
        if text not in by_id:
            raise ConfigError(f"job must be the id of a training of this store; got {text!r}")
        return text

    url.seed("job", parse, next(iter(by_id), ""), "training job")
    if not by_id:
        return None
    if st.session_state["training job"] not in by_id:
        st.session_state["training job"] = next(iter(by_id))
    chosen = st.selectbox(
        "Training",
        list(by_id),
        key="training job",
        format_func=lambda name: (
            f"{by_id[name].request.name} · {moment(by_id[name].created)} · {name[:6]}"
        ),
    )
    url.keep("job", chosen)
    if st.session_state.pop("training told", False):
        st.info("The same training was under way already: this is it.")
    return by_id[chosen]


def _watch(job_id: str, was_running: bool) -> None:
    url.begin_part()
    _look(job_id, was_running)
    url.end()


def _look(job_id: str, was_running: bool) -> None:
    job = look_at(job_id, "training", was_running=was_running)
    if job is None:
        return
    with st.container(border=True):
        show_job(job, "training")
    folder = _folder_of(job)
    if folder is None:
        return
    step = _curves_and_step(folder, job.request.name)
    if step is not None:
        _pattern(folder, step)
    if job.key:
        _figures(job.key)


def _folder_of(job: jobs.Job) -> Path | None:
    """The run's folder; only a name that is a hash becomes a path."""
    name = str(job.request.about.get("folder", ""))
    if len(name) != 16 or not set(name) <= set("0123456789abcdef"):
        return None
    folder = data.store_path() / "training" / name
    return folder if folder.is_dir() else None


def _curves_and_step(folder: Path, toy: str) -> int | None:
    found = checkpoints.curves(folder)
    steps = checkpoints.checkpoint_steps(folder)
    step = None
    if len(steps) > 1:
        widget = "training step"
        url.seed("step", url.whole(0, max(steps), "step"), steps[-1], widget)
        follow = st.toggle("Follow the newest checkpoint", value=True, key="training follow")
        if follow and st.query_params.get("step") is None:
            st.session_state[widget] = steps[-1]
        if st.session_state[widget] not in steps:
            st.session_state[widget] = min(steps, key=lambda s: abs(s - st.session_state[widget]))
        step = int(st.select_slider("Checkpoint (step)", steps, key=widget, disabled=follow))
        url.keep("step", "" if follow else str(step))
    if found:
        names = list(found)
        first = [name for name in names if name != "lr"][:2]
        parse = url.one_of(names, "curve")
        url.seed(
            "curves",
            lambda text: [parse(part) for part in text.split(",")][:MOST_CURVES],
            first,
            "training curves",
        )
        st.session_state["training curves"] = [
            name for name in st.session_state["training curves"] if name in names
        ]
        chosen = st.multiselect("Curves", names, max_selections=MOST_CURVES, key="training curves")
        url.keep("curves", ",".join(chosen), ",".join(first))
        if chosen:
            theory = {
                name: said
                for name, said in checkpoints.theory_of(toy, found).items()
                if name in chosen
            }
            st.caption(_about(found, theory))
            st.plotly_chart(
                checkpoints.curves_figure({name: found[name] for name in chosen}, step, theory),
                theme=None,
                key="training curves figure",
                config={"displaylogo": False},
                alt="curves of the training over its steps",
            )
    return step


def _about(found: dict[str, checkpoints.Curve], theory: dict[str, Any]) -> str:
    """Over how much the curves are taken, and which lines are theory."""
    n_lines = max(len(steps) for steps, _ in found.values())
    told = [f"n = 1 run, {n_lines} lines of its log so far."]
    told += [f"Dashed in {name}: {label}." for name, (label, _) in theory.items()]
    return plain(" ".join(told))


def _pattern(folder: Path, step: int) -> None:
    n_layers, n_heads = checkpoints.shape_of(folder)
    left, right = st.columns(2)
    url.seed("layer", url.whole(0, n_layers - 1, "layer"), 0, "training layer")
    url.seed("head", url.whole(0, n_heads - 1, "head"), 0, "training head")
    layer = left.selectbox("Layer", range(n_layers), key="training layer")
    head = right.selectbox("Head", range(n_heads), key="training head")
    url.keep("layer", str(layer), "0")
    url.keep("head", str(head), "0")
    try:
        patterns, names, origin = _pattern_at(str(folder), step, layer)
    except (WorkbenchError, OSError) as error:
        st.caption(plain(f"No pattern of this toy can be shown: {error}"))
        return
    positions = list(range(patterns.shape[-1]))
    head = min(head, len(patterns) - 1)
    figure = pattern_figure(patterns[head], names, positions, positions, f"L{layer}H{head}")
    figure.update_layout(title=None, margin_t=20)
    st.caption(plain(f"Attention at step {step} on {origin}; {len(positions)} positions."))
    st.plotly_chart(figure, theme=None, key="training pattern", config={"displaylogo": False})


@st.cache_resource(max_entries=16, show_spinner=False)
def _pattern_at(folder: str, step: int, layer: int) -> tuple[Any, list[str], str]:
    """A checkpoint never changes: it is not loaded again at every look."""
    return checkpoints.pattern_at(Path(folder), step, layer)


def _figures(key: str) -> None:
    """The record of the finished run, with its closed forms where it has some."""
    try:
        figures = data.figures_of(key)
        finding = data.finding_of(key)
    except WorkbenchError as error:
        st.error(plain(str(error)))
        return
    st.subheader("What the whole run shows")
    if finding:
        st.success(plain(finding), icon=":material/lightbulb:")
    if not figures:
        return
    names = list(figures)
    url.seed("figure", url.one_of(names, "figure"), names[0], "training figure")
    if st.session_state["training figure"] not in names:
        st.session_state["training figure"] = names[0]
    name = st.selectbox(
        "Figure", names, key="training figure", format_func=lambda name: name.replace("_", " ")
    )
    url.keep("figure", name, names[0])
    show_figure(figures[name], name, "training")
