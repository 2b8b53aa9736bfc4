"""What a model says to the questions of a task: label scores, and the answer it writes.

Scores are log-probabilities of the labels after the prompt: of their first token (``first-token``, the
papers' way; the first tokens must differ) or of the whole label (``loglikelihood``, the sum over its
tokens, as lm-evaluation-harness does). Prompt and label are tokenised together, as there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.evaluation.measures import Scored
from workbench.evaluation.task import Question
from workbench.models.base import ModelAdapter
from workbench.models.memory import fitting_batch_size

SCORINGS = ("first-token", "loglikelihood")


@dataclass(frozen=True)
class Encoded:
    """One question in tokens."""

    prompt: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]
    answer: int


@dataclass(frozen=True)
class Settings:
    """How to score."""

    scoring: str = "first-token"
    batch_size: int | None = None
    """Questions at once; None: as many as memory holds."""
    max_new_tokens: int = 5
    """Tokens that the written answer may take."""
    progress: Callable[[int, int], None] = lambda done, total: None
    report: Callable[[str], None] = lambda text: None
    """Told when memory did not suffice, and what is done about it."""

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ConfigError(f"scoring must be one of {', '.join(SCORINGS)}; got {self.scoring}")


def encode_questions(
    model: ModelAdapter, questions: Sequence[Question], settings: Settings
) -> list[Encoded]:
    """Tokenise every question and refuse, before anything runs, what cannot be scored.

    Raises:
        CapabilityError: The model has no tokenizer.
        DataError: A prompt that does not fit the model, or labels that begin alike.
    """
    if model.tokenizer is None:
        raise CapabilityError(f"an evaluation needs a tokenizer; {model.spec.name} has none")
    encoded = []
    for number, question in enumerate(questions, start=1):
        row = question.where or f"row {number}"
        item = _encode(model.tokenizer, question, row)
        encoded.append(item)
        longest = longest_text(item, settings)
        if longest > model.spec.n_ctx:
            raise DataError(
                f"prompt and answer must fit in n_ctx = {model.spec.n_ctx} of {model.spec.name}; "
                f"{row} needs {longest} tokens; leave it out, or give fewer examples"
            )
        firsts = [label[0] for label in item.labels]
        if settings.scoring == "first-token" and len(set(firsts)) < len(firsts):
            shown = ", ".join(repr(label) for label in question.labels)
            raise DataError(
                f"labels must begin with different tokens to be told apart by the first; {shown} of "
                f"{row} do not with this tokenizer; use other labels, or evaluate with scoring=loglikelihood"
            )
    return encoded


def _encode(tokenizer: Any, question: Question, row: str) -> Encoded:
    # A space at the end belongs to the label, or the prompt would end in a token of its own.
    prompt = question.prompt.rstrip()
    space = question.prompt[len(prompt) :]

    def ids(text: str) -> tuple[int, ...]:
        # The tokenizer would warn of long texts, which are refused by the caller.
        return tuple(tokenizer(text, verbose=False)["input_ids"])

    start = ids(prompt)
    if not start:
        raise DataError(f"a prompt must have at least one token; that of {row} has none; mend it")
    labels = []
    for label in question.labels:
        labels.append(ids(prompt + space + label)[len(start) :])
        if not labels[-1]:
            raise DataError(
                f"a label must have a token of its own; {label!r} of {row} has none; choose another"
            )
    return Encoded(start, tuple(labels), question.answer)


def score(model: ModelAdapter, encoded: Sequence[Encoded], settings: Settings) -> Scored:
    """Score every label and let the model write its answer; active edits apply."""
    total = len(encoded)
    scores: list[tuple[float, ...]] = [()] * total
    entropy, parsed = [0.0] * total, [-1] * total
    size, done = settings.batch_size or largest_batch(model, encoded, settings), 0
    for numbers in of_like_length(encoded, size):
        batch = [encoded[number] for number in numbers]
        log_probs = next_token(model, batch)
        if settings.scoring == "first-token":
            found = first_token_scores(log_probs, batch)
        else:
            found = loglikelihoods(model, batch, log_probs)
        written = write_answers(model, batch, settings.max_new_tokens)
        for number, row, label_scores, answer in zip(
            numbers, log_probs.double(), found, written, strict=True
        ):
            scores[number], parsed[number] = label_scores, answer
            entropy[number] = float(-(row.exp() * row).sum())
        done += len(batch)
        settings.progress(done, total)
    answers = tuple(item.answer for item in encoded)
    return Scored(tuple(scores), answers, tuple(parsed), tuple(entropy))


def largest_batch(model: ModelAdapter, encoded: Sequence[Encoded], settings: Settings) -> int:
    """As many questions at once as fit into a share of the free memory."""
    longest = max((longest_text(item, settings) for item in encoded), default=1)
    return fitting_batch_size(model, longest)


def longest_text(item: Encoded, settings: Settings) -> int:
    """Tokens of a question with its longest label, or with the longest answer."""
    return len(item.prompt) + max(max(map(len, item.labels)), settings.max_new_tokens)


def of_like_length(encoded: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """The numbers of all questions in batches that need little padding."""
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number].prompt))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def pad_left(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
    """Tokens and mask with every row ending at the same place; no mask where none is needed."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[row[0]] * (longest - len(row)) + list(row) for row in rows])
    if min(map(len, rows)) == longest:
        return tokens, None
    lengths = torch.tensor([[len(row)] for row in rows])
    return tokens, (torch.arange(longest) >= longest - lengths).long()


def next_token(model: ModelAdapter, batch: Sequence[Encoded]) -> Float[Tensor, "batch d_vocab"]:
    """Log-probabilities of the token after each prompt."""
    tokens, mask = pad_left([item.prompt for item in batch])
    return model.logits(tokens, mask, last=1)[:, 0].log_softmax(dim=-1)


def first_token_scores(
    log_probs: Float[Tensor, "batch d_vocab"], batch: Sequence[Encoded]
) -> list[tuple[float, ...]]:
    """Log-probability of each label's first token."""
    return [
        tuple(float(row[label[0]]) for label in item.labels)
        for row, item in zip(log_probs, batch, strict=True)
    ]


def loglikelihoods(
    model: ModelAdapter, batch: Sequence[Encoded], log_probs: Float[Tensor, "batch d_vocab"]
) -> list[tuple[float, ...]]:
    """Log-probability of each whole label: the first token's, and that of the rest where it has one."""
    scores = [list(row) for row in first_token_scores(log_probs, batch)]
    longer = [
        (row, index, label)
        for row, item in enumerate(batch)
        for index, label in enumerate(item.labels)
        if len(label) > 1
    ]
    size = max(len(batch), 1)
    for start in range(0, len(longer), size):
        part = longer[start : start + size]
        texts = [(*batch[row].prompt, *label[:-1]) for row, _, label in part]
        tokens, mask = pad_left(texts)
        deepest = max(len(label) for _, _, label in part) - 1
        found = model.logits(tokens, mask, last=deepest).log_softmax(dim=-1)
        for (row, index, label), logits in zip(part, found, strict=True):
            rest = torch.tensor(label[1:])
            picked = logits[-len(rest) :].gather(-1, rest[:, None])
            scores[row][index] += float(picked.sum())
    return [tuple(row) for row in scores]


def write_answers(model: ModelAdapter, batch: Sequence[Encoded], max_new_tokens: int) -> list[int]:
    """Let the model write, most likely token first, and read which label it wrote (-1: none).

    Raises:
        CapabilityError: The backend does not generate.
    """
    if "generate" not in model.capabilities:
        raise CapabilityError(
            f"accuracy is read from what the model writes; the {model.backend} backend does not "
            "generate; use --backend hf or transformer-lens"
        )
    tokens, mask = pad_left([item.prompt for item in batch])
    written = model.generate(
        tokens, max_new_tokens=max_new_tokens, attention_mask=mask, do_sample=False
    )
    decode = model.tokenizer.decode
    return [
        read_answer(
            decode(row[tokens.shape[1] :], skip_special_tokens=True),
            [decode(list(label)) for label in item.labels],
        )
        for row, item in zip(written, batch, strict=True)
    ]


def read_answer(text: str, labels: Sequence[str]) -> int:
    """The label that a text begins with, as a whole word and in any case; -1: none."""
    text = text.strip().lower()
    found = -1
    for index, label in enumerate(labels):
        name = label.strip().lower()
        follows = text[len(name) : len(name) + 1]
        fits = text.startswith(name) and not follows.isalnum()
        # Of labels that begin alike, the longer one.
        if fits and (found < 0 or len(name) > len(labels[found].strip())):
            found = index
    return found
