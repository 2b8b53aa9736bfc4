"""The active-dormant probe on heads that are built by hand, and its result from the store and from files."""

import json
from dataclasses import replace

import pytest
import torch

import workbench as wb
from probes.active_dormant import ActiveDormantConfig, ActiveDormantResult, measure_active_dormant
from probes.active_dormant_examples import EXAMPLE_POS, choose_heads
from tests.probes.planted_switch import BOS, domains, planted_model, planted_tokens
from tests.zoo import random_tokens, tiny_model
from workbench.context import Context

# Planted structure


@pytest.fixture(scope="module")
def planted():
    tokens, context = planted_tokens()
    return measure_active_dormant(planted_model(), tokens, ActiveDormantConfig(), context)


def test_the_planted_switch_is_found(planted):
    found = {name: heads.nonzero().tolist() for name, heads in planted.classes().items()}
    assert found == {
        "always active": [[0, 2]],
        "active-dormant": [[0, 0]],
        "always dormant": [[0, 1]],
    }
    assert planted.dormant[:, 0, 0].tolist() == [True, False]
    counts = {name: planted.metrics()[f"n_{name}"] for name in ("active_dormant", "always_dormant")}
    assert counts == {"active_dormant": 1.0, "always_dormant": 1.0}
    assert planted.metrics()["n_always_active"] == 1.0
    assert planted.labels["domain"] == ("A", "B")


def test_the_planted_heads_have_the_planted_numbers(planted):
    assert planted.sink_attention[0, 0, 0] > 0.99
    assert planted.sink_attention[1, 0, 0] < 0.01
    assert (planted.sink_attention[:, 0, 1] > 0.99).all()
    assert (planted.sink_attention[:, 0, 2] < 0.01).all()
    # Head 0 predicts domain B and nothing else; BOS has no value.
    assert planted.ablation_loss[0, 0, 0].abs() < 1e-4
    assert planted.ablation_loss[1, 0, 0] > 0.5
    assert planted.ablation_loss[:, 0, 1:].abs().max() < 1e-5
    torch.testing.assert_close(planted.bos_loss, planted.ablation_loss, rtol=0, atol=1e-4)
    assert planted.value_norm[1, 0, 0] < 1e-3
    assert planted.value_norm_ratio[1, 0, 0] < 1e-3
    # One-hot attention has no entropy, neither by rows nor by columns.
    assert planted.row_entropy[0, 0, 1] < 0.01
    assert planted.column_entropy[0, 0, 1] < 0.01
    assert planted.column_entropy[0, 0, 2] > 0.9  # itself and its like: all keys get about as much
    assert planted.sink_logit_gap[0, 0, 0] > 10 > -10 > planted.sink_logit_gap[1, 0, 0]
    assert planted.q_sink[0, 0] <= 0.05 < planted.q_sink[0, 1]


def test_heads_differ_when_their_q_is_at_most_the_rate_that_was_asked(planted):
    at, beyond = torch.tensor([[0.05, 0.01, 0.06]]), torch.tensor([[0.05, 0.05001, 0.06]])
    metrics = replace(planted, q_sink=at, q_loss=beyond).metrics()
    assert (metrics["n_different_sink"], metrics["n_different_loss"]) == (2.0, 1.0)


def test_the_example_of_the_switching_head_shows_the_switch(planted):
    assert planted.example_head[0].tolist() == [0, 0]
    pattern = planted.example_pattern[0]
    assert pattern[0, 2:12, 0].min() > 0.99
    assert pattern[1, 2:12, 0].max() < 0.01
    assert planted.labels["example_token"][0] == str(BOS)


def test_the_same_text_twice_has_no_switch():
    tokens, _ = planted_tokens()
    both = torch.cat([tokens, tokens])
    context = domains(len(tokens), len(tokens))
    found = measure_active_dormant(planted_model(), both, ActiveDormantConfig(), context)
    assert found.metrics()["n_active_dormant"] == 0.0
    assert torch.equal(found.p_sink, torch.ones(1, 3))
    assert torch.equal(found.dormant[0], found.dormant[1])


def test_random_text_split_at_random_has_no_switch():
    from probes.active_dormant_prompts import measure_prompts
    from probes.active_dormant_statistics import Domains, adjusted, permutation_p

    found = measure_prompts(wb.wrap(tiny_model("gpt2")), random_tokens(16, 10), Context())
    generator = torch.Generator().manual_seed(0)
    splits = 60
    discovered = 0
    for _ in range(splits):
        index = torch.randperm(16, generator=generator) % 2
        p = permutation_p(found.change[0], Domains(("a", "b"), index), 999, generator)
        discovered += bool((adjusted(p) <= 0.05).any())
    # The level is 0.05 of the splits; 60 of them give at most 9 with probability 0.998.
    assert discovered <= 9


def test_three_domains_are_compared_at_once():
    tokens, context = planted_tokens()
    more = tokens[:6].flip(0)
    context = Context(labels={"domain": (*context.labels["domain"], *("C",) * 6)})
    found = measure_active_dormant(
        planted_model(), torch.cat([tokens, more]), ActiveDormantConfig(), context
    )
    assert found.dormant[:, 0, 0].tolist() == [True, False, True]
    assert found.sink_attention.shape == (3, 1, 3)


# The residual peak


def test_the_mlp_that_makes_the_peak_is_named():
    # Card section 5: zeroing the MLP that makes the peak takes it away, zeroing others does not.
    model = tiny_model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.weight.mul_(0.05)
            block.mlp.c_proj.bias.zero_()
        model.transformer.h[1].mlp.c_proj.bias.fill_(100.0)
    found = measure_active_dormant(
        wb.wrap(model), random_tokens(8, 8), ActiveDormantConfig(), domains(4, 4)
    )
    assert found.peak_maker() == ("MLP", 1)
    assert found.metrics()["peak_mlp_layer"] == 1.0
    assert found.metrics()["peak_share_without_mlp"] < 0.1
    assert found.peak_share()[1, 0] == pytest.approx(1.0, abs=0.05)
    assert found.metrics()["resid_peak"] == pytest.approx(100 * 32**0.5, rel=0.1)


# The result


def test_the_result_survives_the_store_and_has_a_row_a_domain_and_head(tmp_path):
    model = wb.wrap(tiny_model("gpt2"))
    data = {"first": random_tokens(4, 8), "second": random_tokens(4, 8, seed=1)}
    result = wb.run("active-dormant", model, data, store=tmp_path, n_examples=2)
    again = wb.run("active-dormant", model, data, store=tmp_path, n_examples=2)
    assert again.cached
    assert result.domains == ["first", "second"]
    for name in ("sink_attention", "ablation_loss", "value_norm_ratio", "dormant"):
        assert getattr(result, name).shape == (2, 2, 4)
    assert result.dormant.dtype == torch.bool
    counts = again.measured.classes()
    assert sum(int(heads.sum()) for heads in counts.values()) == 8
    table = again.table()
    assert {len(column) for column in table.values()} == {16}
    assert table["domain"] == ["first"] * 8 + ["second"] * 8
    assert table["sink_attention"] == result.sink_attention.flatten().tolist()
    assert isinstance(again.measured, ActiveDormantResult)


def test_heads_that_switch_are_shown_first():
    sink = torch.tensor([[[0.9, 0.9, 0.1]], [[0.1, 0.4, 0.0]]])
    loss = torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, 0.3, 5.0]]])
    dormant = torch.tensor([[[False, True, False]], [[False, False, False]]])
    assert choose_heads(sink, loss, dormant, 2).tolist() == [[0, 1], [0, 0]]
    assert choose_heads(sink, loss, dormant, 0).shape == (0, 2)


def test_long_prompts_are_cut_for_the_examples_only():
    tokens = random_tokens(8, 60)
    found = measure_active_dormant(
        wb.wrap(tiny_model("gpt2")), tokens, ActiveDormantConfig(n_examples=1), domains(4, 4)
    )
    assert found.example_pattern.shape == (1, 2, EXAMPLE_POS, EXAMPLE_POS)
    torch.testing.assert_close(found.example_pattern.sum(-1), torch.ones(1, 2, EXAMPLE_POS))


# From files


def test_two_files_or_a_domain_column_are_the_same_domains(tmp_path, tiny_folder):
    texts = {
        "prose": [
            f"It was a {word} day and nobody had come." for word in ("warm", "cold", "wet", "dry")
        ],
        "code": [f"for {name} in range(10): print({name} + 1)" for name in "ijkn"],
    }
    rows = [{"text": text, "domain": name} for name, part in texts.items() for text in part]
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = wb.load(str(tiny_folder))
    named = wb.run("active-dormant", model, texts, n_pos=24)
    column = wb.run("active-dormant", model, str(tmp_path / "both.jsonl"), n_pos=24)
    assert column.domains == named.domains == ["prose", "code"]
    assert torch.equal(column.sink_attention, named.sink_attention)
    assert torch.equal(column.ablation_loss, named.ablation_loss)
