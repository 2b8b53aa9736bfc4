"""Steps of a search one by one, on a bag of tokens, against controls tried one at a time."""

import pytest
import torch

import probes.reachability_search as searching
from probes.reachability import ReachabilityConfig
from probes.reachability_problems import Problem, State
from probes.reachability_scoring import Scorer, Scores
from probes.reachability_search import (
    Attempt,
    Walk,
    best_attempt,
    enumerate_controls,
    gradient_search,
    greedy_step,
)
from tests.probes.bag_model import bag

NO_BOS = torch.zeros(0, dtype=torch.long)


def scorer_of(model):
    return Scorer(model, 1 << 24)


def loss_of(model, row, target):
    return float(-model.effect[row].sum(dim=0).log_softmax(dim=-1)[target])


def best_of(model, rows, target):
    """(solved, row, loss) of the best row, tried one by one."""
    tried = [
        (int(model.effect[row].sum(dim=0).argmax()) == target, -loss_of(model, row, target), row)
        for row in rows
    ]
    solved, loss, row = max(tried)
    return solved, row, -loss


@pytest.mark.parametrize("at_once", [1 << 16, 7, 64], ids=["at once", "in parts", "one more part"])
def test_every_control_is_tried_once_and_the_best_is_kept(at_once, monkeypatch):
    monkeypatch.setattr(searching, "ENUMERATED_AT_ONCE", at_once)
    model, state = bag(5, 2), State(torch.tensor([4]), torch.tensor([0, 1]), 0)
    found = enumerate_controls(scorer_of(model), state, [0, 3, 4], 2, 4)
    controls = [[a, b] for a in range(4) for b in range(4)]
    assert model.rows == [[4, *control, 0, 1] for control in controls]
    assert max(model.passes) <= at_once
    for target, attempt in zip([0, 3, 4], found, strict=True):
        solved, row, loss = best_of(model, [[4, *u, 0, 1] for u in controls], target)
        assert attempt.solved == solved
        assert attempt.prompt.tolist() == row[1:3]
        assert attempt.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("tail", [[], [2, 5]], ids=["first", "third"])
@pytest.mark.parametrize("bos", [[], [7]], ids=["no BOS", "BOS"])
def test_a_shortlist_has_the_tokens_with_the_best_gradient_where_a_neighbour_stands(tail, bos):
    model, target = bag(12, 4), 3
    state = State(torch.tensor(bos, dtype=torch.long), torch.tensor([1, 6]), 0)
    problem = Problem(state, target, 0)
    captured, run = [], model.capture
    model.capture = lambda tokens, *rest: captured.append(tokens.tolist()) or run(tokens, *rest)
    tails = [torch.tensor(tail, dtype=torch.long)]
    (found,) = greedy_step(scorer_of(model), [problem], tails, 10, shortlist=4)
    stand_in = tail[:1] or [1]
    row = [*bos, *stand_in, *tail, 1, 6]
    assert captured[0] == [row]
    away = model.effect[row].sum(dim=0).softmax(-1)
    away[target] -= 1.0
    slope = model.effect[:10] @ away  # ids from 10 on have no text
    listed = slope.argsort()[:4].tolist()
    rows = [[*bos, token, *tail, 1, 6] for token in listed]
    assert sorted(model.rows) == sorted(rows)
    solved, row, loss = best_of(model, rows, target)
    assert found.prompt.tolist() == row[len(bos) : -2]
    assert (found.solved, found.loss) == (solved, pytest.approx(loss, rel=1e-5))


@pytest.mark.parametrize("shortlist", [None, 10, 11])
def test_without_a_shortlist_or_with_one_of_all_every_token_is_tried(shortlist):
    model = bag(12, 4)
    problems = [
        Problem(State(NO_BOS, torch.tensor([1, 6]), 0), 3, 0),
        Problem(State(torch.tensor([7]), torch.tensor([2]), 1), 5, 1),
    ]
    tails = [torch.tensor([8]), torch.tensor([4, 9])]
    found = greedy_step(scorer_of(model), problems, tails, 10, shortlist)
    for attempt, front, back, target in zip(
        found, ([], [7]), ([8, 1, 6], [4, 9, 2]), (3, 5), strict=True
    ):
        rows = [[*front, token, *back] for token in range(10)]
        solved, row, loss = best_of(model, rows, target)
        assert attempt.prompt[0] == row[len(front)]
        assert (attempt.solved, attempt.loss) == (solved, pytest.approx(loss, rel=1e-5))
    assert len(model.rows) == 20


def test_without_success_the_lowest_loss_is_best():
    controls, nobody = torch.tensor([[1], [2], [3]]), torch.tensor([9, 9, 9])
    found = best_attempt(controls, torch.tensor([0.5, 0.2, 0.8]), nobody, 4)
    assert (found.prompt.tolist(), found.solved) == ([2], False)
    assert found.loss == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ((1.0, False), (0.5, False), 1),
        ((0.5, False), (1.0, False), 0),
        ((0.5, False), (1.0, True), 1),
        ((1.0, True), (0.5, False), 0),
        ((1.0, True), (0.5, True), 1),
        ((0.5, True), (0.5, True), 0),  # the first of equals
    ],
)
def test_the_best_ever_has_succeeded_and_then_the_lowest_loss(first, second, kept):
    problem = Problem(State(NO_BOS, torch.tensor([1]), 0), 4, 0)
    walk = Walk(problem, torch.tensor([0]), torch.Generator(), 9)
    for token, (loss, solved) in enumerate((first, second)):
        winner = torch.tensor([4 if solved else 5])
        walk.update(torch.tensor([[token]]), Scores(torch.tensor([loss]), winner))
        assert walk.current.tolist() == [token]
        assert walk.n_steps == token + 1
    assert walk.best.prompt.tolist() == [kept]
    assert len(walk.seen) == 2


def test_a_walk_ends_with_success_or_behind_its_last_step():
    problem = Problem(State(NO_BOS, torch.tensor([1]), 0), 4, 0)
    walk = Walk(problem, torch.tensor([0]), torch.Generator(), 9)
    assert not walk.ended(0)
    walk.best = Attempt(torch.tensor([0]), 1.0, False)
    walk.n_steps = 3
    assert not walk.ended(3)  # the first step scores what it began with
    assert walk.ended(2)
    walk.best = Attempt(torch.tensor([0]), 1.0, True)
    assert walk.ended(3)


def test_a_noted_walk_goes_on_with_the_same_numbers():
    problem = Problem(State(NO_BOS, torch.tensor([1]), 0), 4, 0)
    walk = Walk(problem, torch.tensor([3, 4]), torch.Generator().manual_seed(5), 9)
    walk.update(torch.tensor([[3, 4]]), Scores(torch.tensor([0.75]), torch.tensor([5])))
    other = Walk(problem, torch.tensor([0, 0]), torch.Generator().manual_seed(1), 9)
    other.go_on(walk.tensors())
    assert other.current.tolist() == [3, 4]
    assert (other.best.loss, other.best.solved, other.n_steps) == (0.75, False, 1)
    assert other.best.prompt.tolist() == [3, 4]
    assert torch.equal(other.seen, walk.seen)
    again = [torch.rand(3, generator=each.generator) for each in (walk, other)]
    assert torch.equal(*again)


def test_seen_controls_are_told_from_others_and_doubles_come_once_in_order():
    problem = Problem(State(NO_BOS, torch.tensor([1]), 0), 4, 0)
    walk = Walk(problem, torch.tensor([0, 0]), torch.Generator().manual_seed(0), 50)
    pairs = torch.cartesian_prod(torch.arange(50), torch.arange(50))
    assert len(walk.fresh(pairs)) == 2500  # no two of them are taken for one
    walk.update(pairs[::2], Scores(torch.ones(1250), torch.zeros(1250, dtype=torch.long)))
    assert torch.equal(walk.fresh(pairs), pairs[1::2])
    doubled = torch.tensor([[7, 2], [3, 1], [7, 2], [9, 9], [3, 1]])
    fresh = Walk(problem, torch.tensor([0, 0]), torch.Generator(), 50).fresh(doubled)
    assert fresh.tolist() == [[7, 2], [3, 1], [9, 9]]
    # All seen: one drawn at random, where the walk then stands.
    again = walk.fresh(pairs[::2])
    drawn = torch.randint(50, (2,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn[None])
    assert torch.equal(walk.current, drawn)


def walks_on(model, states, seed=0):
    return [
        Walk(
            Problem(State(torch.tensor(bos, dtype=torch.long), torch.tensor(body), i), target, i),
            torch.tensor(control),
            torch.Generator().manual_seed(seed + i),
            8,
        )
        for i, (bos, control, body, target) in enumerate(states)
    ]


def test_a_step_is_taken_by_every_walk_that_goes_on_and_told():
    model = bag(10, 3)
    # Two rows of one length whose controls begin at different places, and a longer one.
    states = [([], [0, 1], [2, 3], 9), ([5], [6, 7], [2], 9), ([5], [1, 1], [2, 3, 4], 9)]
    model.effect[:, 9] -= 50.0  # never the argmax, so all steps are taken
    config = ReachabilityConfig(iterations=3, batch=6, candidates=4)
    together, told, steps = walks_on(model, states), [], []
    gradient_search(
        scorer_of(model),
        together,
        config,
        lambda walk: told.append((walk.problem.index, walk.n_steps)),
        lambda going: steps.append(len(going)),
    )
    assert told == [(pair, step) for step in (1, 2, 3, 4) for pair in range(3)]
    assert steps == [3, 3, 3, 0]
    for walk, (bos, control, body, target) in zip(together, states, strict=True):
        (alone,) = walks_on(model, [(bos, control, body, target)], seed=walk.problem.index)
        gradient_search(scorer_of(model), [alone], config, lambda _: None)
        assert torch.equal(alone.best.prompt, walk.best.prompt)
        assert (alone.best.prompt < 8).all()  # ids from 8 on have no text
        row = [*bos, *walk.best.prompt.tolist(), *body]
        assert walk.best.loss == pytest.approx(loss_of(model, row, target), rel=1e-4)
        assert walk.best.loss <= loss_of(model, [*bos, *control, *body], target)


def test_the_first_step_scores_what_the_walk_began_with():
    model = bag(10, 3)
    walks = walks_on(model, [([5], [6, 7], [2], 1)])
    model.rows.clear()
    gradient_search(
        scorer_of(model), walks, ReachabilityConfig(iterations=1, batch=6), lambda _: None
    )
    assert model.rows[0] == [5, 6, 7, 2]
    swaps = model.rows[1:]
    assert all(row[0] == 5 and row[3] == 2 for row in swaps)
    assert all((row[1] != 6) + (row[2] != 7) == 1 for row in swaps)
