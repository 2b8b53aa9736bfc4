"""Settings of probes, toys and interventions: declared once, used by every front end.

A config is a frozen dataclass whose fields are made with ``setting(default, help, ...)``. The
command line, the dashboard's form and the documentation read them from there.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from workbench.errors import ConfigError, UnknownNameError


def setting(
    default: Any,
    help: str,  # noqa: A002 - the word a reader expects
    *,
    choices: tuple[Any, ...] | None = None,
    low: int | float | None = None,
    high: int | float | None = None,
    exclusive: bool = False,
    unit: str | None = None,
) -> Any:
    """Declare one field of a config.

    Args:
        default: The paper's value.
        help: One line for people.
        choices: The allowed values, if they can be listed.
        low: The smallest allowed value.
        high: The largest allowed value.
        exclusive: The bounds themselves are not allowed.
        unit: What the number counts, if it is not obvious.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "low": low,
        "high": high,
        "exclusive": exclusive,
        "unit": unit,
    }
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(config: Any) -> None:
    """Refuse a config with a value out of its declared range; call it in ``__post_init__``.

    Raises:
        ConfigError: Says what must hold and what was found.
    """
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata
        if allowed.get("choices") and value not in allowed["choices"]:
            choices = ", ".join(map(str, allowed["choices"]))
            raise ConfigError(f"{field.name} must be one of {choices}; got {value}")
        if value is None or not _in_range(value, allowed):
            if value is None and type(None) in _alternatives(field.type):
                continue
            raise ConfigError(f"{field.name} must be {_range_text(allowed)}; got {value}")


def _in_range(value: Any, allowed: Mapping[str, Any]) -> bool:
    low, high = allowed.get("low"), allowed.get("high")
    if low is None and high is None:
        return True
    inside = (low is None or value >= low) and (high is None or value <= high)
    return inside and not (allowed.get("exclusive") and value in (low, high))


def _range_text(allowed: Mapping[str, Any]) -> str:
    low, high = allowed.get("low"), allowed.get("high")
    if low is not None and high is not None:
        return f"{'strictly ' if allowed.get('exclusive') else ''}between {low} and {high}"
    bound, words = (low, ("above", "at least")) if high is None else (high, ("below", "at most"))
    return f"{words[0] if allowed.get('exclusive') else words[1]} {bound}"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _parse(name: str, text: str, annotation: Any) -> Any:
    kinds = _alternatives(annotation)
    if type(None) in kinds and text.lower() in ("none", ""):
        return None
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(
                _parse(name, part.strip(), item) for part in text.split(",") if part.strip()
            )
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str:
            return text
    raise ConfigError(f"{name} must be {_in_words(annotation)}; got {text!r}")


def make_config(config_class: type, settings: Mapping[str, Any], what: str) -> Any:
    """Make a config from values, or from the texts of ``--set key=value``.

    Args:
        config_class: A config dataclass.
        settings: Values by field name; a text is read as the field's type.
        what: Whose settings they are, for the message ("attention-sinks").

    Raises:
        UnknownNameError: A setting that does not exist; the nearest is offered.
        ConfigError: A value of the wrong type or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    hints = _hints(config_class)
    values = {}
    for name, value in settings.items():
        if name not in fields:
            raise UnknownNameError(f"setting of {what}", name, fields)
        if isinstance(value, str):
            value = _parse(name, value, hints[name])
        elif isinstance(value, list):
            value = _as_tuple(value)
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and float in _alternatives(hints[name])
        ):
            value = as_float(name, value)
        _check_type(name, value, hints[name])
        values[name] = value
    for name, field in fields.items():
        needed = field.init and field.default is field.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise ConfigError(f"{what} needs {name}; it was not given; say {name}=VALUE")
    return config_class(**values)


@cache  # of a plan's cells, many have the same class
def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    if not _fits(value, annotation):
        raise ConfigError(f"{name} must be {_in_words(annotation)}; got {value!r}")


def as_float(name: str, value: int | float) -> float:
    """A number as a float.

    Raises:
        ConfigError: It is too large for one.
    """
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(
            f"{name} must fit into a float; got a number of {len(str(value))} digits"
        ) from error


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


_ONE = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def _in_words(annotation: Any) -> str:
    """What a setting takes, for people: "a number or none", "a list of pairs of whole numbers"."""
    words: dict[str, None] = {}  # each once: a tuple and a list read alike
    for kind in sorted(_alternatives(annotation), key=lambda kind: kind is type(None)):
        items = typing.get_args(kind)
        if kind is type(None):
            words["none"] = None
        elif typing.get_origin(kind) in (tuple, list):
            words[f"a list of {_many(items[0])}"] = None
        elif typing.get_origin(kind) is typing.Literal:
            words["one of " + ", ".join(map(str, items))] = None
        else:
            words[_ONE.get(kind, getattr(kind, "__name__", str(kind)))] = None
    return " or ".join(words)


def _many(kind: Any) -> str:
    items = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and items[-1] is not ...:
        return (
            f"pairs of {_many(items[0])}" if len(items) == 2 else f"{len(items)} {_many(items[0])}"
        )
    return _MANY.get(kind, str(kind))


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of a type, the items of tuples included."""
    for kind in _alternatives(annotation):
        origin, items = typing.get_origin(kind) or kind, typing.get_args(kind)
        if origin is typing.Literal or origin is Any:
            return True
        # A whole number will do for a float inside a tuple.
        if not isinstance(value, origin) and not (origin is float and type(value) is int):
            continue
        if isinstance(value, bool) and origin in (int, float):
            continue
        if origin is not tuple or not items:
            return True
        each = [items[0]] * len(value) if items[-1] is ... else list(items)
        if len(value) == len(each) and all(map(_fits, value, each)):
            return True
    return False


def describe_settings(config_class: type) -> list[dict[str, Any]]:
    """One row a field: name, type, default, help, choices, low, high, unit."""
    hints = typing.get_type_hints(config_class)
    return [
        {
            "name": field.name,
            "type": " or ".join(
                getattr(kind, "__name__", str(kind)) for kind in _alternatives(hints[field.name])
            ),
            "default": field.default,
            **{key: field.metadata.get(key) for key in ("help", "choices", "low", "high", "unit")},
        }
        for field in dataclasses.fields(config_class)
    ]
