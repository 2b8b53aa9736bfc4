"""The reachability probe on models of transformers, on data of every kind, and what it refuses."""

import dataclasses
import warnings

import pytest
import torch

import workbench as wb
from probes.reachability import ReachabilityConfig
from probes.reachability_problems import n_usable_tokens, read_states
from probes.reachability_scoring import require_gradients
from tests.probes.bag_model import bag
from tests.zoo import padded, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.models.toy import ToyAdapter

QUICK = {"iterations": 3, "batch": 16, "candidates": 8}
ROWS = [{"state": [5 + i, 6, 7 + 2 * i], "target": 20 + i} for i in range(3)]


def tiny_toy():
    config = ToyModelConfig(d_vocab=40, n_ctx=32, n_layers=2, n_heads=2, d_model=16, d_mlp=32)
    return ToyAdapter(make_model(config, 0))


# Against the models of transformers themselves


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mamba"])
def test_found_controls_reach_their_targets_in_plain_transformers(family):
    plain = tiny_model(family, attn_implementation="eager") if family != "mamba" else None
    plain = plain or tiny_model(family)
    rows = [{"state": [5 + i, 6, 7 + 2 * i], "target": t} for i in range(2) for t in (20, 30, 40)]
    result = wb.run("reachability", wb.wrap(tiny_model(family)), rows, k_max=4, **QUICK)
    assert (result.k > 0).any()
    for k, prompt, row in zip(result.k, result.prompts, rows, strict=True):
        if k < 0:
            assert (prompt == -1).all()
            continue
        ids = torch.tensor([[*prompt[: int(k)].tolist(), *row["state"]]])
        with torch.no_grad():
            assert int(plain(ids).logits[0, -1].argmax()) == row["target"]


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_one_token_is_enough_exactly_where_transformers_say_so(family):
    plain, state = tiny_model(family, attn_implementation="eager"), [5, 6, 7]
    rows = [{"state": state, "target": target} for target in range(101)]
    result = wb.run("reachability", wb.wrap(tiny_model(family)), rows, k_max=1, method="greedy")
    with torch.no_grad():
        alone = int(plain(torch.tensor([state])).logits[0, -1].argmax())
        reached = {
            int(plain(torch.tensor([[u, *state]])).logits[0, -1].argmax()) for u in range(101)
        }
    assert set(result.k.eq(0).nonzero().flatten().tolist()) == {alone}
    assert set((result.k == 1).nonzero().flatten().tolist()) == reached - {alone}


def test_gradient_search_beats_random_controls():
    model = wb.wrap(tiny_model("llama"))
    rows = [{"state": [5, 6, 7], "target": target} for target in range(20, 28)]
    settings = {"k_max": 4, "iterations": 6, "batch": 24}
    guided = wb.run("reachability", model, rows, method="gradient", candidates=8, **settings)
    # With every token a candidate, proposals are as good as random.
    blind = wb.run("reachability", model, rows, method="gradient", candidates=101, **settings)
    assert guided.best_loss.mean() < blind.best_loss.mean()


@pytest.mark.parametrize("backend", ["hf", "transformer-lens", "nnsight"])
def test_backends_find_the_same_controls(backend, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    expected = wb.run("reachability", wb.wrap(tiny_model("gpt2")), ROWS, k_max=1, method="greedy")
    model = wb.load(str(tmp_path), backend=backend)
    found = wb.run("reachability", model, ROWS, k_max=1, method="greedy")
    assert torch.equal(found.k, expected.k)
    torch.testing.assert_close(found.best_loss, expected.best_loss, rtol=1e-3, atol=1e-3)
    if backend != "hf":
        with pytest.raises(CapabilityError, match=r"gradients.*--backend hf"):
            wb.run("reachability", model, ROWS, k_max=4)


def test_toys_are_searched_too():
    result = wb.run("reachability", tiny_toy(), ROWS, k_max=4, **QUICK)
    assert result.prompts.shape == (3, 4)
    assert result.head_limit.shape == (3, 2)


# States and targets


def test_states_are_cut_from_the_beginning_of_texts_and_the_truth_follows():
    tokens = random_tokens(20, 40)
    config = ReachabilityConfig(bos_id=0)
    tokens[::2, 0] = 0
    states, which, truths = read_states(bag(101), tokens, config, Context())
    assert {len(states[i].tokens) for i in which} <= set(range(8, 33))
    assert len({len(states[i].tokens) for i in which}) > 5
    for i, row in enumerate(tokens):
        state, n_bos = states[which[i]], int(i % 2 == 0)
        assert len(state.bos) == n_bos
        end = n_bos + len(state.tokens)
        assert torch.equal(state.tokens, row[n_bos:end])
        assert truths[i] == row[end]


def test_padding_is_no_part_of_a_state():
    tokens, mask = padded(random_tokens(2, 14), [14, 9], "right")
    config = ReachabilityConfig(state_min=8)
    states, _, _ = read_states(bag(101), tokens, config, Context(attention_mask=mask))
    assert [len(state.tokens) for state in states][1] == 8
    assert states[1].tokens.tolist() == tokens[1, :8].tolist()


def test_top_75_targets_are_the_models_own():
    model = wb.wrap(tiny_model("llama"))
    rows = [{"state": [5, 6, 7]}]
    result = wb.run(
        "reachability", model, rows, targets="top-75", k_max=1, method="greedy", shortlist=2
    )
    assert result.k.shape == (75,)
    assert result.base_rank.tolist() == [*range(75)]
    assert result.metrics()["reached_base"] == pytest.approx(1 / 75)


def test_uniform_targets_cover_the_vocabulary():
    model = wb.wrap(tiny_model("llama"))
    rows = [{"state": [5, 6, i]} for i in range(8)]
    settings = {"targets": "uniform", "targets_per_state": 5, "k_max": 1, "method": "greedy"}
    settings["shortlist"] = 2  # what is found is not the question
    result = wb.run("reachability", model, rows, **settings)
    assert result.k.shape == (40,)
    assert len(result.target_id.unique()) > 25
    assert int(result.base_rank.min()) < 25
    assert int(result.base_rank.max()) > 75  # beyond what top-75 can draw
    for state in range(8):
        assert len(result.target_id[result.state_index == state].unique()) == 5
    again = wb.run("reachability", model, rows, **settings)
    assert torch.equal(again.target_id, result.target_id)


def test_texts_as_states_and_targets():
    rows = [
        {"state": "Monday, Tuesday,", "target": " the"},
        {"state": "It is a truth universally", "target": 300},
    ]
    model = wb.load("demo")
    result = wb.run("reachability", model, rows, k_max=1, method="greedy", shortlist=8)
    assert result.target_id[1] == 300
    assert result.labels["target_text"][0] == " the"
    assert result.labels["state_text"][0] == "Monday, Tuesday,"
    table = result.table()
    assert set(table) >= {"prompt", "state", "target", "k", "rank_without", "prompt_ids"}
    with pytest.raises(DataError, match=r"must be one token.*'antidisestablishmentarianism'"):
        wb.run("reachability", model, [{"state": "x y", "target": "antidisestablishmentarianism"}])


def test_ids_without_text_are_never_proposed():
    model = wb.load("demo")
    assert n_usable_tokens(model) == len(model.tokenizer)


def test_text_that_tokenises_otherwise_is_reported():
    model = wb.load("demo")
    rows = [{"state": "Monday, Tuesday,", "target": target} for target in range(300, 306)]
    result = wb.run("reachability", model, rows, k_max=2, method="greedy", shortlist=64)
    for i, k in enumerate(result.k.tolist()):
        prompt = result.prompts[i, : max(k, 0)].tolist()
        state = model.tokenizer(rows[i]["state"], add_special_tokens=False)["input_ids"]
        ids = prompt + state
        again = model.tokenizer(model.tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
        row = torch.tensor([[model.tokenizer.bos_token_id, *again]])
        wins = int(model.logits(row)[0, -1].argmax()) == rows[i]["target"]
        assert bool(result.reached_as_text[i]) == (k >= 0 and wins)


def test_results_survive_the_store(tmp_path):
    model = wb.wrap(tiny_model("gpt2"))
    first = wb.run("reachability", model, ROWS, k_max=2, store=tmp_path)
    again = wb.run("reachability", model, ROWS, k_max=2, store=tmp_path)
    assert again.cached
    assert torch.equal(again.measured.prompts, first.measured.prompts)
    assert first.provenance["model"]
    assert first.provenance["prompts"]["n_prompts"] == 3


# Refusals


@pytest.mark.parametrize("target", [101, -1, 10**9])
def test_a_target_outside_the_vocabulary_is_refused(target):
    rows = [{"state": [5, 6], "target": target}]
    with pytest.raises(DataError, match=rf"0 to 100.*row 0 is {target}"):
        wb.run("reachability", wb.wrap(tiny_model("llama")), rows)


def test_a_state_that_leaves_no_room_for_the_control_is_refused():
    rows = [{"state": [5] * 60, "target": 7}]
    model = wb.wrap(tiny_model("llama"))
    with pytest.raises(DataError, match=r"n_ctx = 64.*prompt 0 has 60.*up to 10"):
        wb.run("reachability", model, rows)
    assert wb.run("reachability", model, rows, k_max=4, **QUICK).k.shape == (1,)


def test_a_row_without_a_target_is_refused_unless_targets_are_drawn():
    with pytest.raises(DataError, match="row 0 has a state only"):
        wb.run("reachability", wb.wrap(tiny_model("llama")), [{"state": [5, 6]}])


def test_texts_too_short_to_cut_are_refused():
    with pytest.raises(DataError, match=r"at least 9 tokens.*prompt 0 has 8"):
        wb.run("reachability", wb.wrap(tiny_model("llama")), random_tokens(2, 8))


def test_a_text_as_target_needs_a_tokenizer():
    with pytest.raises(DataError, match="no tokenizer"):
        wb.run("reachability", wb.wrap(tiny_model("llama")), [{"state": [5], "target": "x"}])


def test_brute_force_on_a_large_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="101 tokens to the power of k_max = 10"):
        wb.run("reachability", wb.wrap(tiny_model("llama")), ROWS, method="brute-force")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"k_max": 0}, "k_max must be at least 1"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"method": "magic"}, "method must be one of"),
        ({"state_min": 9, "state_max": 8}, "state_max must be at least"),
    ],
    ids=["k_max", "candidates", "method", "state"],
)
def test_impossible_settings_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        ReachabilityConfig(**settings)


def test_a_bos_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="bos_id must be below 101"):
        wb.run("reachability", wb.wrap(tiny_model("llama")), ROWS, bos_id=101)


def test_integer_weights_are_refused_with_what_could():
    network = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(
            network, {torch.nn.Linear}, dtype=torch.qint8
        )
    model = wb.wrap(tiny_model("llama"))
    model.model = quantised
    with pytest.raises(CapabilityError, match=r"int8.*--backend hf"):
        require_gradients(model, "back-off")
    require_gradients(wb.wrap(tiny_model("llama")), "back-off")


# Settings


@pytest.mark.parametrize(
    ("k_max", "method", "expected"),
    [
        (10, "back-off", [1, 2, 3, 4, 6, 8, 10]),
        (9, "back-off", [1, 2, 3, 4, 6, 8, 9]),
        (2, "back-off", [1, 2]),
        (5, "gradient", [1, 2, 3, 4, 5]),
        (5, "greedy", [1, 2, 3, 4, 5]),
    ],
)
def test_lengths_that_are_tried(k_max, method, expected):
    stages = ReachabilityConfig(k_max=k_max, method=method).stages()
    assert [k for k, _ in stages] == expected
    if method == "back-off":
        assert [how for _, how in stages] == ["greedy" if k <= 3 else "gradient" for k in expected]


def test_defaults_are_the_papers():
    config = ReachabilityConfig()
    assert (config.k_max, config.iterations, config.candidates, config.batch) == (10, 34, 128, 768)
    assert dataclasses.asdict(config)["targets"] == "ground-truth"
