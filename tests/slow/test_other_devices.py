"""A model that is not on the CPU gives the CPU's numbers, and no tensor stays where it was made."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
MODELS = [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gpt2", "eager")]


@pytest.mark.parametrize(("family", "kernel"), MODELS)
def test_on_a_pretended_device_and_on_two_the_numbers_are_those_of_the_cpu(family, kernel):
    line = [sys.executable, "-m", "tests.other_devices", family, kernel]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
