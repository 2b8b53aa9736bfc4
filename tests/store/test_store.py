"""What a store gives back is what was put in, and its keys never become other paths."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from workbench.errors import StoreError
from workbench.store.results import Store
from workbench.store.shelf import default_store_path

ARRAYS = hypothesis_numpy.arrays(
    dtype=st.sampled_from([np.bool_, np.int64, np.int32, np.float32, np.float64, np.float16]),
    shape=hypothesis_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arrays=st.dictionaries(st.sampled_from("abcde"), ARRAYS), number=st.integers(0, 10**9))
def test_arrays_of_every_kind_come_back_as_they_were(store, make_result, arrays, number):
    store.publish(make_result(number, arrays=arrays), replace=True)
    back = store.find(make_result(number).key).arrays
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_a_transposed_array_keeps_its_rows_and_columns(store, make_result):
    array = np.arange(6.0).reshape(2, 3).T
    kept = store.publish(make_result(arrays={"a": array}))
    np.testing.assert_array_equal(kept.arrays["a"], array)
    assert kept.array_shapes() == {"a": ("F64", (3, 2))}


def test_numbers_labels_config_and_provenance_come_back(store, make_result):
    metrics = {"whole": 3.0, "none": math.nan, "high": math.inf, "low": -math.inf}
    result = make_result(
        metrics=metrics, labels={"task": ("days", "months")}, config={"n": (1, 2), "x": None}
    )
    store.publish(result)
    back = store.find(result.key)
    assert math.isnan(back.metrics().pop("none"))
    assert {**back.metrics(), "none": 0} == {**metrics, "none": 0}
    assert back.labels == {"task": ["days", "months"]}
    assert back.tasks == ["days", "months"]
    assert back.config == {"n": [1, 2], "x": None}
    assert back.provenance == result.provenance
    assert (back.cached, back.path) == (True, store.folder(result.key))


def test_result_json_is_strict_json_with_the_promised_names(store, make_result):
    kept = store.publish(make_result(metrics={"undefined": math.nan, "unbounded": math.inf}))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads((kept.path / "result.json").read_text(), parse_constant=refuse)
    names = {"schema", "key", "probe", "version", "metrics", "labels", "config", "provenance"}
    assert set(document) == names
    assert document["metrics"] == {"undefined": None, "unbounded": "Infinity"}


def test_the_first_result_of_a_key_is_kept_unless_it_is_to_be_replaced(store, make_result):
    store.publish(make_result(metrics={"n": 1.0}))
    assert store.publish(make_result(metrics={"n": 2.0})).metrics() == {"n": 1.0}
    assert store.publish(make_result(metrics={"n": 3.0}), replace=True).metrics() == {"n": 3.0}
    assert store.find(make_result().key).metrics() == {"n": 3.0}


def test_a_key_is_found_by_a_unique_beginning(store, make_result):
    result = store.publish(make_result())
    assert store.get(result.key[:6]).key == result.key
    twin = result.key[:10] + "0" * 54
    store.publish(make_result(key=twin))
    with pytest.raises(StoreError, match="must begin one key; 2 begin so"):
        store.get(result.key[:8])


@pytest.mark.parametrize("key", ["", "abcde", "../../etc", "g" * 64, "A" * 64, "*" * 8, "a" * 65])
def test_what_is_no_key_never_becomes_a_path(store, key):
    with pytest.raises(StoreError, match="hex characters; got"):
        store.get(key)
    with pytest.raises(StoreError, match="hex characters; got"):
        store.folder(key)
    with pytest.raises(StoreError, match="hex characters; got"):
        store.remember_request(key, "a" * 64)


def test_an_absent_key_is_none_for_the_cache_and_an_error_for_a_person(store):
    assert store.find("a" * 64) is None
    with pytest.raises(StoreError, match="no result has the key 'aaaaaa'"):
        store.get("aaaaaa")


def test_looking_into_a_store_that_is_not_there_makes_nothing(store):
    assert store.list() == []
    assert store.verify().whole == ()
    assert not store.path.exists()


def test_a_store_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="must be a folder; it is a file"):
        Store(tmp_path / "file")
    with pytest.raises(StoreError, match="must be a folder"):
        Store(tmp_path / "file" / "below").remember_request("a" * 64, "b" * 64)


def test_an_extra_file_is_kept_beside_the_arrays_and_checked(store, make_result, tmp_path, reports):
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"weights")
    kept = store.publish(make_result(), files={"model.safetensors": model})
    assert (kept.path / "model.safetensors").read_bytes() == b"weights"
    (kept.path / "model.safetensors").write_bytes(b"weightz")
    assert store.find(kept.key) is None
    assert "model.safetensors" in reports[0]


@pytest.mark.parametrize(
    "name", ["model.pkl", "model.bin", "../model.json", "a/b.json", "manifest.json"]
)
def test_an_extra_file_may_not_be_a_pickle_or_lie_elsewhere(store, make_result, tmp_path, name):
    with pytest.raises(StoreError, match=r"must be a \.safetensors"):
        store.publish(make_result(), files={name: tmp_path})


def test_a_request_leads_to_its_result_while_that_is_there(store, make_result):
    request, key = "d" * 64, make_result().key
    store.remember_request(request, key)
    assert store.find_request(request) is None
    store.publish(make_result())
    assert store.find_request(request) == key
    store.shelf.remove(key)
    assert store.find_request(request) is None


def test_the_default_store_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "here"))
    assert Store().path == tmp_path / "here"
    monkeypatch.delenv("WORKBENCH_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    if sys.platform == "linux":
        assert default_store_path() == tmp_path / "data" / "interpretability-workbench"


def test_a_cached_result_is_read_without_torch_pandas_or_plotly(store, make_result):
    store.publish(make_result())
    store.remember_request("d" * 64, make_result().key)
    script = f"""
import sys
from workbench.store.results import Store
store = Store({str(store.path)!r})
result = store.find(store.find_request("d" * 64))
print(len(store.list()), result.metrics()["n_prompts"], result.arrays["score"].shape)
print([name for name in ("torch", "pandas", "plotly", "transformers") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == ["1 2.0 (2, 3, 4)", "[]"], done.stderr
