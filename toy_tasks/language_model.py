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
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from toy_tasks.language_config import LanguageModelConfig
from toy_tasks.language_figures import (
    language_loss,
    measured_figures,
    series_tokens,
)
from toy_tasks.language_streams import TokenStreams, prepare_text
from toy_tasks.training import (
    Progress,
    load_weights,
    report_to_stderr,
    train,
)
from workbench.errors import ConfigError, WorkbenchError
from workbench.settings import make_config

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast


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
