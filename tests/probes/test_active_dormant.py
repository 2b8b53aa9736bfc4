"""The active-dormant probe on heads that are built by hand, and on real weights."""

import json

import pytest
import torch

import workbench as wb
from probes.active_dormant import (
    ActiveDormantConfig,
    ActiveDormantResult,
    measure_active_dormant,
)
from probes.active_dormant_examples import EXAMPLE_POS, choose_heads
from tests.zoo import padded, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.errors import ConfigError, DataError

BOS, N_LETTERS = 0, 5
LETTERS_A, LETTERS_B = range(1, 6), range(6, 11)
BIG = 4.0


def planted_model():
    """One layer of three heads of which the test knows what they do.

    Head 0: a letter of A looks at BOS, whose value is zero; a letter of B looks at the letters of B
    so far and writes them, which is the next token of prompts that repeat one letter. Head 1: looks
    at BOS always. Head 2: looks at itself always and writes nothing. Letter i is the axis i of the
    stream; heads write to axes of their own, which the unembedding reads.
    """
    width, d_head = 48, 16
    sizes = ToyModelConfig(
        d_vocab=11, n_ctx=16, n_layers=1, n_heads=3, d_model=width, d_mlp=0, positions="none"
    )
    model = make_model(sizes, seed=0)
    spare, axis = 15, torch.eye(width)
    a, b = axis[list(LETTERS_A)].sum(0), axis[list(LETTERS_B)].sum(0)
    bos, every = axis[BOS], axis[:11].sum(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.zero_()
        model.embed.weight[:, :11] = torch.eye(11)
        heads = {name: model.blocks[0].attention.get_submodule(name) for name in ("W_Q", "W_K")}
        query, key = (heads[name].weight.view(3, d_head, width) for name in ("W_Q", "W_K"))
        query[0, 0], key[0, 0] = BIG * (a + bos), bos
        query[0, 1], key[0, 1] = BIG * b, b
        query[1, 0], key[1, 0] = BIG * every, bos
        query[2, :11] = key[2, :11] = BIG * axis[:11]
        value = model.blocks[0].attention.get_submodule("W_V").weight.view(3, d_head, width)
        out = model.blocks[0].attention.get_submodule("W_O").weight.view(width, 3, d_head)
        for letter in LETTERS_B:
            # Less the spare axis: the norm's mean is in every axis alike, and BOS has no value.
            value[0, letter] = axis[letter] - axis[spare]
            out[16 + letter, 0, letter] = 1.0
        model.unembed.weight[:, 16:27] = 2.0 * torch.eye(11)
    return wb.wrap(model)


def planted_tokens(n=6, n_pos=12):
    """Domain A: random letters of A; domain B: one letter of B, repeated. BOS before both."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(1, 6, (n, n_pos), generator=generator)
    second = torch.randint(6, 11, (n, 1), generator=generator).expand(n, n_pos)
    tokens = torch.cat([first, second])
    tokens[:, 0] = BOS
    return tokens, Context(labels={"domain": ("A",) * n + ("B",) * n})


def domains(n_first, n_second, **more):
    return Context(labels={"domain": ("first",) * n_first + ("second",) * n_second}, **more)


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


# Independent of how it is run


def compare(found, expected, **close):
    close = {"rtol": 1e-4, "atol": 2e-4, "equal_nan": True} | close
    for name in ("sink_attention", "sink_logit_gap", "value_norm_ratio", "ablation_loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)
    for name in ("bos_loss", "row_entropy", "column_entropy", "loss", "peak_without"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)
    for name in ("resid_norm_bos", "resid_norm_rest", "value_norm", "example_pattern"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)


@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_backends_agree(backend, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    tokens = random_tokens(8, 8)
    results = [
        measure_active_dormant(
            wb.load(str(tmp_path), backend=name), tokens, ActiveDormantConfig(), domains(4, 4)
        )
        for name in ("hf", backend)
    ]
    compare(results[1], results[0])
    torch.testing.assert_close(results[1].p_sink, results[0].p_sink)


def test_batches_and_order_do_not_change_the_numbers():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(9, 10)
    config = ActiveDormantConfig(n_examples=0)
    whole = measure_active_dormant(model, tokens, config, domains(4, 5))
    parts = measure_active_dormant(
        model, tokens, ActiveDormantConfig(n_rows=3, n_examples=0), domains(4, 5, batch_size=2)
    )
    compare(parts, whole)
    torch.testing.assert_close(parts.p_loss, whole.p_loss)
    order = torch.tensor([0, 8, 2, 1, 4, 3, 7, 6, 5])
    labels = [("first",) * 4 + ("second",) * 5][0]
    context = Context(labels={"domain": tuple(labels[i] for i in order)})
    compare(measure_active_dormant(model, tokens[order], config, context), whole)


def test_a_padded_prompt_counts_as_it_does_alone():
    lengths = [12, 7, 12, 9, 12, 6, 12, 8]
    tokens, mask = padded(random_tokens(8), lengths, "right")
    model, config = wb.wrap(tiny_model("llama")), ActiveDormantConfig()
    found = measure_active_dormant(model, tokens, config, domains(4, 4, attention_mask=mask))
    # Each domain's means, from prompts that were measured in batches of their own length.
    from probes.active_dormant_prompts import measure_prompts

    alone = [
        measure_prompts(model, tokens[i : i + 1, :n], Context()) for i, n in enumerate(lengths)
    ]
    for d, rows in enumerate((range(4), range(4, 8))):
        for array, name in (("sink_attention", "sink"), ("sink_logit_gap", "gap")):
            expected = torch.cat([alone[i].activity[name] for i in rows]).mean(0)
            torch.testing.assert_close(getattr(found, array)[d], expected, rtol=1e-4, atol=1e-4)
        expected = torch.cat([alone[i].change[0] for i in rows]).mean(0)
        torch.testing.assert_close(found.ablation_loss[d], expected, rtol=0, atol=1e-4)
    assert found.example_tokens[1, 6:].tolist() != [-1] * 6  # its first prompt is whole


def test_progress_counts_layers_and_a_killed_run_goes_on():
    kept, seen = {}, []

    def keep(name, compute):
        if name not in kept:
            if len(kept) == stop:
                raise KeyboardInterrupt
            kept[name] = compute()
        return kept[name]

    def progress(done, total):
        seen.append((done, total))

    model, tokens, stop = wb.wrap(tiny_model("gpt2")), random_tokens(8, 8), 5
    context = domains(4, 4, batch_size=4, keep=keep, progress=progress)
    with pytest.raises(KeyboardInterrupt):
        measure_active_dormant(model, tokens, ActiveDormantConfig(), context)
    stop = -1
    seen.clear()
    found = measure_active_dormant(model, tokens, ActiveDormantConfig(), context)
    assert seen == [(n, 6) for n in range(1, 7)]  # two batches: activity and two layers each
    compare(found, measure_active_dormant(model, tokens, ActiveDormantConfig(), domains(4, 4)))


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


# Refusals


def test_one_domain_or_too_few_prompts_are_refused():
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(6, 8)
    with pytest.raises(DataError, match="two or more domains"):
        measure_active_dormant(model, tokens, ActiveDormantConfig())
    with pytest.raises(DataError, match=r"at least 4 prompts a domain.*3 of first, 3 of second"):
        measure_active_dormant(model, tokens, ActiveDormantConfig(), domains(3, 3))


def test_short_prompts_are_refused():
    tokens, mask = padded(random_tokens(8, 8), [8] * 7 + [2], "right")
    with pytest.raises(DataError, match=r"at least 3 tokens.*prompt 7 has 2"):
        measure_active_dormant(
            wb.wrap(tiny_model("gpt2")),
            tokens,
            ActiveDormantConfig(),
            domains(4, 4, attention_mask=mask),
        )


@pytest.mark.parametrize(
    "wrong", [{"sink_threshold": 1.0}, {"fdr": 0.0}, {"n_rows": 0}, {"loss_threshold": -0.1}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ActiveDormantConfig(**wrong)


def test_too_few_permutations_are_refused():
    config = ActiveDormantConfig(n_permutations=20)
    with pytest.raises(ConfigError, match="at least 160"):
        measure_active_dormant(
            wb.wrap(tiny_model("gpt2")), random_tokens(8, 8), config, domains(4, 4)
        )


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
