"""``import workbench as wb``: every public name, in whatever order things were imported."""

import subprocess
import sys

import pytest

import workbench as wb


@pytest.mark.parametrize("name", wb.__all__)
def test_every_public_name_is_there(name):
    assert getattr(wb, name) is not None


@pytest.mark.parametrize("first", ["", "import workbench.run", "import workbench.cli.commands"])
def test_run_stays_a_function(first):
    code = f"import workbench as wb\n{first}\nassert callable(wb.run) and callable(wb.run), wb.run"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        _ = wb.runs
