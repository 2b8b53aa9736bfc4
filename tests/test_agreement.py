"""The page of agreement says what was measured; ``tests/slow/test_agreement.py`` measures again."""

import json

import pytest

from tests.scripts import benchmarks
from tests.zoo import ALL_FAMILIES, REFUSED_BY_HF


@pytest.fixture(scope="module")
def agreement():
    with benchmarks() as import_script:
        yield import_script("agreement")


@pytest.fixture(scope="module")
def kept(agreement):
    return json.loads(agreement.KEPT.read_text("utf-8"))


def test_the_page_is_what_the_kept_numbers_render_to(agreement, kept):
    assert agreement.PAGE.read_text("utf-8") == agreement.render(kept), (
        "benchmarks/agreement.py --render"
    )


def test_every_family_and_backend_is_there(agreement, kept):
    found = {(row["family"], row["backend"]) for row in kept["rows"]}
    assert found == {(family, backend) for family in ALL_FAMILIES for backend in agreement.BACKENDS}


def test_every_proof_passed_or_says_why_it_could_not_be_made(kept):
    for row in kept["rows"]:
        assert row["passed"] is not False, row
        if row["passed"] is None:
            assert len(row["detail"]) > 10, row
    refused = {(row["family"], row["backend"]) for row in kept["rows"] if row["name"] == "refused"}
    assert refused == {(family, "hf") for family in REFUSED_BY_HF}


def test_every_backend_is_compared_with_another(kept):
    compared = {
        (row["family"], row["backend"])
        for row in kept["rows"]
        if row["name"].startswith("agrees-with-") and row["passed"]
    }
    assert compared >= {(family, "nnsight") for family in ALL_FAMILIES}
    assert compared >= {
        (family, "transformer-lens") for family in ALL_FAMILIES if family not in REFUSED_BY_HF
    }


def test_a_failed_proof_stands_out(agreement):
    row = {
        "family": "gpt2",
        "backend": "hf",
        "name": "stock-logits",
        "passed": False,
        "value": 0.5,
        "bound": 1e-4,
        "detail": "",
    }
    good = {**row, "name": "residual-adds-up", "passed": True, "value": 1e-7}
    page = agreement.render({"date": "", "versions": {}, "rows": [row, good]})
    assert "**failed: stock-logits**" in page
    assert "| gpt2 | **5e-01** | 1e-07 |" in page
