"""Head effects, races and profiles against whole forward passes, one head at a time."""

import dataclasses
import json

import pytest
import torch

import workbench as wb
from tests.zoo import padded, random_tokens, tiny_model
from workbench.calibration.act import calibrate_act
from workbench.calibration.controls import random_heads
from workbench.calibration.effects import (
    Answers,
    Residuals,
    Work,
    answers_of_rows,
    prepare,
    stock_answers,
)
from workbench.calibration.gradient import gradient_profile
from workbench.calibration.one_head import OneHeadARow
from workbench.calibration.parts import Splits, split
from workbench.calibration.profile import (
    dominant_heads,
    finite_profile,
    profile_heads,
    rank_correlation,
)
from workbench.calibration.race import PROBES, filter_heads
from workbench.calibration.settings import ActCalibration, Run, ZeroTuningCalibration
from workbench.calibration.zerotuning import calibrate_zerotuning
from workbench.errors import ConfigError, DataError
from workbench.evaluation.scoring import Encoded, pad_left
from workbench.evaluation.seen import seen_in_calibration
from workbench.evaluation.task import Question, find_task
from workbench.interventions.act import ACT, DampedMass
from workbench.models.base import Site

EDITS = {
    "zerotuning": wb.ZeroTuning(3.0),
    "key": wb.ZeroTuning(1.5, mode="key"),
    "act": ACT(1.2, 0.2),
    "act full": ACT(1.2, 0.2, mode="full"),
}


def with_heads(edit, layer, head):
    return dataclasses.replace(edit, heads=((layer, head),))


def questions(n=10, n_pos=9, seed=0):
    """Random prompts of different lengths with two random one-token labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = random_tokens(n, n_pos, seed=seed)
    found = []
    for row in range(n):
        length = int(torch.randint(5, n_pos + 1, (1,), generator=generator))
        labels = torch.randperm(101, generator=generator)[:2].tolist()
        found.append(
            Encoded(tuple(tokens[row, :length].tolist()), tuple((x,) for x in labels), row % 2)
        )
    return found


@pytest.fixture(scope="module")
def model():
    return wb.wrap(tiny_model("llama"))


@pytest.mark.parametrize("name", EDITS)
def test_each_row_sees_its_own_head(model, name):
    tokens, mask = padded(random_tokens(4, 9), [9, 6, 9, 7], "left")
    heads = torch.tensor([0, 3, 2, 1])
    stock = model.logits(tokens, mask)
    for layer in (0, 1):
        with model.edit(OneHeadARow(EDITS[name], layer, heads)):
            together = model.logits(tokens, mask)
        for row, head in enumerate(heads.tolist()):
            with model.edit(with_heads(EDITS[name], layer, head)):
                alone = model.logits(tokens, mask)
            shown = mask[row].bool()
            torch.testing.assert_close(together[row][shown], alone[row][shown], rtol=0, atol=1e-5)
        assert (together - stock).abs().max() > 1e-3


@pytest.mark.parametrize("name", EDITS)
def test_answers_of_rows_equal_whole_passes(model, name):
    asked = questions()
    prepared = prepare(model, asked, None, Work())
    rows = [(0, 1), (0, 2), (5, 0), (9, 3)]
    for layer in (0, 1):
        work = Work()
        found = answers_of_rows(model, prepared, EDITS[name], layer, rows, work)
        assert work.layer_forwards == len(rows) * (2 - layer)
        for index, (question, head) in enumerate(rows):
            with model.edit(with_heads(EDITS[name], layer, head)):
                alone = stock_answers(model, [asked[question]], 1, Work())
            assert found.margin[index] == pytest.approx(float(alone.margin), abs=1e-4)
            assert found.entropy[index] == pytest.approx(float(alone.entropy), abs=1e-4)


def test_answers_are_margins_and_entropies_worked_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    asked = [Encoded((0,), ((0,), (1,), (2,)), 0), Encoded((0,), ((1,), (2,)), 1)]
    answers = Answers.of(probs.log(), asked)
    torch.testing.assert_close(answers.margin, torch.tensor([2.0, 1 / 8]).log())
    wanted = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(answers.entropy, wanted)


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_head_is_touched_exactly_where_act_changes_its_pattern(model, mode, side):
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
    race, _, work = filter_heads(model, asked, act, range(3), Run(batch_size), reach=reach)
    assert list(race.kept()) == brute_force(model, asked, act, range(3))
    naive = (3 * 4 + 1) * len(asked) * 3
    assert work.layer_forwards < naive


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
    race, stock, work = filter_heads(model, asked, act, range(4), Run(16))
    assert list(race.kept()) == brute_force(model, asked, act, range(4))
    assert race.kept()
    naive = (4 * 4 + 1) * len(asked) * 4
    exact = filter_heads(model, asked, act, range(4), Run(16), reach=None)[2]
    assert work.layer_forwards < exact.layer_forwards < naive
    # Of 64 rows a head needs its probes and those near the border, no more.
    assert int(race.run.max()) <= PROBES + 10 + 16
    assert int(stock.touched.sum()) > 2 * int(race.run.sum())


def test_what_was_kept_serves_as_well_as_what_is_made_anew(model):
    asked = questions(6)
    rows = [4, 1, 5]
    whole, alone = Residuals(model, asked), Residuals(model, asked, limit=0)
    for start in (0, 3):
        part = list(range(start, start + 3))
        for each in (whole, alone):
            each.keep(part, prepare(model, [asked[row] for row in part], None, Work()))
    spent, again = Work(), Work()
    kept, made = whole.prepared(rows, spent), alone.prepared(rows, again)
    assert (spent.layer_forwards, again.layer_forwards) == (0, 3 * 2)
    for layer in (0, 1):
        found = [
            answers_of_rows(model, each, EDITS["act"], layer, [(0, 1), (2, 3)], Work()).margin
            for each in (kept, made)
        ]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


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


def test_the_gradient_is_that_of_small_gammas(model):
    asked = questions(6)
    for objective in ("accuracy", "entropy"):
        gradient = gradient_profile(model, asked, objective, 4, Work())
        step = 1e-2
        for layer, head in ((0, 1), (1, 3)):
            values = []
            for sign in (1, -1):
                gamma = float(torch.exp(torch.tensor(sign * step)))
                with model.edit(wb.ZeroTuning(gamma, ((layer, head),))):
                    answers = stock_answers(model, asked, 4, Work())
                values.append(answers.margin if objective == "accuracy" else -answers.entropy)
            numeric = float((values[0] - values[1]).mean()) / (2 * step)
            assert float(gradient[layer, head]) == pytest.approx(numeric, abs=2e-3)
        assert gradient.abs().max() > 0.01


def test_the_finite_profile_is_the_change_under_each_head_alone(model):
    asked = questions(7)
    config = ZeroTuningCalibration(objective="entropy", probe_gamma=2.5)
    heads = ((0, 0), (0, 3), (1, 1), (1, 2))
    effect = finite_profile(model, asked, heads, config, Run(3), Work())
    stock = stock_answers(model, asked, 7, Work()).entropy.mean()
    for head, found in zip(heads, effect.tolist(), strict=True):
        with model.edit(wb.ZeroTuning(2.5, (head,))):
            edited = stock_answers(model, asked, 7, Work()).entropy.mean()
        assert found == pytest.approx(float(stock - edited), abs=1e-4)
    other = dataclasses.replace(config, probe_gamma=1 / 2.5)
    down = finite_profile(model, asked, heads, other, Run(3), Work())
    assert rank_correlation(effect, down) > 0.5  # a probe below 1 is read the other way round


@pytest.mark.parametrize("objective", ["accuracy", "entropy"])
def test_the_rank_correlation_is_that_of_gradient_and_finite_profile(model, objective):
    from scipy.stats import spearmanr

    asked = questions(12)
    config = ZeroTuningCalibration(objective=objective, probe_gamma=1.02)
    profile = profile_heads(model, asked, config, Run(8), Work())
    assert profile.measured == tuple((layer, head) for layer in range(2) for head in range(4))
    proxy = gradient_profile(model, asked, objective, 8, Work()).flatten()
    document = profile.document()
    wanted = spearmanr(proxy.tolist(), profile.effect.tolist()).statistic
    assert document["gradient_rank_correlation"] == pytest.approx(wanted)
    assert document["profile"]["L1H2"] == pytest.approx(float(profile.effect[6]), rel=1e-5)
    if objective == "entropy":  # smooth: near gamma 1 the order is the derivative's
        assert wanted > 0.9
    assert rank_correlation(torch.zeros(4), torch.arange(4.0)) is None


def test_heads_chosen_by_gradient_are_verified_one_by_one(model):
    asked = questions(12)
    config = ZeroTuningCalibration(objective="entropy", profile="gradient", share=0.5)
    work = Work()
    profile = profile_heads(model, asked, config, Run(8), work)
    proxy = gradient_profile(model, asked, "entropy", 8, Work())
    assert (profile.is_up, profile.measured) == dominant_heads(proxy, 0.5)
    every = ZeroTuningCalibration(objective="entropy")
    whole = profile_heads(model, asked, every, Run(8), Work())
    for head in profile.measured:
        helps = (float(whole.effect[whole.measured.index(head)]) > 0) == profile.is_up
        assert (head in profile.heads) == helps
    # Less than the whole profile, which runs all eight heads.
    assert len(profile.measured) <= 4
    with pytest.raises(ConfigError, match="profile=gradient needs mode=score"):
        profile_heads(model, asked, dataclasses.replace(config, mode="key"), Run(8), Work())


def test_the_dominant_type_gives_the_strongest_heads_and_no_other():
    effect = torch.tensor([[0.3, -0.1, 0.2], [0.1, 0.0, -0.4]])
    assert dominant_heads(effect, 0.34) == (True, ((0, 0), (0, 2)))
    assert dominant_heads(effect, 1.0) == (True, ((0, 0), (0, 2), (1, 0)))
    assert dominant_heads(-effect, 0.17) == (False, ((0, 0),))
    assert dominant_heads(torch.zeros(2, 2), 0.5) == (True, ())


def made_up(n):
    words = ["good", "bad", "fine", "poor", "great", "awful"]
    return [
        Question(f"Review {i}: a {words[i % 6]} film\nSentiment:", (" good", " bad"), i % 2)
        for i in range(n)
    ]


def test_parts_share_no_prompt_and_depend_on_the_seed():
    asked = made_up(40) + made_up(10)
    parts = split(asked, 0)
    sets = [
        {item.prompt for item in part} for part in (parts.profile, parts.validation, parts.test)
    ]
    assert [len(each) for each in sets] == [20, 10, 10]
    assert not sets[0] & sets[1]
    assert not (sets[0] | sets[1]) & sets[2]
    assert parts.n_repeated == 10
    assert split(asked, 0) == parts
    assert split(asked, 1) != parts
    with pytest.raises(DataError, match="at least 8 different questions"):
        split(made_up(7), 0)


@pytest.fixture(scope="module")
def demo():
    return wb.load("demo")


def test_a_calibrated_zerotuning_is_a_file_that_loads(demo):
    parts = split(made_up(16), 0)
    config = ZeroTuningCalibration(objective="entropy", gammas=(0.5, 2.0))
    found = calibrate_zerotuning(demo, parts, config, Run(16))
    document = json.loads(json.dumps(found.document(demo.spec, {"task": "x"}, config)))
    assert document["layers"] == 4
    assert document["model"] == demo.spec.name
    assert set(document["calibration"]["table"]) == {"uncalibrated", "calibrated", "random_heads"}
    assert document["calibration"]["table"]["calibrated"]["n"] == len(parts.test)
    assert -1.0 <= document["calibration"]["scores"]["gradient_rank_correlation"] <= 1.0
    validation = document["calibration"]["scores"]
    if found.heads:  # what was chosen beats the uncalibrated model where it was chosen
        assert (
            validation["validation"][str(found.settings["gamma"])]
            > validation["validation_uncalibrated"]
        )
    with demo.edit(document):
        (active,) = demo.interventions
        assert active.heads == found.heads
        assert active.gamma == found.settings["gamma"]


def test_a_calibrated_act_is_a_file_that_loads_and_says_what_it_spent(demo):
    parts = split(made_up(16), 0)
    config = ActCalibration(alpha=2.0, skip_first_layers=0, skip_last_layers=1)
    found = calibrate_act(demo, parts, config, Run(16))
    document = found.document(demo.spec, {"task": "x"}, config)
    assert found.layer_forwards < found.layer_forwards_naive
    assert all(layer < 3 for layer, _ in found.heads)
    with demo.edit(document):
        assert demo.interventions == (ACT(2.0, 0.4, found.heads),)


def test_random_heads_are_as_many_seeded_and_of_the_layers_that_were_chosen_from(model):
    spec = model.spec
    assert len(random_heads(spec, range(2), 5, 0)) == 5
    assert random_heads(spec, range(2), 5, 0) == random_heads(spec, range(2), 5, 0)
    assert random_heads(spec, range(2), 5, 0) != random_heads(spec, range(2), 5, 1)
    assert random_heads(spec, range(1, 2), 4, 0) == ((1, 0), (1, 1), (1, 2), (1, 3))


def test_questions_that_chose_are_known_again():
    asked = made_up(40)
    parts = split(asked, 0)
    content = json.loads(json.dumps({"name": "act", "calibration": parts.about()}))
    assert content["calibration"]["parts"] == {"profile": 20, "validation": 10, "test": 10}
    assert seen_in_calibration(parts.test, content) == 0
    assert seen_in_calibration(asked, content) == 30
    assert seen_in_calibration(asked, wb.ZeroTuning(2.0)) == 0
    task = find_task("sst2")
    behind = [task.with_examples(question, parts.test[:1]) for question in parts.profile]
    assert seen_in_calibration(behind, content) == 20


def test_what_cannot_calibrate_is_refused(demo):
    for settings, words in (
        ({"probe_gamma": 1.0}, "probe_gamma must be a number other than 1"),
        ({"share": 0.0}, "share must be above 0"),
        ({"gammas": (0.5, -1.0, 2.0)}, "gammas must be above 0; got 0.5, -1, 2"),
        ({"gammas": ()}, "both sides of 1"),
        ({"gammas": (1.5, 2.0)}, "both sides of 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            ZeroTuningCalibration(**settings)
    with pytest.raises(ConfigError, match="beta must be below 1"):
        ActCalibration(beta=1.0)
    parts = Splits(made_up(4), made_up(4), made_up(4))
    with pytest.raises(ConfigError, match="skipped layers must leave"):
        calibrate_act(demo, parts, ActCalibration(skip_first_layers=4), Run())
    with pytest.raises(DataError, match="validation is empty"):
        calibrate_act(
            demo, Splits(made_up(4), [], made_up(4)), ActCalibration(skip_first_layers=0), Run()
        )


@pytest.mark.parametrize("name", ["act", "zerotuning"])
def test_a_row_that_cannot_be_scored_is_told_before_anything_is_run(demo, name, monkeypatch):
    bad = Question("word " * 300, (" good", " bad"), 0, where="line 7 of x.jsonl")
    parts = Splits(made_up(4), made_up(4), [bad])

    def too_early(*_, **__):
        raise AssertionError("the model was run")

    for name_of_pass in ("capture", "logits", "continue_from"):
        monkeypatch.setattr(type(demo), name_of_pass, too_early)
    calibrate, config = {
        "act": (calibrate_act, ActCalibration(skip_first_layers=0)),
        "zerotuning": (calibrate_zerotuning, ZeroTuningCalibration()),
    }[name]
    with pytest.raises(DataError, match=r"line 7 of x\.jsonl needs"):
        calibrate(demo, parts, config, Run())
