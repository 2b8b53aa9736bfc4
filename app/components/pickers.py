"""Choosing a model and prompts: recent ones, the embedded ones, or whatever a person types."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from app import data, jobs, url
from workbench.builtin import BUILTIN
from workbench.errors import ConfigError
from workbench.sources import GENERATED
from workbench.store.files import explained, replace_file

RECENT = 12
_DOMAIN = re.compile(r"[\w.-]+=.+")


def model_picker(scope: str, default: str = "demo", name: str = "model") -> str:
    """A model: demo, one that was used before, a local folder or a hub id; kept in the URL."""
    known = list(dict.fromkeys(["demo", *_recent("model")]))
    return _picker(
        (name, "Model"),
        known,
        default,
        f"{scope} model",
        "demo (embedded), a local folder, a hub id such as gpt2, or toy:DIR. Type one that is not "
        "in the list and press Enter.",
    )


def data_picker(scope: str, default: str = "builtin:natural") -> str:
    """Prompts: built in, drawn, used before, or a file or hub data set; kept in the URL."""
    builtin = [f"builtin:{name}" for name in BUILTIN]
    known = list(dict.fromkeys([*builtin, *GENERATED, *_recent("data")]))
    return _picker(
        ("data", "Prompts"),
        known,
        default,
        f"{scope} data",
        "builtin:NAME, random, repeat, a .txt, .jsonl or .safetensors file, or hf:NAME. For domains "
        "type NAME=SOURCE, NAME=SOURCE. Press Enter after typing.",
    )


def _picker(names: tuple[str, str], known: list[str], default: str, key: str, about: str) -> str:
    """A list that takes other values too; ``names`` are those of the URL and of the label."""
    name, label = names

    def parse(text: str) -> str:
        if not text.strip():
            raise ConfigError(f"{label.lower()} must be named; the URL names none")
        return text.strip()

    url.seed(name, parse, default, key)
    chosen = st.session_state[key]
    options = known if chosen in known or chosen is None else [chosen, *known]
    value = st.selectbox(label, options, key=key, help=about, accept_new_options=True)
    value = str(value or default).strip()
    url.keep(name, value, default)
    return value


def _recent(what: str) -> list[str]:
    recent: Iterable[Any] = (
        job.request.about.get(what) for job in jobs.listing(data.store_path(), limit=60)
    )
    return list(dict.fromkeys(str(value) for value in recent if value))[:RECENT]


def data_arguments(text: str) -> tuple[str, ...]:
    """``--data`` of the command line: once, or once for each NAME=SOURCE."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and all(map(_DOMAIN.fullmatch, parts)):
        return tuple(f"--data={part}" for part in parts)
    return (f"--data={text}",)


def data_value(text: str) -> Any:
    """The same for ``wb.run`` in a notebook."""
    parts = [part.strip() for part in text.split(",")]
    if all(map(_DOMAIN.fullmatch, parts)) and not Path(text).exists():
        return dict(part.split("=", 1) for part in parts)
    return text


def keep_prompts(text: str) -> str:
    """Keep typed prompts as a file of the store; returns its path."""
    return _keep("prompts", text, ".txt")


def keep_intervention(content: Mapping[str, Any]) -> str:
    """Keep an intervention of a form as a file of the store; returns its path."""
    return _keep("interventions", json.dumps(content, sort_keys=True), ".json")


def keep_plan(text: str) -> str:
    """Keep the plan of a sweep as a file of the store; returns its path."""
    return _keep("plans", text, ".yaml")


def _keep(what: str, text: str, suffix: str) -> str:
    """A file that is named by its content, so that equal requests have equal arguments."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = data.store_path() / "jobs" / what / f"{digest}{suffix}"
    with explained("write", path):
        replace_file(path, text.encode())
    return str(path)
