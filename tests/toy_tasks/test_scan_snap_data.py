"""Token ids, class laws and batches of the scan-snap toy."""

import pytest
import torch

from toy_tasks.scan_snap_data import ScanSnapConfig, class_law, draw_batch
from workbench.errors import ConfigError
from workbench.settings import make_config


def test_the_small_set_is_the_papers():
    config = ScanSnapConfig()
    law = class_law(config)
    assert (config.n_tokens, config.n_classes) == (34, 2)
    assert law.is_distinct[0].nonzero().flatten().tolist() == list(range(10, 20))
    assert law.is_distinct[1].nonzero().flatten().tolist() == list(range(20, 30))
    assert law.query.tolist() == [0, 1]
    assert law.next_token.tolist() == [32, 33]
    # Ten of weight 1 beside 0.1 + 0.2 + ... + 1 = 5.5.
    common = (law.prob * law.is_common).sum(dim=1)
    torch.testing.assert_close(common, torch.full((2,), 10 / 15.5, dtype=torch.float64))
    assert law.prob[1, 29] / law.prob[1, 20] == pytest.approx(10.0)


def test_ids_stand_in_the_order_of_the_contract():
    config = ScanSnapConfig(
        n_queries=2, n_classes_per_query=2, n_common=2, n_common_per_query=1, n_distinct=3
    )
    law = class_law(config)
    # 0 1 common | 2 3 of the queries | 4-6 7-9 10-12 13-15 distinct | 16 17 queries | 18-21 next
    supports = [row.nonzero().flatten().tolist() for row in law.prob]
    assert supports == [
        [0, 1, 2, 4, 5, 6],
        [0, 1, 2, 7, 8, 9],
        [0, 1, 3, 10, 11, 12],
        [0, 1, 3, 13, 14, 15],
    ]
    assert law.query.tolist() == [0, 0, 1, 1]
    assert law.next_token.tolist() == [18, 19, 20, 21]
    assert (config.n_context, config.n_tokens) == (16, 22)


def test_batches_follow_the_law():
    config = ScanSnapConfig(n_queries=2, n_classes_per_query=2, n_common_per_query=5)
    law = class_law(config)
    batch = draw_batch(law, (20_000, 31), [torch.Generator().manual_seed(0)])
    assert batch.counts.sum(dim=-1).unique().tolist() == [31.0]
    for row, (token, query) in enumerate(zip(law.next_token, law.query, strict=True)):
        mine = batch.target[0] == token
        assert mine.float().mean().item() == pytest.approx(0.25, abs=5 * (0.1875 / 20_000) ** 0.5)
        assert batch.query[0, mine].unique().tolist() == [query]
        n_drawn = 31 * mine.sum()
        share = batch.counts[0, mine].sum(dim=0) / n_drawn
        error = (law.prob[row] * (1 - law.prob[row]) / n_drawn).sqrt()
        assert ((share - law.prob[row]).abs() <= 5 * error).all()


def test_counts_spread_as_draws_with_replacement_do():
    law = class_law(ScanSnapConfig(n_queries=1, n_common=1, n_distinct=2))  # 1, 0.1, 1 over 2.1
    batch = draw_batch(law, (40_000, 10), [torch.Generator().manual_seed(3)])
    found = batch.counts[0, :, :3].T.cov()
    prob = law.prob[0, :3]
    wanted = 10 * (prob.diag() - prob[:, None] * prob)
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.03)


def test_a_run_draws_the_same_beside_others():
    law = class_law(ScanSnapConfig())
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = draw_batch(law, (4, 9), seeds)
    alone = draw_batch(law, (4, 9), [torch.Generator().manual_seed(6)])
    assert torch.equal(both.counts[1:], alone.counts)
    assert torch.equal(both.target[1:], alone.target)
    assert not torch.equal(both.counts[0], both.counts[1])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps", "0", "steps must be"),
        ("n_distinct", "0", "n_distinct must be at least 1"),
        ("n_queries", "0", "n_queries must be at least 1"),
        ("n_pos", "1", "n_pos must be at least 2"),
        ("lr_z", "0", "lr_z must be above 0"),
        ("momentum", "1", "momentum must be between"),
        ("init", "ones", "init must be one of zero, normal, uniform"),
        ("steps", "1000000", "1000002 checkpoints make 136000272; raise record_every"),
        ("n_distinct", "20000", "at most 10000 tokens; these counts make 40014"),
    ],
)
def test_impossible_settings_are_refused(name, value, words):
    with pytest.raises(ConfigError, match=words):
        make_config(ScanSnapConfig, {name: value}, "scan-snap")
