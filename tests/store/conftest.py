"""A store in a temporary folder and results to put in it."""

import hashlib

import numpy as np
import pytest

from workbench.result import Result
from workbench.store.results import Store


def key_of(number):
    """A key that looks like the real ones."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def build_result(number=0, **changes):
    """A result whose arrays and metrics depend on ``number``."""
    content = {
        "key": key_of(number),
        "probe": "attention-sinks",
        "version": 1,
        "config": {"threshold": 0.3},
        "arrays": {"score": np.linspace(0, number, 24, dtype=np.float32).reshape(2, 3, 4)},
        "metrics": {"sink_rate": number / 8, "n_prompts": 2.0},
        "provenance": {"model": "demo", "created": f"2026-01-01T00:00:{number % 60:02d}+00:00"},
    }
    return Result(**{**content, **changes})


@pytest.fixture
def make_result():
    return build_result


@pytest.fixture
def reports():
    return []


@pytest.fixture
def store(tmp_path, reports):
    return Store(tmp_path / "store", report=reports.append)
