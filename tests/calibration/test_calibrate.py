"""Parts, controls and files of a calibration, and what is refused."""

import dataclasses
import json

import pytest

import workbench as wb
from tests.calibration.asked import made_up
from workbench.calibration.act import calibrate_act
from workbench.calibration.controls import random_heads
from workbench.calibration.effects import Work, stock_answers
from workbench.calibration.parts import Splits, encode_parts, split
from workbench.calibration.settings import ActCalibration, Run, ZeroTuningCalibration
from workbench.calibration.zerotuning import calibrate_zerotuning
from workbench.errors import ConfigError, DataError
from workbench.evaluation.evaluate import evaluate
from workbench.evaluation.seen import seen_in_calibration
from workbench.evaluation.task import Question, find_task
from workbench.interventions.act import ACT


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


@pytest.mark.parametrize("objective", ["accuracy", "entropy"])
def test_gamma_is_the_best_of_its_side_on_questions_that_chose_no_head(demo, objective):
    parts = split(made_up(32), 1)
    config = ZeroTuningCalibration(objective=objective, gammas=(0.2, 0.5, 2.0, 4.0), share=0.5)
    found = calibrate_zerotuning(demo, parts, config, Run(16))
    is_up = found.scores["dominant"] == "up"
    sign = 1 if is_up else -1
    ranked = sorted(found.scores["profile"].items(), key=lambda item: -sign * item[1])
    strongest = {name for name, effect in ranked[:8] if sign * effect > 0}
    heads = tuple(sorted((int(name[1]), int(name[3])) for name in strongest))
    asked, values = encode_parts(demo, parts).validation, {}
    for gamma in (1.0, *((2.0, 4.0) if is_up else (0.2, 0.5))):
        with demo.edit(wb.ZeroTuning(gamma, heads)):
            answers = stock_answers(demo, asked, 16, Work())
        right = float((answers.margin > 0).float().mean()), float(answers.margin.mean())
        values[gamma] = (-float(answers.entropy.mean()), 0.0) if objective == "entropy" else right
    best = max(values, key=lambda gamma: values[gamma])
    assert heads
    assert found.scores["validation_uncalibrated"] == pytest.approx(list(values.pop(1.0)), abs=1e-4)
    assert set(found.scores["validation"]) == set(map(str, values))
    for gamma, value in values.items():
        assert found.scores["validation"][str(gamma)] == pytest.approx(list(value), abs=1e-4)
    assert found.settings["gamma"] == best
    assert found.heads == (() if best == 1.0 else heads)


def test_the_table_is_an_evaluation_of_the_part_that_chose_nothing(demo):
    parts = split(made_up(32), 1)
    config = ZeroTuningCalibration(objective="entropy", gammas=(0.2, 4.0))
    found = calibrate_zerotuning(demo, parts, config, Run(16, seed=5))
    assert found.heads
    random = random_heads(demo.spec, range(4), len(found.heads), 5)
    edit = wb.ZeroTuning(found.settings["gamma"], found.heads)
    for name, change in (
        ("uncalibrated", None),
        ("calibrated", edit),
        ("random_heads", dataclasses.replace(edit, heads=random)),
    ):
        wanted = evaluate(demo, find_task("sst2"), parts.test, change).metrics()
        assert found.table[name] == pytest.approx(wanted, abs=1e-5)
    assert found.table["calibrated"] != found.table["random_heads"]


def test_a_calibrated_act_is_a_file_that_loads_and_says_what_it_spent(demo):
    parts = split(made_up(16), 0)
    config = ActCalibration(alpha=2.0, skip_first_layers=0, skip_last_layers=1)
    found = calibrate_act(demo, parts, config, Run(16))
    document = found.document(demo.spec, {"task": "x"}, config)
    assert found.layer_forwards < found.layer_forwards_naive
    assert all(layer < 3 for layer, _ in found.heads)
    with demo.edit(document):
        assert demo.interventions == (ACT(2.0, 0.4, found.heads),)


def test_act_takes_every_winner_and_keeps_no_part_for_what_it_does_not_choose(demo):
    config = ActCalibration(alpha=2.0, skip_first_layers=0)
    assert config.shares == (0.75, 0.0)
    parts = split(made_up(40), 0, config.shares)
    assert parts.about()["parts"] == {"profile": 30, "validation": 0, "test": 10}
    found = calibrate_act(demo, parts, config, Run(16))
    assert [f"L{layer}H{head}" for layer, head in found.heads] == list(found.scores["won"])
    assert "validation" not in found.scores
    assert found.table["calibrated"]["n"] == 10
    parted = Splits(parts.profile[:14], parts.profile[14:], parts.test)
    again = calibrate_act(demo, parted, config, Run(16))
    assert (again.heads, again.scores) == (found.heads, found.scores)


def test_act_may_take_as_many_winners_as_do_best_together_on_questions_of_their_own(demo):
    config = ActCalibration(
        alpha=1.5, beta=0.0, skip_first_layers=0, skip_last_layers=0, take="best", race="exact"
    )
    assert config.shares == (0.5, 0.25)
    parts = split(made_up(48), 3, config.shares)
    found = calibrate_act(demo, parts, config, Run(16))
    won, lost = found.scores["won"], found.scores["lost"]
    assert len(won) > 1  # there is something to choose
    order = sorted(won, key=lambda name: lost[name] - won[name])
    strongest = [(int(name[1]), int(name[3])) for name in order]
    asked, right = encode_parts(demo, parts).validation, []
    for n in range(len(strongest) + 1):
        with demo.edit(ACT(1.5, 0.0, heads=tuple(strongest[:n]))):
            margin = stock_answers(demo, asked, 16, Work()).margin
        right.append((float((margin > 0).float().mean()), float(margin.mean())))
        assert found.scores["validation"][str(n)] == pytest.approx(right[-1], abs=1e-4)
    assert found.heads == tuple(sorted(strongest[: right.index(max(right))]))
    # The part that chooses how many has chosen no head, and the table's has chosen nothing.
    other = Splits(parts.profile, parts.test, parts.validation)
    again = calibrate_act(demo, other, config, Run(16))
    assert (again.scores["won"], again.scores["lost"]) == (won, lost)
    assert again.scores["validation"] != found.scores["validation"]


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
    for empty, config in (
        ("profile", ActCalibration(skip_first_layers=0)),
        ("test", ActCalibration(skip_first_layers=0)),
        ("validation", ActCalibration(skip_first_layers=0, take="best")),
        ("validation", ZeroTuningCalibration()),
    ):
        sizes = {"profile": 4, "validation": 4, "test": 4, empty: 0}
        parts = Splits(*(made_up(n) for n in sizes.values()))
        calibrate = calibrate_act if isinstance(config, ActCalibration) else calibrate_zerotuning
        with pytest.raises(DataError, match=f"{empty} is empty"):
            calibrate(demo, parts, config, Run())


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
