"""``docs/benchmarks.md`` from the hand-written sections in ``page/`` and the numbers in ``results/``.

A section holds ``<!-- table: NAME -->`` where the table of ``results/NAME.json`` belongs, and
``<!-- figure: NAME -->`` where its picture does. A number in a sentence is asked for as well, so that it is
the table's: ``{{NAME / row / who / ratio}}``, where stars may stand for what differs, and several rows give
"least to most". Numbers that no section asks for get a section of their own at the end, so that nothing
measured is left out.

    python benchmarks/render.py              # the page
    python benchmarks/render.py --adopt      # what out/ holds becomes the kept numbers first
    python benchmarks/render.py --figures    # the pictures as well; needs Chromium
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from record import OUT, RESULTS, TIE, Row, read_record

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
SECTIONS = Path(__file__).parent / "page"
IMAGES = ROOT / "docs" / "images"
VALUE = re.compile(r"\{\{([^{}]+)\}\}")
PLACE = re.compile(r"^<!-- (table|figure): ([\w-]+) -->$", re.MULTILINE)


def render_page() -> str:
    """The whole page."""
    records = {path.stem: read_record(path) for path in sorted(RESULTS.glob("*.json"))}
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SECTIONS.glob("*.md")))
    placed = {name for kind, name in PLACE.findall(text) if kind == "table"}
    missing = placed - set(records)
    if missing:
        raise SystemExit(
            f"a section asks for results/{sorted(missing)[0]}.json, which is not there"
        )
    for name in sorted(set(records) - placed):
        text += f"\n## {name}\n\n<!-- table: {name} -->\n"

    def fill(found: re.Match[str]) -> str:
        kind, name = found.groups()
        return table(records[name]) if kind == "table" else f"![{name}](images/{picture(name)})"

    text = VALUE.sub(lambda found: value(records, found[1]), text)
    head = "<!-- Made by benchmarks/render.py from benchmarks/page and benchmarks/results. -->\n"
    return head + PLACE.sub(fill, text)


def value(records: dict[str, dict[str, Any]], asked: str) -> str:
    """A number for a sentence: ``"record / row / who / entry"``, of all rows that fit."""
    parts = asked.split(" / ")
    if len(parts) != 4:
        raise SystemExit(f"a sentence asks for {asked!r}; it must be record / row / who / entry")
    record, name, who, entry = parts
    found = [
        getattr(row, entry)
        for row in records.get(record, {"rows": ()})["rows"]
        if fnmatchcase(row.name, name) and fnmatchcase(row.peer, who)
    ]
    known = [each for each in found if each is not None]
    if not known:
        return "(not measured)"
    ends = [number(min(known)), number(max(known))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def picture(name: str) -> str:
    """File name of a benchmark's figure."""
    return f"benchmark_{name}.svg"


# Tables


def table(record: dict[str, Any]) -> str:
    """The rows of one record, under a line of conditions."""
    rows = grouped(record["rows"])
    columns = {title: [show(row) for row in rows] for title, show in COLUMNS.items()}
    columns["note"] = [note(row, rows, record["better"]) for row in rows]
    names = columns["what"]
    columns["what"] = ["" if names[:i][-1:] == [name] else name for i, name in enumerate(names)]
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    for title in ("shape", "threads"):
        if len(set(columns.get(title, []))) == 1:
            del columns[title]  # the line of conditions has it
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return caption(record) + "\n\n" + "\n".join(lines)


def grouped(rows: Sequence[Row]) -> list[Row]:
    """Rows of one piece of work together, in the order in which it first comes up."""
    order = list(dict.fromkeys(row.name for row in rows))
    return sorted(rows, key=lambda row: order.index(row.name))


def caption(record: dict[str, Any]) -> str:
    """What holds for every row: what is compared, when, where, with which versions."""
    rows: list[Row] = record["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    same = [
        f"{value}{unit}".replace("1 threads", "one thread")
        for values, unit in (
            ({row.shape for row in rows}, ""),
            ({row.threads for row in rows}, " threads"),
        )
        if len(values) == 1 and (value := next(iter(values))) is not None
    ]
    parts = [f"Ratio: {record['ratio_means']}"]
    if any(row.ratio is not None or row.cpu_ratio is not None for row in rows):
        parts[0] += f"; {record['better']} is better"
    parts += [". ".join([", ".join(same)] if same else []), record["conditions"]]
    parts += [f"{record['machine']}; {versions}; {record['date']}", f"`{record['command']}`"]
    return ". ".join(part[0].upper() + part[1:] for part in parts if part) + "."


def number(value: float | None) -> str:
    """Three digits, with thousands set apart."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(middle: float | None, least: float | None, most: float | None) -> str:
    """A median with its spread; either may not have been measured."""
    ends = [number(end) or "?" for end in (least, most)]
    if least is None and most is None:
        return number(middle)
    return f"{number(middle)} [{ends[0]},&nbsp;{ends[1]}]".strip()


def peer(row: Row) -> str:
    """Who, with its version; ours stands out."""
    name = f"{row.peer} {row.version}" if row.version else row.peer
    return f"**{name}**" if row.is_ours else name


def limit(row: Row) -> str:
    """The limit and how far the row is from it."""
    far = "" if row.distance is None else f" (x{number(row.distance)})"
    return number(row.limit) + far


COLUMNS: dict[str, Callable[[Row], str]] = {
    "what": lambda row: row.name,
    "who": peer,
    "shape": lambda row: row.shape or "",
    "threads": lambda row: number(row.threads),
    "median [least, most]": lambda row: (
        f"{interval(row.median, row.least, row.most)} {row.unit or ''}".strip()
    ),
    "ratio": lambda row: interval(row.ratio, row.ratio_least, row.ratio_most),
    "CPU time": lambda row: number(row.cpu_ratio),
    "extra memory, MB": lambda row: number(row.peak_memory),
    "limit (distance)": limit,
}


def note(row: Row, rows: Sequence[Row], better: str) -> str:
    """The row's note; a row of ours that another beats begins with the name of that one, and why."""
    winner = beaten_by(row, rows, better)
    ahead = winner.peer if winner else "the reference" if behind_reference(row, better) else None
    behind = f"**behind {ahead}**: {row.why}" if ahead else ""
    return "; ".join(filter(None, (behind, row.note)))


def behind_reference(row: Row, better: str) -> bool:
    """Whether ours is worse than what ratios are taken of, by more than a tie.

    Of rows that could be behind alone, those with a ``why``: the reference of others is no rival.
    """
    if not (row.is_ours and row.why and row.ratio):
        return False
    return (row.ratio if better == "lower" else 1 / row.ratio) > TIE


def beaten_by(row: Row, rows: Sequence[Row], better: str) -> Row | None:
    """Whoever does the same piece of work better than this row of ours, by more than a tie."""
    if not row.is_ours:
        return None
    best = None
    for other in rows:
        if other.is_ours or other.name != row.name or other.shape != row.shape:
            continue
        for kind in ("ratio", "cpu_ratio"):
            mine, its = getattr(row, kind), getattr(other, kind)
            if mine is None or its is None:
                continue
            worse = mine / its if better == "lower" else its / mine
            if worse > TIE and (best is None or worse > best[0]):
                best = worse, other
            break
    return best[1] if best else None


def adopt(names: Sequence[str]) -> None:
    """What was measured becomes the kept numbers; a file of another form is named and left.

    Args:
        names: Of the benchmarks that have ended; none: whatever lies there.
    """
    for path in sorted(OUT.glob("*.json")):
        if names and not any(
            path.stem == name or path.stem.startswith(f"{name}_") for name in names
        ):
            continue
        try:
            read_record(path)
        except (KeyError, TypeError, ValueError) as error:
            print(f"{path.name} is no record and is left out: {error}", file=sys.stderr)
            continue
        shutil.move(path, RESULTS / path.name)
    (OUT / "ended.txt").unlink(missing_ok=True)  # all is to be measured the next time


def main() -> None:
    """Adopt, render and draw as asked; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figures", action="store_true", help="draw the pictures as well")
    parser.add_argument(
        "--adopt", nargs="*", metavar="BENCHMARK", help="keep what benchmarks/out holds of these"
    )
    arguments = parser.parse_args()
    if arguments.adopt is not None:
        adopt(arguments.adopt)
    PAGE.write_text(render_page(), encoding="utf-8")
    if arguments.figures:
        from figures import draw_all

        draw_all()


if __name__ == "__main__":
    main()
