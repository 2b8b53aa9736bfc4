"""Effects of single heads against whole forward passes."""

import pytest
import torch

import workbench as wb
from tests.calibration.asked import EDITS, questions, with_heads
from tests.zoo import padded, random_tokens, tiny_model
from workbench.calibration.effects import Answers, Work, stock_answers
from workbench.calibration.later_rows import LaterRows
from workbench.calibration.one_head import OneHeadARow, WholeRows
from workbench.calibration.prepared import Kept, prepare
from workbench.evaluation.scoring import Encoded, pad_left
from workbench.interventions.act import ACT
from workbench.interventions.damped_mass import DampedMass
from workbench.models.base import Site


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


@pytest.mark.parametrize("name", [name for name in EDITS if name != "act full"])
def test_each_row_is_decoded_under_its_own_head(model, name):
    tokens, mask = padded(random_tokens(4, 9), [9, 6, 9, 7], "left")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with model.edit(OneHeadARow(EDITS[name], 0, torch.tensor([0, 3, 2, 1]))):
        cached = model.generate(tokens, attention_mask=mask, **options)
        whole = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, whole)


CASES = [("llama", name) for name in EDITS] + [
    (family, "act") for family in ("gpt2", "gemma2", "gpt_oss", "gpt_neox", "mistral", "phi3")
]


def equal_to_whole_passes(model, asked, name, found, rows, layer):
    for index, (question, head) in enumerate(rows):
        with model.edit(with_heads(EDITS[name], layer, head)):
            alone = stock_answers(model, [asked[question]], 1, Work())
        assert found.margin[index] == pytest.approx(float(alone.margin), abs=1e-4)
        assert found.entropy[index] == pytest.approx(float(alone.entropy), abs=1e-4)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_answers_of_later_rows_equal_whole_passes(family, name):
    model, asked = wb.wrap(tiny_model(family)), questions(6)
    prepared = prepare(model, asked, EDITS[name], (0, 1), Work())
    assert isinstance(prepared.rows, LaterRows)
    rows = [(0, 1), (5, 0), (0, 2)]
    moved = 0.0
    for layer in (0, 1):
        found = prepared.rows.answers(layer, rows, 2, Work())
        equal_to_whole_passes(model, asked, name, found, rows, layer)
        before = prepared.stock.margin[[question for question, _ in rows]]
        moved = max(moved, float((found.margin - before).abs().max()))
    assert moved > 1e-3
    stock = stock_answers(model, asked, 4, Work())
    torch.testing.assert_close(prepared.stock.margin, stock.margin, rtol=0, atol=1e-4)


def test_models_that_are_edited_already_run_whole_passes(model):
    asked, rows = questions(4), [(0, 1), (3, 2)]
    with model.edit(wb.ZeroTuning(2.0)):
        prepared = prepare(model, asked, EDITS["act"], (0, 1), Work())
        assert isinstance(prepared.rows, WholeRows)
        work = Work()
        found = prepared.rows.answers(1, rows, 8, work)
        assert work.layer_forwards == len(rows) * 2
        equal_to_whole_passes(model, asked, "act", found, rows, 1)


def test_a_head_is_touched_where_it_changes_what_the_answer_is_made_of(model):
    act, asked = ACT(2.2, 0.4), questions(30, 12)
    prepared = prepare(model, asked, act, (0, 1), Work())
    changed = torch.zeros(2, len(asked), 4, dtype=torch.bool)
    stock = stock_answers(model, asked, 8, Work()).margin
    for layer in (0, 1):
        for head in range(4):
            with model.edit(with_heads(act, layer, head)):
                after = stock_answers(model, asked, 8, Work()).margin
            changed[layer, :, head] = (after - stock).abs() > 2e-5
    assert bool(prepared.touched[changed].all())
    assert (prepared.touched & ~changed).float().mean() < 0.03  # a change too small to be seen
    # In the last block a sink that the last position does not damp changes no answer.
    tokens, mask = pad_left([item.prompt for item in asked])
    site = Site("pattern", 1)
    damped = model.capture(tokens, [site], DampedMass(act), attention_mask=mask)[site] > 0
    assert bool(damped[prepared.touched[1]].all())
    assert bool((damped & ~prepared.touched[1]).any())


def test_a_row_costs_the_positions_behind_its_first_change_and_the_parts_that_are_run():
    model = wb.wrap(tiny_model("gpt2", n_layer=4))
    asked = [Encoded(tuple(range(10)), ((3,), (4,)), 0)]
    rows = prepare(model, asked, EDITS["zerotuning"], range(4), Work()).rows
    # Of the 12 d^2 entries of a block, queries, keys and values have 3, the output 1 and the MLP 8.
    for layer, first in ((0, 4), (1, 4), (2, 0)):
        changed = torch.zeros(1, 10, 4, dtype=torch.bool)
        changed[:, first:, 2] = True
        given = LaterRows(model, asked, rows.mask, {**rows.parts, ("changed", layer): changed})
        work = Work()
        given.answers(layer, [(0, 2)], 8, work)
        share = (10 - first) / 10
        whole = (9 / 12 + (2 - layer) + 3 / 12) * share + 9 / 12 * 1 / 10
        assert work.layer_forwards == pytest.approx(whole)
    work = Work()
    rows.answers(3, [(0, 2), (0, 1)], 8, work)
    assert work.layer_forwards == pytest.approx(2 * 9 / 12 / 10)
    assert model.shares(0).behind == model.shares(3).unread == pytest.approx(9 / 12)


def test_answers_are_margins_and_entropies_worked_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    asked = [Encoded((0,), ((0,), (1,), (2,)), 0), Encoded((0,), ((1,), (2,)), 1)]
    answers = Answers.of(probs.log(), asked)
    torch.testing.assert_close(answers.margin, torch.tensor([2.0, 1 / 8]).log())
    wanted = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(answers.entropy, wanted)


def test_what_was_kept_serves_as_well_as_what_is_made_anew(model):
    asked, edit = questions(6), EDITS["act"]
    numbers = [4, 1, 5]
    kept, anew = Kept(model, asked, edit, (0, 1)), Kept(model, asked, edit, (0, 1), room=0)
    for start in (0, 3):
        part = list(range(start, start + 3))
        prepared = prepare(model, [asked[number] for number in part], edit, (0, 1), Work())
        kept.keep(part, prepared)
        anew.keep(part, prepared)
    spent, again = Work(), Work()
    found = [kept.rows(numbers, spent), anew.rows(numbers, again)]
    assert (spent.layer_forwards, again.layer_forwards) == (0, 3 * 2)
    for layer in (0, 1):
        margins = [each.answers(layer, [(0, 1), (2, 3)], 8, Work()).margin for each in found]
        torch.testing.assert_close(margins[0], margins[1], rtol=0, atol=1e-5)
