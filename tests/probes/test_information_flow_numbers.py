"""Headline numbers of information flow counted item by item, and its smaller parts on unequal values."""

from types import SimpleNamespace

import pytest
import torch

from probes.information_flow_batch import InformationFlowConfig
from probes.information_flow_cross import entering, pair_mask, relative_change
from probes.information_flow_encoding import cosines, pooled, site_before, without_direction
from probes.information_flow_images import _representative, keep_sets
from probes.information_flow_items import Padding, Places
from probes.information_flow_summary import FlowNumbers
from probes.information_flow_tokens import KEEP_SETS, item_tokens, nearest_is_own
from workbench.errors import DataError


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Numbers(FlowNumbers):
    """Three prompts: items of 3, 1 and 2 tokens; of 2 tokens and 1; one of 2 alone."""

    def __init__(self, **changes):
        self.item_of_pos = torch.tensor(
            [
                [0, 0, 0, -1, 1, 2, 2, -1],
                [-1, 0, 0, 1, -1, -1, -1, -1],
                [0, 0, -1, -1, -1, -1, -1, -1],
            ]
        )
        self.representative = torch.tensor(
            [[0, 1, 1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
        ).bool()
        self.keep_score = drawn(3, 8)
        self.keep_score[0, :3] = torch.tensor([0.1, 0.4, 0.9])
        self.keep_score[0, 5:7] = torch.tensor([-0.2, -0.3])
        self.keep_score[1, 1:3] = torch.tensor([0.3, 0.5])
        self.keep_score[2, :2] = torch.tensor([0.7, 0.6])
        self.keep_set_score = drawn(3, 3, 5, seed=1)
        self.keep_set_correct = drawn(3, 3, 5, seed=2) > 0.5
        self.flow = drawn(3, 3, 3, seed=3)
        self.correct = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 0, 0]]).bool()
        self.correct_patched = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0]]).bool()
        self.predicted_redundant = None
        self.route_edges = None
        self.config = InformationFlowConfig()
        vars(self).update(changes)


ITEMS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
COMPANY = ITEMS[:5]


def test_items_and_their_tokens():
    numbers = Numbers()
    assert [tuple(row) for row in numbers.exists().nonzero().tolist()] == ITEMS
    assert [tuple(row) for row in numbers.in_company().nonzero().tolist()] == COMPANY
    assert numbers.n_tokens().tolist() == [[3, 1, 2], [2, 1, 0], [2, 0, 0]]
    assert numbers.n_representative().tolist() == [[2, 1, 0], [1, 0, 0], [1, 0, 0]]
    # Items of several tokens: last best, first best, last best, first best.
    assert numbers.last_is_best().tolist() == [True, False, True, False]


def test_headline_numbers_against_counts():
    numbers = Numbers()
    found = numbers.metrics()
    assert found["representative_rate"] == pytest.approx(4 / 6)
    assert found["redundant_rate"] == pytest.approx(1 - 4 / 9)  # of 3, 2, 2 and 2 tokens
    assert found["last_token_rate"] == 0.5
    assert found["leakage_rate"] == pytest.approx(3 / 5)
    assert found["leakage_rate_patched"] == pytest.approx(1 / 5)
    assert found["leakage_reduction"] == pytest.approx(2 / 3)
    pairs = [(0, a, b) for a in range(3) for b in range(3) if a != b] + [(1, 0, 1), (1, 1, 0)]
    assert found["mean_flow"] == pytest.approx(sum(float(numbers.flow[p]) for p in pairs) / 8)
    full, removed = (
        [bool(numbers.keep_set_correct[(*item, KEEP_SETS.index(name))]) for item in COMPANY]
        for name in ("full", "removed")
    )
    assert found["accuracy_before"] == pytest.approx(sum(full) / 5)
    assert found["accuracy_after"] == pytest.approx(sum(removed) / 5)
    both = [after for before, after in zip(full, removed, strict=True) if before]
    assert found["unaffected"] == pytest.approx(sum(both) / len(both))
    assert (found["n_items"], found["n_prompts"]) == (6.0, 3.0)
    assert "n_route_edges" not in found
    assert "classifier_accuracy" not in found
    edges = Numbers(route_edges=torch.zeros(7, 5)).metrics()
    assert edges["n_route_edges"] == 7.0


def test_numbers_without_a_case_are_left_out():
    right = Numbers(correct=torch.ones(3, 3, dtype=torch.bool)).metrics()
    assert right["leakage_rate"] == 0.0
    assert "leakage_reduction" not in right
    alone = Numbers()
    alone.item_of_pos = torch.tensor([[0, -1], [-1, 0], [0, -1]])
    alone.representative = torch.ones(3, 2, dtype=torch.bool)
    alone.keep_score = drawn(3, 2)
    assert alone.leakage_rate() is None
    assert set(alone.metrics()) == {"representative_rate", "n_items", "n_prompts"}
    prompt = Numbers(config=InformationFlowConfig(readout="prompt")).metrics()
    assert "accuracy_before" not in prompt
    assert "leakage_rate" in prompt


def test_the_classifier_is_judged_on_items_of_several_tokens():
    said = torch.zeros(3, 8, dtype=torch.bool)
    said[0, [0, 1, 4]], said[1, 3], said[2, 1] = True, True, True
    found = Numbers(predicted_redundant=said).metrics()
    # Of 9 tokens redundant: 0 of the first, 5 and 6, 1 of the second prompt, 1 of the third.
    assert found["classifier_base_rate"] == pytest.approx(5 / 9)
    assert found["classifier_accuracy"] == pytest.approx((9 - 4) / 9)
    assert found["classifier_precision"] == pytest.approx(2 / 3)
    never = Numbers(predicted_redundant=torch.zeros(3, 8, dtype=torch.bool)).metrics()
    assert "classifier_precision" not in never


def test_the_table_has_a_row_an_item():
    numbers = Numbers()
    table = numbers.table()
    assert list(zip(table["prompt"], table["item"], strict=True)) == ITEMS
    assert table["n_tokens"] == [3, 1, 2, 2, 1, 2]
    assert table["n_representative"] == [2, 1, 0, 1, 0, 1]
    at = KEEP_SETS.index("item")
    assert table["item_score"] == [float(numbers.keep_set_score[(*item, at)]) for item in ITEMS]
    best = [0.9, float(numbers.keep_score[0, 4]), -0.2, 0.5, float(numbers.keep_score[1, 3]), 0.7]
    assert table["best_token_score"] == pytest.approx(best)
    assert table["flow_in"] == pytest.approx([float(numbers.flow[p, i].sum()) for p, i in ITEMS])
    assert table["flow_out"] == pytest.approx(
        [float(numbers.flow[p, :, i].sum()) for p, i in ITEMS]
    )
    assert table["leaks"] == [0, 1, 1, 0, 1, 1]
    assert table["leaks_patched"] == [0, 0, 1, 0, 0, 0]


# Parts


def test_relative_changes_of_items_and_of_no_tokens():
    end, other = drawn(2, 4, 3), drawn(2, 4, 3, seed=1)
    own = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 0]], [[0, 1, 0, 1], [0, 0, 0, 0]]]).bool()
    found = relative_change(end, other, own)
    for b in range(2):
        for i in range(2):
            at = own[b, i]
            expected = (end[b, at] - other[b, at]).norm() / end[b, at].norm() if at.any() else 0.0
            assert found[b, i].item() == pytest.approx(float(expected), rel=1e-5)


def test_pairs_are_of_two_different_items_that_exist():
    found = pair_mask(torch.tensor([[True, False, True], [False, True, False]]))
    assert found.nonzero().tolist() == [[0, 0, 2], [0, 2, 0]]


def test_what_enters_is_what_is_left_before_less_what_is_left_behind():
    torch.testing.assert_close(
        entering(torch.tensor([[0.75, 0.5, 0.625, 0.0]])), torch.tensor([[0.25, -0.125, 0.625]])
    )


def test_readings_and_directions():
    x, pool = drawn(2, 4, 3), torch.tensor([[[1, 0, 1, 0]], [[0, 1, 1, 1]]]).bool()
    found = pooled(x, pool)
    torch.testing.assert_close(found[0, 0], x[0, 0] + x[0, 2])
    torch.testing.assert_close(found[1, 0], x[1, 1] + x[1, 2] + x[1, 3])
    direction = torch.tensor([0.6, 0.8, 0.0])
    left = without_direction(x, direction)
    torch.testing.assert_close(left @ direction, torch.zeros(2, 4), atol=1e-6, rtol=0)
    across = torch.tensor([[0.8, -0.6, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(left @ across.T, x @ across.T)
    read, prototype = drawn(1, 2, 3, seed=4), drawn(1, 3, 3, seed=5)
    prototype[0, 2] = 0.0
    found = cosines(read, prototype)
    for i in range(2):
        for j in range(2):
            expected = torch.cosine_similarity(read[0, i], prototype[0, j], dim=0)
            assert found[0, i, j].item() == pytest.approx(float(expected), rel=1e-5)
    assert found[0, :, 2].tolist() == [0.0, 0.0]
    assert str(site_before(1, 2)) == "L1.resid_pre"
    assert str(site_before(2, 2)) == "ln_final"


def test_the_nearest_prototype_is_the_own_only_without_a_tie():
    score = torch.tensor([[[0.5, 0.5], [0.1, 0.2]], [[0.5, 0.9], [0.0, -0.5]]])
    exists = torch.tensor([[True, True], [True, False]])
    assert nearest_is_own(score, exists).tolist() == [[False, True], [True, False]]


def test_tokens_of_items_prompt_by_prompt():
    places = Places(torch.tensor([[-1, 0, 1], [0, -1, -1], [2, 2, -1]]), 3)
    assert [x.tolist() for x in item_tokens(places.of_pos)] == [
        [0, 0, 1, 2, 2],
        [1, 2, 0, 0, 1],
        [0, 1, 0, 2, 2],
    ]
    part = places.part(1, 2)
    assert part.of_pos.tolist() == [[0, -1, -1], [2, 2, -1]]
    assert part.mask().nonzero().tolist() == [[0, 0, 0], [1, 2, 0], [1, 2, 1]]


# Images


def shown(single, whole, tau=0.5):
    """Which of two tokens of item 1 of three shows it, given scores of each image for all items."""
    of_pos = torch.tensor([-1, 1, 1, 0])
    names = tuple(keep_sets(of_pos, 4, 3))
    score = torch.zeros(len(names), 3)
    for pos, row in zip((1, 2), single, strict=True):
        score[names.index(f"token {pos}")] = torch.tensor(row)
    score[names.index("item 1")] = torch.tensor([9.0, whole, 9.0])
    return _representative(names, score, of_pos, tau).tolist()


def test_a_tokens_image_shows_its_item_better_than_any_other():
    assert shown([(0.0, 0.5, 0.0), (0.0, 0.49, 0.0)], 1.0) == [False, True, False, False]
    assert shown([(0.6, 0.5, 0.0), (0.0, 0.5, 0.6)], 1.0) == [False, False, False, False]
    assert shown([(0.4, 0.5, 0.3), (0.3, 0.5, 0.4)], 1.0) == [False, True, True, False]


# What prompts are compared with


def test_padding_of_a_tokenizer_is_the_first_id_it_has():
    def tokenizer(**ids):
        names = {
            "pad_token_id": None,
            "eos_token_id": None,
            "unk_token_id": None,
            "bos_token_id": 4,
        }
        fake = SimpleNamespace(**{**names, **ids}, all_special_ids=[4, 5, 6])
        return Called(fake)

    assert Padding.of(tokenizer(pad_token_id=0, eos_token_id=5), None, 9).pad == 0
    assert Padding.of(tokenizer(eos_token_id=5, unk_token_id=6), None, 9).pad == 5
    assert Padding.of(tokenizer(unk_token_id=6), None, 9).pad == 6
    assert Padding.of(tokenizer(), None, 9).pad == 0
    found = Padding.of(tokenizer(pad_token_id=2, unk_token_id=6), 8, 9)
    # BOS is no part of what stands behind it; an unknown word is no special token.
    assert (found.pad, found.prefix, found.bos, found.special) == (8, (5,), 4, (4, 5))
    assert Padding.of(tokenizer(bos_token_id=7), None, 9).prefix == (4, 5)
    assert Padding.of(None, None, 9) == Padding(0)
    for wrong in (-1, 9):
        with pytest.raises(DataError, match="below 9"):
            Padding.of(None, wrong, 9)


class Called:
    """A tokenizer whose empty prompt is (4, 5)."""

    def __init__(self, names):
        vars(self).update(vars(names))

    def __call__(self, text):
        assert text == ""
        return {"input_ids": [4, 5]}


def test_empty_and_lengthened_prompts():
    padding = Padding(9, (5,), 4, (4, 5))
    assert padding.empty(4, 4).tolist() == [4, 5, 9, 9]
    assert padding.empty(3, 4).tolist() == [5, 9, 9, 9]
    assert padding.empty(4, 1).tolist() == [4]
    assert Padding(9, (5,)).empty(4, 2).tolist() == [5, 9]
    tokens, lengths = torch.tensor([[1, 2, 3], [6, 7, 8]]), torch.tensor([3, 1])
    assert padding.lengthened(tokens, lengths, 5).tolist() == [[1, 2, 3, 9, 9], [6, 9, 9, 9, 9]]
    assert padding.lengthened(tokens, lengths, 2).tolist() == [[1, 2], [6, 9]]
    row, kept = torch.tensor([[4, 1, 2, 5]]), torch.tensor([[False, False, True, False]])
    assert padding.alone(row, kept).tolist() == [[4, 9, 2, 5]]
    assert padding.without(row, kept).tolist() == [[4, 1, 9, 5]]
