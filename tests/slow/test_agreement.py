"""Measures the page of agreement again: every family through every backend."""

import json

import pytest

from tests.models.agreement import LIBRARY_WARNINGS
from tests.scripts import benchmarks
from tests.zoo import ALL_FAMILIES

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS)]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_page_of_agreement_still_holds(family):
    with benchmarks() as import_script:
        agreement = import_script("agreement")
        again = agreement.measure([family])
        kept = json.loads(agreement.KEPT.read_text("utf-8"))["rows"]

    def outcomes(rows):
        return {(row["backend"], row["name"]): row["passed"] for row in rows}

    assert outcomes(again) == outcomes(row for row in kept if row["family"] == family)
