"""What the cells of a plan rest on: probes, models and prompts on this machine, each read once.

A plan of 100,000 cells names a few models and texts. What is found here holds for one plan; a
worker looks again for each of its cells.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.discovery import find_probe
from workbench.encoding import DRAWN_PROMPTS, DRAWN_TOKENS
from workbench.raw_prompts import raw_hash
from workbench.registry import Probe
from workbench.requests import (
    ModelFiles,
    Options,
    edited_request,
    model_files,
    probe_hash,
    request_from,
)
from workbench.sources import read_source

if TYPE_CHECKING:
    from workbench.execute.cell import Cell

CHARACTERS_A_TOKEN = 4
T = TypeVar("T")


@dataclass(frozen=True)
class PromptFacts:
    """What a plan must know of prompts."""

    hash: str
    lengths: tuple[int, ...]
    """Tokens of each prompt, about; 0: it is drawn when the model is there."""

    def n_tokens(self, n_pos: int | None) -> int:
        """Tokens in all, when prompts are cut to ``n_pos``."""
        drawn = n_pos or DRAWN_TOKENS
        return sum(min(length, n_pos or length) or drawn for length in self.lengths)


class PlanInputs:
    """Reads every probe, model and text of a plan once."""

    def __init__(self, hashes: Path | None = None) -> None:
        """Start with nothing read.

        Args:
            hashes: Where hashes of large weight files are remembered.
        """
        self._hashes = hashes
        self._found: dict[tuple[Any, ...], Any] = {}

    def once(self, make: Callable[..., T], *about: Any) -> T:
        """What a function made of these arguments the first time."""
        if (make, *about) not in self._found:
            self._found[make, *about] = make(*about)
        found: T = self._found[make, *about]
        return found

    def probe(self, name: str) -> Probe:
        """A probe; see ``workbench.discovery.find_probe``."""
        return self.once(find_probe, name)

    def model(self, name: str, revision: str | None) -> ModelFiles:
        """A model as its files tell; see ``workbench.requests.model_files``."""
        return self.once(model_files, name, revision, self._hashes)

    def prompts(self, data: Any, limit: int | None) -> PromptFacts | None:
        """What a plan must know of prompts; None for probes that need none.

        Raises:
            DataError: They cannot be read.
        """
        return None if data is None else self.once(_read, json.dumps(data), limit)

    def document(self) -> dict[str, Any]:
        """What was found, as JSON data: hashes of models and prompts, versions of probes."""
        found: dict[str, Any] = {"models": {}, "data": {}, "probes": {}}
        for (make, *about), value in self._found.items():
            if make is model_files:
                name, revision, _ = about
                text = name if revision is None else f"{name}@{revision}"
                found["models"][text] = {"revision": value.revision, "tokenizer": value.tokenizer}
            elif make is _read:
                data, limit = about
                where = {"source": json.loads(data), "limit": limit}
                found["data"][value.hash] = {**where, "prompts": len(value.lengths)}
            elif make is find_probe:
                found["probes"][value.name] = value.version
        return found

    def request(self, cell: "Cell") -> str | None:
        """The request a cell is, as the store remembers it; None when files alone do not tell.

        Without an intervention it is the request of ``workbench run``.
        """
        options = Options(**cell.options)
        prompts = self.prompts(cell.data, options.limit)
        base = request_from(
            cell.probe,
            self.once(probe_hash, cell.probe),
            self.model(cell.model, options.revision),
            None if prompts is None else prompts.hash,
            options,
            cell.settings,
        )
        return edited_request(base, cell.intervention)


def _read(data: str, limit: int | None) -> PromptFacts:
    raw = read_source(json.loads(data), limit)
    lengths: list[int] = []
    for part in list(raw.domains.values()) or [raw]:
        here = [len(text) // CHARACTERS_A_TOKEN + 1 for text in part.texts]
        here += [len(ids) for ids in part.ids]
        lengths += here or [0] * (limit or DRAWN_PROMPTS)
    return PromptFacts(raw_hash(raw), tuple(lengths))
