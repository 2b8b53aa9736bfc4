"""lm-evaluation-harness on a task of our own: its numbers for its model are ours for ours."""

import json

import pytest
import torch

import workbench as wb
from workbench.errors import DataError
from workbench.evaluation.evaluate import evaluate
from workbench.evaluation.scoring import Settings
from workbench.evaluation.task import find_task, read_questions, task_from

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ROWS = [
    {"text": "Monday, Tuesday,", "choices": [" Wednesday", " the sea"], "label": 0},
    {"text": "seven, eight,", "choices": [" ten and more", " nine"], "label": 1},
    {"text": "The king said", "choices": [" that he", " zebra"], "label": 0},
    {"text": "It was a dark", "choices": [" stormy sea", " and stormy night"], "label": 1},
]
YAML = """task: ours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def model():
    return wb.load("demo")


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "ours.yaml").write_text(YAML.format(path=path))

    def run(lm):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(
            lm, tasks=["ours"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
        scores = [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples]
        return found["results"]["ours"]["acc,none"], scores

    return run


def our_scores(model, intervention=None):
    """Label scores by our own evaluation; one question a row, its own labels."""
    settings = Settings("loglikelihood", max_new_tokens=1)
    found = []
    for row in ROWS:
        template = {"name": "ours", "prompt": "{text}", "labels": row["choices"], "answer": "label"}
        task = task_from(template, "ours")
        question = task.question({"text": row["text"], "label": row["label"]}, "")
        found.append(
            list(evaluate(model, task, [question], intervention, settings).scored.scores[0])
        )
    return found


def test_the_harness_own_model_agrees_with_our_scores(model, run):
    from lm_eval.models.huggingface import HFLM

    accuracy, scores = run(HFLM(pretrained=model.model, tokenizer=model.tokenizer, device="cpu"))
    ours = our_scores(model)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(ours), rtol=0, atol=1e-4)
    right = [
        row["label"] == max((0, 1), key=lambda i: s[i]) for row, s in zip(ROWS, ours, strict=True)
    ]
    assert accuracy == sum(right) / len(right)


@pytest.mark.parametrize("edit", [None, wb.ZeroTuning(4.0)], ids=["stock", "edited"])
def test_the_adapter_lets_the_harness_see_the_model_as_it_is(model, run, edit):
    from workbench.evaluation.harness import HarnessModel

    with model.edit(*([edit] if edit else [])):
        _, scores = run(HarnessModel(model, batch_size=3))
    wanted = our_scores(model, edit)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(wanted), rtol=0, atol=1e-4)
    if edit:
        assert (torch.tensor(wanted) - torch.tensor(our_scores(model))).abs().max() > 1e-3


SST2 = """task: ours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "Review: {{{{text}}}}\\nSentiment:"
doc_to_choice: ["negative", "positive"]
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.mark.parametrize("edit", [None, wb.ZeroTuning(4.0)], ids=["stock", "edited"])
@pytest.mark.parametrize(
    "name", ["demo", pytest.param("models/stories260K", marks=pytest.mark.slow)]
)
def test_accuracy_on_real_rows_is_the_harness_accuracy(shared_data, tmp_path, name, edit):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from workbench.evaluation.harness import HarnessModel

    model = wb.load(name if name == "demo" else str(shared_data / name))
    path = tmp_path / "rows.jsonl"
    rows = (shared_data / "tasks" / "sst2_test.jsonl").read_text("utf-8").splitlines()[:40]
    path.write_text("\n".join(rows) + "\n")
    (tmp_path / "ours.yaml").write_text(SST2.format(path=path))
    found = evaluate(
        model, find_task("sst2"), read_questions(find_task("sst2"), path), edit,
        Settings("loglikelihood", max_new_tokens=1),
    )  # fmt: skip
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with model.edit(*([edit] if edit else [])):
        if edit:  # the harness's own model knows no edit
            lm = HarnessModel(model, batch_size=8)
        else:
            lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, device="cpu", batch_size=8)
        theirs = lm_eval.simple_evaluate(
            lm, tasks=["ours"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    samples = sorted(theirs["samples"]["ours"], key=lambda sample: sample["doc_id"])
    scores = [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples]
    torch.testing.assert_close(
        torch.tensor(scores), torch.tensor(found.scored.scores), rtol=0, atol=2e-4
    )
    assert theirs["results"]["ours"]["acc,none"] == pytest.approx(found.metrics()["label_accuracy"])
    assert 0.3 < found.metrics()["label_accuracy"] < 0.7  # chance on this task: not all one answer


def test_texts_are_continued_up_to_the_stop_string_and_rolled_over_windows(model):
    from types import SimpleNamespace

    from workbench.evaluation.harness import HarnessModel

    adapter = HarnessModel(model)
    asked = SimpleNamespace(args=("Monday, Tuesday,", {"until": [","], "max_gen_toks": 6}))
    assert adapter.generate_until([asked]) == [" and Wednesday"]
    text = "Monday, Tuesday, Wednesday"
    tokens = torch.tensor([[adapter.prefix_token_id, *adapter.tok_encode(text, False)]])
    log_probs = model.logits(tokens)[0].log_softmax(-1)
    wanted = float(log_probs[:-1].gather(-1, tokens[0, 1:, None]).sum())
    (found,) = adapter.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert found == pytest.approx(wanted, abs=1e-3)
    long = SimpleNamespace(args=("word " * 300, {"until": [], "max_gen_toks": 4}))
    with pytest.raises(DataError, match="must fit in n_ctx = 256"):
        adapter.generate_until([long])


def test_rows_of_the_file_are_the_harness_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "a", "label": 1}) + "\n")
    template = {"name": "x", "prompt": "{text}", "labels": [" b", " c"], "answer": "label"}
    assert read_questions(task_from(template, "x"), path)[0].answer == 1
