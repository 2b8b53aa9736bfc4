"""What a search keeps when it is killed, and what it tells while it runs."""

import itertools

import pytest
import torch

import workbench as wb
from probes.reachability import ReachabilityConfig
from probes.reachability_problems import Problem, State
from probes.reachability_scoring import Scorer
from probes.reachability_search import Attempt, Walk
from probes.reachability_stages import IN_WORK, Meter, Notes, Search
from tests.probes.bag_model import bag
from tests.probes.test_reachability_search import STATES, run
from tests.zoo import tiny_model
from workbench.context import Context


class KilledError(Exception):
    pass


def keeping(kept, most):
    """A store in memory that is killed when it has kept so many pieces."""

    def keep(name, compute):
        if name in kept:
            return kept[name]
        part = compute()
        if len(kept) >= most:
            raise KilledError
        kept[name] = part
        return part

    return keep


@pytest.mark.parametrize("together", [1, 100])
def test_a_killed_search_goes_on_where_it_was(together):
    config = ReachabilityConfig(k_max=5, iterations=5, batch=20, candidates=10)
    memory = {"batch_size": 20 * together}
    whole = bag(10, 1)
    expected = run(whole, STATES, config, **memory)
    for most in (1, 4, 8, 12):
        kept, again = {}, bag(10, 1)
        with pytest.raises(KilledError):
            run(bag(10, 1), STATES, config, keep=keeping(kept, most), **memory)
        found = run(again, STATES, config, keep=keeping(kept, 10_000), **memory)
        assert torch.equal(found.prompts, expected.prompts)
        assert len(again.rows) < len(whole.rows)


def test_every_solved_pair_is_kept_before_the_next_is_begun():
    config = ReachabilityConfig(k_max=2, method="gradient", iterations=6, batch=10)
    kept, finished = {}, []
    model = bag(10, 1)

    def keep(name, compute):
        if name in kept:
            return kept[name]
        kept[name] = compute()
        finished.append((name, len(model.passes)))
        return kept[name]

    run(model, STATES, config, keep=keep, batch_size=10)
    at = [passes for name, passes in finished if name.startswith("k1-pair")]
    assert len(at) > 5
    assert len(set(at)) == len(at)  # one problem a pass, each kept before the next forward pass


def test_status_names_loss_solved_count_and_time_left(monkeypatch):
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr("probes.reachability_stages.time.monotonic", lambda: next(clock))
    told, progress = [], []
    config = ReachabilityConfig(k_max=4, iterations=4, batch=10, candidates=5)
    run(
        bag(10, 1),
        STATES,
        config,
        status=told.append,
        progress=lambda *at: progress.append(at),
    )
    assert any("best loss" in line and "of 20 solved" in line and "left" in line for line in told)
    assert any("step" in line for line in told)
    done = [at for at, _ in progress]
    assert done == sorted(done)
    assert progress[-1][0] == progress[-1][1]


def test_a_run_that_is_killed_goes_on_from_its_store(tmp_path):
    rows = [{"state": [5 + i, 6, 7], "target": 20 + i} for i in range(3)]
    settings = {"k_max": 4, "iterations": 3, "batch": 16, "candidates": 8, "batch_size": 16}
    whole = counting(wb.wrap(tiny_model("llama")))
    expected = wb.run("reachability", whole, rows, **settings)
    broken = counting(wb.wrap(tiny_model("llama")), most=2 * whole.n_calls // 3)
    with pytest.raises(KeyboardInterrupt):
        wb.run("reachability", broken, rows, store=tmp_path, **settings)
    again = counting(wb.wrap(tiny_model("llama")))
    found = wb.run("reachability", again, rows, store=tmp_path, **settings)
    assert torch.equal(found.prompts, expected.prompts)
    assert again.n_calls < whole.n_calls / 2


def counting(model, most=10**9):
    """A model that counts its scoring passes and is killed at one too many."""
    model.n_calls = 0

    def counted(run):
        def call(*args, **options):
            model.n_calls += 1
            if model.n_calls > most:
                raise KeyboardInterrupt
            return run(*args, **options)

        return call

    model.logits, model.continue_from = counted(model.logits), counted(model.continue_from)
    return model


# Parts of it, by hand


class Clock:
    """A clock that is set."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("probes.reachability_stages.time.monotonic", clock)
    return clock


def attempt(loss, solved=False):
    return Attempt(torch.tensor([1]), loss, solved)


def test_a_meter_says_loss_count_and_time_left(clock):
    told, done = [], []
    meter = Meter(Context(status=told.append, progress=lambda *at: done.append(at)), 3, 5)
    meter.begin(0, 1, "greedy", 1)
    # One pair has all its three lengths behind it.
    assert done == [(3, 15)]
    clock.now = 100.4
    meter.advance(attempt(2.0, solved=True))
    assert told == []  # not yet half a second
    assert done[-1] == (2 * 3 + 1, 15)
    clock.now = 100.5
    meter.tell("step 1 of 4", 3.0)
    # Three open pairs with three lengths, one of which is done: eight times half a second.
    assert told == ["k = 1, greedy; step 1 of 4; best loss 2; 2 of 5 solved; 4 s left"]
    meter.tell("", 0.5)
    assert len(told) == 1  # at once again: nothing
    clock.now = 101.0
    meter.tell("", 1.0)
    assert told[1] == "k = 1, greedy; best loss 0.5; 2 of 5 solved; 8 s left"
    for _ in range(3):
        meter.advance(attempt(9.0))
    assert done[-3:] == [(8, 15), (9, 15), (9, 15)]  # no more than the open pairs
    clock.now = 200.0
    meter.begin(1, 2, "gradient", 2)
    assert done[-1] == (2 * 3 + 3 * 1, 15)
    meter.tell("", 7.0)
    # A length forgets the loss of the one before, and how long a pair takes is not known yet.
    assert told[-1] == "k = 2, gradient; best loss 7; 2 of 5 solved"
    clock.now = 250.0
    meter.advance(attempt(8.0))
    assert told[-1].endswith("best loss 7; 2 of 5 solved; at most 4 min left")  # 5 times 50 s
    meter.finish(4)
    assert done[-1] == (4 * 3 + 1 * 3, 15)


def test_minutes_begin_behind_a_minute_and_a_half(clock):
    told = []
    meter = Meter(Context(status=told.append), 2, 1)
    meter.begin(0, 1, "greedy", 0)
    clock.now = 190.0
    meter.advance(attempt(1.0))
    assert told[-1].endswith("; 90 s left")
    clock.now = 191.0
    meter.tell("", 1.0)
    assert told[-1].endswith("; at most 2 min left")
    meter.advance(attempt(1.0))
    clock.now = 192.0
    meter.advance(attempt(1.0))
    assert told[-1].endswith("; 0 s left")  # never less than nothing


class Drafts:
    """Notes in memory."""

    def __init__(self):
        self.notes = []

    def read_draft(self, name):
        return None

    def write_draft(self, name, part):
        self.notes.append((name, part))


def walks_of(n):
    state = State(torch.zeros(0, dtype=torch.long), torch.tensor([1]), 0)
    walks = [
        Walk(Problem(state, 2, 7 + i), torch.tensor([i]), torch.Generator(), 9) for i in range(n)
    ]
    for walk in walks:
        walk.best = attempt(1.0 + walk.problem.index)
    return walks


def test_notes_are_made_before_more_than_one_walks_steps_would_be_lost():
    drafts = Drafts()
    notes, walks = Notes(Context(drafts=drafts), most=6, k=4), walks_of(2)
    at = []
    for _ in range(7):
        notes.stepped(walks)
        at.append(len(drafts.notes))
    # Two steps a time: after six, two more would be eight of at most six.
    assert at == [0, 0, 1, 1, 1, 2, 2]
    name, part = drafts.notes[0]
    assert name == IN_WORK
    assert {key.split(" ")[0] for key in part} == {"k4-pair-7", "k4-pair-8"}
    assert part["k4-pair-8 current"].tolist() == [1]
    assert part["k4-pair-8 best_loss"].item() == 9.0
    alone = Notes(Context(drafts=drafts), most=6, k=4)
    for _ in range(20):
        alone.stepped(walks[:1])  # a walk alone may be begun anew
    assert len(drafts.notes) == 2


def roomy(rows, gradients):
    """A scorer that has room for so many rows and gradients, and what it was asked for."""
    scorer, asked = Scorer(bag(9), 1 << 20), []
    scorer.rows_at_once = lambda n_pos: asked.append(n_pos) or rows
    scorer.problems_at_once = lambda n_pos: asked.append(n_pos) or gradients
    return scorer, asked


@pytest.mark.parametrize(
    ("rows", "gradients", "iterations", "expected"),
    [
        (1000, 1000, 34, 16),  # the most there are
        (1000, 1000, 4, 5),  # a step of all is no more than the steps of one
        (1000, 3, 34, 3),
        (29, 1000, 34, 2),  # ten proposals each
        (9, 1000, 34, 1),
    ],
)
def test_so_many_are_searched_together(rows, gradients, iterations, expected):
    room, asked = roomy(rows, gradients)
    config = ReachabilityConfig(batch=10, iterations=iterations)
    states = [
        State(torch.tensor([0]), torch.tensor([1, 2]), 0),
        State(torch.zeros(0, dtype=torch.long), torch.tensor([1, 2, 3, 4, 5]), 1),
    ]
    problems = [Problem(state, 3, i) for i, state in enumerate(states)]
    search = Search(room, config, Context(), 9, problems)
    assert search._together(problems, 4) == expected
    assert asked == [5 + 4] * 2  # the longest row of any


def test_a_walk_begins_with_random_tokens_before_the_best_control_so_far():
    state = State(torch.zeros(0, dtype=torch.long), torch.tensor([1]), 0)
    problem = Problem(state, 2, 0)
    search = Search(Scorer(bag(9), 1 << 20), ReachabilityConfig(), Context(seed=3), 9, [problem])
    search.attempts = [[]]
    first = search._walk(problem, 4, {})
    drawn = torch.randint(9, (4,), generator=problem.generator(3, 4))
    assert torch.equal(first.current, drawn)
    search.attempts = [[attempt(1.0), Attempt(torch.tensor([8, 7]), 0.5, False)]]
    second = search._walk(problem, 4, {})
    drawn = torch.randint(9, (2,), generator=problem.generator(3, 4))
    assert second.current.tolist() == [*drawn.tolist(), 8, 7]
    # What was noted is gone on with: its own, not that of pair 10, whose name begins alike.
    noted = {}
    for pair, current in ((0, 5), (10, 6)):
        walk = Walk(Problem(state, 2, pair), torch.tensor([current]), torch.Generator(), 9)
        walk.best, walk.n_steps = attempt(0.25), 2 + pair
        noted |= {f"k4-pair-{pair} {name}": x for name, x in walk.tensors().items()}
    third = search._walk(problem, 4, noted)
    assert (third.current.tolist(), third.n_steps, third.best.loss) == ([5], 2, 0.25)
    other = search._walk(problem, 6, noted)
    assert other.n_steps == 0
