import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy_tasks.language_streams as streams
from toy_tasks.language_config import LanguageModelConfig
from toy_tasks.language_figures import succession_score
from toy_tasks.language_model import main, train_language_model
from toy_tasks.training import Progress, read_metrics
from workbench.errors import ConfigError

TINY = LanguageModelConfig(
    n_layers=1,
    n_heads=2,
    d_model=16,
    n_ctx=64,
    d_vocab=700,
    batch_size=2,
    n_steps=6,
    warmup_steps=1,
    backcopy_from=3,
)

STORY = "The old king went to the river with his dog, and the dog saw a fish.\n"


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [STORY.replace("river", f"river {number}") for number in range(600)]
    (folder / "story.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def few_snippets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "N_SUCCESSION_SNIPPETS", 300)
    monkeypatch.setattr(streams, "N_COPY_SNIPPETS", 100)


def test_marked_text_is_mixed_in_from_its_step_on() -> None:
    config = LanguageModelConfig(
        succession_share=0.2, copy_share=0.1, backcopy_share=0.3, backcopy_from=5
    )
    assert config.shares_at(4) == pytest.approx((0.7, 0.2, 0.1))
    assert config.shares_at(5) == pytest.approx((0.4, 0.2, 0.1, 0.3))


# The run


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"d_model": 130}, "d_model must be a multiple of n_heads=4; got 130"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"succession_share": 0.7, "copy_share": 0.5}, "must leave room for the text"),
        ({"held_out_share": 0.9}, "held_out_share must be"),
    ],
)
def test_impossible_setting_is_refused(settings: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LanguageModelConfig(**settings)


@pytest.mark.usefixtures("few_snippets")
def test_trained_folder_loads_and_notes_what_the_probes_look_for(
    tmp_path: Path, text_folder: Path
) -> None:
    folder = train_language_model(TINY, text_folder, tmp_path / "run", progress=None)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.model_type == "gpt2"
    assert tokenizer("hello").input_ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6
    assert {"loss", "val_loss", "sink_rate", "succession"} <= last.keys()


@pytest.mark.usefixtures("few_snippets")
def test_interrupted_run_resumes_to_the_same_model(tmp_path: Path, text_folder: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train_language_model(TINY, text_folder, tmp_path / "whole", progress=None)
    with pytest.raises(KeyboardInterrupt):
        train_language_model(TINY, text_folder, tmp_path / "cut", progress=interrupt)
    cut = train_language_model(TINY, text_folder, tmp_path / "cut", progress=None)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.usefixtures("few_snippets")
def test_run_can_start_from_the_weights_of_another(tmp_path: Path, text_folder: Path) -> None:
    first = train_language_model(TINY, text_folder, tmp_path / "first", progress=None)
    config = replace(TINY, start_from=str(first / "model.safetensors"), n_steps=1)
    train_language_model(config, text_folder, tmp_path / "second", progress=None)
    last = read_metrics(tmp_path / "first" / "metrics.jsonl")[-1]
    assert read_metrics(tmp_path / "second" / "metrics.jsonl")[0]["val_loss"] == last["val_loss"]


@pytest.mark.usefixtures("few_snippets")
def test_run_is_not_resumed_on_other_text(tmp_path: Path, text_folder: Path) -> None:
    train_language_model(TINY, text_folder, tmp_path / "run", progress=None)
    (text_folder / "more.txt").write_text(STORY * 200)
    with pytest.raises(ConfigError, match="text_sha256"):
        train_language_model(TINY, text_folder, tmp_path / "run", progress=None)


def test_command_line_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--set", "n_layer=3"], ["--set", "n_layers=x"], []):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "nowhere"), "-o", str(tmp_path / "run"), *words])
        assert capsys.readouterr().err.count("\n") == 1


def test_planted_succession_is_found_in_its_head_and_nowhere_else() -> None:
    model, series = planted_successor()
    pooled, by_task = succession_score(model, series)
    assert pooled[0, 1] == 1.0
    assert by_task[:, 0, 1].tolist() == [1.0, 1.0]
    assert pooled[0, 0] < 0.5


def planted_successor() -> tuple[torch.nn.Module, dict[str, list[int]]]:
    """Make a one-block GPT-2 whose head 1 maps each item, as MLP0 leaves it, to the next."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    series = {"days": [1, 2, 3, 4, 5, 6, 7], "ordinals": [8, 9, 10, 11, 12]}
    sources = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    targets = [2, 3, 4, 5, 6, 7, 1, 9, 10, 11, 12]
    block = model.transformer.h[0]
    with torch.no_grad():
        model.transformer.wte.weight.normal_()
        model.lm_head.weight.normal_()
        block.mlp.c_proj.weight.normal_()
        resid = block.mlp(block.ln_2(model.transformer.wte.weight[sources]))
        block.attn.c_attn.weight[:, 64 + 16 : 64 + 32] = torch.linalg.pinv(resid)[
            :, :11
        ] @ torch.eye(11, 16)
        block.attn.c_proj.weight[16 : 16 + 11] = torch.linalg.pinv(model.lm_head.weight[targets]).T
    return model, series
