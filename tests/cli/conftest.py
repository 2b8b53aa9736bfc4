"""The command line as a fixture, and a first result to find again."""

import pytest

from tests.cli.command import Command


@pytest.fixture
def command(capfd, store_path):
    """Runs command lines against a store of this test."""
    return Command(capfd)


@pytest.fixture
def run_tiny(command, tiny_folder):
    """``workbench run attention-sinks`` on a tiny model and four prompts, with more options."""

    def run(*more):
        arguments = ["run", "attention-sinks", "--model", tiny_folder]
        if "--data" not in more:
            arguments += ["--data", "builtin:natural"]
        if "--n-pos" not in more:
            arguments += ["--n-pos", "32"]
        return command(*arguments, "--limit", "4", *more)

    return run
