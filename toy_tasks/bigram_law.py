"""The law of Bigram-Backcopy sequences: character statistics, sampling, and the exact oracle.

Characters follow a bigram law, except after a trigger (one of the most frequent characters), where
the character before the trigger is copied. With mu the unigram law, P the bigram law, T the
triggers and positions counted from 0:

    x_0 = <s>
    x_1 ~ mu restricted to characters outside T
    x_n = x_{n-2} if x_{n-1} in T, else x_n ~ P[x_{n-1}, .]          n >= 2

So two triggers are never adjacent, and every trigger is followed by the character before it.

Paper: Guo et al. 2024, "Active-Dormant Attention Heads", arXiv:2410.13835. Their oracle takes the
whole of mu at position 0, although x_1 is no trigger; here the row of <s> is the true law, so that
a perfect model has no excess risk. Their generator is a Python loop over tokens in 60 processes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import ConfigError, DataError

BOS = "<s>"
MIN_CHARACTERS = 3
REFERENCE = "tinyshakespeare.json"
"""Character counts of the text that the paper used."""

# Character statistics


@dataclass(frozen=True, eq=False)
class CharacterCounts:
    """How often characters and pairs of neighbours occur in a text."""

    characters: tuple[str, ...]
    """By code point; the index is the token id."""
    single: Int[Tensor, " char"]
    pair: Int[Tensor, "char next_char"]


def count_characters(text: str) -> CharacterCounts:
    """Count the characters of a text and its pairs of neighbours.

    Raises:
        DataError: Fewer than three distinct characters: no law with triggers and others.
    """
    points = np.frombuffer(text.encode("utf-32-le", errors="replace"), dtype=np.uint32)
    known, index = np.unique(points, return_inverse=True)
    if len(known) < MIN_CHARACTERS:
        raise DataError(
            f"a text must have at least {MIN_CHARACTERS} distinct characters for a bigram law; got "
            f"{len(known)}; give a longer text"
        )
    n = len(known)
    pair = np.bincount(index[:-1] * n + index[1:], minlength=n * n).reshape(n, n)
    single = np.bincount(index, minlength=n)
    return CharacterCounts(tuple(map(chr, known)), torch.from_numpy(single), torch.from_numpy(pair))


def read_counts(text: str | None = None) -> CharacterCounts:
    """Count a text file's characters; None: read the counts of the reference text.

    Raises:
        DataError: The file cannot be read as UTF-8 text, or has too few characters.
    """
    if text is not None:
        try:
            return count_characters(Path(text).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"text must be a readable UTF-8 file; {Path(text).name} is not ({error.args[-1]}); "
                "check the path"
            ) from error
    kept = json.loads((files("toy_tasks") / "data" / REFERENCE).read_text(encoding="utf-8"))
    return CharacterCounts(
        tuple(kept["characters"]), torch.tensor(kept["single"]), torch.tensor(kept["pair"])
    )


# The law


@dataclass(frozen=True, eq=False)
class BigramLaw:
    """What follows what; <s> is the last token id."""

    tokens: tuple[str, ...]
    """The characters and <s>, by id."""
    unigram: Float[Tensor, " d_vocab"]
    """mu, in float64; 0 for <s>."""
    transition: Float[Tensor, "d_vocab next_token"]
    """P, in float64. The row of <s> is the law of x_1; rows of triggers are never used."""
    is_trigger: Bool[Tensor, " d_vocab"]

    @property
    def bos(self) -> int:
        """The id of <s>."""
        return len(self.tokens) - 1

    @property
    def d_vocab(self) -> int:
        """How many token ids there are."""
        return len(self.tokens)

    @property
    def triggers(self) -> Int[Tensor, " trigger"]:
        """The triggers' ids, the most frequent first."""
        ids = self.is_trigger.nonzero()[:, 0]
        return ids[self.unigram[ids].argsort(descending=True, stable=True)]


def make_law(counts: CharacterCounts, triggers: int | str = 3) -> BigramLaw:
    """Build the law from counts.

    Args:
        counts: Of the text that is imitated.
        triggers: How many of the most frequent characters are triggers, or the characters.

    Raises:
        ConfigError: No character, every character or an unknown one is a trigger.
    """
    n = len(counts.characters)
    is_trigger = torch.zeros(n + 1, dtype=torch.bool)
    is_trigger[_trigger_ids(counts, triggers)] = True
    unigram = torch.zeros(n + 1, dtype=torch.float64)
    unigram[:n] = counts.single / counts.single.sum()
    transition = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    followed = counts.pair.sum(dim=1, keepdim=True)
    # Only a text's last character can have no successor; it is followed by anything.
    transition[:n, :n] = torch.where(followed > 0, counts.pair / followed.clamp(min=1), unigram[:n])
    first = unigram.masked_fill(is_trigger, 0.0)
    transition[n] = first / first.sum()
    return BigramLaw((*counts.characters, BOS), unigram, transition, is_trigger)


def _trigger_ids(counts: CharacterCounts, triggers: int | str) -> list[int]:
    n = len(counts.characters)
    if isinstance(triggers, str):
        unknown = sorted(set(triggers) - set(counts.characters))
        if unknown:
            raise ConfigError(
                f"triggers must occur in the text; {unknown[0]!r} does not; choose others"
            )
        chosen = [counts.characters.index(character) for character in sorted(set(triggers))]
    else:
        order = counts.single.argsort(descending=True, stable=True)
        chosen = order[: max(0, triggers)].tolist()
    if not 0 < len(chosen) < n:
        raise ConfigError(
            f"triggers must be at least 1 and at most {n - 1} of the text's {n} characters; got "
            f"{len(chosen)}; the paper takes 3"
        )
    return chosen


def sample(
    law: BigramLaw, n_rows: int, n_pos: int, generator: torch.Generator
) -> Int[Tensor, "{n_rows} {n_pos}+1"]:
    """Draw sequences x_0 ... x_{n_pos}."""
    return follow(law, draw(n_rows, n_pos, generator))


def draw(n_rows: int, n_pos: int, generator: torch.Generator) -> Float[Tensor, "{n_pos} {n_rows}"]:
    """Draw the even numbers in [0, 1) that sequences are made from, one a token."""
    return torch.rand(n_pos, n_rows, dtype=torch.float64, generator=generator)


def follow(law: BigramLaw, uniform: Float[Tensor, "pos row"]) -> Int[Tensor, "row longer"]:
    """Make sequences x_0 ... x_n from even numbers, all rows at once, position by position."""
    # Row v of the flat table spans (v, v + 1]: one search serves every previous character.
    offsets = torch.arange(law.d_vocab, dtype=torch.float64)
    cumulative = law.transition.cumsum(dim=1)
    flat = (cumulative / cumulative[:, -1:] + offsets[:, None]).flatten()
    # Kept off 1, so that adding the row's number can never round up into the next row.
    uniform = uniform * (1.0 - 2.0**-40)
    # By position first: every step reads and writes contiguous memory.
    tokens = torch.full((len(uniform) + 1, uniform.shape[1]), law.bos)
    for pos in range(1, len(tokens)):
        previous = tokens[pos - 1]
        found = torch.searchsorted(flat, uniform[pos - 1] + previous, right=True)
        found -= previous * law.d_vocab
        # x_0 and x_1 are no triggers, so at pos 1 the row below is never taken.
        copied = tokens[max(pos - 2, 0)]
        tokens[pos] = torch.where(law.is_trigger[previous], copied, found)
    return tokens.T.contiguous()


# The oracle


def oracle(law: BigramLaw, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_vocab"]:
    """The true law of the next token at every position, in float64."""
    before = torch.nn.functional.one_hot(tokens.roll(1, dims=1), law.d_vocab).double()
    copies = law.is_trigger[tokens][..., None]
    return torch.where(copies, before, law.transition[tokens])


def excess_risk(
    log_probs: Float[Tensor, "row pos d_vocab"], truth: Float[Tensor, "row pos d_vocab"]
) -> Float[Tensor, "row pos"]:
    """Expected loss of a model's prediction minus the oracle's own, in nats: their divergence."""
    # A model in half or single precision may give log 0 where the truth is 0 as well.
    cross = torch.where(truth > 0, truth * log_probs.double(), 0.0).sum(dim=-1)
    return -cross - torch.special.entr(truth).sum(dim=-1)


def split_risk(
    risk: Float[Tensor, "row pos"], law: BigramLaw, tokens: Int[Tensor, "row pos"]
) -> tuple[float, float]:
    """Mean risk at triggers (backcopy) and at other characters (bigram), without position 0."""
    is_trigger = law.is_trigger[tokens]
    bigram = ~is_trigger
    bigram[:, 0] = False
    return risk[is_trigger].mean().item(), risk[bigram].mean().item()


def guessing_risk(law: BigramLaw) -> float:
    """Loss of guessing evenly among all tokens, in nats."""
    return float(np.log(law.d_vocab))


def decode(law: BigramLaw, ids: Sequence[int]) -> str:
    """The text of token ids."""
    return "".join(law.tokens[index] for index in ids)
