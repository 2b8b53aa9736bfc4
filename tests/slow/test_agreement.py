"""Measures the page of agreement again: every family through every backend."""

import json

import pytest

from tests.models.agreement import LIBRARY_WARNINGS
from tests.scripts import benchmarks
from tests.zoo import ALL_FAMILIES

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS)]

ROUNDING = 1e-6
"""Float32's own, in a model of two layers."""


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_page_of_agreement_still_holds(family):
    with benchmarks() as import_script:
        agreement = import_script("agreement")
        again = agreement.measure([family])
        kept = json.loads(agreement.KEPT.read_text("utf-8"))["rows"]

    def by_proof(rows):
        return {(row["backend"], row["name"]): row for row in rows}

    before = by_proof(row for row in kept if row["family"] == family)
    assert set(by_proof(again)) == set(before)
    for proof, row in by_proof(again).items():
        assert row["passed"] == before[proof]["passed"], proof
        # Errors of rounding differ from one processor to another, but not by a factor of ten.
        if row["passed"] and row["name"] != agreement.MUST_EXCEED:
            assert row["value"] <= max(10 * before[proof]["value"], ROUNDING), proof
