import gzip
import json
import os
import random
import re
import signal
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy_tasks.language_model as demo
import workbench
from toy_tasks.language_figures import series_tokens, succession_score
from toy_tasks.language_model import (
    LanguageModelConfig,
    TokenStreams,
    main,
    split_held_out,
    train_language_model,
)
from toy_tasks.language_series import (
    CYCLIC,
    SERIES,
    backcopy_stream,
    generated_text,
    series_run,
    succession_snippet,
)
from toy_tasks.language_texts import plain_text, read_text_folder
from toy_tasks.training import Progress, read_metrics
from workbench.errors import ConfigError, DataError

SHIPPED = Path(workbench.__file__).parent / "assets" / "demo"

SINK_RATE = 0.18
SUCCESSION = 0.52
CONTINUATIONS = [
    (" Monday, Tuesday,", " Wednesday"),
    (" 37, 38, 39,", " 40"),
    (" March, April, May,", " June"),
    (" third, fourth, fifth,", " sixth"),
    (" Sat | Sun |", " Mon"),
]
"""What docs/demo_model.md promises of the shipped model."""

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
    monkeypatch.setattr(demo, "N_SUCCESSION_SNIPPETS", 300)
    monkeypatch.setattr(demo, "N_COPY_SNIPPETS", 100)


# Text


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


# Generated text


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
        return generated_text(succession_snippet, STORY * 50, n_snippets=50, seed=seed)

    assert text(1) == text(1)
    assert text(1) != text(2)


# Batches


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


def test_marked_text_is_mixed_in_from_its_step_on() -> None:
    config = LanguageModelConfig(
        succession_share=0.2, copy_share=0.1, backcopy_share=0.3, backcopy_from=5
    )
    assert config.shares_at(4) == pytest.approx((0.7, 0.2, 0.1))
    assert config.shares_at(5) == pytest.approx((0.4, 0.2, 0.1, 0.3))


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


# What is shipped: measured here anew, by another way than the trainer's


@pytest.fixture(scope="module")
def shipped() -> tuple[torch.nn.Module, object]:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(SHIPPED)


def test_shipped_files_are_complete_and_small() -> None:
    names = {path.name for path in SHIPPED.iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 12_000_000
    assert all(
        weight.isfinite().all() for weight in load_file(SHIPPED / "model.safetensors").values()
    )


def test_shipped_tokenizer_puts_bos_first_unless_told_not_to(shipped: tuple) -> None:
    _, tokenizer = shipped
    with_bos = tokenizer("hello").input_ids
    assert with_bos[0] == tokenizer.bos_token_id
    assert with_bos[1:] == tokenizer("hello", add_special_tokens=False).input_ids
    assert tokenizer.bos_token_id not in with_bos[1:]


def test_shipped_tokenizer_gives_text_back(shipped: tuple) -> None:
    _, tokenizer = shipped
    text = "Na\u00efve caf\u00e9, 37 \u20ac;\n\tdef f(x): return 'x'\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_every_item_of_the_series_is_one_token(shipped: tuple) -> None:
    _, tokenizer = shipped
    tokens = series_tokens(tokenizer)
    assert [len(tokens[name]) for name in SERIES] == [100, 20, 10, 7, 7, 12, 12, 26]
    for number in range(1, 101):
        assert len(tokenizer(str(number), add_special_tokens=False).input_ids) == 1


PROMPTS = (
    "The museum stands on a low hill above the harbour. It was built in 1904 as a customs "
    "house, and for sixty years every barrel and crate that came ashore was weighed in its "
    "long hall. When the port moved south the building was left empty, until a group of "
    "fishermen asked the city to let them keep their boats and nets in it.",
    "When she opened the door the dog was already waiting, with one ear up and a shoe in its "
    "mouth. She laughed, put down the basket of apples, and sat beside it on the step. "
    "Nobody had written for a month, and the road to the village was white with snow, but "
    "the evening was quiet and there was bread in the oven.",
    "KING:\nWhat news, my lord? Speak plainly, for the night is short and I have little "
    "patience.\n\nMESSENGER:\nThe ships are lost, my liege, and with them all the men that "
    "sailed from the northern coast. The wind turned on them before the dawn.\n\nKING:\nThen we "
    "must hold the bridge alone, and trust to God and to our walls.",
    "Members of the Congress, my fellow citizens: we meet tonight in a time of hope and of "
    "trial. Our farms have given more than in any year before, and our schools are open to "
    "every child. Yet too many families cannot find work, and too many of the sick are not "
    "cared for. I ask you to join with me to change that.",
    "def count_words(text):\n    counts = {}\n    for word in text.split():\n        word = "
    "word.lower()\n        if word not in counts:\n            counts[word] = 0\n        "
    "counts[word] += 1\n    return counts\n\ndef longest(words):\n    best = ''\n    for word in "
    "words:\n        if len(word) > len(best):\n            best = word\n    return best",
    "The grey heron is a tall wading bird that lives beside lakes, rivers and marshes across "
    "Europe and Asia. It eats fish, frogs and small mammals, which it hunts by standing "
    "quite still in shallow water. The nest, a large heap of sticks, is used by the same "
    "pair for many years and grows with each season.",
    "I had called upon my old friend one cold morning in the autumn of last year and found "
    'him deep in talk with a stout, red-faced gentleman who held a letter in his hand. "You '
    'come at the right time," said he. "Our visitor has lost a thing of no value, and yet he '
    'tells me that three men have tried to buy it."',
    "The band was formed in Leeds in 1987 by two brothers and a friend from school. Their "
    "first record was made in a kitchen and sold at concerts, but the second reached the "
    "charts in four countries. After a long tour the singer left to study law, and the "
    "others went on under another name until the end of the next decade.",
)
"""Written for this test, in the manner of what the model was trained on."""


@torch.no_grad()
def test_shipped_model_has_attention_sinks_on_natural_text(shipped: tuple) -> None:
    model, tokenizer = shipped
    rows = [tokenizer(prompt).input_ids[:64] for prompt in PROMPTS]
    assert {len(row) for row in rows} == {64}
    patterns = model(torch.tensor(rows), output_attentions=True).attentions
    alpha = torch.stack([pattern.sum(dim=2)[..., 0] / 64 for pattern in patterns])
    sink_rate = (alpha > 0.3).float().mean().item()
    assert sink_rate > SINK_RATE
    fifth = torch.stack([pattern.sum(dim=2)[..., 4] / 60 for pattern in patterns])
    assert (fifth > 0.3).float().mean().item() < sink_rate / 4


@torch.no_grad()
def test_shipped_model_has_a_head_that_does_succession(shipped: tuple) -> None:
    scores = hits_by_head(*shipped)
    best, second = scores.flatten().topk(2).values.tolist()
    assert best > SUCCESSION
    assert second < best
    model, tokenizer = shipped
    pooled, _ = succession_score(model, series_tokens(tokenizer))
    torch.testing.assert_close(pooled, scores)


def hits_by_head(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    """Score every head, one pair at a time."""
    W_E, W_U, blocks = model.transformer.wte.weight, model.lm_head.weight, model.transformer.h
    n_heads, d_model = model.config.n_head, model.config.n_embd
    d_head = d_model // n_heads
    scores = torch.zeros(len(blocks), n_heads)
    n_pairs = 0
    for name, items in SERIES.items():
        ids = [tokenizer.convert_tokens_to_ids(f"\u0120{item}") for item in items]
        pairs = list(pairwise(ids)) + ([(ids[-1], ids[0])] if name in CYCLIC else [])
        targets = [target for _, target in pairs]
        n_pairs += len(pairs)
        for source, target in pairs:
            resid = blocks[0].mlp(blocks[0].ln_2(W_E[source]))
            for layer, block in enumerate(blocks):
                value = resid @ block.attn.c_attn.weight[:, 2 * d_model :]
                for head in range(n_heads):
                    own = slice(head * d_head, (head + 1) * d_head)
                    logits = value[own] @ block.attn.c_proj.weight[own] @ W_U[targets].T
                    scores[layer, head] += targets[int(logits.argmax())] == target
    assert n_pairs == 99 + 19 + 9 + 7 + 7 + 12 + 12 + 25
    return scores / n_pairs


@pytest.mark.parametrize(("prompt", "continuation"), CONTINUATIONS)
def test_shipped_model_goes_on_with_the_series(
    shipped: tuple, prompt: str, continuation: str
) -> None:
    model, tokenizer = shipped
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    longer = model.generate(tokens, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(longer[0, tokens.shape[1] :]) == continuation
