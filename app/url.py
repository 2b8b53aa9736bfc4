"""Selections that live in the URL: read when a page opens, written when a person chooses.

A value of the URL that cannot be meant is replaced by the default and said so. Browsers may change
the URL under us (back, forward, a link to the same page): what we wrote last is remembered, and a
URL that differs from it is read again.

A browser that is quicker than we are sends a choice with a URL that we have changed meanwhile; that
URL is old, not a wish. So the URL is read again only in a run that no widget has caused.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import streamlit as st

from app.components.text import plain
from workbench.errors import ConfigError, UnknownNameError, WorkbenchError

T = TypeVar("T")
Number = TypeVar("Number", int, float)

LARGEST = 2**53 - 1
"""The largest whole number that a browser holds exactly."""
_WRITTEN = "url written"
_KNOWN = "url known"
_WRONG = "url wrong"
_CHOSEN = "url chosen"
_SEEN = "url widgets"
_TRUST = "url trust"
_OWN = (_WRITTEN, _KNOWN, _WRONG, _CHOSEN, _SEEN, _TRUST)


def begin(page: str) -> None:
    """Start a run of a page; on another page than the last, forget what was written there."""
    st.session_state[_KNOWN] = set()
    st.session_state[_CHOSEN] = st.session_state.pop(_TRUST, False) or _has_chosen()
    if st.session_state.get("url page") != page:
        st.session_state[_WRITTEN] = {}
        st.session_state[_WRONG] = {}
        st.session_state["url page"] = page


def end() -> None:
    """End a run of a page, or of a part of it: the person has seen what the widgets hold now."""
    st.session_state[_SEEN] = _widgets()


def begin_part() -> None:
    """Start a run of a part of a page: only its own widgets and the clock cause one."""
    st.session_state[_CHOSEN] = True


def run_page_again() -> None:
    """Run the whole page because something ended; what is chosen on it stays."""
    st.session_state[_TRUST] = True
    st.rerun(scope="app")


def _has_chosen() -> bool:
    seen, now = st.session_state.get(_SEEN, {}), _widgets()
    return any(seen[key] != now[key] for key in seen.keys() & now.keys())


def _widgets() -> dict[str, Any]:
    """What widgets hold; objects that pages keep for themselves are none."""
    state = {str(key): value for key, value in st.session_state.items() if key not in _OWN}
    return {key: value for key, value in state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    # Streamlit's own page objects pass for texts.
    return type(value) in (str, int, float, bool, type(None))


def go(name: str, value: str) -> None:
    """Put a selection into the URL that the next run is to read from there."""
    st.query_params[name] = value
    st.session_state.setdefault(_WRITTEN, {}).pop(name, None)


def seed(name: str, parse: Callable[[str], T], default: T, key: str) -> None:
    """Give the widget with ``key`` the value of the URL, before it is made.

    Args:
        name: Of the parameter.
        parse: Reads its text; a ``WorkbenchError`` says why it cannot be meant.
        default: Where the URL says nothing, or nothing that can be meant.
        key: Of the widget.
    """
    st.session_state.setdefault(_KNOWN, set()).add(name)
    written = st.session_state.setdefault(_WRITTEN, {})
    text = st.query_params.get(name)
    known = key in st.session_state and name in written
    if known and (written[name] == text or st.session_state.get(_CHOSEN)):
        return
    wrong = st.session_state.setdefault(_WRONG, {})
    wrong.pop(name, None)
    try:
        st.session_state[key] = default if text is None else parse(text)
    except WorkbenchError as error:
        wrong[name] = [f"the URL's {name}: {error}", None]
        st.session_state[key] = default


def keep(name: str, value: str, default: str = "") -> None:
    """Write a selection into the URL; a default is left out of it."""
    text = None if value == default else value
    wrong = st.session_state.setdefault(_WRONG, {})
    if name in wrong:
        # The complaint stays until something else is chosen than what was put in the value's place.
        if wrong[name][1] in (None, value):
            wrong[name][1] = value
        else:
            del wrong[name]
    if text is None:
        st.query_params.pop(name, None)
    elif st.query_params.get(name) != text:
        st.query_params[name] = text
    st.session_state.setdefault(_WRITTEN, {})[name] = text


def one_of(options: Iterable[str], what: str) -> Callable[[str], str]:
    """A parser that takes one of some names."""
    known = list(options)

    def parse(text: str) -> str:
        if text not in known:
            raise UnknownNameError(what, text, known)
        return text

    return parse


def whole(low: int, high: int, what: str) -> Callable[[str], int]:
    """A parser that takes a whole number in a range."""
    return number(int, low, high, what)


def number(
    kind: type[Number], low: float | None, high: float | None, what: str
) -> Callable[[str], Number]:
    """A parser that takes an int or a float in a range that may be open.

    What a browser cannot hold (2^53 and more, infinity, NaN) is refused as well.
    """
    least = -LARGEST if low is None else low
    most = LARGEST if high is None else min(high, LARGEST)
    word = "a whole number" if kind is int else "a number"

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not least <= value <= most:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise ConfigError(f"{what} must be {word} from {least:g} to {most:g}; got {shown!r}")
        return value

    return parse


def complain() -> None:
    """Tell what is wrong with the URL: values that cannot be meant, names that do not exist."""
    wrong: dict[str, Any] = st.session_state.get(_WRONG, {})
    known = st.session_state.get(_KNOWN, set())
    problems = [problem for problem, _ in wrong.values()]
    for name in st.query_params:
        if name not in known:
            problems.append(str(UnknownNameError("URL setting of this page", name, known)))
    for problem in problems:
        st.warning(plain(f"{problem} (the default is shown)"))
