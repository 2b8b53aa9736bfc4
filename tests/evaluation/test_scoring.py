"""Label scores against plain forward passes; what is written; what cannot be scored."""

import pytest
import torch

import workbench as wb
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.evaluation.evaluate import evaluate
from workbench.evaluation.scoring import Settings, encode_questions, read_answer, score
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
