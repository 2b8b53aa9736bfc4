"""What a result says about its pairs, counted by hand, and the edges of what is accepted."""

import dataclasses

import pytest
import torch

from probes.reachability import ReachabilityConfig, ReachabilityResult, measure_reachability
from probes.reachability_problems import (
    Problem,
    State,
    ground_truth_pairs,
    n_usable_tokens,
    read_states,
    uniform_pairs,
)
from probes.reachability_results import padded_prompts
from tests.probes.bag_model import BagModel, bag
from workbench.context import Context
from workbench.errors import ConfigError, DataError


def result(**changes):
    """Four pairs of three states: solved without a control, by one of 1 and of 3, not at all."""
    fields = {
        "k": torch.tensor([0, 1, 3, -1]),
        "prompts": torch.tensor([[-1, -1, -1], [0, -1, -1], [4, 0, 7], [-1, -1, -1]]),
        "epsilon": torch.tensor([0.75, 0.5, 0.5, 0.25]),
        "epsilon_low": torch.zeros(4),
        "epsilon_high": torch.ones(4),
        "bound_excluded": torch.tensor([False, False, False, True]),
        "target_id": torch.tensor([5, 6, 7, 8]),
        "state_index": torch.tensor([0, 0, 1, 2]),
        "state_length": torch.tensor([2, 2, 3, 4]),
        "base_rank": torch.tensor([0, 3, 9, 2]),
        "base_loss": torch.tensor([0.5, 2.0, 4.0, 3.0]),
        "best_loss": torch.tensor([0.5, 1.0, 0.25, 2.5]),
        "reached_as_text": torch.tensor([True, True, False, False]),
        "config": ReachabilityConfig(k_max=3),
    }
    return ReachabilityResult(**{**fields, **changes})


def test_shares_and_means_of_pairs():
    assert result().metrics() == {
        "reached": 0.75,
        "reached_base": 0.25,
        "excluded_by_bound": 0.25,
        "n_pairs": 4.0,
        "n_states": 3.0,
        "mean_k": pytest.approx(4 / 3),
        "reached_as_text": 0.5,
    }
    assert result().reached().tolist() == [True, True, True, False]


def test_heads_are_excluded_where_no_number_or_more_than_k_max_suffices():
    found = result(head_min_k=torch.tensor([[0, 3], [-1, 4], [2, 1], [3, 100]]))
    excluded = found.head_excluded()
    assert excluded.tolist() == [[False, False], [True, True], [False, False], [False, True]]
    assert found.metrics()["heads_excluded"] == 3 / 8
    assert result().head_excluded() is None
    assert "heads_excluded" not in result().metrics()


def test_the_table_has_ids_in_order_and_texts_where_there_are_some():
    texts = {"prompt_text": ("", "a", "b c", ""), "state_text": ("s", "s", "t", "u")}
    table = result(labels=texts).table()
    assert table["prompt_ids"] == ["", "0", "4 0 7", ""]
    assert table["prompt"] == ["", "a", "b c", ""]
    assert table["state"] == ["s", "s", "t", "u"]
    assert table["target"] == [""] * 4
    assert table["k"] == [0, 1, 3, -1]
    assert table["rank_without"] == [0, 3, 9, 2]
    assert table["loss_with"] == [0.5, 1.0, 0.25, 2.5]
    assert table["loss_without"] == [0.5, 2.0, 4.0, 3.0]
    assert table["reached_as_text"] == [True, True, False, False]
    assert table["excluded_by_bound"] == [False, False, False, True]


def test_controls_side_by_side():
    prompts = [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.long), torch.tensor([0, 2, 4])]
    assert padded_prompts(prompts, 3).tolist() == [[3, 1, -1], [-1, -1, -1], [0, 2, 4]]


def test_only_gradient_stages_and_shortlists_need_gradients():
    needs = {
        (method, k, short): ReachabilityConfig(
            method=method, k_max=k, shortlist=short
        ).needs_gradients()
        for method in ("back-off", "greedy", "gradient")
        for k in (3, 4)
        for short in (None, 8)
    }
    without = {("back-off", 3, None), ("greedy", 3, None), ("greedy", 4, None)}
    assert {key for key, needed in needs.items() if not needed} == without
    assert ReachabilityConfig(state_min=5, state_max=5).state_max == 5


# The base and the shortest control, on a model whose logits are known


def test_ranks_and_losses_without_and_with_a_control():
    model = bag(9, 3)
    rows = tuple({"state": [1, 2], "target": target} for target in range(9))
    config = ReachabilityConfig(method="brute-force", k_max=1)
    found = measure_reachability(model, torch.tensor([[1, 2]] * 9), config, Context(rows=rows))
    plain = model.effect[[1, 2]].sum(dim=0)
    moved = plain + model.effect  # one token in front
    torch.testing.assert_close(found.base_loss, -plain.log_softmax(-1))
    assert found.base_rank.tolist() == [int((plain > plain[t]).sum()) for t in range(9)]
    losses = -moved.log_softmax(dim=-1)
    for target in range(9):
        wins = (moved.argmax(dim=-1) == target).nonzero().flatten()
        if int(plain.argmax()) == target:
            assert found.k[target] == 0
            assert found.best_loss[target].item() == pytest.approx(found.base_loss[target].item())
        elif len(wins):
            assert found.k[target] == 1
            assert found.prompts[target, 0] == wins[losses[wins, target].argmin()]
            assert found.best_loss[target].item() == pytest.approx(
                float(losses[wins, target].min()), rel=1e-5
            )
        else:
            assert found.k[target] == -1
            # The best that was seen, with or without a control.
            least = min(float(losses[:, target].min()), float(found.base_loss[target]))
            assert found.best_loss[target].item() == pytest.approx(least, rel=1e-5)
    assert {-1, 0, 1} == set(found.k.tolist())


def test_equal_logits_count_against_the_target():
    effect = torch.zeros(4, 4)
    effect[:, 1:3] = 1.0
    rows = tuple({"state": [0], "target": target} for target in range(4))
    found = measure_reachability(
        BagModel(effect),
        torch.zeros(4, 1, dtype=torch.long),
        ReachabilityConfig(method="greedy", k_max=1),
        Context(rows=rows),
    )
    assert found.base_rank.tolist() == [3, 1, 1, 3]


def test_top_targets_are_no_more_than_the_vocabulary():
    found = measure_reachability(
        bag(6),
        torch.tensor([[1, 2, 3]]),
        ReachabilityConfig(method="greedy", k_max=1, targets="top-75", state_min=3),
        Context(),
    )
    order = bag(6).effect[[1, 2, 3]].sum(dim=0).argsort(descending=True)
    assert found.target_id.tolist() == order.tolist()


# The edges of what is accepted


def test_brute_force_may_try_just_so_many_controls(monkeypatch):
    rows, state = ({"state": [1], "target": 2},), torch.tensor([[1]])
    config = ReachabilityConfig(method="brute-force", k_max=2)
    monkeypatch.setattr("probes.reachability.MOST_ENUMERATED", 36)
    assert measure_reachability(bag(6), state, config, Context(rows=rows)).k.shape == (1,)
    with pytest.raises(ConfigError, match="7 tokens to the power of k_max = 2"):
        measure_reachability(bag(7), state, config, Context(rows=rows))
    greedy = ReachabilityConfig(method="greedy", k_max=2)
    assert measure_reachability(bag(7), state, greedy, Context(rows=rows)).k.shape == (1,)


def test_the_last_id_of_the_vocabulary_may_be_bos_or_a_target():
    rows, state = ({"state": [5, 1], "target": 5},), torch.tensor([[5, 1]])
    config = ReachabilityConfig(method="greedy", k_max=1, bos_id=5)
    found = measure_reachability(bag(6), state, config, Context(rows=rows))
    assert (found.target_id.tolist(), found.state_length.tolist()) == ([5], [1])
    with pytest.raises(ConfigError, match="bos_id must be below 6"):
        measure_reachability(
            bag(6), state, dataclasses.replace(config, bos_id=6), Context(rows=rows)
        )
    spec = bag(6).spec
    assert ground_truth_pairs(spec, [0, 0], [0, 5]) == [(0, 0), (0, 5)]
    for target in (-1, 6):
        with pytest.raises(DataError, match="0 to 5"):
            ground_truth_pairs(spec, [0], [target])


def test_a_state_may_fill_what_the_control_leaves():
    config = ReachabilityConfig(k_max=3)
    for length, fits in ((5, True), (6, False)):
        tokens = torch.ones(1, length, dtype=torch.long)
        context = Context(rows=({"state": [1] * length, "target": 0},))
        if fits:
            (state,), _, _ = read_states(bag(6, n_ctx=8), tokens, config, context)
            assert len(state.tokens) == 5
        else:
            with pytest.raises(DataError, match="n_ctx = 8"):
                read_states(bag(6, n_ctx=8), tokens, config, context)


@pytest.mark.parametrize(("targets", "needed"), [("ground-truth", 5), ("uniform", 4)])
def test_a_prompt_must_have_the_shortest_state_and_its_truth(targets, needed):
    config = ReachabilityConfig(state_min=4, targets=targets, k_max=1)
    tokens = torch.arange(needed)[None]
    (state,), _, (truth,) = read_states(bag(6), tokens, config, Context())
    assert state.tokens.tolist() == [0, 1, 2, 3]
    assert truth == (4 if targets == "ground-truth" else None)
    with pytest.raises(DataError, match=f"at least {needed} tokens.*has {needed - 1}"):
        read_states(bag(6), tokens[:, 1:], config, Context())


def test_states_are_as_long_as_the_prompt_or_state_max_allows():
    config = ReachabilityConfig(state_min=2, state_max=4, targets="uniform", k_max=1)
    tokens = torch.arange(5).repeat(60, 1)
    states, which, _ = read_states(bag(6), tokens, config, Context())
    assert sorted(len(state.tokens) for state in states) == [2, 3, 4]
    assert sorted(set(which)) == [0, 1, 2]  # each state once
    short, _, _ = read_states(bag(6), tokens[:, :3], config, Context())
    assert sorted(len(state.tokens) for state in short) == [2, 3]


def test_a_state_behind_bos_is_another_than_without():
    config = ReachabilityConfig(bos_id=0, k_max=1)
    rows = ({"state": [0, 1], "target": 2}, {"state": [1], "target": 2})
    tokens, mask = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1, 1], [1, 0]])
    states, which, truths = read_states(
        bag(6), tokens, config, Context(rows=rows, attention_mask=mask)
    )
    assert [(s.bos.tolist(), s.tokens.tolist()) for s in states] == [([0], [1]), ([], [1])]
    assert (which, truths) == ([0, 1], [2, 2])
    with pytest.raises(DataError, match="at least one token besides BOS; that of row 0"):
        read_states(bag(6), tokens[:1, :1], config, Context(rows=({"state": [0], "target": 2},)))
    with pytest.raises(DataError, match="row 0 has bool"):
        read_states(bag(6), tokens[1:, :1], config, Context(rows=({"state": [1], "target": True},)))


def test_uniform_targets_may_be_all_tokens_and_no_more():
    config = ReachabilityConfig(targets="uniform", targets_per_state=6)
    pairs = uniform_pairs(2, 6, config, Context())
    assert [state for state, _ in pairs] == [0] * 6 + [1] * 6
    for state in range(2):
        assert sorted(target for s, target in pairs if s == state) == [*range(6)]
    assert pairs[:6] != pairs[6:]  # drawn for each anew
    with pytest.raises(ConfigError, match="at most 5"):
        uniform_pairs(2, 5, config, Context())


def test_ids_that_have_a_text_are_those_of_the_smaller_of_model_and_tokenizer():
    model = bag(6)
    assert n_usable_tokens(model) == 6
    for known, expected in ((4, 4), (9, 6)):
        model.tokenizer = range(known)
        assert n_usable_tokens(model) == expected


def test_rows_of_a_state_are_bos_control_state():
    state = State(torch.tensor([9]), torch.tensor([1, 2]), 0)
    assert state.rows(torch.tensor([[5, 6], [7, 8]])).tolist() == [[9, 5, 6, 1, 2], [9, 7, 8, 1, 2]]


def test_random_numbers_of_a_pair_depend_on_nothing_but_itself():
    def first(bos=(0,), body=(1, 2), target=3, index=0, seed=0, k=4):
        state = State(torch.tensor(bos, dtype=torch.long), torch.tensor(body), index)
        return Problem(state, target, index).generator(seed, k).initial_seed()

    assert first() == first(index=5)
    others = [first(bos=()), first(body=(1, 3)), first(target=4), first(seed=1), first(k=6)]
    assert len({first(), *others}) == 6
