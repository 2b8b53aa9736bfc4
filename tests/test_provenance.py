"""Keys and versions."""

import hashlib
import json
import math
import platform

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench
from workbench.errors import ConfigError
from workbench.provenance import canonical_json, content_key, environment, request_hash

words = st.text('ab"\\é \n', max_size=4)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner) | st.dictionaries(words, inner),
    max_leaves=8,
)


def test_canonical_json_sorts_keys_and_has_no_spaces():
    value = {"b": (1, 2.5), "a": {"d": None, "c": "é"}, "e": True}
    text = b'{"a":{"c":"\\u00e9","d":null},"b":[1,2.5],"e":true}'
    assert canonical_json(value) == text


@settings(deadline=None)
@given(st.dictionaries(words, plain))
def test_canonical_json_reads_back_and_ignores_the_order_of_keys(value):
    assert json.loads(canonical_json(value)) == value
    backwards = dict(reversed(value.items()))
    assert canonical_json(backwards) == canonical_json(value)


def test_floats_are_written_exactly_and_differ_from_integers():
    assert canonical_json(0.1 + 0.2) == b"0.30000000000000004"
    assert canonical_json(1.0) != canonical_json(1)
    assert canonical_json(True) != canonical_json(1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_refused_with_its_place(value):
    with pytest.raises(ConfigError, match=r"value\.config\.lr\[1\] must be a finite number; got"):
        canonical_json({"config": {"lr": [0.1, value]}})


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), 1j])
def test_unknown_type_is_refused(value):
    with pytest.raises(TypeError, match=r"value\.x must be plain JSON data; got"):
        canonical_json({"x": value})


def test_keys_must_be_texts():
    with pytest.raises(TypeError, match="texts as keys; got 1"):
        canonical_json({1: "a"})


def test_content_key_is_a_sha256_of_the_fields():
    assert content_key({"a": 1}) == hashlib.sha256(b'result\n{"a":1}').hexdigest()


def test_request_and_result_never_share_a_key():
    assert request_hash({"a": 1}) != content_key({"a": 1})


@settings(deadline=None)
@given(st.dictionaries(words, st.integers(), min_size=1))
def test_any_changed_field_changes_the_key(fields):
    name = next(iter(fields))
    for key in (content_key, request_hash):
        assert key({**fields, name: fields[name] + 1}) != key(fields)


def test_environment_names_versions_and_nobody():
    found = environment()
    assert found["workbench"] == workbench.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"]
    assert platform.node() not in found.values()
    assert canonical_json(found)


def test_package_that_is_not_installed_is_none(monkeypatch):
    monkeypatch.setattr("workbench.provenance.PACKAGES", ("no-such-package",))
    assert environment()["no_such_package"] is None
