"""Scores of a layer, lists, text and the result, against slow counts with unequal values."""

import dataclasses

import pytest
import torch

from probes.successor_heads import SuccessorHeadsResult, best_head, measure_successor_heads
from probes.successor_heads_scores import (
    TokenPath,
    greater_than,
    head_weights,
    score_layer,
    task_of_pairs,
    vocabulary_of,
)
from probes.successor_heads_tokens import Series, TokenSet
from tests.probes.factored_successors import NO_TOKENS, WEIGHTS, factored
from tests.probes.planted_successors import PlantedWeights, WordTokenizer
from workbench.context import Context
from workbench.errors import DataError
from workbench.testing import PlantedModel, uniform_pattern


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LINE = Series("line", tuple("abcdefg"))
RING = Series("ring", tuple("uvwxyz"), cyclic=True)


# Scores of a layer, source by source


def planted_layer(n_layers=1, seed=0):
    sets = (
        TokenSet(LINE, "space", (1, 2, 3, 5, 6), (0, 1, 2, 3, 4)),
        TokenSet(RING, "space", (1, 2, 3, 4, 5, 6), (5, 6, 7, 8, 9, 10)),
        TokenSet(LINE, "bare", (2, 3, 4, 7), (11, 12, 13, 14)),
    )
    heads = drawn(n_layers, 3, 6, 6, seed=seed)
    model = PlantedWeights(WordTokenizer([]), drawn(15, 6, seed=1), drawn(6, 15, seed=2), heads)
    return model, sets


def test_a_layer_is_scored_as_pair_by_pair():
    model, sets = planted_layer(2)
    path = TokenPath(mlp0=False)
    found = score_layer(model, 1, vocabulary_of(model, sets, path))
    embed, unembed = model.weight("W_E"), model.weight("W_U")
    hits, greater = [[] for _ in range(3)], [[] for _ in range(3)]
    wrong = torch.zeros(3, 2)
    for one in sets:
        ids = torch.tensor(one.ids)
        for head in range(3):
            logits = embed[ids] @ model.heads[1, head] @ unembed[:, ids]
            places = {index: at for at, index in enumerate(one.index)}
            n = len(one.series.items)
            after = {i: i % n + 1 if one.series.cyclic else i + 1 for i in one.index}
            pairs = [(places[i], places[after[i]]) for i in one.index if after[i] in places]
            targets = [target for _, target in pairs]
            for source, target in pairs:
                said = max(targets, key=lambda t, source=source: logits[source, t])
                hits[head].append(float(said == target))
                if not one.series.cyclic:
                    wrong[head, 0] += said != target
                    wrong[head, 1] += said != target and said > source
            if not one.series.cyclic:
                for source in range(1, len(ids) - 1):
                    lean = logits[source, source + 1 :].mean() - logits[source, :source].mean()
                    greater[head].append(lean / logits[source].std(correction=0))
    assert found["found"].tolist() == hits
    torch.testing.assert_close(found["greater"], torch.tensor(greater), rtol=1e-3, atol=1e-4)
    assert torch.equal(found["wrong"], wrong)
    assert wrong[:, 0].sum() > wrong[:, 1].sum() > 0
    assert task_of_pairs(sets, ("ring", "line")).tolist() == [1] * 3 + [0] * 6 + [1] * 2


def test_rows_of_a_set_are_found_by_place_and_by_set():
    model, sets = planted_layer()
    vocabulary = vocabulary_of(model, sets, TokenPath(mlp0=False))
    assert [vocabulary.rows(n) for n in range(3)] == [slice(0, 5), slice(5, 11), slice(11, 15)]
    assert vocabulary.rows_of(sets[2]) == slice(11, 15)
    assert torch.equal(vocabulary.unembed, model.weight("W_U")[:, :15])


def test_grouped_heads_share_their_values():
    class Grouped(PlantedModel):
        def weight(self, name, layer=None):
            return drawn(2, 5, 3, seed=layer) if name == "W_V" else drawn(6, 3, 5, seed=layer)

    w_v, w_o = head_weights(Grouped(uniform_pattern(3)[None, None, None]), 4)
    assert w_v.shape == (6, 5, 3)
    assert w_o.shape == (6, 3, 5)
    for head in range(6):
        assert torch.equal(w_v[head], drawn(2, 5, 3, seed=4)[head // 3])


def test_logits_that_are_all_alike_lean_nowhere():
    assert greater_than(torch.full((4, 4), 2.0)).tolist() == [0.0, 0.0]


# The result


def result(**changes):
    fields = {
        "score": torch.tensor([[0.1, 0.5], [0.9, 0.3]]),
        "score_by_task": torch.tensor([[[0.0, 0.2], [1.0, 0.4]], [[0.4, 0.6], [0.5, 0.0]]]),
        "n_pairs": torch.tensor([5, 6]),
        "filter_counts": torch.zeros(1, 3, dtype=torch.long),
        "summary": torch.tensor([0.25]),
        "greater_than_bias": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "list_attention": torch.tensor([[0.1, 0.2], [0.3, 0.4]]),
        "labels": {"summary": ("chance",), "task": ("days", "letters")},
    }
    return SuccessorHeadsResult(**{**fields, **changes})


def test_headline_numbers_are_those_of_the_best_head():
    assert result().best == best_head(result().score) == (1, 0)
    assert best_head(torch.tensor([[0.5, 0.1, 0.5]])) == (0, 0)
    assert best_head(torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.1, 0.9]])) == (1, 2)
    assert result().metrics() == pytest.approx(
        {
            "best_layer": 1.0,
            "best_head": 0.0,
            "best_score": 0.9,
            "best_macro_score": 0.75,
            "second_score": 0.5,
            "greater_than_bias": 3.0,
            "list_attention": 0.3,
            "chance": 0.25,
        }
    )
    torch.testing.assert_close(result().macro_score(), torch.tensor([[0.2, 0.4], [0.75, 0.2]]))
    alone = result(
        score=torch.tensor([[0.7]]),
        score_by_task=torch.ones(2, 1, 1),
        greater_than_bias=None,
        list_attention=None,
    )
    assert set(alone.metrics()) == {
        "best_layer",
        "best_head",
        "best_score",
        "best_macro_score",
        "chance",
    }


def test_the_table_has_a_row_a_head_layer_by_layer():
    table = result().table()
    assert table["layer"] == [0, 0, 1, 1]
    assert table["head"] == [0, 1, 0, 1]
    assert table["score"] == pytest.approx([0.1, 0.5, 0.9, 0.3])
    assert table["macro_score"] == pytest.approx([0.2, 0.4, 0.75, 0.2])
    assert table["score days"] == pytest.approx([0.0, 0.2, 1.0, 0.4])
    assert table["score letters"] == pytest.approx([0.4, 0.6, 0.5, 0.0])
    assert table["greater_than_bias"] == [1.0, 2.0, 3.0, 4.0]
    assert "direct_effect" not in table


def test_text_that_cannot_be_used_is_refused_before_anything_is_measured(monkeypatch):
    def too_early(*_):
        raise AssertionError

    monkeypatch.setattr("probes.successor_heads.vocabulary_of", too_early)
    model = factored()
    model.capabilities = model.capabilities | {"edits"}
    with pytest.raises(DataError, match="at least 2 prompts"):
        measure_successor_heads(model, torch.zeros(1, 4, dtype=torch.long), WEIGHTS)


def test_scores_by_task_and_progress_layer_by_layer():
    model = factored()
    model.heads = torch.cat([model.heads, model.heads.flip(1)])
    model.spec = dataclasses.replace(model.spec, n_layers=2)
    model.pattern = model.pattern.repeat(1, 2, 1, 1, 1)
    told = []
    found = measure_successor_heads(
        model, NO_TOKENS, WEIGHTS, Context(progress=lambda *at: told.append(at))
    )
    assert told[:2] == [(1, 2), (2, 2)]
    assert found.labels["task"] == ("numbers", "number words", "months")
    torch.testing.assert_close(found.score_by_task[:, 0], found.score_by_task[:, 1].flip(1))
    weights = found.n_pairs.float() / found.n_pairs.sum()
    torch.testing.assert_close(found.score, torch.einsum("t,tlh->lh", weights, found.score_by_task))
    assert "feature_agreement" not in found.metrics()  # of one autoencoder
