"""Classes, examples and headline numbers of active-dormant heads on chosen and on unequal values."""

import math

import pytest
import torch

from probes.active_dormant import ActiveDormantConfig, ActiveDormantResult
from probes.active_dormant_activity import column_entropy, first_and_rest
from probes.active_dormant_examples import EXAMPLE_POS, choose_heads, read_examples
from probes.active_dormant_statistics import (
    Domains,
    adjusted,
    check_prompts,
    choose_permutations,
    dormant_heads,
    judged,
    n_relabellings,
    permutation_p,
    prompts_needed,
    range_of_means,
)
from workbench.context import Context
from workbench.errors import ConfigError, DataError
from workbench.testing import PlantedModel

NAN = math.nan


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def result(**changes):
    """Two domains, one layer, three heads: active, switching, dormant."""
    numbers = {
        name: drawn(2, 1, 3, seed=n)
        for n, name in enumerate(
            (
                "sink_attention",
                "sink_logit_gap",
                "value_norm",
                "value_norm_ratio",
                "ablation_loss",
                "bos_loss",
                "row_entropy",
                "column_entropy",
            )
        )
    }
    fields = {
        **numbers,
        "p_sink": torch.tensor([[0.01, 0.02, 0.5]]),
        "p_loss": torch.tensor([[0.03, 0.6, 0.7]]),
        "q_sink": torch.tensor([[0.04, 0.0625, 0.5]]),
        "q_loss": torch.tensor([[0.0625, 0.7, 0.7]]),
        "dormant": torch.tensor([[[False, True, True]], [[False, False, True]]]),
        "loss": torch.tensor([2.0, 3.0]),
        "resid_norm_bos": torch.tensor([[2.0, 8.0], [1.0, 4.0]]),
        "resid_norm_rest": torch.tensor([[4.0, 2.0], [1.0, 2.0]]),
        "peak_without": torch.tensor([[[4.0], [2.0]], [[1.0], [3.0]]]),
        "n_prompts": torch.tensor([3, 4]),
        "example_head": torch.zeros(1, 2, dtype=torch.long),
        "example_tokens": torch.zeros(2, 2, dtype=torch.long),
        "example_pattern": torch.zeros(1, 2, 2, 2),
        "labels": {"domain": ("news", "code"), "part": ("attention", "mlp")},
        "config": ActiveDormantConfig(fdr=0.0625),
    }
    return ActiveDormantResult(**{**fields, **changes})


def test_headline_numbers_by_hand():
    found = result().metrics()
    assert found == pytest.approx(
        {
            "n_always_active": 1.0,
            "n_active_dormant": 1.0,
            "n_always_dormant": 1.0,
            # A q of exactly the level counts.
            "n_different_sink": 2.0,
            "n_different_loss": 1.0,
            "smallest_p": 1 / 35,
            "resid_peak": 6.0,
            "resid_peak_ratio": (4.0 + 2.0) / 2,
            "n_prompts": 7.0,
            "peak_mlp_layer": 0.0,
            "peak_share_without_mlp": (2 / 8 + 3 / 4) / 2,
        }
    )
    torch.testing.assert_close(result().peak_share(), torch.tensor([[0.375], [0.5]]))
    assert result().peak_maker() == ("attention", 0)
    without = result(peak_without=torch.tensor([[[4.0], [NAN]], [[1.0], [NAN]]]))
    assert "peak_mlp_layer" not in without.metrics()
    assert without.peak_maker() == ("attention", 0)


def test_the_part_without_which_least_of_the_peak_is_left():
    two = {
        name: value.repeat(*([1] * (value.dim() - 2)), 2, 1)
        for name, value in vars(result()).items()
        if isinstance(value, torch.Tensor) and value.shape[-2:] == (1, 3)
    }
    deep = torch.tensor([[[4.0, 2.0], [8.0, 1.0]], [[2.0, 1.0], [4.0, 3.9]]])
    found = result(
        **two,
        peak_without=deep,
        resid_norm_bos=torch.tensor([[2.0, 8, 1], [1.0, 4, 1]]),
        resid_norm_rest=torch.ones(2, 3),
    )
    assert found.peak_maker() == ("attention", 1)
    assert found.metrics()["peak_mlp_layer"] == 1.0


def test_the_table_has_a_row_a_domain_and_head():
    found = result()
    table = found.table()
    assert table["domain"] == ["news"] * 3 + ["code"] * 3
    assert table["layer"] == [0] * 6
    assert table["head"] == [0, 1, 2] * 2
    assert table["class"] == ["always active", "active-dormant", "always dormant"] * 2
    assert table["bos_loss"] == found.bos_loss.flatten().tolist()
    assert table["q_sink"] == pytest.approx([0.04, 0.0625, 0.5] * 2)


# Entropy and means


def test_column_entropy_is_that_of_the_attention_that_keys_receive():
    # Three real tokens of four: received is a mean over the 3, 2 and 1 queries that see a key.
    received, valid = drawn(1, 2, 4), torch.tensor([[1.0, 1, 1, 0]])
    found = column_entropy(received, valid)
    for head in range(2):
        total = [float(received[0, head, k]) * (3 - k) for k in range(3)]
        share = [x / sum(total) for x in total]
        expected = -sum(x * math.log(x) for x in share) / math.log(3)
        assert found[0, head].item() == pytest.approx(expected, rel=1e-5)
    alone = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    assert column_entropy(alone, valid).item() == 0.0


def test_the_first_position_apart_from_the_mean_of_the_others():
    x, valid = drawn(2, 3, 4), torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    first, rest = first_and_rest(x, valid)
    assert torch.equal(first, x[..., 0])
    torch.testing.assert_close(rest[0], (x[0, :, 1] + x[0, :, 2]) / 2)
    torch.testing.assert_close(rest[1], x[1, :, 1:].mean(dim=-1))


# Examples


def test_heads_that_switch_come_first_by_the_loss_then_the_others_by_their_sinks():
    sink = torch.tensor([[[0.9, 0.1, 0.5], [0.2, 0.9, 0.9]], [[0.1, 0.1, 0.9], [0.3, 0.8, 0.0]]])
    loss = torch.tensor([[[0.0, 0.1, 0.2], [0.0, 0.0, 0.1]], [[0.0, 0.1, 0.5], [0.7, 0.0, 0.1]]])
    dormant = torch.zeros(2, 2, 3, dtype=torch.bool)
    dormant[0, 0, 2] = dormant[1, 1, 0] = True  # they switch
    dormant[:, 1, 1] = True  # always dormant
    # Switching, by losses of 0.7 and 0.3; then sinks by 0.9, 0.8, 0.1 and 0.
    expected = [[1, 0], [0, 2], [1, 2], [0, 0], [1, 1], [0, 1]]
    for n in (1, 4, 6):
        assert choose_heads(sink, loss, dormant, n).tolist() == expected[:n]


def test_examples_are_the_first_prompt_of_every_domain_and_its_corner():
    n_pos = EXAMPLE_POS + 3
    pattern = drawn(3, 2, 2, n_pos, n_pos)
    seen = []

    class Recorded(PlantedModel):
        def capture(self, tokens, sites, *args, **options):
            seen.append((tokens.shape, [site.layer for site in sites]))
            return super().capture(tokens, sites, *args, **options)

    model = Recorded(pattern)
    tokens = torch.arange(3 * n_pos).view(3, n_pos)
    domains = Domains(("a", "b"), torch.tensor([1, 1, 0]))
    heads = torch.tensor([[1, 0], [0, 1], [1, 1]])
    mask = torch.ones(3, n_pos, dtype=torch.long)
    mask[0, 5:] = 0
    found = read_examples(model, tokens, domains, heads, Context(attention_mask=mask))
    assert seen == [((1, EXAMPLE_POS), [0, 1]), ((1, 5), [0, 1])]
    assert torch.equal(found.tokens[0], tokens[2, :EXAMPLE_POS])
    assert found.tokens[1].tolist() == [*tokens[0, :5].tolist(), *[-1] * (EXAMPLE_POS - 5)]
    assert found.pattern.shape == (3, 2, EXAMPLE_POS, EXAMPLE_POS)
    # A planted model shows its first patterns to whoever asks alone.
    for example, (layer, head) in enumerate(heads.tolist()):
        assert torch.equal(found.pattern[example, 1, :5, :5], pattern[0, layer, head, :5, :5])
        assert found.pattern[example, 1, 5:].sum() == found.pattern[example, 1, :, 5:].sum() == 0
    seen.clear()
    none = read_examples(model, tokens, domains, heads[:0], Context())
    assert (none.pattern.shape[0], seen) == (0, [])
    assert torch.equal(none.tokens[1], tokens[0, :EXAMPLE_POS])


# The test between domains


def test_the_range_of_means_against_loops():
    x, index = drawn(7, 3), torch.tensor([[0, 0, 1, 2, 2, 2, 1], [0, 1, 2, 2, 2, 1, 0]])
    found = range_of_means(x, index, 3)
    for draw in range(2):
        means = torch.stack([x[index[draw] == d].mean(dim=0) for d in range(3)])
        torch.testing.assert_close(found[draw], means.amax(dim=0) - means.amin(dim=0))


def test_p_values_count_relabellings_at_least_as_large(monkeypatch):
    x = drawn(6, 2, 2)
    domains = Domains(("a", "b"), torch.tensor([0, 0, 0, 1, 1, 1]))
    for chunk in (256, 7, 20):
        monkeypatch.setattr("probes.active_dormant_statistics.CHUNK", chunk)
        found = permutation_p(x, domains, 20, torch.Generator().manual_seed(3))
        generator, orders = torch.Generator().manual_seed(3), []
        for start in range(0, 20, chunk):
            size = min(chunk, 20 - start)
            orders += list(torch.rand(size, 6, generator=generator).argsort(dim=1))
        flat = x.flatten(1).double()
        own = (flat[:3].mean(0) - flat[3:].mean(0)).abs()
        counts = torch.ones(4)
        for order in orders:
            labels = domains.index[order]
            gap = (flat[labels == 0].mean(0) - flat[labels == 1].mean(0)).abs()
            counts += gap >= own - 1e-9
        torch.testing.assert_close(found, (counts / 21).view(2, 2))


def test_q_values_against_their_definition():
    p = drawn(3, 4)
    p[1, 2] = p[0, 0]
    found, flat = adjusted(p), p.flatten().tolist()
    for value, q in zip(flat, found.flatten().tolist(), strict=True):
        ratios = [12 * other / sum(x <= other for x in flat) for other in flat if other >= value]
        assert q == pytest.approx(min(1.0, *ratios), rel=1e-5)


def test_relabellings_that_can_be_told_apart():
    assert n_relabellings(torch.tensor([2, 3])) == 10
    assert n_relabellings(torch.tensor([3, 3])) == 10  # 20, but names can be swapped
    assert n_relabellings(torch.tensor([1, 2, 2])) == 15
    assert n_relabellings(torch.tensor([2, 2, 2])) == 15
    assert prompts_needed(2, 0.1) == 3
    assert prompts_needed(2, 0.11) == 3
    assert prompts_needed(2, 1 / 3) == 2
    assert prompts_needed(2, 1.0) == 1
    check_prompts(Domains(("a", "b"), torch.tensor([0, 0, 0, 1, 1, 1])), 0.1)
    with pytest.raises(DataError, match="at least 4 prompts"):
        check_prompts(Domains(("a", "b"), torch.tensor([0, 0, 0, 1, 1, 1])), 0.09)


def test_so_many_permutations_that_one_head_alone_can_pass():
    assert choose_permutations(None, 4, 0.05) == 9_999
    assert choose_permutations(None, 1000, 0.05) == 20_000
    assert choose_permutations(80, 4, 0.05) == 80
    with pytest.raises(ConfigError, match=r"at least 80.*got 79"):
        choose_permutations(79, 4, 0.05)


def test_dormant_needs_more_than_the_sinks_threshold_and_no_more_than_the_losss():
    sink = torch.tensor([0.5, 0.51, 0.51, 0.51]).view(1, 1, 4)
    loss = torch.tensor([0.0, 0.25, 0.26, -1.0]).view(1, 1, 4)
    assert dormant_heads(sink, loss, 0.5, 0.25).flatten().tolist() == [False, True, False, True]
    mean = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])
    found = judged(mean, torch.tensor([[True, False]]))
    assert found.flatten().tolist() == [1.0, 4.0, 3.0, 4.0]


def test_means_of_domains_leave_nan_out():
    domains = Domains(("a", "b", "c"), torch.tensor([1, 0, 1, 2]))
    x = torch.tensor([[1.0, NAN], [2.0, 5.0], [3.0, 7.0], [4.0, 8.0]])
    assert domains.mean(x).tolist() == [[2.0, 5.0], [2.0, 7.0], [4.0, 8.0]]
    assert domains.sizes.tolist() == [1, 2, 1]
