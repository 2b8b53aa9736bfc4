"""Controls written out and read again, by a tokenizer whose answer is known."""

import pytest
import torch

from probes.reachability_problems import Problem, State
from probes.reachability_text import describe_pairs, reached_as_text
from tests.probes.bag_model import bag


class Letters:
    """A letter a token; what it reads again is planted."""

    def __init__(self, again):
        self.again = again

    def decode(self, ids):
        return "".join("abcdefgh"[token] for token in ids)

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": self.again(["abcdefgh".index(letter) for letter in text])}


def pair_of(model, control, bos):
    """A control before the state (1, 2), with the target that it does reach."""
    row = torch.tensor([[*bos, *control, 1, 2]])
    target = int(model.logits(row, last=1)[0, -1].argmax())
    state = State(torch.tensor(bos, dtype=torch.long), torch.tensor([1, 2]), 0)
    return Problem(state, target, 0), torch.tensor(control)


def reached_again(again, control=(5, 3), n_ctx=8, bos=()):
    model = bag(n_ctx=n_ctx)
    model.tokenizer = Letters(again)
    problem, prompt = pair_of(model, control, bos)
    model.rows.clear()
    found = reached_as_text(model, [problem], torch.tensor([len(control)]), [prompt])
    return bool(found), model.rows


def test_text_that_reads_as_the_same_ids_is_not_scored_again():
    assert reached_again(lambda ids: ids) == (True, [])


@pytest.mark.parametrize("bos", [(), (7,)], ids=["no BOS", "BOS"])
def test_other_ids_are_scored_behind_bos(bos):
    # The model sums over its tokens, so their order changes nothing, and one more of them does.
    backwards = reached_again(lambda ids: ids[::-1], bos=bos)
    assert backwards == (True, [[*bos, 2, 1, 3, 5]])
    effect = bag().effect
    whole = effect[[*bos, 5, 3, 1, 2]].sum(dim=0)
    for more in range(8):
        wins = bool((whole + effect[more]).argmax() == whole.argmax())
        found = reached_again(lambda ids, more=more: [more, *ids], bos=bos)
        assert found == (wins, [[*bos, more, 5, 3, 1, 2]])


@pytest.mark.parametrize("bos", [(), (7,)], ids=["no BOS", "BOS"])
def test_text_of_nothing_or_of_more_than_the_model_reads_does_not_reach(bos):
    assert reached_again(lambda ids: [], bos=bos) == (False, [])
    # Twice the ids have the same argmax in this model.
    twice = reached_again(lambda ids: 2 * ids, n_ctx=8)
    assert twice == (True, [[5, 3, 1, 2, 5, 3, 1, 2]])
    assert reached_again(lambda ids: 2 * ids, n_ctx=7 + len(bos), bos=bos) == (False, [])


def test_without_a_tokenizer_ids_count():
    model = bag()
    problem, prompt = pair_of(model, (5, 3), ())
    k, prompts = torch.tensor([2, -1]), [prompt, torch.zeros(0, dtype=torch.long)]
    assert reached_as_text(model, [problem] * 2, k, prompts).tolist() == [True, False]
    texts = describe_pairs(model, [problem] * 2, prompts)
    assert texts["prompt_text"] == ("[5] [3]", "")
    assert texts["state_text"] == ("[1] [2]",) * 2
    assert texts["target_text"] == (f"[{problem.target}]",) * 2
