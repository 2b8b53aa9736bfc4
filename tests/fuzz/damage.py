"""Content that is nearly valid: bytes changed, cut, repeated, one place of a structure replaced by anything."""

import copy
import json

from hypothesis import strategies as st

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([2**63, -1, 10**400, "../x", "\ud800", "1e999", "NaN", "\x00", "{", "inf"]),
)
anything = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """The path of every place in a structure."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, inner in items:
        yield from places(inner, (*path, name))


@st.composite
def damaged_structure(draw, *valid):
    """One of some valid structures with one to three places replaced, removed or added."""
    value = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                value = draw(anything)
            elif isinstance(value, dict):
                value[draw(st.text(max_size=8))] = draw(anything)
            continue
        parent = value
        for name in path[:-1]:
            parent = parent[name]
        if draw(st.integers(0, 4)) == 0:
            del parent[path[-1]]
        else:
            parent[path[-1]] = draw(anything)
    return value


@st.composite
def damaged_bytes(draw, *valid):
    """Valid content with pieces changed, cut out, repeated or put in."""
    content = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content), 1)))
        length = draw(st.integers(0, 8))
        how = draw(st.sampled_from(["flip", "cut", "put", "repeat", "end"]))
        if how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[at : at + length]
        elif how == "put":
            content[at:at] = draw(st.binary(max_size=8))
        elif how == "repeat":
            content[at:at] = content[at : at + length] * draw(st.integers(1, 50))
        elif how == "end":
            del content[at:]
    return bytes(content)


def as_json(structures):
    return structures.map(lambda value: json.dumps(value).encode())


def yaml_of(structures):
    import yaml

    return structures.map(lambda value: yaml.safe_dump(json.loads(json.dumps(value))).encode())


def both(*structures):
    """A structure damaged as JSON, and its text damaged as bytes."""
    texts = [json.dumps(value).encode() for value in structures]
    return as_json(damaged_structure(*structures)) | damaged_bytes(*texts)


TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["nan", "inf", "-1", "1e400", "9" * 5000, "a" * 64, "١٢", "", ",", "0x10", "1_0"]
    ),
)
