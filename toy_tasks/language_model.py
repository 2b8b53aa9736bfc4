"""Train a small GPT-2 that has what the probes look for: attention sinks and succession.

The text is a folder of the user's; to it are added generated documents that natural text of a few
megabytes lacks: succession (days, months, numbers, letters, ordinals, in lists and sentences) and
copying (word lists said again, words echoed). Both give heads work on some inputs only; on all
others such a head is idle, and an idle head parks its attention on the first token (Guo et al.
2024, "Active-Dormant Attention Heads", arXiv:2410.13835; Gu et al. 2024, arXiv:2410.10781).
The last part of the training adds text with marks strewn in, after each of which a token is
copied: the Bigram-Backcopy task of the former paper on natural text. Every training sequence
begins with BOS, which occurs nowhere else.

What every checkpoint notes is defined in ``toy_tasks.language_figures``.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from toy_tasks.language_figures import (
    held_out_rows,
    language_loss,
    measured_figures,
    series_tokens,
)
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
from toy_tasks.training import (
    Progress,
    TrainingConfig,
    load_weights,
    report_to_stderr,
    train,
)
from workbench.errors import ConfigError, WorkbenchError
from workbench.settings import check_settings, make_config, setting

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


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
