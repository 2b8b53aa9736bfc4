"""``workbench list``."""

import pytest

from workbench.models.base import LAYER_SITES, MODEL_SITES
from workbench.registry import all_probes


def test_every_probe_is_listed_with_its_settings(command):
    found = {probe["name"]: probe for probe in command("list", "probes", "--json").json["probes"]}
    assert set(found) == {probe.name for probe in all_probes()}
    sinks = found["attention-sinks"]
    assert sinks["paper"] == "arXiv:2410.10781"
    assert sinks["data"] is True
    names = {setting["name"]: setting for setting in sinks["settings"]}
    assert names["inputs"]["choices"] == ["natural", "random", "repeat", "swap"]
    assert all(setting["help"] for setting in sinks["settings"])


def test_every_site_is_listed(command):
    found = [site["name"] for site in command("list", "sites", "--json").json["sites"]]
    assert found == [*MODEL_SITES, *(f"L0.{name}" for name in LAYER_SITES)]


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("probes", "attention-sinks"),
        ("tasks", "language-model"),
        ("interventions", "zerotuning"),
        ("sites", "L0.resid_mid"),
        ("datasets", "builtin:natural"),
    ],
)
def test_tables_are_complete(command, what, name):
    shown = command("list", what)
    assert shown.code == 0
    assert name in shown.out
    assert name in [row["name"] for row in command("list", what, "--json").json[what]]
