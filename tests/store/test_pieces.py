"""Finished parts of a measurement survive a kill and are never half-read."""

import os

import pytest
import torch

import workbench as wb
from tests.zoo import random_tokens, tiny_model
from workbench.context import Context
from workbench.errors import StoreError
from workbench.run import Reporter
from workbench.store.pieces import Pieces
from workbench.store.results import Store

KEY = "a" * 64


class Counted:
    """Makes a part and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"x": torch.arange(6.0).view(2, 3).T, "n": torch.tensor(self.calls)}


def test_a_part_is_made_once_and_comes_back_whole(tmp_path):
    make = Counted()
    first = Pieces(tmp_path, KEY).get_or_compute("batch-0", make)
    again = Pieces(tmp_path, KEY).get_or_compute("batch-0", make)
    assert make.calls == 1
    assert torch.equal(first["x"], again["x"])
    assert again["x"].shape == (3, 2)
    again["x"].zero_()  # its own memory, not the file's


def test_a_draft_holds_the_last_note_and_is_never_half_read(tmp_path):
    pieces = Pieces(tmp_path, KEY)
    context = Context(keep=pieces.get_or_compute, drafts=pieces)
    assert context.noted("in work") is None
    x = torch.arange(3)
    for n in (1, 2):
        context.note("in work", {"x": x, "view": x[1:], "n": torch.tensor(n)})  # memory in common
    found = Context(drafts=Pieces(tmp_path, KEY)).noted("in work")
    assert int(found["n"]) == 2
    assert found["view"].tolist() == [1, 2]
    assert Pieces(tmp_path, "b" * 64).read_draft("in work") is None
    assert Pieces(tmp_path, KEY, "batch_size=2").read_draft("in work") is None
    (file,) = (tmp_path / "pieces" / KEY).iterdir()
    content = file.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-4], b""):
        file.write_bytes(damaged)
        assert context.noted("in work") is None
    pieces.discard()
    assert not file.exists()


def test_what_is_kept_is_found_and_the_rest_is_not_made(tmp_path):
    context = Context(keep=Pieces(tmp_path, KEY).get_or_compute)
    assert context.kept("batch-0") is None
    context.piece("batch-0", Counted())
    assert int(context.kept("batch-0")["n"]) == 1
    assert Context().kept("batch-0") is None
    Context().note("in work", {})  # without a store, nowhere


def test_parts_of_other_names_cuts_and_keys_are_not_taken(tmp_path):
    make = Counted()
    Pieces(tmp_path, KEY, "batch_size=2").get_or_compute("batch-0", make)
    Pieces(tmp_path, KEY, "batch_size=2").get_or_compute("batch-2", make)
    Pieces(tmp_path, KEY, "batch_size=4").get_or_compute("batch-0", make)
    Pieces(tmp_path, "b" * 64, "batch_size=2").get_or_compute("batch-0", make)
    assert make.calls == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_part_is_made_again(tmp_path, damage):
    make = Counted()
    Pieces(tmp_path, KEY).get_or_compute("batch-0", make)
    (file,) = (tmp_path / "pieces" / KEY).iterdir()
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    file.write_bytes({"flip": flipped, "cut": content[:-4], "empty": b""}[damage])
    Pieces(tmp_path, KEY).get_or_compute("batch-0", make)
    assert make.calls == 2


def test_a_name_never_becomes_a_path(tmp_path):
    Pieces(tmp_path, KEY).get_or_compute("../../outside", Counted())
    assert [path.name for path in tmp_path.iterdir()] == ["pieces"]
    assert len(list((tmp_path / "pieces" / KEY).iterdir())) == 1


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_FAULT", "during-file:ENOSPC")
    with pytest.raises(StoreError, match="disk is full"):
        Pieces(tmp_path, KEY).get_or_compute("batch-0", Counted())


def test_without_a_store_a_part_is_just_computed():
    make = Counted()
    Context().piece("batch-0", make)
    assert Context().piece("batch-0", make)["n"] == 2


class Interrupting:
    """Progress that breaks off after some batches."""

    def __init__(self, after):
        self.after = after

    def __call__(self, done, total):
        if done >= self.after:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    model = wb.wrap(tiny_model("gpt2"))
    tokens = random_tokens(6, 12)
    whole = wb.run("attention-sinks", model, tokens, batch_size=2)
    reporter = Reporter(progress=Interrupting(4))
    with pytest.raises(KeyboardInterrupt):
        wb.run("attention-sinks", model, tokens, store=tmp_path, batch_size=2, reporter=reporter)
    captured = []
    capture = type(model).capture
    monkeypatch.setattr(
        type(model),
        "capture",
        lambda self, tokens, *rest, **named: (
            captured.append(len(tokens)),
            capture(self, tokens, *rest, **named),
        )[1],
    )
    resumed = wb.run("attention-sinks", model, tokens, store=tmp_path, batch_size=2)
    assert sum(captured) == 2  # the third batch alone
    assert torch.equal(resumed.score, whole.score)
    assert resumed.metrics() == whole.metrics()
    assert not (tmp_path / "pieces" / resumed.key).exists()


def test_gc_takes_old_parts_but_not_those_of_a_run_under_way(tmp_path):
    store = Store(tmp_path)
    for key in (KEY, "b" * 64):
        Pieces(tmp_path, key).get_or_compute("batch-0", Counted())
    Pieces(tmp_path, "c" * 64).get_or_compute("fresh", Counted())
    for key in (KEY, "b" * 64):
        for path in [*(tmp_path / "pieces" / key).iterdir(), tmp_path / "pieces" / key]:
            os.utime(path, (0, 0))
    with store.lease("b" * 64):
        store.gc()
    assert {path.name[0] for path in (tmp_path / "pieces").iterdir()} == {"b", "c"}
