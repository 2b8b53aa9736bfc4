"""Searches against brute force on a bag of tokens, whose reachable sets are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.reachability import ReachabilityConfig, measure_reachability
from probes.reachability_problems import Problem, State
from probes.reachability_results import ReachabilityConfig as Config
from probes.reachability_search import Attempt, Walk, best_attempt, propose
from tests.probes.bag_model import BagModel, bag, reachable
from workbench.context import Context
from workbench.errors import EngineError

NO_BOS = torch.zeros(0, dtype=torch.long)


def every_pair(model, states):
    return Context(
        rows=tuple(
            {"state": list(state), "target": target}
            for state in states
            for target in range(model.spec.d_vocab)
        )
    ), torch.tensor([state for state in states for _ in range(model.spec.d_vocab)])


def run(model, states, config, **changes):
    context, tokens = every_pair(model, states)
    context = Context(rows=context.rows, **changes)
    return measure_reachability(model, tokens, config, context)


def reached_sets(result, states):
    n = len(result.k) // len(states)
    return [
        {target for target in range(n) if result.k[i * n + target] >= 0} for i in range(len(states))
    ]


STATES = [(0, 1, 2), (3, 3, 1)]


# Against brute force


@pytest.mark.parametrize("seed", range(4))
def test_brute_force_is_exact(seed):
    model = bag(7, seed)
    result = run(model, STATES, ReachabilityConfig(method="brute-force", k_max=2))
    for state, found in zip(STATES, reached_sets(result, STATES), strict=True):
        assert found == set().union(*(reachable(model, state, k) for k in range(3)))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_with_one_token_equals_brute_force(seed):
    model = bag(12, seed)
    result = run(model, STATES, ReachabilityConfig(method="greedy", k_max=1))
    for state, found in zip(STATES, reached_sets(result, STATES), strict=True):
        assert found == reachable(model, state, 0) | reachable(model, state, 1)


def test_back_off_stays_inside_the_reachable_set_and_finds_most_of_it():
    found = possible = 0
    for seed in range(8):
        model = bag(12, seed)
        result = run(model, STATES, ReachabilityConfig(k_max=2))
        for state, reached in zip(STATES, reached_sets(result, STATES), strict=True):
            exact = set().union(*(reachable(model, state, k) for k in range(3)))
            assert reached <= exact
            found, possible = found + len(reached), possible + len(exact)
    assert found >= 0.8 * possible


SLOW = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SLOW) for seed in (1, 2, 3))])
def test_gradient_search_with_all_candidates_finds_all(seed):
    model = bag(12, seed)
    config = ReachabilityConfig(method="gradient", k_max=2, candidates=12, batch=1000)
    result = run(model, STATES, config)
    for state, found in zip(STATES, reached_sets(result, STATES), strict=True):
        assert found == set().union(*(reachable(model, state, k) for k in range(3)))


def test_a_model_that_ignores_its_input_reaches_its_own_choice_only():
    model = BagModel(torch.tensor([0.0, 3.0, 1.0, 2.0]).repeat(4, 1))
    result = run(model, [(0, 1)], ReachabilityConfig(k_max=4, iterations=3, batch=8))
    assert result.k.tolist() == [-1, 0, -1, -1]
    assert result.metrics()["reached"] == 0.25


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_every_control_does_what_it_says_and_no_shorter_one_was_skipped(seed):
    model = bag(6, seed)
    result = run(model, STATES[:1], ReachabilityConfig(method="brute-force", k_max=2))
    for target, k, prompt in zip(result.target_id, result.k, result.prompts, strict=True):
        assert (prompt >= 0).sum() == max(int(k), 0)
        if k >= 0:
            control = prompt[: int(k)].tolist()
            assert int(sum(model.effect[[*control, *STATES[0]]]).argmax()) == target
            assert all(int(target) not in reachable(model, STATES[0], j) for j in range(int(k)))
    assert (result.epsilon.diff() <= 0).all()


# k = 0, ties, BOS


def test_a_target_that_is_the_argmax_needs_no_control():
    effect = torch.zeros(3, 3)
    effect[1, 2] = 5.0
    result = run(BagModel(effect), [(1,)], ReachabilityConfig(k_max=1, method="greedy"))
    assert result.k.tolist()[2] == 0
    assert result.metrics()["reached_base"] == pytest.approx(1 / 3)
    assert result.base_rank.tolist()[2] == 0


def test_a_tied_target_is_not_reached():
    effect = torch.zeros(3, 3)
    effect[:, :2] = 1.0
    result = run(BagModel(effect), [(2,)], ReachabilityConfig(k_max=2, method="brute-force"))
    assert result.k.tolist() == [-1, -1, -1]
    assert result.base_rank.tolist() == [1, 1, 2]


def test_mean_k_is_left_out_when_nothing_is_reached():
    model = BagModel(torch.ones(3, 3))
    metrics = run(model, [(2,)], ReachabilityConfig(k_max=1, method="greedy")).metrics()
    assert "mean_k" not in metrics
    assert metrics["reached"] == 0.0


def test_the_control_stands_between_bos_and_state():
    model = bag(8)
    config = ReachabilityConfig(k_max=2, method="greedy", bos_id=7)
    rows = ({"state": [7, 1, 2], "target": 0}, {"state": [7, 1, 2], "target": 3})
    context = Context(rows=rows)
    result = measure_reachability(model, torch.tensor([[7, 1, 2]] * 2), config, context)
    assert all(row[0] == 7 and row[-2:] == [1, 2] for row in model.rows)
    assert {len(row) for row in model.rows} >= {3, 4}
    assert result.state_length.tolist() == [2, 2]


def test_a_first_token_that_is_no_bos_belongs_to_the_state():
    model = bag(8)
    run(model, [(3, 1)], ReachabilityConfig(k_max=1, method="greedy", bos_id=7))
    longest = [row for row in model.rows if len(row) == 3]
    assert {row[0] for row in longest} == set(range(8))


# Parts of the search


def test_proposals_change_one_token_each_and_none_comes_twice():
    current = torch.tensor([4, 5, 6])
    scores = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    config = Config(candidates=6, batch=10)
    found = propose(current, scores, config, torch.Generator().manual_seed(1))
    assert 8 <= len(found) <= 10
    assert ((found != current).sum(dim=1) == 1).all()
    assert len(found.unique(dim=0)) == len(found)
    best = scores.topk(6, largest=False).indices
    for row in found:
        place = int((row != current).nonzero())
        assert row[place] in best[place]


def test_all_swaps_are_proposed_where_the_batch_has_room():
    scores = torch.arange(5.0).repeat(2, 1)
    config = Config(candidates=5, batch=100)
    found = propose(torch.tensor([0, 0]), scores, config, torch.Generator())
    expected = {(t, 0) for t in range(1, 5)} | {(0, t) for t in range(1, 5)}
    assert set(map(tuple, found.tolist())) == expected


def test_a_walk_scores_no_control_twice_and_starts_again_when_it_has_seen_all():
    problem = Problem(State(NO_BOS, torch.tensor([1]), 0), 0, 0)
    walk = Walk(problem, torch.tensor([0]), torch.Generator().manual_seed(0), 3)
    all_three = torch.tensor([[0], [1], [1], [2]])
    fresh = walk.fresh(all_three)
    assert fresh.tolist() == [[0], [1], [2]]
    walk.seen = torch.cat([walk.seen, *(_hash(row) for row in fresh)])
    assert walk.fresh(all_three).shape == (1, 1)


def _hash(row):
    from probes.reachability_search import _hashes

    return _hashes(row[None])


def test_the_best_control_ever_is_kept_when_the_walk_gets_worse():
    problem = Problem(State(NO_BOS, torch.tensor([1]), 0), 0, 0)
    walk = Walk(problem, torch.tensor([0]), torch.Generator(), 9)
    from probes.reachability_scoring import Scores

    nobody = torch.tensor([5])
    walk.update(torch.tensor([[3]]), Scores(torch.tensor([1.0]), nobody))
    walk.update(torch.tensor([[4]]), Scores(torch.tensor([2.0]), nobody))
    assert walk.current.tolist() == [4]
    assert walk.best.prompt.tolist() == [3]


def test_success_is_taken_before_a_lower_loss():
    controls, loss = torch.tensor([[1], [2], [3]]), torch.tensor([0.5, 0.9, 0.8])
    winner = torch.tensor([9, 4, 4])
    assert best_attempt(controls, loss, winner, 4) == Attempt(controls[2], loss[2].item(), True)


def test_shortlisted_tokens_are_those_with_the_best_gradient():
    model = bag(12, 3)
    config = ReachabilityConfig(method="greedy", k_max=1, shortlist=3)
    few, whole = run(model, STATES, config), run(model, STATES, Config(method="greedy", k_max=1))
    assert (few.k[few.k > 0] == whole.k[few.k > 0]).all()
    assert 0 < few.reached().sum() <= whole.reached().sum()


# Batches, memory, order


def settings_of_all_methods():
    return [
        ReachabilityConfig(k_max=4, iterations=4, batch=10, candidates=5),
        ReachabilityConfig(k_max=2, method="gradient", iterations=4, batch=10),
        ReachabilityConfig(k_max=3, method="greedy"),
    ]


@pytest.mark.parametrize(
    "config", settings_of_all_methods(), ids=["back-off", "gradient", "greedy"]
)
def test_rows_at_once_do_not_change_what_is_found(config):
    states = [(0, 1, 2), (3, 3, 1), (5, 5, 5)]
    whole, tight = bag(10, 1), bag(10, 1)
    expected = run(whole, states, config)
    found = run(tight, states, config, batch_size=3)
    assert max(tight.passes) <= 3 < max(whole.passes)
    assert torch.equal(found.k, expected.k)
    assert torch.equal(found.prompts, expected.prompts)


def test_pairs_do_not_depend_on_their_neighbours():
    config = settings_of_all_methods()[0]
    whole = run(bag(10, 1), STATES, config)
    alone = run(bag(10, 1), STATES[1:], config)
    assert torch.equal(whole.prompts[10:], alone.prompts)
    backwards = run(bag(10, 1), STATES[::-1], config)
    assert torch.equal(backwards.prompts, whole.prompts.roll(10, 0))


def test_out_of_memory_halves_the_rows_and_changes_nothing():
    config = ReachabilityConfig(k_max=2, method="brute-force")
    small, large = bag(8, most_rows=5), bag(8)
    found, expected = run(small, STATES, config), run(large, STATES, config)
    assert torch.equal(found.prompts, expected.prompts)
    assert max(small.passes) <= 5 < max(large.passes)


def test_infinite_losses_are_an_error():
    model = BagModel(torch.full((3, 3), torch.nan))
    with pytest.raises(EngineError, match="must be finite"):
        run(model, [(1,)], ReachabilityConfig(k_max=1, method="greedy"))


def test_targets_of_one_state_share_the_sweep():
    model = bag(12)
    run(model, STATES[:1], ReachabilityConfig(method="greedy", k_max=1))
    # One row for k = 0, and the vocabulary once for all 12 targets.
    assert len(model.rows) == 1 + 12
