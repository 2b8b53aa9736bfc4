"""The models of the tests of calibration."""

import pytest

import workbench as wb
from tests.zoo import tiny_model


@pytest.fixture(scope="session")
def model():
    return wb.wrap(tiny_model("llama"))


@pytest.fixture(scope="session")
def demo():
    return wb.load("demo")
