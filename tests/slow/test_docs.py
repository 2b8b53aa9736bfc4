"""Runs the blocks of the pages that take many seconds; the rest is in ``tests/test_docs.py``."""

import pytest

from tests.pages import ROOT, SLOW, run_page


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_the_blocks_of_a_slow_page_run(page, capfd, store_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page(ROOT / page, capfd) > 0
