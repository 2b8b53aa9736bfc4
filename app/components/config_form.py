"""A form made from a config class: one input a field, its help and unit beside it, kept in the URL."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import streamlit as st

from app import url
from app.components.text import plain
from workbench.settings import make_config

PREFIX = "s."
"""Of settings in the URL, so that none of them is taken for a selection of the page."""

_SAFE_INTEGER = 2**53 - 1  # of a browser


def config_form(config: type, what: str, scope: str) -> dict[str, Any]:
    """Show one input per field and return the values that differ from the defaults.

    Args:
        config: A config dataclass whose fields are ``setting(...)``.
        what: Whose settings they are, for messages.
        scope: Makes the widgets' keys the page's own.

    Raises:
        ConfigError: A value that must not be; it is also written beside the form.
    """
    hints = typing.get_type_hints(config)
    fields = [field for field in dataclasses.fields(config) if field.init]
    changed: dict[str, Any] = {}
    columns = st.columns(2)
    for index, field in enumerate(fields):
        with columns[index % 2]:
            value = field_input(field, hints[field.name], f"{scope} {field.name}")
        default = _default(field)
        if value != default and not (isinstance(value, str) and value == text_of(default)):
            changed[field.name] = value
    make_config(config, changed, what)
    return changed


def as_arguments(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings as ``--set`` of the command line."""
    return tuple(f"--set={name}={text_of(value)}" for name, value in sorted(settings.items()))


def text_of(value: Any) -> str:
    """A value as ``--set`` reads it."""
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return ",".join(map(text_of, value))
    return repr(value) if isinstance(value, float) else str(value)


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def field_input(field: Any, hint: Any, key: str) -> Any:
    """The input of one field, by its type; its help, range and unit come from its metadata."""
    about = field.metadata
    help_text = _help(field)
    label = field.name.replace("_", " ") + (f" ({about['unit']})" if about.get("unit") else "")
    kinds = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    if about.get("choices"):
        return _choice(field, about["choices"], label, help_text, key)
    if kinds == (bool,):
        return _switch(field, label, help_text, key)
    numeric = [kind for kind in kinds if kind is not type(None)]
    if numeric in ([int], [float]):
        return _number(field, numeric[0], label, help_text, key)
    return _text(field, label, help_text, key)


_UNIONS = (typing.Union, types.UnionType)


def _help(field: Any) -> str:
    about = field.metadata
    parts = [plain(str(about.get("help") or ""))]
    if about.get("low") is not None or about.get("high") is not None:
        low, high = about.get("low"), about.get("high")
        inside = " (ends excluded)" if about.get("exclusive") else ""
        ends = [
            f"from {low:g}" if low is not None else "",
            f"to {high:g}" if high is not None else "",
        ]
        parts.append(f"Range: {' '.join(filter(None, ends))}{inside}.")
    parts.append(f"Default: {plain(text_of(_default(field))) or 'none'}.")
    return " ".join(filter(None, parts))


def _choice(field: Any, choices: Any, label: str, help_text: str, key: str) -> Any:
    by_text = {text_of(choice): choice for choice in choices}
    default = text_of(_default(field))
    options = list(by_text) if default in by_text else [default, *by_text]
    name = PREFIX + field.name
    url.seed(name, url.one_of(options, field.name), default, key)
    text = st.selectbox(label, options, key=key, help=help_text)
    url.keep(name, text, default)
    return by_text.get(text, _default(field))


def _switch(field: Any, label: str, help_text: str, key: str) -> bool:
    name, default = PREFIX + field.name, bool(_default(field))
    parse = url.one_of(("True", "False"), field.name)
    url.seed(name, lambda text: parse(text) == "True", default, key)
    value = st.toggle(label, key=key, help=help_text)
    url.keep(name, str(value), str(default))
    return bool(value)


def _number(field: Any, kind: type, label: str, help_text: str, key: str) -> Any:
    name, about = PREFIX + field.name, field.metadata
    default = None if _default(field) is None else kind(_default(field))
    low, high = (None if about.get(end) is None else kind(about[end]) for end in ("low", "high"))

    read = url.number(kind, low, high, field.name)
    url.seed(name, lambda text: None if not text and default is None else read(text), default, key)
    limits: dict[str, Any] = {"min_value": low, "max_value": high, "step": 1}
    if kind is int:
        limits["max_value"] = None if high is None else min(high, _SAFE_INTEGER)
    else:
        limits |= {"format": "%g", "step": _step(float(default or 0.0))}
    value = st.number_input(
        label, key=key, help=help_text, value=None, placeholder="none", **limits
    )
    # An emptied field of a number that must be there is its default again.
    value = default if value is None else kind(value)
    url.keep(name, text_of(value), text_of(default))
    return value


def _step(default: float) -> float:
    """A tenth of the default's own size: 0.01 for 0.3, 0.0001 for 0.003."""
    return 0.1 if default == 0 else float(f"1e{_exponent(default) - 1}")


def _exponent(value: float) -> int:
    return int(f"{abs(value):e}".partition("e")[2])


def _text(field: Any, label: str, help_text: str, key: str) -> str:
    name, default = PREFIX + field.name, text_of(_default(field))
    url.seed(name, str, default, key)
    value = st.text_input(label, key=key, help=help_text, placeholder="none")
    url.keep(name, value, default)
    return str(value)
