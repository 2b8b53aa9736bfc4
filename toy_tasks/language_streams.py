"""From a folder of texts to token streams: the tokenizer, and what training sequences are cut from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from toy_tasks.language_config import LanguageModelConfig
from toy_tasks.language_figures import held_out_rows
from toy_tasks.language_series import (
    BACKCOPY_MARKS,
    N_COPY_SNIPPETS,
    N_SUCCESSION_SNIPPETS,
    SERIES,
    backcopy_stream,
    copy_snippet,
    generated_text,
    succession_snippet,
)
from toy_tasks.language_texts import read_text_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


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
