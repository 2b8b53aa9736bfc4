"""ACT's races against the search of one head at a time on whole passes."""

import dataclasses

import pytest
import torch

import workbench as wb
from tests.calibration.asked import questions, with_heads
from tests.zoo import padded, random_tokens, tiny_model
from workbench.calibration.effects import (
    Work,
    stock_answers,
)
from workbench.calibration.race import filter_heads
from workbench.calibration.settings import Run
from workbench.evaluation.scoring import Settings, encode_questions, pad_left
from workbench.evaluation.task import find_task, read_questions
from workbench.interventions.act import ACT
from workbench.interventions.damped_mass import DampedMass
from workbench.models.base import Site


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tile_floats", [150, 1 << 20])
def test_a_head_is_touched_exactly_where_act_changes_its_pattern(
    model, mode, side, tile_floats, monkeypatch
):
    # 150: tiles of long prompts hold some of the heads only.
    monkeypatch.setattr("workbench.attention.streaming.TILE_FLOATS", tile_floats)
    tokens, mask = padded(random_tokens(5, 12), [12, 7, 9, 12, 5], side)
    act = ACT(alpha=2.2, beta=0.4, mode=mode)
    site = Site("pattern", 0)
    mass = model.capture(tokens, [site], DampedMass(act), attention_mask=mask)[site]
    stock = model.capture(tokens, [site], attention_mask=mask)[site]
    with model.edit(dataclasses.replace(act, heads=tuple((0, head) for head in range(4)))):
        edited = model.capture(tokens, [site], attention_mask=mask)[site]
    real = mask[:, None, :, None].bool()
    changed = ((edited - stock).abs() * real).amax(dim=(-1, -2)) > 1e-6
    if mode == "causal" and side == "right":
        # Rows of padding may count a sink: more is run than needed, never less.
        assert bool((mass > 0)[changed].all())
    else:
        assert torch.equal(mass > 0, changed)
    assert bool(changed.any())
    assert not bool(changed.all())


def brute_force(model, asked, act, layers):
    """Every head on whole passes: kept if more answers are right than without it."""
    stock = stock_answers(model, asked, 32, Work()).margin > 0
    kept = []
    for layer in layers:
        for head in range(model.spec.n_heads):
            with model.edit(with_heads(act, layer, head)):
                right = stock_answers(model, asked, 32, Work()).margin > 0
            if right.sum() > stock.sum():
                kept.append((layer, head))
    return kept


@pytest.mark.parametrize(
    ("seed", "batch_size", "reach"), [(0, 16, None), (1, 5, None), (0, 5, 2.0), (2, 16, 2.0)]
)
def test_the_race_keeps_the_heads_that_brute_force_keeps(seed, batch_size, reach):
    model = wb.wrap(tiny_model("gpt2", seed=seed, n_layer=3))
    asked = questions(18, seed=seed)
    act = ACT(alpha=1.5, beta=0.1)
    race, _, work = filter_heads(
        model, asked, act, range(3), Run(batch_size), reach=reach, probes=6
    )
    assert list(race.kept()) == brute_force(model, asked, act, range(3))
    naive = (3 * 4 + 1) * len(asked) * 3
    assert work.layer_forwards < naive


@pytest.mark.parametrize(
    ("name", "task", "file", "n"),
    [
        ("demo", "agnews", "agnews_test", 10),
        pytest.param("demo", "agnews", "agnews_test", 60, marks=pytest.mark.slow),
        pytest.param("models/stories260K", "sst2", "sst2_train", 40, marks=pytest.mark.slow),
    ],
)
def test_both_races_keep_on_real_rows_what_brute_force_keeps(shared_data, name, task, file, n):
    model = wb.load(name if name == "demo" else str(shared_data / name))
    rows = read_questions(find_task(task), shared_data / "tasks" / f"{file}.jsonl", 2 * n)
    fits = [
        row for row in rows if len(model.tokenizer(row.prompt, verbose=False)["input_ids"]) < 240
    ][:n]
    asked = encode_questions(model, fits, Settings())
    assert len(asked) == n
    act, layers = ACT(alpha=2.0, beta=0.0), range(model.spec.n_layers)
    wanted = brute_force(model, asked, act, layers)
    assert wanted or name != "demo"  # there is something to keep
    for reach in (None, 2.0):
        race, _, work = filter_heads(model, asked, act, layers, Run(64), reach=reach, probes=8)
        assert list(race.kept()) == wanted
        n_heads = model.spec.n_layers * model.spec.n_heads
        assert work.layer_forwards < (n_heads + 1) * len(asked) * model.spec.n_layers / 2


def with_far_margins(model, n, n_near):
    """Questions that no head can turn, but for ``n_near`` of them: labels far apart or side by side."""
    found, asked = [], questions(n, seed=5)
    tokens, mask = pad_left([item.prompt for item in asked])
    orders = model.logits(tokens, mask, last=1)[:, 0].argsort(descending=True).tolist()
    for row, (item, order) in enumerate(zip(asked, orders, strict=True)):
        pair = (order[40], order[41]) if row < n_near else (order[0], order[-1])
        pair = pair if row % 2 else pair[::-1]
        found.append(dataclasses.replace(item, labels=((pair[0],), (pair[1],))))
    return found


def test_rows_far_from_the_border_are_spared_and_the_choice_stays():
    model = wb.wrap(tiny_model("gpt2", seed=1, n_layer=4))
    asked, act = with_far_margins(model, 64, 10), ACT(alpha=1.5, beta=0.5)
    race, stock, work = filter_heads(model, asked, act, range(4), Run(16), probes=16)
    assert list(race.kept()) == brute_force(model, asked, act, range(4))
    assert race.kept()
    naive = (4 * 4 + 1) * len(asked) * 4
    exact = filter_heads(model, asked, act, range(4), Run(16), reach=None)[2]
    assert work.layer_forwards < exact.layer_forwards < naive
    # Of 64 rows a head needs its probes and those near the border, no more.
    assert int(race.run.max()) <= 16 + 10 + 16
    assert int(stock.touched.sum()) > 2 * int(race.run.sum())


def test_too_few_questions_for_probes_are_run_exactly(model):
    asked, act = questions(5), ACT(alpha=1.5, beta=0.1)
    few, _, spent = filter_heads(model, asked, act, range(2), Run(8), probes=3)
    exact, _, wanted = filter_heads(model, asked, act, range(2), Run(8), reach=None)
    assert spent == wanted
    assert torch.equal(few.run, exact.run)


def test_a_race_that_was_broken_off_goes_on(model, tmp_path):
    from workbench.store.pieces import Pieces

    asked, act = questions(16), ACT(alpha=1.5, beta=0.1)
    whole = filter_heads(model, asked, act, range(2), Run(4))

    def stop(done, total):
        raise KeyboardInterrupt

    pieces = Pieces(tmp_path, "a" * 64)
    with pytest.raises(KeyboardInterrupt):
        filter_heads(
            model, asked, act, range(2), Run(4, progress=stop, piece=pieces.get_or_compute)
        )
    assert list((tmp_path / "pieces").rglob("*.safetensors"))
    again = filter_heads(model, asked, act, range(2), Run(4, piece=pieces.get_or_compute))
    for name in ("won", "lost", "run"):
        assert torch.equal(getattr(again[0], name), getattr(whole[0], name))
    assert again[0].kept() == whole[0].kept()
