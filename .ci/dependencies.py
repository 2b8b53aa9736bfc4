"""Write docs/dependencies.md: every pinned package with its licence and who asks for it.

    python .ci/dependencies.py            writes the page from what is installed
    python .ci/dependencies.py --check    fails when constraints.txt and the page disagree

Needs no network: licences are read from the packages' own metadata.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS, PAGE = ROOT / "constraints.txt", ROOT / "docs" / "dependencies.md"
HEAD = """# Dependencies and their licences

Every package that `make` may install, at the version it installs (`constraints.txt`), with the licence that the
package's own metadata states. Written by `python .ci/dependencies.py`; a test compares the page with the pins.

`pip-audit --no-deps --disable-pip -r constraints.txt` compares the pins with known vulnerabilities where its
data can be reached. {audit}

| package | version | licence |
|---|---|---|
"""
AUDIT = """Where this page was written it could not
be (2026-11-25: every package came back as "could not be audited"), so nothing is said here about vulnerabilities."""


def pins() -> dict[str, str]:
    """Version by package."""
    lines = PINS.read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def licence(package: str) -> str:
    """What a package says its licence is, in a few words."""
    try:
        about = metadata(package)
    except PackageNotFoundError:
        return "(not needed on Linux)"
    if expression := about.get("License-Expression"):
        return expression
    classifiers = about.get_all("Classifier") or []
    named = [text.split(" :: ")[-1] for text in classifiers if text.startswith("License :: ")]
    if named and named != ["OSI Approved"]:
        return ", ".join(sorted(set(named)))
    text = (about.get("License") or "").strip().split("\n")[0]
    return text[:60] or "not stated in its metadata"


def listed() -> dict[str, str]:
    """Version by package, as the page has them."""
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w.+-]+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    return {name: version for name, version in rows if name != "package"}


def main() -> int:
    """Write or check the page."""
    wanted = pins()
    if "--check" in sys.argv:
        differ = sorted(set(wanted.items()) ^ set(listed().items()))
        if differ:
            sys.stderr.write(
                f"{PAGE.name} and {PINS.name} differ in {differ}; run {Path(__file__).name}\n"
            )
        return int(bool(differ))
    rows = [f"| {name} | {version} | {licence(name)} |" for name, version in wanted.items()]
    PAGE.write_text(HEAD.format(audit=AUDIT) + "\n".join(rows) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
