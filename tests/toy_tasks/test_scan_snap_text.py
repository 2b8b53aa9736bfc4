"""Scan and snap on text: what is measured, by hand; that it happens; that a run goes on."""

import math
from dataclasses import replace

import pytest
import torch

import workbench as wb
from toy_tasks.scan_snap_text import (
    ScanSnapTextConfig,
    common_ratio,
    row_entropy,
    train_scan_snap_text,
)
from toy_tasks.scan_snap_words import prompts, read_words
from toy_tasks.training import TrainingError
from workbench.discovery import find_figures, find_probe
from workbench.errors import DataError
from workbench.provenance import content_key
from workbench.result import Result

FEW = ScanSnapTextConfig(steps=8, d_model=8, n_pos=8, batch_size=4, n_words=50, n_held_out=4)


def test_entropy_is_one_where_attention_is_even_and_zero_on_one_key():
    pattern = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.0, 1.0, 0.0]])
    assert row_entropy(pattern).tolist() == pytest.approx([0.0, 1.0, 0.0])
    quarter = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]])
    assert row_entropy(quarter)[2].item() == pytest.approx(1.5 * math.log(2) / math.log(3))


def test_common_words_are_compared_with_even_attention():
    even = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    common = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    assert common_ratio(even[None, None], common) == pytest.approx(1.0)
    avoids = torch.zeros(4, 4)
    avoids[:, 1] = 1.0
    assert common_ratio(avoids[None, None], common) == 0.0
    # Queries 2 and 3 put all on token 0; even would put 1/3 and 1/2 on common ones.
    seeks = torch.zeros(4, 4)
    seeks[:, 0] = 1.0
    assert common_ratio(seeks[None, None], common) == pytest.approx(1 / ((1 / 3 + 1 / 2) / 2))


def test_words_are_numbered_by_frequency(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The cat, the dog's cat. " * 30, encoding="utf-8")
    words = read_words(str(path), 4, 4)
    assert words.vocabulary == ("<unk>", "the", "cat", ",")
    assert words.train[:7].tolist() == [1, 2, 3, 1, 0, 2, 0]
    assert len(words.train) + len(words.held_out) == 210
    assert len(words.held_out) == 21
    rows = prompts(words.train, 5, 4, torch.Generator().manual_seed(0))
    text = words.train.tolist()
    assert all(row in [text[i : i + 5] for i in range(len(text))] for row in rows.tolist())


def test_a_text_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt"):
        read_words(str(tmp_path / "none.txt"), 50, 8)
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(DataError, match="at least 180 words for prompts of 8; got 2"):
        read_words(str(tmp_path / "short.txt"), 50, 8)


@pytest.mark.slow
def test_attention_grows_sparse(tmp_path):
    result = train_scan_snap_text(ScanSnapTextConfig(steps=512), tmp_path)
    assert result.train_loss[-1] < 0.7 * result.train_loss[0]
    assert result.entropy[0, 0] > 0.97
    assert result.entropy[-1, 0] < 0.93
    assert result.top_attention[-1, 0] > 1.6 * result.top_attention[0, 0]


def test_attention_that_hardly_learns_stays_as_even_as_it_began(tmp_path):
    result = train_scan_snap_text(ScanSnapTextConfig(steps=16, lr=1e-3), tmp_path)
    assert result.entropy[-1, 0] > 0.97
    assert result.change[1:].max() < 1e-3


def test_checkpoints_layers_and_the_first_change(tmp_path):
    result = train_scan_snap_text(replace(FEW, n_layers=3), tmp_path)
    assert result.step.tolist() == [0, 1, 2, 4, 8]
    assert result.entropy.shape == result.change.shape == (5, 3)
    assert result.change[0].isnan().all()
    assert ((result.change[1:] > 0) & (result.change[1:] < 1)).all()
    task = find_probe("scan-snap-text")
    stored = Result.from_measurement(task, result, key=content_key({}), provenance={})
    assert stored.measured.data_hash() == result.data_hash()
    assert len(result.data_hash()) == 64
    (figure,) = find_figures(task)(result).values()
    assert "n = 1 run (seed 0), 4 held-out prompts" in figure.layout.title.subtitle.text


def test_the_sink_probe_agrees_with_the_record(tmp_path):
    """Another road to the last entropies: the model from its folder, through capture."""
    result = train_scan_snap_text(FEW, tmp_path)
    model = wb.load(f"toy:{tmp_path}")
    from safetensors.torch import load_file

    tokens = load_file(tmp_path / "sample.safetensors")["tokens"]
    pattern = model.capture(tokens, ["L0.pattern"])["L0.pattern"]
    found = row_entropy(pattern)[..., 4:].mean()
    torch.testing.assert_close(found, result.entropy[-1, 0])


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path):
    whole = train_scan_snap_text(FEW, tmp_path / "whole")

    def crash(progress):
        if progress.step == 4:
            raise MemoryError

    with pytest.raises(MemoryError):
        train_scan_snap_text(FEW, tmp_path / "cut", crash)
    again = train_scan_snap_text(FEW, tmp_path / "cut")
    assert torch.equal(again.entropy, whole.entropy)
    assert torch.equal(again.loss, whole.loss)
    with pytest.raises(TrainingError, match="settings and the text it began with"):
        train_scan_snap_text(replace(FEW, seed=1), tmp_path / "cut")


def test_a_rate_that_diverges_is_reported_with_its_step(tmp_path):
    with pytest.raises(TrainingError, match=r"at step \d+"):
        train_scan_snap_text(replace(FEW, lr=1e30, steps=30), tmp_path)
    assert (tmp_path / "metrics.jsonl").is_file()
