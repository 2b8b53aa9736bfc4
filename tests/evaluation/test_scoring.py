"""Label scores against plain forward passes; what is written; what cannot be scored."""

import pytest
import torch

import workbench as wb
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.evaluation.evaluate import evaluate
from workbench.evaluation.scoring import (
    Settings,
    encode_questions,
    largest_batch,
    read_answer,
    score,
)
from workbench.evaluation.task import Question, find_task

QUESTIONS = [
    Question("Monday, Tuesday,", (" and Wednesday", " January"), 0),
    Question("one two three", (" four", " Monday", " the other thing"), 0),
    Question("The sun was", (" warm and bright", " zebra"), 0),
]


@pytest.fixture(scope="module")
def model():
    return wb.load("demo")


def by_hand(model, question):
    """Log-probability of every label, one plain forward pass each."""
    found = []
    for label in question.labels:
        prompt = model.tokenizer(question.prompt)["input_ids"]
        whole = torch.tensor([model.tokenizer(question.prompt + label)["input_ids"]])
        with torch.no_grad():
            log_probs = model.model(whole).logits[0].log_softmax(-1)
        rest = range(len(prompt), whole.shape[1])
        found.append([float(log_probs[pos - 1, whole[0, pos]]) for pos in rest])
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_equal_plain_forward_passes_whatever_the_batch(model, batch_size):
    for scoring, total in (("loglikelihood", sum), ("first-token", lambda parts: parts[0])):
        settings = Settings(scoring, batch_size)
        found = score(model, encode_questions(model, QUESTIONS, settings), settings)
        for scores, question in zip(found.scores, QUESTIONS, strict=True):
            wanted = [total(parts) for parts in by_hand(model, question)]
            assert scores == pytest.approx(wanted, abs=1e-4)


def test_entropy_is_that_of_the_next_token(model):
    settings = Settings()
    found = score(model, encode_questions(model, QUESTIONS[:1], settings), settings)
    tokens = torch.tensor([model.tokenizer(QUESTIONS[0].prompt)["input_ids"]])
    probs = model.logits(tokens)[0, -1].double().softmax(-1)
    assert found.entropy[0] == pytest.approx(float(-(probs * probs.log()).sum()), abs=1e-4)


def test_what_is_written_is_read(model):
    settings = Settings()
    found = score(model, encode_questions(model, QUESTIONS[:1], settings), settings)
    text = model.generate(QUESTIONS[0].prompt, max_new_tokens=5, do_sample=False)
    assert text.strip().startswith("and Wednesday")  # the demo model knows its weekdays
    assert found.parsed == (0,)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" positive.", 0),
        ("\nPositive review", 0),
        ("positively", -1),
        ("very positive", -1),
        ("", -1),
        ("not", 1),
        ("not sure", 2),
    ],
)
def test_an_answer_is_a_whole_word_at_the_start(text, label):
    assert read_answer(text, [" positive", " not", " not sure"]) == label


def test_an_edit_moves_the_scores_and_the_stock_model_stays(model):
    settings = Settings()
    evaluation = evaluate(model, find_task("sst2"), QUESTIONS, wb.ZeroTuning(3.0), settings)
    plain = evaluate(model, find_task("sst2"), QUESTIONS, None, settings)
    assert evaluation.stock == plain.scored
    assert evaluation.scored != plain.scored
    document = evaluation.document()
    assert document["interventions"][0]["gamma"] == 3.0
    assert set(document["difference"]) == {"accuracy", "label_accuracy", "margin"}
    change = document["difference"]["margin"]
    assert change["value"] == pytest.approx(document["margin"] - document["stock"]["margin"])
    assert change["gained"] + change["lost"] == 3
    assert document["stock"]["n"] == 3
    with model.edit(wb.ZeroTuning(3.0)):
        edited = evaluate(model, find_task("sst2"), QUESTIONS, None, settings)
    assert edited.scored == evaluation.scored
    assert [row["stock_parsed"] for row in evaluation.rows()] == list(plain.scored.parsed)


def plant(monkeypatch, model, most):
    """Let the model hold ``most`` prompts at a time; returns the sizes of the passes it was asked for."""
    seen = []
    for name in ("logits", "generate"):
        whole = getattr(type(model), name)

        def limited(self, tokens, *rest, whole=whole, **named):
            seen.append(len(tokens))
            if len(tokens) > most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried a lot")
            return whole(self, tokens, *rest, **named)

        monkeypatch.setattr(type(model), name, limited)
    return seen


def test_an_evaluation_steps_back_where_memory_does_not_suffice(model, monkeypatch):
    asked = [Question(f"{item.prompt} {n}", item.labels, 0) for n in range(3) for item in QUESTIONS]
    task, edit, told = find_task("sst2"), wb.ZeroTuning(3.0), []
    whole = evaluate(model, task, asked, edit, Settings(batch_size=9))
    seen = plant(monkeypatch, model, 2)
    found = evaluate(model, task, asked, edit, Settings(report=told.append))
    assert found.metrics() == pytest.approx(whole.metrics(), abs=1e-5)
    assert found.stock.metrics() == pytest.approx(whole.stock.metrics(), abs=1e-5)
    assert seen[0] == len(asked)  # all at once is tried first: memory seemed to suffice
    assert seen[1:3] == [4, 2]
    assert "going on with 2 prompts" in told[-1]
    with pytest.raises(RuntimeError, match="allocate memory"):  # a size that was given is kept
        evaluate(model, task, asked, edit, Settings(batch_size=9))


def test_the_automatic_batch_is_what_fits_into_half_of_the_free_memory(model, monkeypatch):
    encoded = encode_questions(model, QUESTIONS, Settings())
    longest = max(len(item.prompt) for item in encoded) + 5
    spec = model.spec
    each = 4 * longest * (16 * spec.d_model + 4 * spec.d_mlp + spec.d_vocab)
    for free, size in ((2 * 2 * each, 2), (2 * 5 * each, 4), (0, 1)):
        monkeypatch.setattr(
            "workbench.models.memory.free_memory_bytes", lambda device, free=free: free
        )
        assert largest_batch(model, encoded, Settings()) == size


def test_rows_are_told_by_where_they_stand(model):
    alike = Question("The", (" one thing", " one other"), 0, where="line 5 of x.jsonl")
    with pytest.raises(DataError, match=r"line 5 of x\.jsonl do not"):
        encode_questions(model, [QUESTIONS[0], alike], Settings())


def test_a_prompt_without_a_token_is_refused():
    from tests.zoo import tiny_model

    def letters(text, **_):  # a tokenizer that puts nothing in front
        return {"input_ids": [ord(letter) for letter in text]}

    bare = wb.wrap(tiny_model("gpt2"), letters)
    with pytest.raises(DataError, match="at least one token; that of row 1 has none"):
        encode_questions(bare, [Question(" ", (" a", " b"), 0)], Settings())


def test_labels_that_begin_alike_are_refused_by_the_first_token_alone(model):
    question = Question("The", (" one thing", " one other"), 0)
    with pytest.raises(DataError, match=r"row 1.*scoring=loglikelihood"):
        encode_questions(model, [question], Settings())
    assert encode_questions(model, [question], Settings("loglikelihood"))


def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(model):
    questions = [QUESTIONS[0], Question("word " * 300, (" a", " b"), 0)]
    with pytest.raises(DataError, match="row 2 needs"):
        encode_questions(model, questions, Settings())


def test_unknown_scoring_and_models_without_tokenizer_are_refused():
    with pytest.raises(ConfigError, match="first-token, loglikelihood"):
        Settings("guess")
    from tests.zoo import tiny_model

    with pytest.raises(CapabilityError, match="tokenizer"):
        encode_questions(wb.wrap(tiny_model("gpt2")), QUESTIONS, Settings())
