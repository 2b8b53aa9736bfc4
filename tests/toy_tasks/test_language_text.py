"""What a demo language model is trained on: texts, generated text, and the batches cut from them."""

import gzip
import json
import random
import re
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from toy_tasks.language_series import (
    CYCLIC,
    SERIES,
    backcopy_stream,
    generated_text,
    series_run,
    succession_snippet,
)
from toy_tasks.language_streams import TokenStreams, split_held_out
from toy_tasks.language_texts import plain_text, read_text_folder
from workbench.errors import DataError


def test_text_is_read_from_plain_gzipped_json_and_zipped_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffplain text", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"id": "x", "text": "a question", "code": "an answer", "n": 1}\n'
    )
    (tmp_path / "c.json.gz").write_bytes(
        gzip.compress(json.dumps(["one text", "another"]).encode())
    )
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("in/member.txt", "zipped text")
        archive.writestr("in/image.png", b"\xff\xfe")
    (tmp_path / "readme.md").write_text("not read")
    assert read_text_folder(tmp_path) == {
        "a.txt": "plain text",
        "b.jsonl": "a question\nan answer",
        "c.json.gz": "one text\n\nanother",
        "d.zip": "zipped text",
    }


def test_excluded_files_and_archive_members_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("kept")
    (tmp_path / "b.txt").write_text("left out")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("in/bad.txt", b"\xff\xfe")
        archive.writestr("in/good.txt", "kept too")
    assert read_text_folder(tmp_path, ("b*", "*/bad.txt")) == {"a.txt": "kept", "d.zip": "kept too"}


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("latin.txt", "caf\xe9".encode("latin-1"), r"latin\.txt must be UTF-8; byte 3 is not"),
        ("torn.jsonl", b'{"text": "a', r"torn\.jsonl must be JSON"),
        ("number.json", b"[1]", r"number\.json must hold texts"),
        (
            "torn.txt.gz",
            gzip.compress(b"text", mtime=0)[:-4],
            r"torn\.txt\.gz must be a whole archive",
        ),
        ("torn.zip", b"PK", r"torn\.zip must be a whole archive"),
        ("empty.txt", b" \n", r"must hold text; no \.txt"),
        ("image.png", b"\x89PNG", r"must hold text; no \.txt"),
    ],
)
def test_unusable_file_is_refused_in_one_line(
    tmp_path: Path, name: str, data: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says) as caught:
        read_text_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not one"):
        read_text_folder(tmp_path / "nowhere")


def test_frames_and_corpus_marks_are_removed() -> None:
    book = (
        "Licence\n*** START OF THE PROJECT ***\nOnce upon a time.\n*** END OF THE PROJECT ***\nmore"
    )
    assert plain_text(book) == "Once upon a time."
    wiki = ' A 60 @-@ cm fish , it swam ( fast ) . It met <unk> there . " Well , " he said . '
    assert plain_text(wiki) == 'A 60-cm fish, it swam (fast). "Well," he said.'


def test_end_of_every_file_is_held_out() -> None:
    texts = {"a": "0123456789" * 10, "b": "abcdefghij" * 10}
    training, held_out = split_held_out(texts, 0.1)
    assert held_out == "0123456789\n\nabcdefghij"
    assert len(training) == 180 + 2


def test_series_wrap_only_where_they_are_cyclic() -> None:
    rng = random.Random(0)
    for name, items in SERIES.items():
        pairs = set(pairwise(items))
        if name in CYCLIC:
            pairs.add((items[-1], items[0]))
        seen = {
            pair for _ in range(400) for run in [series_run(rng, name, 6)] for pair in pairwise(run)
        }
        assert seen == pairs, name


def test_numbers_are_balanced_over_the_whole_series() -> None:
    rng = random.Random(0)
    text = "".join(succession_snippet(rng, ["word"]) for _ in range(20_000))
    counts = [len(re.findall(rf"(?<!\d){number}(?!\d)", text)) for number in range(1, 101)]
    inner = counts[8:92]
    assert min(counts) > 50
    assert max(inner) < 1.5 * min(inner)


def test_generated_text_is_the_same_for_a_seed_and_another_for_the_next() -> None:
    def text(seed: int) -> str:
        return generated_text(
            succession_snippet,
            "The old king went to the river with his dog, and the dog saw a fish.\n" * 50,
            n_snippets=50,
            seed=seed,
        )

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_batches_begin_with_bos_and_hold_it_nowhere_else() -> None:
    streams = TokenStreams((torch.arange(1, 100), torch.arange(1000, 1100)), bos=0)
    batch = streams.batch((0.5, 0.5), (400, 20), torch.Generator().manual_seed(0))
    assert batch.shape == (400, 20)
    assert torch.equal(batch == 0, torch.arange(20).expand(400, 20) == 0)
    assert torch.equal(batch[:, 2:] - batch[:, 1:-1], torch.ones(400, 18, dtype=torch.int64))
    assert batch[:, 1].unique().tolist()[0] == 1  # both ends of a stream are reached
    assert 1099 in batch[:, -1]


def test_streams_are_drawn_by_their_shares() -> None:
    streams = TokenStreams(tuple(torch.full((50,), stream) for stream in (1, 2, 3)), bos=0)
    batch = streams.batch((0.8, 0.2), (4000, 3), torch.Generator().manual_seed(0))
    assert (batch[:, 1] == 2).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert batch.max() == 2


def test_token_after_a_mark_is_the_one_so_many_back() -> None:
    text = torch.arange(100, 600)
    marked = backcopy_stream(text, {7: 1, 8: 2}, mark_share=0.3, seed=0).tolist()
    places = [place for place, token in enumerate(marked) if token in (7, 8)]
    assert 100 < len(places) < 200
    for place in places:
        back = 1 if marked[place] == 7 else 2
        assert marked[place + 1] == marked[place - back]
    added = {place for mark in places for place in (mark, mark + 1)}
    assert [token for place, token in enumerate(marked) if place not in added] == text.tolist()
