"""Effects of single heads against whole forward passes."""

import pytest
import torch

from tests.calibration.asked import EDITS, questions, with_heads
from tests.zoo import padded, random_tokens
from workbench.calibration.effects import (
    Answers,
    Residuals,
    Work,
    answers_of_rows,
    prepare,
    stock_answers,
)
from workbench.calibration.one_head import OneHeadARow
from workbench.evaluation.scoring import Encoded


@pytest.mark.parametrize("name", EDITS)
def test_each_row_sees_its_own_head(model, name):
    tokens, mask = padded(random_tokens(4, 9), [9, 6, 9, 7], "left")
    heads = torch.tensor([0, 3, 2, 1])
    stock = model.logits(tokens, mask)
    for layer in (0, 1):
        with model.edit(OneHeadARow(EDITS[name], layer, heads)):
            together = model.logits(tokens, mask)
        for row, head in enumerate(heads.tolist()):
            with model.edit(with_heads(EDITS[name], layer, head)):
                alone = model.logits(tokens, mask)
            shown = mask[row].bool()
            torch.testing.assert_close(together[row][shown], alone[row][shown], rtol=0, atol=1e-5)
        assert (together - stock).abs().max() > 1e-3


@pytest.mark.parametrize("name", EDITS)
def test_answers_of_rows_equal_whole_passes(model, name):
    asked = questions()
    prepared = prepare(model, asked, None, Work())
    rows = [(0, 1), (0, 2), (5, 0), (9, 3)]
    for layer in (0, 1):
        work = Work()
        found = answers_of_rows(model, prepared, EDITS[name], layer, rows, work)
        assert work.layer_forwards == len(rows) * (2 - layer)
        for index, (question, head) in enumerate(rows):
            with model.edit(with_heads(EDITS[name], layer, head)):
                alone = stock_answers(model, [asked[question]], 1, Work())
            assert found.margin[index] == pytest.approx(float(alone.margin), abs=1e-4)
            assert found.entropy[index] == pytest.approx(float(alone.entropy), abs=1e-4)


def test_answers_are_margins_and_entropies_worked_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    asked = [Encoded((0,), ((0,), (1,), (2,)), 0), Encoded((0,), ((1,), (2,)), 1)]
    answers = Answers.of(probs.log(), asked)
    torch.testing.assert_close(answers.margin, torch.tensor([2.0, 1 / 8]).log())
    wanted = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(answers.entropy, wanted)


def test_what_was_kept_serves_as_well_as_what_is_made_anew(model):
    asked = questions(6)
    rows = [4, 1, 5]
    whole, alone = Residuals(model, asked), Residuals(model, asked, limit=0)
    for start in (0, 3):
        part = list(range(start, start + 3))
        for each in (whole, alone):
            each.keep(part, prepare(model, [asked[row] for row in part], None, Work()))
    spent, again = Work(), Work()
    kept, made = whole.prepared(rows, spent), alone.prepared(rows, again)
    assert (spent.layer_forwards, again.layer_forwards) == (0, 3 * 2)
    for layer in (0, 1):
        found = [
            answers_of_rows(model, each, EDITS["act"], layer, [(0, 1), (2, 3)], Work()).margin
            for each in (kept, made)
        ]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
