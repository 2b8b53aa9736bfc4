"""Templates and rows: filled as written, refused with the row's number."""

import json

import pytest

from workbench.errors import ConfigError, DataError, UnknownNameError
from workbench.evaluation.evaluate import with_examples
from workbench.evaluation.task import find_task, read_questions, task_from, task_names


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_the_tasks_that_come_along_read_their_rows():
    assert task_names() == ["agnews", "arc", "boolq", "sst2"]
    question = find_task("sst2").question({"text": "a good film", "label": 1}, "line 1")
    assert question.prompt == "Review: a good film\nSentiment:"
    assert question.labels[question.answer] == " positive"
    row = {"question": "What is wet?", "choices": ["fire", "water", "air"], "answer": 1}
    question = find_task("arc").question(row, "line 1")
    assert question.prompt == "Question: What is wet?\nA. fire\nB. water\nC. air\nAnswer:"
    assert question.labels == (" A", " B", " C")
    row = {"passage": "Goats faint.", "question": "do goats faint", "answer": True}
    question = find_task("boolq").question(row, "line 1")
    assert question.prompt == "Goats faint.\nQuestion: do goats faint?\nAnswer:"
    assert question.labels[question.answer] == " yes"


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("sst2", "sst2_test"),
        ("agnews", "agnews_test"),
        ("boolq", "boolq_passage"),
        ("arc", "arc_easy"),
    ],
)
def test_whole_files_of_real_rows_are_read(shared_data, task, file):
    path = shared_data / "tasks" / f"{file}.jsonl"
    questions = read_questions(find_task(task), path)
    assert len(questions) == len(path.read_text("utf-8").splitlines()) > 1000
    assert len({question.answer for question in questions}) >= 2
    assert all(len(question.labels) >= 2 for question in questions)
    assert questions[6].where == f"line 7 of {file}.jsonl"


def test_braces_in_a_row_stay_what_they_are():
    question = find_task("sst2").question({"text": "{label} {0}", "label": 0}, "line 1")
    assert question.prompt == "Review: {label} {0}\nSentiment:"


def test_a_label_may_be_named():
    assert find_task("sst2").question({"text": "x", "label": "Positive"}, "line 1").answer == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "must have label"),
        ({"text": "x", "label": None}, "has null"),
        ({"text": None, "label": 1}, "text of a row of sst2 must be a text"),
        ({"text": ["x"], "label": 1}, "must be a text"),
        ({"text": "x", "label": 2}, "0 ... 1"),
        ({"text": "x", "label": -1}, "0 ... 1"),
        ({"text": "x", "label": "good"}, "negative, positive"),
        ({"label": 1}, "has no text"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(tmp_path, row, message):
    path = write(tmp_path / "test.jsonl", [{"text": "fine", "label": 0}, row])
    with pytest.raises(DataError, match=r"line 2 of test.jsonl") as error:
        read_questions(find_task("sst2"), path)
    assert message in str(error.value)


def test_choices_must_be_a_list():
    for choices in ("abc", ["a"], ["a", None]):
        row = {"question": "?", "choices": choices, "answer": 0}
        with pytest.raises(DataError, match="choices, a list of 2 to 26 texts; line 7"):
            find_task("arc").question(row, "line 7")


def test_an_empty_split_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="at least one row"):
        read_questions(find_task("sst2"), path)


def test_unknown_tasks_offer_the_nearest():
    with pytest.raises(UnknownNameError, match="sst2"):
        find_task("sst")


GOOD = {"name": "mine", "prompt": "{q}:", "labels": [" a", " b"], "answer": "label"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 3}, "prompt of a task must be a text"),
        ({"labels": [" a"]}, "two or more different"),
        ({"labels": [" a", " a"]}, "two or more different"),
        ({"prompt": "{q.__class__}"}, "fields as {name}"),
        ({"prompt": "{q"}, "braces must be closed"),
        ({"prompt": "{text:d}"}, r"take fields as \{name\}; .* has \{text:d\}"),
        ({"prompt": "{text!r}"}, r"has \{text!r\}"),
        ({"prompt": "{text:{width}}"}, r"take fields as"),
        ({"prompt": "no field"}, "fields as {name}"),
        ({"extra": "x"}, "got extra"),
    ],
)
def test_a_template_that_is_none_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        task_from({**GOOD, **change}, "mine.json")
    assert task_from(GOOD, "mine.json").labels == (" a", " b")


def test_examples_come_in_front_and_never_from_the_questions():
    task = find_task("sst2")
    train = [task.question({"text": f"train {n}", "label": n % 2}, "") for n in range(4)]
    asked = [task.question({"text": f"test {n}", "label": 0}, "") for n in range(2)]
    first, second = with_examples(task, asked, train, 2, seed=0)
    assert first.prompt.endswith("\n\nReview: test 0\nSentiment:")
    assert first.prompt.count("Review:") == 3
    shown = first.prompt.rsplit("Review:", 1)[0]
    assert second.prompt.startswith(shown)  # the same examples for every question
    assert sum(f"train {n}\nSentiment: " in shown for n in range(4)) == 2
    with pytest.raises(ConfigError, match=r"shots must lie in 0 \.\.\. 4"):
        with_examples(task, asked, train, 5, seed=0)
    with pytest.raises(ConfigError, match="must not be among the questions"):
        with_examples(task, asked, asked, 2, seed=0)
