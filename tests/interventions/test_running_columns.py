"""ACT over the calls of a generation, in parts and in tiles, against its definition on the whole pattern."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.attention.test_streaming import make_inputs, reference
from tests.interventions.test_act import LOW, defined
from workbench.attention import streaming
from workbench.attention.edits import RowCall, TiledCall
from workbench.attention.shared import Shared
from workbench.attention.streaming import PatternBlock, attend
from workbench.attention.whole import change_pattern, statistics_of_pattern
from workbench.interventions import running_columns
from workbench.interventions.act import ACT
from workbench.interventions.damped_mass import DampedMass
from workbench.models.base import ModelSpec

N_HEADS, N_POS = 3, 12
SPEC = ModelSpec(
    name="made", revision="", family="made", n_layers=1, n_heads=N_HEADS, n_kv_heads=N_HEADS,
    d_model=24, d_head=8, d_mlp=8, d_vocab=10, n_ctx=64,
)  # fmt: skip
RULE = ACT(alpha=LOW, beta=0.2)


def made(n_prompts, n_pos=N_POS, *, window=N_POS, seed=0):
    """Causal patterns, each row over at most ``window`` keys."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(
        n_prompts, N_HEADS, n_pos, n_pos, generator=generator, dtype=torch.float64
    )
    key, query = torch.arange(n_pos), torch.arange(n_pos)[:, None]
    return scores.masked_fill((key > query) | (key <= query - window), -torch.inf).softmax(-1)


def planned(act=RULE):
    (edit,) = act.plan(SPEC)
    return edit


def ruled(pattern, mode="causal", **changes):
    settings = {"alpha": LOW, "beta": 0.2, "mode": mode, **changes}
    return torch.stack([defined(prompt, **settings) for prompt in pattern])


def in_parts(edit, pattern, cuts, *, window=N_POS, by_row=False, first=None, valid=None):
    """Rows edited call by call; each call has the keys that a cache of the window still holds."""
    found = torch.zeros_like(pattern)
    first = torch.zeros(pattern.shape[0], dtype=torch.long) if first is None else first
    for start, stop in pairwise(cuts):
        gone = max(0, start - window + 1)
        part = pattern[:, :, start:stop, gone:stop].clone()
        if by_row and start and stop == start + 1:
            call = RowCall(make_inputs(), start, gone, first - gone, Shared())
            edited = edit.row(call, part, None)
        else:
            places = {"n_before": start, "first_column": gone}
            edited = change_pattern(edit, part, first - gone, None if start else valid, **places)
        found[:, :, start:stop, gone:stop] = edited
    return found


def close(found, wanted, atol=1e-12):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("spare", [0, 2, 128])
@pytest.mark.parametrize("window", [N_POS, 4])
@pytest.mark.parametrize("by_row", [False, True])
def test_calls_of_a_generation_go_on_where_the_one_before_ended(by_row, window, spare, monkeypatch):
    monkeypatch.setattr(running_columns, "SPARE_COLUMNS", spare)
    pattern = made(2, window=window)
    found = in_parts(planned(), pattern, [0, 4, 5, 6, 9, 10, 11, 12], window=window, by_row=by_row)
    close(found, ruled(pattern))
    assert (found - pattern).abs().max() > 0.01


@pytest.mark.parametrize("by_row", [False, True])
def test_a_new_prompt_begins_anew(by_row):
    edit = planned()
    for seed, n_prompts in enumerate([2, 2, 3, 1]):
        pattern = made(n_prompts, seed=seed)
        close(in_parts(edit, pattern, [0, 7, 8, 9, 12], by_row=by_row), ruled(pattern))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("mode", ["causal", "full"])
def test_padding_on_the_left_neither_counts_nor_receives(mode, by_row):
    alone = made(1, 9, seed=1)
    pattern = made(2)
    pattern[1] = 0.0
    pattern[1, :, :3] = 1 / N_POS  # what a kernel leaves in rows of padding is nobody's
    pattern[1, :, 3:, 3:] = alone[0]
    first, valid = torch.tensor([0, 3]), torch.ones(2, 8)
    valid[1, :3] = 0
    edit = planned(replace(RULE, mode=mode))
    found = in_parts(edit, pattern, [0, 8, 9, 10, 12], by_row=by_row, first=first, valid=valid)
    if mode == "full":  # the prompt's rows look ahead, to its end; decoded ones do not
        close(found[:1, :, :8, :8], ruled(pattern[:1, :, :8, :8], "full"))
        close(found[1:, :, 3:8, 3:8], ruled(alone[:, :, :5, :5], "full"))
    start = 8 if mode == "full" else 0
    close(found[0, :, start:], ruled(pattern[:1])[0, :, start:])
    start = 8 if mode == "full" else 3
    close(found[1, :, start:, 3:], ruled(alone)[0, :, start - 3 :])


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("by_row", [False, True])
def test_the_second_token_after_a_prompt_of_one_by_hand(by_row, mode):
    # Key 0 has received (1 + 0.45) / 2 = 0.725 a row, above 1.2 / 2; key 1 has 0.55.
    pattern = torch.tensor([[[[1.0, 0.0], [0.45, 0.55]]]], dtype=torch.float64)
    (edit,) = ACT(1.2, 0.5, protect_first=False, mode=mode).plan(replace(SPEC, n_heads=1))
    found = in_parts(edit, pattern, [0, 1, 2], by_row=by_row)
    close(found, torch.tensor([[[[1.0, 0.0], [0.225, 0.775]]]]), 1e-7)


def test_beams_take_their_sums_along():
    pattern, edit = made(2), planned()
    swapped = pattern[[1, 0]]
    in_parts(edit, pattern, [0, 6, 7])
    edit.reorder(torch.tensor([1, 0]))
    for row in range(7, N_POS):
        place = {"n_before": row, "first_column": 0}
        part = swapped[:, :, row : row + 1, : row + 1].clone()
        found = change_pattern(edit, part, torch.zeros(2, dtype=torch.long), **place)
        close(found[:, :, 0], ruled(swapped)[:, :, row, : row + 1])


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("chosen", [(1,), (2, 0), (0, 1, 2)])
def test_heads_that_are_not_chosen_keep_their_bits(chosen, by_row):
    edit, pattern = planned(replace(RULE, heads=tuple((0, head) for head in chosen))), made(2)
    found = in_parts(edit, pattern, [0, 7, 8, 9, 12], by_row=by_row)
    wanted = pattern.clone()
    wanted[:, list(chosen)] = ruled(pattern)[:, list(chosen)]
    close(found, wanted)
    others = [head for head in range(N_HEADS) if head not in chosen]
    assert torch.equal(found[:, others], pattern[:, others])


def in_tiles(edit, pattern, n_prompts, n_rows):
    """Rows edited in tiles of some prompts and rows, as the streaming engine cuts them."""
    batch, found = pattern.shape[0], torch.zeros_like(pattern)
    first = torch.zeros(batch, dtype=torch.long)
    nothing = torch.zeros
    change = edit.begin(TiledCall(0, 0, first, first + N_POS, nothing, nothing))
    for prompt in range(0, batch, n_prompts):
        for row in range(0, N_POS, n_rows):
            prompts, rows = slice(prompt, prompt + n_prompts), slice(row, row + n_rows)
            seen = slice(0, row + n_rows)
            tile = pattern[prompts, :, rows, seen]
            block = PatternBlock(tile, prompts, slice(0, N_HEADS), rows, seen, None)
            found[prompts, :, rows, seen] = change(block)
    return found


@pytest.mark.parametrize("n_rows", [3, 12])
@pytest.mark.parametrize("n_prompts", [1, 2, 4])
def test_tiles_begin_anew_with_their_prompts_alone(n_prompts, n_rows):
    edit = planned()
    for seed in range(2):
        pattern = made(4, seed=seed)
        close(in_tiles(edit, pattern, n_prompts, n_rows), ruled(pattern))


@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("tile_floats", [1, 700, 1 << 20])
def test_the_damped_mass_is_that_of_the_rule(tile_floats, mode, protect, monkeypatch):
    monkeypatch.setattr(streaming, "TILE_FLOATS", tile_floats)
    monkeypatch.setattr(streaming, "MIN_TILE_ROWS", 5)
    inputs = make_inputs(n_q=N_POS, n_k=N_POS)
    act = replace(RULE, mode=mode, protect_first=protect)
    found = attend(inputs, {"mass": DampedMass(act)}, want=()).statistics["mass"]
    close(found, summed(reference(inputs)[0], mode, int(protect)), 1e-5)


def summed(pattern, mode, first_judged):
    """The attention to sinks, key by key and row by row. ``[batch head]``."""
    mass = torch.zeros(pattern.shape[:2], dtype=torch.float64)
    for row in range(N_POS):
        last = N_POS if mode == "full" else row + 1
        for key in range(first_judged, row + 1):
            mean = pattern[:, :, key:last, key].mean(dim=-1)
            mass += torch.where(mean > LOW / last, pattern[:, :, row, key], 0.0)
    return mass


def test_the_damped_mass_leaves_padding_out():
    alone, valid = made(1, 9, seed=1).float(), torch.ones(2, N_POS)
    pattern, valid[1, :3] = made(2).float(), 0
    pattern[1] = 0.0
    pattern[1, :, :3] = 1 / N_POS
    pattern[1, :, 3:, 3:] = alone[0]
    for mode in ("causal", "full"):
        mass = {"mass": DampedMass(replace(RULE, mode=mode))}
        found = statistics_of_pattern(pattern, mass, valid)["mass"]
        close(found[1], statistics_of_pattern(alone, mass)["mass"][0], 1e-5)
        close(found[0], statistics_of_pattern(pattern[:1], mass)["mass"][0], 1e-5)


@pytest.mark.parametrize("mode", ["causal", "full"])
def test_a_last_key_is_judged_by_its_one_row_by_hand(mode):
    # Key 1 has received 0.55 in one row, above 1 / 2.
    pattern = torch.tensor([[[[1.0, 0.0], [0.45, 0.55]]]])
    found = statistics_of_pattern(pattern, {"mass": DampedMass(ACT(1.0, mode=mode))})["mass"]
    close(found, torch.tensor([[0.55]]), 1e-7)


def test_sums_begin_where_a_cache_that_they_have_not_seen_has_let_keys_go():
    part = made(1)[:, :, 6:10, 4:10]
    call = TiledCall(6, 4, torch.tensor([-4]), torch.tensor([10]), lambda *_: part, lambda: part)
    columns = running_columns.RunningColumns()
    columns.open(call)
    block = PatternBlock(part, *(slice(0, size) for size in part.shape), None)
    close(columns.advance(running_columns.Place(call, block), part), part.cumsum(dim=2))
