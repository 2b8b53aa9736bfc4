"""What an attack says while it runs, and how problems become batches, counted by hand."""

import dataclasses

import pytest
import torch

from probes.activation_attacks_bench import (
    N_STATES,
    Cell,
    Problem,
    ask,
    logits_of_group,
    make_bench,
    problems_at_once,
    similar_lengths,
    verify,
)
from probes.activation_attacks_campaign import Standing
from probes.activation_attacks_optimise import NO_TARGET, Reached, project
from tests.probes.attacked_models import MODELS, bench_of
from workbench.models.memory import gradient_bytes, prefix_bytes

# The line that says where a search stands


def test_the_line_names_solved_ended_loss_and_time_left(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("probes.activation_attacks_campaign.time.monotonic", lambda: now[0])
    told = []
    standing = Standing(told.append, 4)
    standing.begin("activations", 0, 3)  # three tries of four seeds
    now[0] = 11.0
    standing.passed(2.5)
    assert told == ["activations: 0 of 0 solved, best loss 2.5 nats, time left not known yet"]
    now[0] = 11.25
    standing.passed(1.5)
    assert len(told) == 1
    now[0] = 11.5
    standing.passed(3.0)
    assert told[1] == "activations: 0 of 0 solved, best loss 1.5 nats, time left not known yet"
    now[0] = 12.0
    standing.ended(0.125, solved=True)
    assert told[2] == "activations: 1 of 1 solved, best loss 0.125 nats, about 22 s left"
    now[0] = 14.0
    standing.ended(0.5, solved=False)
    assert told[3] == "activations: 1 of 2 solved, best loss 0.125 nats, about 20 s left"
    # The next round of the same search goes on counting, with a loss of its own.
    standing.begin("activations", 3, 5)
    standing.ended(4.0, solved=False)
    assert told[4].startswith("activations: 1 of 3 solved, best loss 4 nats, about 23 s")
    now[0] = 20.0
    standing.begin("tokens", 0, 1)
    now[0] = 26.0
    for n_left in (18, 6, 2, 0, 0):
        standing.ended(1.0, solved=False)
        assert told[-1].endswith(f"about {n_left} s left")
    assert told[-1].startswith("tokens: 0 of 5 solved")


# Groups, budgets and what is asked


def problem(positions, n_target, row=0, share=1.0):
    return Problem(Cell(positions, share), n_target, row)


def test_targets_within_a_factor_of_two_are_searched_together():
    problems = [problem((0,), t) for t in (1, 2, 3, 4, 5, 8, 9, 16, 17)]
    groups = [[p.n_target for p in group] for group in similar_lengths(problems)]
    assert groups == [[17], [16, 9], [8, 5], [4, 3], [2], [1]]


def test_as_many_problems_as_the_budget_allows(caplog):
    bench = bench_of(MODELS["gpt2"]())
    spec, group = bench.model.spec, [problem((2, 5), 3), problem((6,), 5, 1)]
    # From position 2 to the last context token and four tokens of the longest target.
    one = gradient_bytes(spec, 8 - 2 + 4, 5, 2) + N_STATES * 4 * 2 * spec.d_model
    kept = 3 * prefix_bytes(spec, 2)
    for budget, expected in ((kept + one, 1), (kept + 3 * one - 1, 2), (kept + 3 * one, 3)):
        at_most = dataclasses.replace(bench, budget_bytes=budget, at_most=9)
        assert problems_at_once(at_most, group) == expected
    roomy = dataclasses.replace(bench, budget_bytes=kept + 9 * one)
    assert problems_at_once(roomy, group) == 2  # no more than there are
    assert problems_at_once(dataclasses.replace(roomy, at_most=1), group) == 1
    assert not caplog.records
    tight = dataclasses.replace(bench, budget_bytes=kept + one - 1)
    assert problems_at_once(tight, group) == 1
    assert "an attack on 5 tokens" in caplog.text


def test_a_group_is_asked_for_its_own_targets_and_dimensions():
    bench = bench_of(MODELS["gpt2"]())
    half = (torch.arange(32) < 16).float()
    bench = dataclasses.replace(bench, masks={1.0: torch.ones(32), 0.5: half})
    group = [problem((2, 5), 3, 1), problem((6,), 5, 2, share=0.5)]
    asked = ask(bench, group)
    targets = bench.cases.targets
    assert asked.targets[0].tolist() == [*targets[1, :3].tolist(), NO_TARGET, NO_TARGET]
    assert asked.targets[1].tolist() == targets[2, :5].tolist()
    assert asked.free[0].eq(1.0).all()
    assert torch.equal(asked.free[1], torch.stack([half, torch.zeros(32)]))


@pytest.mark.parametrize("family", ["gpt2", "mamba"], ids=["behind a prefix", "whole"])
def test_logits_of_a_group_are_those_of_each_problem_in_a_whole_pass(family):
    bench = bench_of(MODELS[family](), layer=1)
    group = [problem((3, 5), 3, 1), problem((6,), 4, 2), problem((4, 7), 4, 0)]
    change = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    change[1, 1] = 0.0  # it has one position only
    logits_of = logits_of_group(bench, group)
    for slots in ([0, 1, 2], [2, 0], [1]):
        found = logits_of(change[slots], torch.tensor(slots))
        assert found.shape[1] == 4
        for row, index in enumerate(slots):
            one = group[index]
            whole = bench.resid[one.row].clone()
            for place, pos in enumerate(one.cell.positions):
                whole[pos] += change[index, place]
            with torch.no_grad():
                expected = bench.model.continue_from(1, whole[None, : 8 + 3], last=4)[0]
            torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-3)


def test_an_outcome_is_the_argmax_only_where_every_token_is():
    bench = bench_of(MODELS["gpt2"]())
    # The first target token is what the model says anyway, the second is not.
    context = bench.cases.contexts[:1]
    first = int(bench.model.logits(context, last=1)[0, -1].argmax())
    second = bench.model.logits(torch.cat([context, torch.tensor([[first]])], dim=1), last=1)[0, -1]
    cases = dataclasses.replace(
        bench.cases, targets=torch.tensor([[first, int(second.argmin())]]), contexts=context
    )
    bench = make_bench(bench.model, 0, cases, bench.masks)
    nothing = Reached(torch.zeros(1, 32), 0, 0.0, 7)
    whole = verify(bench, problem((3,), 2), nothing)
    assert (whole.n_correct, whole.is_argmax, whole.n_steps) == (1, False, 7)
    alone = verify(bench, problem((3,), 1), nothing)
    assert (alone.n_correct, alone.is_argmax, alone.norm_ratio) == (1, True, 0.0)


def test_projections_are_the_nearest_within_the_bound():
    x = torch.tensor([[3.0, 4.0], [0.3, -0.4]])
    torch.testing.assert_close(project(x, "l2", 1.0), torch.tensor([[0.6, 0.8], [0.3, -0.4]]))
    torch.testing.assert_close(project(x, "linf", 3.5), torch.tensor([[3.0, 3.5], [0.3, -0.4]]))
    torch.testing.assert_close(project(-x, "linf", 0.35).abs().amax(dim=1), torch.full((2,), 0.35))
    assert project(x, "l2", None) is x
