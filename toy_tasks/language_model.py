"""Train a small GPT-2 that has what the probes look for: attention sinks and succession.

The text is a folder of the user's; to it are added generated documents that natural text of a few
megabytes lacks: succession (days, months, numbers, letters, ordinals, in lists and sentences) and
copying (word lists said again, words echoed). Both give heads work on some inputs only; on all
others such a head is idle, and an idle head parks its attention on the first token (Guo et al.
2024, "Active-Dormant Attention Heads", arXiv:2410.13835; Gu et al. 2024, arXiv:2410.10781).
The last part of the training adds text with marks strewn in, after each of which a token is
copied: the Bigram-Backcopy task of the former paper on natural text. Every training sequence
begins with BOS, which occurs nowhere else.

While it trains, every checkpoint notes

    val_loss     mean loss in nats on held-out natural text, position 0 excluded
    sink_rate    share of (prompt, layer, head) with alpha_0 > 0.3 on 64 tokens of that text, where
                 alpha_0 = 1/T * sum over q of A[q, 0]
    succession   of the best head, share of pairs (item, next item) for which the effective OV
                 circuit MLP0(ln_2(W_E)) W_V W_O W_U ranks the next item first among the targets
                 of its task (Gould et al. 2023, "Successor Heads", arXiv:2312.09230)
"""

import argparse
import fnmatch
import gzip
import hashlib
import json
import random
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toy_tasks.training import (
    Progress,
    TrainingConfig,
    load_weights,
    report_to_stderr,
    train,
)
from workbench.errors import ConfigError, DataError, WorkbenchError
from workbench.settings import check_settings, make_config, setting

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# fmt: off
NUMBER_WORDS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty",
)
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)
# fmt: on
SERIES: dict[str, tuple[str, ...]] = {
    "numbers": tuple(str(number) for number in range(1, 101)),
    "number words": NUMBER_WORDS,
    "ordinals": ORDINALS,
    "days": DAYS,
    "day prefixes": tuple(day[:3] for day in DAYS),
    "months": MONTHS,
    "month prefixes": tuple(month[:3] for month in MONTHS),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
"""The series the model is taught, each word a single token after a space."""

CYCLIC = ("days", "day prefixes", "months", "month prefixes")


@dataclass(frozen=True)
class LanguageModelConfig:
    """Settings of a demo language model; docs/demo_model.md says which made the shipped one."""

    n_layers: int = setting(4, "blocks", low=1.0)
    n_heads: int = setting(4, "attention heads of a block", low=1.0)
    d_model: int = setting(128, "width of the residual stream, a multiple of n_heads", low=1.0)
    n_ctx: int = setting(256, "tokens of a training sequence, BOS included", low=64.0)
    d_vocab: int = setting(2048, "tokens of the vocabulary", low=300.0)
    batch_size: int = setting(8, "sequences of a step", low=1.0)
    n_steps: int = setting(7200, "updates", low=1.0)
    lr: float = setting(3e-3, "learning rate between warm-up and decay", low=0.0, exclusive=True)
    warmup_steps: int = setting(200, "steps over which the learning rate rises", low=0.0)
    decay_share: float = setting(
        0.25,
        "share of the steps, at the end, over which it falls",
        low=0.0,
        high=1.0,
    )
    final_lr_share: float = setting(0.05, "last learning rate, as a share of lr", low=0.0, high=1.0)
    weight_decay: float = setting(0.1, "pull of all matrices to zero", low=0.0)
    beta2: float = setting(0.99, "memory of AdamW for the squared gradient", low=0.0, high=1.0)
    succession_share: float = setting(
        0.2, "share of the sequences cut from generated succession text", low=0.0, high=1.0
    )
    copy_share: float = setting(
        0.08, "share of the sequences cut from generated copying text", low=0.0, high=1.0
    )
    backcopy_share: float = setting(
        0.4,
        "share of the sequences cut from marked text, from backcopy_from on",
        low=0.0,
        high=1.0,
    )
    backcopy_from: int = setting(3350, "step from which marked text is mixed in", low=0.0)
    held_out_share: float = setting(
        0.04,
        "share of every file, at its end, kept for measuring",
        low=0.0,
        high=0.5,
        exclusive=True,
    )
    start_from: str = setting(
        "", "a checkpoint of an earlier run on this text whose weights are the first ones"
    )
    exclude: tuple[str, ...] = setting(
        (), "files of the text folder, or zip/member, to leave out; * is allowed"
    )
    seed: int = setting(0, "seed of weights, batches and generated text", low=0.0)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_settings(self)
        if self.d_model % self.n_heads:
            raise ConfigError(
                f"d_model must be a multiple of n_heads={self.n_heads}; got {self.d_model}. "
                "Change one of them."
            )
        generated = self.succession_share + self.copy_share + self.backcopy_share
        if generated > 1:
            raise ConfigError(
                "succession_share, copy_share and backcopy_share must leave room for the text; "
                f"they sum to {generated}. Lower one of them."
            )

    def shares_at(self, step: int) -> tuple[float, ...]:
        """Return the shares of text, succession, copying and, later, marked text."""
        natural = 1 - self.succession_share - self.copy_share
        if step < self.backcopy_from:
            return (natural, self.succession_share, self.copy_share)
        rest = (self.succession_share, self.copy_share, self.backcopy_share)
        return (natural - self.backcopy_share, *rest)

    def training(self) -> TrainingConfig:
        """Return the settings of the shared loop."""
        return TrainingConfig(
            n_steps=self.n_steps,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            decay_share=self.decay_share,
            final_lr_share=self.final_lr_share,
            weight_decay=self.weight_decay,
            beta2=self.beta2,
            seed=self.seed,
        )


# The text folder


def read_text_folder(folder: Path, exclude: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the text of every .txt, .json and .jsonl file by name, also gzipped or in a .zip.

    Of JSON the strings are taken: a list of them, or of objects (lines, in .jsonl) whose string
    fields other than names and ids are joined.

    Raises:
        DataError: the folder is missing or empty, or a file is not text of one of these kinds.
    """
    if not folder.is_dir():
        raise DataError(
            f"the text must be a folder; {folder} is not one. Give a folder of .txt or .jsonl."
        )
    texts = {}
    for path in sorted(folder.iterdir()):
        wanted = [
            (name, data)
            for name, data in (_unpack(path) if path.is_file() else ())
            if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)
        ]
        text = "\n\n".join(plain_text(part) for name, data in wanted for part in _texts(name, data))
        if text.strip():
            texts[path.name] = text
    if not texts:
        raise DataError(
            f"{folder} must hold text; no .txt, .json or .jsonl with any was found. Put some there."
        )
    return texts


def _unpack(path: Path) -> Iterator[tuple[str, bytes]]:
    """Give name and bytes of each file in ``path``."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.namelist())
                yield from ((f"{path.name}/{member}", archive.read(member)) for member in members)
        elif path.suffix == ".gz":
            yield path.name.removesuffix(".gz"), gzip.decompress(path.read_bytes())
        else:
            yield path.name, path.read_bytes()
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path.name} must be a whole archive; {error}. Copy it again or exclude it."
        ) from error


def _texts(name: str, data: bytes) -> Iterator[str]:
    if not name.endswith((".txt", ".json", ".jsonl")):
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} must be UTF-8; byte {error.start} is not. Convert or exclude it."
        ) from error
    try:
        if name.endswith(".txt"):
            yield text
        elif name.endswith(".jsonl"):
            yield from (
                _text_of(json.loads(line), name) for line in text.splitlines() if line.strip()
            )
        else:
            whole = json.loads(text)
            entries = whole if isinstance(whole, list) else [whole]
            yield from (_text_of(entry, name) for entry in entries)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} must be JSON; {error}. Mend or exclude it.") from error


def _text_of(entry: object, name: str) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise DataError(
            f"{name} must hold texts or objects with texts; got {type(entry).__name__}. Exclude it."
        )
    skipped = ("id", "task_id", "entry_point", "test")
    return "\n".join(
        value for key, value in entry.items() if isinstance(value, str) and key not in skipped
    )


def plain_text(text: str) -> str:
    """Undo what corpora do to text: Gutenberg's frame, WikiText's split words and unknown words."""
    text = text.replace("\r\n", "\n")
    begin, end = re.search(r"\*\*\* ?START OF.*\n", text), re.search(r"\*\*\* ?END OF", text)
    text = text[begin.end() if begin else 0 : end.start() if end else None]
    if " <unk> " in text:
        text = "\n".join(_plain_wikitext(line) for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _plain_wikitext(line: str) -> str:
    """Join the words of a line again; sentences with a word that is not given are left out."""
    sentences = re.split(
        r"(?<= [.!?] )", line.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
    )
    line = "".join(sentence for sentence in sentences if "<unk>" not in sentence)
    line = re.sub(r'" ([^"]*) "', r'"\1"', line)
    return re.sub(r" ([,.;:!?%)\]]|'s\b|n't\b)", r"\1", line).replace("( ", "(").strip()


# Generated text


def series_run(rng: random.Random, name: str, n_items: int, *, backward: bool = False) -> list[str]:
    """Return ``n_items`` successive items, from a random start; only cyclic series wrap."""
    items = SERIES[name]
    if name in CYCLIC:
        start = rng.randrange(len(items))
    else:
        n_items = min(n_items, len(items))
        start = rng.randrange(len(items) - n_items + 1)
    run = [items[(start + offset) % len(items)] for offset in range(n_items)]
    return run[::-1] if backward else run


N_SUCCESSION_SNIPPETS = 45_000
N_COPY_SNIPPETS = 8_000
"""1.8 and 0.7 million tokens: a run sees each snippet a few times only."""

SEPARATORS = (
    ",",
    ";",
    " -",
    " /",
    " and",
    " then",
    ", then",
    ".",
    ":",
    " |",
    " or",
    " to",
    ", and",
    " >",
    "\n",
    ",\n",
)
PAIRS = (
    " after{a} comes{b}.",
    " The{a} comes before the{b}.",
    " from{a} to{b}",
    " between{a} and{b}.",
    "{a}, then{b}.",
    " It was{a} and soon it would be{b}.",
    " Not{a} but{b}.",
    " He said{a} and she said{b}.",
    " If this is{a}, the next is{b}.",
    " either{a} or{b}",
)
ENUMERATED = (
    "{item}.{words}\n",
    "{item}:{words}\n",
    "{item}){words};",
    " chapter{item}:{words}.",
    " on{item}{words},",
)


def succession_snippet(rng: random.Random, words: list[str]) -> str:
    """Return one list or sentence in which items of a series follow each other.

    What stands between two items never tells which item it was, so that the next one can only be
    found by attending back to it.
    """
    name = rng.choice(("numbers", "numbers", "numbers", *SERIES))
    kind = rng.random()
    run = [
        f" {item}"
        for item in series_run(rng, name, rng.randint(3, 12), backward=rng.random() < 0.02)
    ]
    if name in ("numbers", "letters") and rng.random() < 0.15:
        return rng.choice(("\n", "-", ".", ",", "|")).join(item.strip() for item in run)
    if kind < 0.5:
        return rng.choice(SEPARATORS).join(run)
    if kind < 0.7:
        template = rng.choice(PAIRS)
        pairs = (series_run(rng, name, 2) for _ in range(rng.randint(1, 4)))
        return "".join(template.format(a=f" {a}", b=f" {b}") for a, b in pairs)
    template = rng.choice(ENUMERATED)
    return "".join(
        template.format(item=item, words=_words(rng, words, rng.randint(1, 4))) for item in run
    )


def copy_snippet(rng: random.Random, words: list[str]) -> str:
    """Return words said again: a list repeated, or each word echoed."""
    chosen = [_words(rng, words, 1) for _ in range(rng.randint(3, 16))]
    kind = rng.random()
    if kind < 0.6:
        separator = rng.choice(("", "", ",", ";", "\n"))
        return rng.choice(("\n", ".")).join([separator.join(chosen)] * rng.randint(2, 4))
    echo = rng.choice(
        ("{word} ({word})", "{word}:{word},", "{word} ={word};", "{word}, I say{word}!")
    )
    return "".join(echo.format(word=word) for word in chosen)


def _words(rng: random.Random, words: list[str], n_words: int) -> str:
    return "".join(f" {rng.choice(words)}" for _ in range(n_words))


def generated_text(
    snippet: Callable[[random.Random, list[str]], str], natural: str, *, n_snippets: int, seed: int
) -> str:
    """Return snippets with lines of natural text between them."""
    rng = random.Random(seed)
    words = common_words(natural)
    lines = [line for line in natural.split("\n") if 20 < len(line) < 120]
    pieces = []
    for _ in range(n_snippets):
        pieces.append(snippet(rng, words))
        pieces.append(rng.choice(("\n", "\n\n", f"\n{rng.choice(lines or [''])}\n")))
    return "".join(pieces)


def common_words(natural: str, n_words: int = 1000) -> list[str]:
    """Return the commonest words that are no item of a series: filler must not look like one."""
    counts = Counter(re.findall(r"\b[a-z]{3,8}\b", natural))
    taken = {item for series in SERIES.values() for item in series}
    return [word for word, _ in counts.most_common(n_words + len(taken)) if word not in taken][
        :n_words
    ]


# Tokenizer


def train_tokenizer(texts: list[str], d_vocab: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE that puts BOS first and keeps every item of the series whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *_series_by_weight(texts)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def _series_by_weight(texts: list[str]) -> list[str]:
    """Say every item so often that BPE merges it to one token; years want the bare numbers too."""
    n_times = max(20, sum(len(text) for text in texts) // 2000)
    items = [f" {item}" for series in SERIES.values() for item in series]
    return [item * n_times for item in items] + [
        f"{number}\n" * n_times for number in SERIES["numbers"]
    ]


BACKCOPY_MARKS = {"~": 1, "^": 2, "@": 4}
"""How far back the token lies that is said again after a mark."""


def backcopy_stream(
    tokens: Int[Tensor, " pos"], marks: dict[int, int], *, mark_share: float, seed: int
) -> Int[Tensor, " marked"]:
    """Return text with marks strewn in, after each of which a token is said again.

    This is the Bigram-Backcopy task (Guo et al. 2024) on natural text: any token may have to be
    copied, but only after a mark, so that the head that copies must be idle everywhere else.

    ``marks`` says, by token of the mark, how many tokens back the copied one lies; ``mark_share``
    is the chance of a mark after a token of the text.
    """
    rng = random.Random(seed)
    marked: list[int] = []
    for token in tokens.tolist():
        marked.append(token)
        if rng.random() < mark_share and len(marked) >= max(marks.values()):
            mark = rng.choice(list(marks))
            marked += [mark, marked[-marks[mark]]]
    return torch.tensor(marked)


# Batches


@dataclass(frozen=True)
class TokenStreams:
    """What training sequences are cut from."""

    streams: tuple[Int[Tensor, " _"], ...]
    bos: int

    def batch(
        self, shares: tuple[float, ...], size: tuple[int, int], generator: torch.Generator
    ) -> Int[Tensor, "batch pos"]:
        """Cut windows at random places and put BOS before each.

        ``shares`` are the chances of the streams (beyond the last share none is drawn), ``size``
        the number of windows and of their tokens, BOS included.
        """
        batch_size, n_ctx = size
        chosen = torch.multinomial(
            torch.tensor(shares), batch_size, replacement=True, generator=generator
        )
        places = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        rows = []
        for stream, place in zip(chosen.tolist(), places.tolist(), strict=True):
            tokens = self.streams[stream]
            start = int(place * (len(tokens) - n_ctx + 2))
            rows.append(torch.cat([torch.tensor([self.bos]), tokens[start : start + n_ctx - 1]]))
        return torch.stack(rows)


def encode(tokenizer: "PreTrainedTokenizerFast", text: str) -> Int[Tensor, " pos"]:
    """Return the tokens of a long text, without BOS; cut at line ends, which costs no merge."""
    chunks = re.findall(r"[\s\S]{1,4000}(?:\n|$)|[\s\S]{1,4000}", text)
    encoded = tokenizer(chunks, add_special_tokens=False).input_ids
    return torch.tensor([token for chunk in encoded for token in chunk])


def split_held_out(texts: dict[str, str], share: float) -> tuple[str, str]:
    """Return the text to train on and the end of every file, to measure on."""
    cuts = {name: int(len(text) * (1 - share)) for name, text in texts.items()}
    return (
        "\n\n".join(text[: cuts[name]] for name, text in texts.items()),
        "\n\n".join(text[cuts[name] :] for name, text in texts.items()),
    )


# Measurement


def held_out_rows(
    tokens: Int[Tensor, " held_out"], bos: int, n_rows: int, n_pos: int
) -> Int[Tensor, "row pos"]:
    """Return evenly spread windows of held-out text, BOS first."""
    if len(tokens) < n_pos:
        raise DataError(
            f"held-out text must have {n_pos} tokens; got {len(tokens)}. Give more text."
        )
    starts = torch.linspace(0, len(tokens) - n_pos + 1, n_rows).long().tolist()
    windows = torch.stack([tokens[start : start + n_pos - 1] for start in starts])
    return torch.cat([torch.full((n_rows, 1), bos), windows], dim=1)


def language_loss(model: "GPT2LMHeadModel", tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Return the mean loss, in nats, of predicting positions 1, 2, ..."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def first_token_attention(
    model: "GPT2LMHeadModel", tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch layer head"]:
    """Return alpha_0, the mean attention that position 0 receives from all positions."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # sdpa never forms the patterns
    patterns = model(tokens, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack([pattern[..., 0].mean(dim=-1) for pattern in patterns], dim=1)


def series_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[str, list[int]]:
    """Return the token of every item, written after a space."""
    encoded = {
        name: [tokenizer(f" {item}", add_special_tokens=False).input_ids for item in items]
        for name, items in SERIES.items()
    }
    split = [
        SERIES[name][row]
        for name, rows in encoded.items()
        for row, ids in enumerate(rows)
        if len(ids) != 1
    ]
    if split:
        raise DataError(
            f"every item must be one token; {split[0]!r} is not. Raise d_vocab or give more text."
        )
    return {name: [ids[0] for ids in rows] for name, rows in encoded.items()}


@torch.no_grad()
def succession_score(
    model: "GPT2LMHeadModel", series: dict[str, list[int]]
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "task layer head"]]:
    """Return the share of pairs each head's effective OV circuit gets right, pooled and by task."""
    block, W_E = model.transformer.h[0], model.transformer.wte.weight
    right, n_pairs = [], []
    for name, ids in series.items():
        sources, targets = (ids, ids[1:] + ids[:1]) if name in CYCLIC else (ids[:-1], ids[1:])
        resid = block.mlp(block.ln_2(W_E[sources]))
        logits = torch.einsum(
            "sd,lhde,te->lhst", resid, ov_circuits(model), model.lm_head.weight[targets]
        )
        right.append((logits.argmax(dim=-1) == torch.arange(len(targets))).sum(dim=-1))
        n_pairs.append(len(sources))
    hits = torch.stack(right).float()
    return hits.sum(dim=0) / sum(n_pairs), hits / torch.tensor(n_pairs)[:, None, None]


def ov_circuits(model: "GPT2LMHeadModel") -> Float[Tensor, "layer head d_model d_model"]:
    """Return the map W_V W_O of every head, rows in and columns out."""
    n_heads, d_model = model.config.n_head, model.config.n_embd
    circuits = []
    for block in model.transformer.h:
        W_V = block.attn.c_attn.weight[:, 2 * d_model :].unflatten(1, (n_heads, -1))
        W_O = block.attn.c_proj.weight.unflatten(0, (n_heads, -1))
        circuits.append(torch.einsum("dhk,hke->hde", W_V, W_O))
    return torch.stack(circuits)


@torch.no_grad()
def measured_figures(
    model: "GPT2LMHeadModel", rows: Int[Tensor, "row pos"], series: dict[str, list[int]]
) -> dict[str, float]:
    """Return what is noted at every checkpoint."""
    model.eval()
    pooled, by_task = succession_score(model, series)
    best = int(pooled.argmax())
    figures = {
        "val_loss": language_loss(model, rows).item(),
        "sink_rate": (first_token_attention(model, rows[:, :64]) > 0.3).float().mean().item(),
        "succession": pooled.max().item(),
        "succession_layer": float(best // pooled.shape[1]),
        "succession_head": float(best % pooled.shape[1]),
        "succession_by_task": by_task.flatten(1)[:, best].mean().item(),
    }
    model.train()
    return figures


# The whole run


@dataclass(frozen=True)
class PreparedText:
    """What a run is trained and measured on."""

    tokenizer: "PreTrainedTokenizerFast"
    streams: TokenStreams
    held_out: Int[Tensor, "row pos"]


def prepare_text(config: LanguageModelConfig, text_folder: Path) -> PreparedText:
    """Read the folder, generate the rest, and train the tokenizer on both."""
    texts = read_text_folder(text_folder, config.exclude)
    natural, held_out = split_held_out(texts, config.held_out_share)
    succession = generated_text(
        succession_snippet, natural, n_snippets=N_SUCCESSION_SNIPPETS, seed=config.seed
    )
    copying = generated_text(
        copy_snippet, natural, n_snippets=N_COPY_SNIPPETS, seed=config.seed + 1
    )
    tokenizer = train_tokenizer([natural, succession[: len(natural) // 10]], config.d_vocab)
    bos = tokenizer.bos_token_id
    encoded = [encode(tokenizer, text) for text in (natural, succession, copying)]
    marks = {tokenizer.convert_tokens_to_ids(mark): back for mark, back in BACKCOPY_MARKS.items()}
    marked = backcopy_stream(encoded[0], marks, mark_share=0.2, seed=config.seed)
    rows = held_out_rows(encode(tokenizer, held_out), bos, 64, config.n_ctx)
    return PreparedText(tokenizer, TokenStreams((*encoded, marked), bos), rows)


def train_language_model(
    config: LanguageModelConfig,
    text_folder: Path,
    out_dir: Path,
    *,
    progress: Callable[[Progress], None] | None = report_to_stderr,
) -> Path:
    """Train tokenizer and model on a text folder, going on where ``out_dir`` left off.

    Returns:
        The folder with the finished model and its tokenizer, in the transformers format.
    """
    text = prepare_text(config, text_folder)
    series = series_tokens(text.tokenizer)
    model = make_model(config, text.tokenizer)
    if config.start_from:
        load_weights(model, Path(config.start_from))
    _note_settings(config, text.streams, out_dir)
    size = (config.batch_size, config.n_ctx)
    train(
        model,
        lambda model, step, generator: language_loss(
            model, text.streams.batch(config.shares_at(step), size, generator)
        ),
        config.training(),
        out_dir,
        measure=lambda model: measured_figures(model, text.held_out, series),
        progress=progress,
    )
    return save_model(model, text.tokenizer, out_dir / "model")


def _note_settings(config: LanguageModelConfig, streams: TokenStreams, out_dir: Path) -> None:
    """Keep settings and a hash of the text beside the run; refuse to resume it with others."""
    digest = hashlib.sha256()
    for stream in streams.streams:
        digest.update(stream.numpy().tobytes())
    noted = {**asdict(config), "exclude": list(config.exclude), "text_sha256": digest.hexdigest()}
    path = out_dir / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else noted
    free = ("n_steps", "decay_share", "final_lr_share")  # the loop sees to these
    changed = [name for name in noted if noted[name] != before.get(name) and name not in free]
    if changed:
        raise ConfigError(
            f"a run is resumed with what it began with; {path} has {changed[0]}="
            f"{before.get(changed[0])!r}, not {noted[changed[0]]!r}. Choose another folder."
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


def make_model(
    config: LanguageModelConfig, tokenizer: "PreTrainedTokenizerFast"
) -> "GPT2LMHeadModel":
    """Return an untrained GPT-2 with weights drawn from the seed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.d_vocab,
            n_positions=config.n_ctx,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            # the formula of GPT-2's gelu_new in one kernel: a quarter faster on a processor
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save_model(
    model: "GPT2LMHeadModel", tokenizer: "PreTrainedTokenizerFast", folder: Path
) -> Path:
    """Write a folder that ``from_pretrained`` reads."""
    model.eval()
    model.config.activation_function = "gelu_new"
    tokenizer.model_max_length = model.config.n_positions
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(arguments: list[str]) -> None:
    """Run ``python -m toy_tasks.language_model TEXT_FOLDER -o DIR [--set key=value]...``."""
    parser = argparse.ArgumentParser(prog="python -m toy_tasks.language_model")
    parser.add_argument("text_folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parsed = parser.parse_args(arguments)
    if any("=" not in word for word in parsed.set):
        parser.error(f"--set takes key=value; got {' '.join(parsed.set)}")
    try:
        settings = dict(word.split("=", 1) for word in parsed.set)
        config = make_config(LanguageModelConfig, settings, "the language model")
        folder = train_language_model(config, parsed.text_folder, parsed.out)
    except WorkbenchError as error:
        parser.exit(1, f"{error}\n")
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
