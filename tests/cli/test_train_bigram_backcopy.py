"""``workbench train bigram-backcopy``: trained, stored, and probed like any model."""

import pytest

SMALL = ["n_pos=16", "d_model=16", "batch_size=4", "steps=6", "n_held_out=4"]


@pytest.fixture
def train(command, tmp_path):
    def run(*settings, folder=tmp_path / "toy"):
        given = [word for pair in (*SMALL, *settings) for word in ("--set", pair)]
        return command("train", "bigram-backcopy", *given, "-o", folder, "--json")

    return run


def test_the_run_is_stored_and_its_model_is_one_like_any_other(
    train, command, store_path, tmp_path
):
    done = train().json
    assert done["path"] == str(tmp_path / "toy")
    assert done["metrics"]["n_steps"] == 6
    assert command("results", "show", done["key"][:12], "--json").code == 0
    data = ("--data", tmp_path / "toy" / "sample.safetensors", "--json")
    probed = command("run", "attention-sinks", "--model", f"toy:{tmp_path / 'toy'}", *data).json
    # The model lies beside the stored result, too.
    (stored,) = store_path.glob(f"results/*/{done['key']}")
    again = command("run", "attention-sinks", "--model", f"toy:{stored}", *data).json
    assert again["metrics"] == probed["metrics"]
    drain = done["metrics"]["value_drain"]
    assert probed["metrics"]["value_drain"] == pytest.approx(drain, rel=1e-4)


def test_people_see_the_headline_numbers_and_what_to_do_next(command, tmp_path):
    given = [word for pair in SMALL for word in ("--set", pair)]
    done = command("train", "bigram-backcopy", *given, "-o", tmp_path / "toy")
    assert "sink_attention" in done.out
    assert "sample.safetensors" in done.err


def test_a_text_of_the_users_is_part_of_the_key_but_not_its_place(train, tmp_path):
    text = tmp_path / "secret" / "text.txt"
    text.parent.mkdir()
    text.write_text("the cat sat on the mat " * 20, encoding="utf-8")
    first = train(f"text={text}", "triggers=1", folder=tmp_path / "first").json
    text.write_text("the dog lay on the rug " * 20, encoding="utf-8")
    second = train(f"text={text}", "triggers=1", folder=tmp_path / "second").json
    assert first["key"] != second["key"]
    assert "secret" not in (tmp_path / "first" / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps=0", "steps must be at least 1"),
        ("triggers=0", "at least 1"),
        ("triggers=65", "at most 64"),
        ("text=none.txt", "none.txt"),
        ("n_layer=2", "n_layers"),
        ("lr=0", "above 0"),
        ("n_heads=3", "multiple of n_heads"),
    ],
)
def test_an_impossible_run_is_refused_in_one_line(train, tmp_path, setting, words):
    assert train(setting).failed_with(words)
    assert not (tmp_path / "toy" / "metrics.jsonl").exists()
