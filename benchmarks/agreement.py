"""Every family through every backend: the largest error of every proof of ``workbench validate``.

The models are the tests' zoo: two layers, random weights large enough that a wrong scale, a forgotten
norm or a dropped window shows. What was found is kept in ``benchmarks/agreement.json``, and
``docs/agreement.md`` is rendered from it.

    python benchmarks/agreement.py
    python benchmarks/agreement.py --render     # the page only, from the kept numbers
"""

import argparse
import copy
import datetime
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import versions_of

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "agreement.json"
PAGE = ROOT / "docs" / "agreement.md"
BACKENDS = ("hf", "transformer-lens", "nnsight")
MUST_EXCEED = "edit-changes-logits"
"""The one proof whose value must lie above its bound; it is no error."""


def backend_of(backend: str, module: Any) -> Any:
    """The same weights through one backend."""
    from workbench.models.bridge_building import bridge_of
    from workbench.models.huggingface import HuggingFaceModel
    from workbench.models.nnsight_building import wrap_module
    from workbench.models.transformer_lens import TransformerLensModel

    if backend == "hf":
        return HuggingFaceModel(module)
    if backend == "transformer-lens":
        return TransformerLensModel(bridge_of(module))
    twin = copy.deepcopy(module)
    twin.set_attn_implementation("eager")
    return wrap_module(twin)


def measure(families: Sequence[str]) -> list[dict[str, Any]]:
    """One row a family, backend and proof; a refusal is a row as well."""
    from tests.zoo import tiny_model
    from workbench.errors import CapabilityError
    from workbench.models.validate import to_rows, validate_model

    rows = []
    for family in families:
        module = tiny_model(family)
        models: dict[str, Any] = {}
        for backend in BACKENDS:
            about = {"family": family, "backend": backend}
            try:
                models[backend] = backend_of(backend, module)
            except CapabilityError as error:
                rows.append(about | {"name": "refused", "passed": None, "detail": str(error)})
                continue
            others = list(models.values())[:1] if len(models) > 1 else []
            checks = to_rows(validate_model(models[backend], other_backends=others))
            rows += [about | check for check in checks if check["name"] != "backends-agree"]
        print(family, flush=True)
    return rows


# The page


def render(record: dict[str, Any]) -> str:
    """The page of one record."""
    rows = record["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    parts = [
        "<!-- Made by benchmarks/agreement.py --render from benchmarks/agreement.json. -->",
        "# Agreement",
        INTRODUCTION.format(date=record["date"], versions=versions, n=len(families)),
        "## All proofs, in short",
        _table(
            ["family", *BACKENDS],
            [
                [family, *(_summary(_of(rows, family, backend)) for backend in BACKENDS)]
                for family in families
            ],
        ),
    ]
    for backend in BACKENDS:
        names = [
            row["name"]
            for row in rows
            if row["backend"] == backend and row["name"] not in ("refused", MUST_EXCEED)
        ]
        names = list(dict.fromkeys(names))
        body = []
        for family in families:
            found = {row["name"]: row for row in _of(rows, family, backend)}
            if "refused" not in found:
                body.append([family, *(_value(found.get(name)) for name in names)])
        parts += [f"## {backend}, proof by proof", _table(["family", *names], body)]
    parts += ["## What was left out, and why", _reasons(rows)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
Whether the numbers are those of the model. Each of the {n} families below is a tiny model with random weights,
through each backend, put to the proofs of `workbench validate` on two prompts of 16 random tokens: are the logits
the library's own; does reading everything move nothing; do streamed statistics equal those of the whole pattern,
also when it is cut into tiles of six rows; does the residual stream add up; does an edit act where it says and
nowhere else; is a padded prompt the prompt alone; do cached tokens equal those without a cache; does another
backend find the same numbers. The figures are largest absolute differences, divided by the largest entry of the
reference vector where that exceeds 1. All in float32, where the bound is 1e-4; it is 0 for `no-op-is-bitwise` and
`heads-are-zeroed`.

Measured {date} with {versions}, on a CPU. `workbench validate --model M` says the same of a model of yours;
`tests/slow/test_agreement.py` measures this page again."""


def _of(rows: list[dict[str, Any]], family: str, backend: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["family"] == family and row["backend"] == backend]


def _summary(rows: list[dict[str, Any]]) -> str:
    if any(row["name"] == "refused" for row in rows):
        return "refused"
    failed = [row["name"] for row in rows if row["passed"] is False]
    if not rows:
        return ""
    passed = [row for row in rows if row["passed"]]
    errors = [row for row in passed if row["name"] != MUST_EXCEED]
    worst = max(errors, key=lambda row: row["value"])
    text = f"{len(passed)} passed, largest {worst['value']:.0e} ({worst['name']})"
    return text + (f"; **failed: {', '.join(failed)}**" if failed else "")


def _value(row: dict[str, Any] | None) -> str:
    if row is None or row["passed"] is None:
        return ""
    text = (
        "0" if row["value"] == 0 else f"{row['value']:.0e}" if row["value"] is not None else "error"
    )
    return text if row["passed"] else f"**{text}**"


def _reasons(rows: list[dict[str, Any]]) -> str:
    """Skipped proofs and refused families, those with one reason together."""
    by_reason: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        if row["passed"] is None:
            place = by_reason.setdefault((row["backend"], row["detail"]), {})
            place.setdefault(row["name"], []).append(row["family"])
    lines = []
    for (backend, reason), names in by_reason.items():
        what = ", ".join(f"`{name}`" for name in names)
        families = ", ".join(dict.fromkeys(each for found in names.values() for each in found))
        lines.append([families, backend, what, reason.replace("<", "&lt;")])
    return _table(["family", "backend", "proof", "reason"], lines)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main() -> None:
    """Validate the families on every backend and write the page; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--render", action="store_true", help="write the page from the kept numbers"
    )
    arguments = parser.parse_args()
    if not arguments.render:
        sys.path.insert(0, str(ROOT))
        warnings.simplefilter("ignore")  # deprecations inside the peers
        from tests.zoo import ALL_FAMILIES

        record = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": versions_of("torch", "transformers", "transformer-lens", "nnsight"),
            "rows": measure(ALL_FAMILIES),
        }
        KEPT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(json.loads(KEPT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
