"""``workbench evaluate`` and ``calibrate`` as people call them, on the demo model."""

import json

import pytest

from workbench.models.huggingface import HuggingFaceModel


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "test.jsonl"
    texts = ["a warm film", "a dull film", "a fine old story", "an awful noise"] * 3
    rows = [{"text": f"{text} {n}", "label": n % 2} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def on(questions, *more):
    return ("evaluate", "--model", "demo", "--data", questions, "--task", "sst2", *more)


def test_an_intervention_is_compared_with_the_stock_model(command, questions, tmp_path):
    rows = tmp_path / "rows.jsonl"
    found = command(
        *on(questions, "--intervention", "zerotuning", "--set", "gamma=3", "--json", "-o", rows)
    ).json
    assert {"accuracy", "label_accuracy", "invalid_rate", "margin", "n"} <= set(found)
    assert found["n"] == 12
    assert found["stock"]["n"] == 12
    assert found["interventions"][0]["gamma"] == 3.0
    assert set(found["difference"]["label_accuracy"]) == {
        "value",
        "low",
        "high",
        "p",
        "gained",
        "lost",
    }
    assert len(rows.read_text().splitlines()) == 12


def test_a_bad_row_is_refused_before_the_model_is_loaded(command, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine", "label": 0}\n{"text": "bad", "label": 7}\n')
    failed = command("evaluate", "--model", "no-such-model", "--data", path, "--task", "sst2")
    assert failed.failed_with("line 2 of bad.jsonl")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--task", "sst3"), "sst2"),
        (("--scoring", "guess"), "loglikelihood"),
        (("--shots", "2"), "--examples"),
        (("--intervention", "zerotuning", "--set", "gamma=0"), "gamma must be above 0"),
        (
            ("--intervention", "act", "--set", "heads=L9H0", "--set", "beta=0.1"),
            "4 layers x 4 heads",
        ),
    ],
    ids=["task", "scoring", "shots", "gamma", "heads"],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(command, questions, more, words):
    assert command(*on(questions, "--limit", "2", *more)).failed_with(words)


def test_settings_without_an_intervention_are_wrong_usage(command, questions):
    assert command(*on(questions, "--set", "gamma=2")).code == 2


def test_answers_for_a_judge_have_the_judge_s_format(command, tmp_path):
    asked, answers = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    asked.write_text(json.dumps({"question_id": 81, "turns": ["Say something.", "Again."]}) + "\n")
    arguments = ("evaluate", "--model", "demo", "--data", asked, "--task", "mt-bench")
    assert command(*arguments).failed_with("add -o")
    done = command(*arguments, "-o", answers, "--max-new-tokens", "3")
    assert done.code == 0
    (row,) = map(json.loads, answers.read_text().splitlines())
    assert row["question_id"] == 81
    assert len(row["choices"][0]["turns"]) == 2
    assert {"answer_id", "model_id", "tstamp"} <= set(row)
    said = command(*arguments, "-o", answers, "--max-new-tokens", "3", "--json").json
    assert said == {"task": "mt-bench", "n": 1, "path": str(answers)}
    answers.unlink()
    failed = command(*arguments, "-o", answers, "--max-new-tokens", "200")
    assert failed.failed_with("question 81 may need")
    assert not answers.exists()
    assert command(*arguments, "-o", answers, "--shots", "2").code == 2


def test_a_calibration_writes_a_file_that_evaluate_takes(command, questions, tmp_path):
    file = tmp_path / "zt.json"
    settings = ("--set", "objective=entropy", "--set", "gammas=0.5,2.0")
    done = command(
        "calibrate", "zerotuning", "--model", "demo", "--data", questions, "--task", "sst2", "-o", file,
        *settings,
    )  # fmt: skip
    assert done.code == 0
    content = json.loads(file.read_text())
    assert content["name"] == "zerotuning"
    assert content["layers"] == 4
    assert content["calibration"]["n"] == 12
    assert "rank correlation of the gradient" in done.err
    found = command(*on(questions, "--intervention", file, "--json"))
    assert found.json["n"] == 12
    assert found.json["seen_in_calibration"] == 9  # the table's quarter apart
    assert "9 of the 12 questions chose this intervention" in found.err
    written = command(
        "generate", "--model", "demo", "--prompt", "Monday, Tuesday,", "--max-new-tokens", "2",
        "--intervention", file, "--compare", "--json",
    )  # fmt: skip
    assert written.code == 0
    masses = written.json["comparison"]["sink_mass"]
    assert (masses["stock"] != masses["edited"]) == bool(content["heads"])
    content["layers"] = 5
    file.write_text(json.dumps(content))
    assert command(*on(questions, "--limit", "2", "--intervention", file)).failed_with(
        "layers is 5"
    )


def test_a_calibration_steps_back_where_memory_does_not_suffice(
    command, questions, tmp_path, monkeypatch
):
    arguments = (
        "calibrate", "act", "--model", "demo", "--data", questions, "--task", "sst2", "--limit", "8",
        "--set", "alpha=2",
    )  # fmt: skip
    whole, small = tmp_path / "whole.json", tmp_path / "small.json"
    assert command(*arguments, "-o", whole).code == 0
    most = 2
    for name in ("logits", "continue_from"):
        given = getattr(HuggingFaceModel, name)

        def limited(self, first, *rest, given=given, **named):
            rows = rest[0] if isinstance(first, int) else first
            if len(rows) > most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried a lot")
            return given(self, first, *rest, **named)

        monkeypatch.setattr(HuggingFaceModel, name, limited)
    done = command(*arguments, "-o", small)
    assert done.code == 0
    assert "memory did not suffice; going on with" in done.err
    wanted, found = (json.loads(path.read_text()) for path in (whole, small))
    assert found["heads"] == wanted["heads"]
    for row, metrics in wanted["calibration"]["table"].items():
        assert found["calibration"]["table"][row] == pytest.approx(metrics, abs=1e-5)
    failed = command(*arguments, "-o", small, "--batch-size", "8")
    assert failed.failed_with("lower --batch-size")  # a size that was given is kept


def test_what_cannot_be_calibrated_is_said_in_one_line(command, questions, tmp_path):
    arguments = (
        "--model",
        "demo",
        "--data",
        questions,
        "--task",
        "sst2",
        "-o",
        tmp_path / "x.json",
    )
    assert command("calibrate", "acts", *arguments).failed_with("act")
    assert command("calibrate", "act", *arguments, "--set", "beta=1").failed_with(
        "beta must be below 1"
    )
    assert command("calibrate", "act", *arguments, "--limit", "5").failed_with(
        "at least 8 different"
    )
    assert not (tmp_path / "x.json").exists()
