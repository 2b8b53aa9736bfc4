"""What a result of attention sinks says, against loops over unequal values."""

import pytest
import torch

from probes.attention_sinks_results import AttentionSinkConfig, AttentionSinkResult

N_BATCH, N_LAYERS, N_HEADS, N_POS, AT = 3, 2, 4, 6, 2


def drawn(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def result(**settings):
    config = AttentionSinkConfig(**{"threshold": 0.5, "position": AT, **settings})
    return AttentionSinkResult(
        drawn(N_BATCH, N_LAYERS, N_HEADS, N_POS, seed=1),
        drawn(N_LAYERS, 2, N_POS, seed=2),
        drawn(N_LAYERS, 2, N_POS, seed=3),
        drawn(N_LAYERS, N_HEADS, N_POS, seed=4),
        drawn(N_LAYERS + 1, N_POS, seed=5),
        drawn(N_LAYERS, N_HEADS, N_POS, seed=6),
        drawn(N_LAYERS, N_HEADS, N_POS, seed=7),
        config,
    )


def heads():
    return [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]


def over_others(row, at=AT):
    others = [float(x) for pos, x in enumerate(row) if pos != at]
    return float(row[at]) / (sum(others) / len(others))


def test_a_head_sinks_at_the_position_that_is_judged():
    found = result()
    rates = [
        [float(found.score[b, layer, head, AT]) > 0.5 for b in range(N_BATCH)]
        for layer, head in heads()
    ]
    share = sum(map(sum, rates)) / (N_BATCH * len(rates))
    assert 0 < share < 1
    assert found.sink_rate() == found.metrics()["sink_rate"] == pytest.approx(share)
    assert found.sink_rate(0) == pytest.approx(float((found.score[..., 0] > 0.5).sum()) / 24)
    always = [at for at, row in zip(heads(), rates, strict=True) if all(row)]
    assert found.sink_heads() == always
    assert found.table()["sink_rate"] == pytest.approx([sum(row) / N_BATCH for row in rates])


def test_headline_numbers():
    found = result()
    metrics = found.metrics()
    assert metrics["mean_score"] == pytest.approx(float(found.score[..., AT].sum()) / 24)
    mean = found.ov_norm.sum(dim=(0, 1)) / 8
    assert metrics["value_drain"] == pytest.approx(over_others(mean))
    assert metrics["resid_peak_ratio"] == pytest.approx(max(map(over_others, found.resid_norm)))
    assert (metrics["n_prompts"], metrics["n_pos"]) == (3.0, 6.0)
    assert "sink_rate_at_0" not in metrics
    swapped = result(inputs="swap")
    assert swapped.metrics()["sink_rate_at_0"] == swapped.sink_rate(0)


def test_the_table_has_a_row_a_head():
    found = result()
    table = found.table()
    assert list(zip(table["layer"], table["head"], strict=True)) == heads()
    scores = [float(found.score[:, layer, head, AT].sum()) / N_BATCH for layer, head in heads()]
    assert table["mean_score"] == pytest.approx(scores)
    ratios = [over_others(found.ov_norm[layer, head]) for layer, head in heads()]
    assert table["ov_norm_ratio"] == pytest.approx(ratios)
    for name in ("qk_cosine", "qk_norm_product"):
        expected = [float(getattr(found, name)[layer, head, AT]) for layer, head in heads()]
        assert table[name] == pytest.approx(expected)
