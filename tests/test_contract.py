"""What every probe must satisfy, ours or a third party's."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from workbench.discovery import find_figures, find_probe, load_probes, probe_source
from workbench.errors import WorkbenchError
from workbench.models.base import CAPABILITIES
from workbench.settings import make_config

ROOT = Path(__file__).parents[1]
PROBES = load_probes()


@pytest.fixture(params=PROBES, ids=lambda probe: probe.name)
def probe(request):
    return request.param


def test_the_config_is_frozen_and_explains_every_field(probe):
    assert probe.config.__dataclass_params__.frozen
    for field in dataclasses.fields(probe.config):
        assert field.metadata.get("help"), f"{field.name} needs a line of help"
        assert field.metadata["help"] == field.metadata["help"].rstrip(".")


def test_the_defaults_are_allowed_and_survive_their_texts(probe):
    config = probe.config()
    texts = {
        field.name: str(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if not isinstance(getattr(config, field.name), tuple)
    }
    assert make_config(probe.config, texts, probe.name) == config


def test_values_outside_the_declared_range_are_refused(probe):
    for field in dataclasses.fields(probe.config):
        low, choices = field.metadata.get("low"), field.metadata.get("choices")
        if low is not None:
            bad = low - 1
        elif choices:
            bad = "no-such-choice"
        else:
            continue
        with pytest.raises(WorkbenchError, match=field.name):
            make_config(probe.config, {field.name: bad}, probe.name)


def test_the_result_is_frozen_and_has_numbers_and_a_table(probe):
    assert dataclasses.is_dataclass(probe.result)
    assert probe.result.__dataclass_params__.frozen
    assert callable(probe.result.metrics)
    assert callable(probe.result.table)
    assert "config" in {field.name for field in dataclasses.fields(probe.result)}


def test_it_says_what_it_measures_and_after_whom(probe):
    assert probe.summary.endswith(".")
    assert len(probe.summary) <= 100
    assert probe.paper.startswith(("arXiv:", "doi:"))
    assert probe.paper in (inspect.getmodule(probe.measure).__doc__ or "")


def test_names_agree(probe):
    assert probe.measure.__name__ == f"measure_{probe.topic}"
    assert find_probe(probe.name) is probe
    assert probe_source(probe.name) == Path(inspect.getmodule(probe.measure).__file__)


def test_it_needs_what_a_model_can_have(probe):
    assert probe.needs <= set(CAPABILITIES)
    assert probe.version >= 1


def test_it_has_figures_and_a_page(probe):
    assert callable(find_figures(probe))
    page = (ROOT / "docs" / "probes" / f"{probe.name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {probe.name}\n")
    for field in dataclasses.fields(probe.config):
        assert f"`{field.name}`" in page, f"the page must explain {field.name}"


def test_the_readme_lists_it(probe):
    assert f"[{probe.name}](docs/probes/{probe.name}.md)" in (ROOT / "README.md").read_text("utf-8")
