"""A result is the same thing in memory, from a store, and in every file format."""

import builtins
import csv
import json
import math
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench import discovery, registry
from workbench.errors import ConfigError, StoreError, UnknownNameError, WorkbenchError
from workbench.registry import Probe
from workbench.result import Result
from workbench.settings import check_settings, setting
from workbench.store.results import Store
from workbench.store.strict_json import jsonable, read_number, to_json

HOSTILE = "</script><script>alert('<b>&')</script>"


@dataclass(frozen=True)
class PlantedConfig:
    threshold: float = setting(0.3, "Where a score counts.", low=0.0, high=1.0)
    layers: tuple[int, ...] = setting((0, 1), "Which layers.")

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True)
class PlantedResult:
    score: Float[Tensor, "task layer"]
    dormant: Bool[Tensor, " layer"]
    walk: Float[Tensor, " step"] | None
    config: PlantedConfig
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def metrics(self):
        return {"mean_score": float(self.score.nanmean()), "undefined": math.nan}

    def table(self):
        return {"task": list(self.labels["task"]), "first": self.score[:, 0].tolist()}


def figures(result):
    from plotly.graph_objects import Figure, Heatmap

    drawn = Figure(
        Heatmap(z=result.score.tolist()), layout={"title": {"text": result.labels["task"][1]}}
    )
    return {HOSTILE: drawn, "again": drawn}


def measure_planted(model, tokens, config):
    """Plant numbers."""


@pytest.fixture
def probe(monkeypatch):
    planted = Probe(
        "planted",
        "Plant numbers.",
        "arXiv:0000.00000",
        3,
        PlantedConfig,
        PlantedResult,
        measure_planted,
        frozenset(),
        False,
    )
    monkeypatch.setitem(registry._PROBES, "planted", planted)
    # Only this module has probes, whatever else is installed.
    monkeypatch.setattr(discovery, "_probe_modules", lambda: {"planted": __name__})
    return planted


@pytest.fixture
def measured():
    return PlantedResult(
        score=torch.tensor([[0.5, math.nan], [0.25, -1.0]]),
        dormant=torch.tensor([True, False]),
        walk=None,
        config=PlantedConfig(threshold=0.4, layers=(2, 3)),
        labels={"task": ("days", HOSTILE)},
    )


@pytest.fixture
def result(probe, measured):
    return Result.from_measurement(
        probe, measured, key="a" * 64, provenance={"model": HOSTILE, "seed": 0}
    )


@pytest.fixture
def stored(result, tmp_path):
    return Store(tmp_path / "store").publish(result)


def test_the_measurement_comes_back_from_disk_as_it_was(stored, measured):
    back = stored.measured
    torch.testing.assert_close(back.score, measured.score, equal_nan=True, rtol=0, atol=0)
    assert back.dormant.dtype == torch.bool
    assert back.walk is None
    assert (back.config, back.labels) == (measured.config, measured.labels)


def test_arrays_and_labels_are_attributes(stored, measured):
    assert torch.equal(stored.dormant, measured.dormant)
    assert stored.tasks == ["days", HOSTILE]
    assert {"score", "tasks", "save"} <= set(dir(stored))
    with pytest.raises(AttributeError, match="no 'scores'; its arrays are: dormant, score"):
        _ = stored.scores
    assert not hasattr(stored, "_anything")


def test_changing_a_tensor_does_not_change_the_result(stored):
    stored.dormant[0] = False
    assert stored.dormant[0]


def test_a_field_that_is_no_tensor_is_a_bug_of_the_probe(probe):
    @dataclass(frozen=True)
    class Wrong:
        score: float

    with pytest.raises(TypeError, match="'score' of a probe's result must be a tensor"):
        Result.from_measurement(probe, Wrong(1.0), key="a" * 64, provenance={})


def test_an_array_may_not_hide_an_attribute_of_results(probe):
    @dataclass(frozen=True)
    class Hiding:
        save: Tensor

    with pytest.raises(TypeError, match="cannot be called 'save'"):
        Result.from_measurement(probe, Hiding(torch.ones(1)), key="a" * 64, provenance={})


def test_half_precision_that_numpy_lacks_is_kept_as_float32(probe):
    @dataclass(frozen=True)
    class Half:
        score: Tensor

        def metrics(self):
            return {}

    half = Half(torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True))
    kept = Result.from_measurement(probe, half, key="a" * 64, provenance={})
    assert kept.arrays["score"].dtype == np.float32


def test_a_result_of_another_version_says_what_is_missing(probe, result):
    arrays = {"score": result.arrays["score"]}
    old = Result(key="a" * 64, probe="planted", version=2, config={}, arrays=arrays, metrics={})
    with pytest.raises(StoreError, match="no array 'dormant', which version 3 needs; run it again"):
        _ = old.measured


def test_a_setting_that_is_gone_or_impossible_is_a_plain_error(probe, result):
    result.config["threshold"] = 7
    with pytest.raises(ConfigError, match="between 0"):
        _ = result.measured


def test_a_result_of_an_unknown_probe_still_gives_its_arrays(probe, tmp_path):
    foreign = Result(
        key="b" * 64, probe="elsewhere", version=1, config={}, arrays={"a": np.ones(2)}, metrics={}
    )
    with pytest.raises(UnknownNameError, match="elsewhere"):
        _ = foreign.measured
    foreign.save(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["arrays"] == {"a": [1.0, 1.0]}


def test_json_has_every_array_and_no_constant_that_json_lacks(stored, tmp_path):
    path = stored.save(tmp_path / "x.json")
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["arrays"]["score"] == [[0.5, None], [0.25, -1.0]]
    assert content["metrics"] == {"mean_score": pytest.approx(-1 / 12), "undefined": None}
    assert content["key"] == "a" * 64


def test_csv_and_parquet_hold_the_headline_table(stored, tmp_path):
    import pandas

    with stored.save(tmp_path / "x.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["task", "first"], ["days", "0.5"], [HOSTILE, "0.25"]]
    frame = pandas.read_parquet(stored.save(tmp_path / "deep" / "x.parquet"))
    pandas.testing.assert_frame_equal(frame, stored.to_dataframe())


def test_html_is_one_page_with_plotly_once_and_every_text_escaped(stored, tmp_path):
    page = stored.save(tmp_path / "x.HTML").read_text()
    assert page.count("Plotly.newPlot(") >= 2
    assert len(re.findall(r"plotly\.js v\d", page)) == 1
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)\s*=", page)
    assert "default-src 'none'" in page
    assert "mean_score" in page
    assert "a" * 64 in page


def test_the_card_and_the_text_of_a_result_name_what_matters(stored):
    card = stored._repr_html_()
    assert "<script>" not in card
    assert "mean_score" in card
    text = repr(stored)
    assert "planted" in text
    assert "score [2 2]" in text


@pytest.mark.parametrize("name", ["x.pkl", "x", "x.jsn"])
def test_an_unknown_format_offers_the_known_ones(stored, tmp_path, name):
    with pytest.raises(WorkbenchError, match=r"must end in \.csv, \.html, \.json, .*; got 'x"):
        stored.save(tmp_path / name)


def test_a_file_that_cannot_be_written_leaves_the_old_one(stored, tmp_path, monkeypatch):
    path = stored.save(tmp_path / "x.csv")
    before = path.read_bytes()
    monkeypatch.setenv("WORKBENCH_FAULT", "during-file:ENOSPC")
    with pytest.raises(StoreError, match="the disk is full"):
        stored.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["x.csv"]


@pytest.fixture
def without(monkeypatch):
    """Make an import fail as if the package were not installed."""
    real = builtins.__import__

    def hide(package):
        def refuse(name, *arguments, **options):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return real(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", refuse)

    return hide


@pytest.mark.parametrize(
    ("package", "suffix"), [("pandas", "parquet"), ("plotly", "html"), ("plotly", "png")]
)
def test_a_missing_package_says_how_to_install_it(stored, tmp_path, without, package, suffix):
    without(package)
    with pytest.raises(WorkbenchError, match=rf"{package}.*pip install .*\[view\]"):
        stored.save(tmp_path / f"x.{suffix}")


class Undrawable:
    """A figure on a machine where kaleido finds no browser."""

    def to_image(self, format):  # noqa: A002 - plotly's name
        raise RuntimeError("\n\nKaleido requires Google Chrome to be installed.\n")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_an_image_without_a_browser_says_what_to_install(stored, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(stored, "figures", lambda: {"one": Undrawable()})
    with pytest.raises(WorkbenchError, match=r"Chromium.*plotly_get_chrome") as caught:
        stored.save(tmp_path / f"x.{suffix}")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(stored, "figures", dict)
    with pytest.raises(WorkbenchError, match="needs a figure"):
        stored.save(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("number", [0.0, -1.5, math.inf, -math.inf, 1e300])
def test_every_number_survives_strict_json(number):
    assert read_number(json.loads(to_json(number), parse_constant=pytest.fail)) == number


def test_what_json_lacks_is_written_as_something_it_has(tmp_path):
    value = {1: (np.float32(0.5), {3, 2}), "p": tmp_path, "d": torch.float16, "n": math.nan}
    assert jsonable(value, nan="NaN") == {
        "1": [0.5, [2, 3]],
        "p": str(tmp_path),
        "d": "torch.float16",
        "n": "NaN",
    }


def test_a_probe_of_several_modes_gets_the_result_type_of_its_mode():
    from probes.token_dynamics import StateSpaceResult, TokenDynamicsConfig
    from workbench.discovery import find_probe

    flat = torch.ones(2, dtype=torch.long)
    measured = StateSpaceResult(
        eigenvalues=torch.ones(2, 3, 2),
        n_positive=3 * flat,
        n_negative=0 * flat,
        regime=flat,
        symmetric_positive=flat,
        symmetric_negative=flat,
        delta_norm=torch.ones(2),
        decay=torch.ones(2, 3),
        config=TokenDynamicsConfig(mode="state-space"),
        labels={"regime": ("divergent", "divergent")},
    )
    found = Result.from_measurement(
        find_probe("token-dynamics"), measured, key="0" * 64, provenance={}
    )
    assert isinstance(found.measured, StateSpaceResult)
    assert found.regimes == ["divergent", "divergent"]
    assert found.measured.metrics() == found.metrics()
    assert "step_norm" not in found.arrays
