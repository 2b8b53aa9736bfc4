"""What a cell takes, by hand, and the refusal of what cannot fit."""

import json

import pytest

from tests.execute.conftest import sinks
from workbench.errors import ConfigError
from workbench.execute.estimate import (
    LIBRARY_BYTES,
    Estimate,
    Estimator,
    memory_bytes,
    model_sizes,
    n_tokens,
    refuse_what_cannot_fit,
)


def cell_of(two_models, **changes):
    return sinks(two_models[:1], **changes).cells[0]


def test_sizes_come_from_the_folder(two_models, tiny_folder):
    sizes = model_sizes(cell_of(two_models))
    assert (sizes.d_model, sizes.d_mlp, sizes.n_ctx) == (16, 64, 48)
    assert sizes.d_vocab == json.loads((tiny_folder / "config.json").read_text())["vocab_size"]
    assert sizes.weight_bytes == (tiny_folder / "model.safetensors").stat().st_size
    half = model_sizes(cell_of(two_models, dtypes="bfloat16"))
    assert half.weight_bytes == sizes.weight_bytes // 2
    assert model_sizes(cell_of(two_models, models="nobody/nothing")) is None


def test_memory_is_weights_activations_and_logits(two_models):
    cell = cell_of(two_models, batch_size=2)
    sizes = model_sizes(cell)
    # 16 positions: 16 d_model + 4 d_mlp numbers each, and the logits, of 4 bytes.
    one = 4 * 16 * (16 * 16 + 4 * 64) + 4 * 16 * sizes.d_vocab
    assert memory_bytes(cell, sizes) == LIBRARY_BYTES + sizes.weight_bytes + 2 * one
    single = cell_of(two_models, batch_size=2, limit=1)
    assert memory_bytes(single, sizes) == LIBRARY_BYTES + sizes.weight_bytes + one


def test_tokens_are_counted_over_prompts_and_domains(two_models):
    assert n_tokens(cell_of(two_models)) == 2 * 16
    domains = {"a": "builtin:natural", "b": "builtin:code"}
    assert n_tokens(cell_of(two_models, data=domains)) == 2 * 2 * 16


def test_time_is_a_lower_bound_until_the_store_knows(two_models, store):
    import workbench as wb

    cell = cell_of(two_models)
    first = Estimator(store).estimate(cell)
    assert first.is_lower_bound
    assert 0 < first.seconds < 1
    done = wb.run(
        "attention-sinks", two_models[0], "builtin:natural", n_pos=16, limit=2, store=store
    )
    then = Estimator(store).estimate(cell)
    assert (then.seconds, then.is_lower_bound) == (done.provenance["seconds"], False)
    unknown = Estimator(store).estimate(cell_of(two_models, models="nobody/nothing"))
    assert unknown == Estimate(None, None)


def test_what_cannot_fit_is_refused_with_what_to_lower(two_models):
    cells = sinks(two_models).cells
    estimates = [Estimate(3_000_000_000, 1.0), Estimate(5_000_000_000, 1.0)]
    with pytest.raises(ConfigError, match=r"1 of 2 do not: .*other.* 5\.0 GB and 4\.0 GB are free"):
        refuse_what_cannot_fit(cells, estimates, 1, 4_000_000_000)
    with pytest.raises(ConfigError, match=r"2 workers must fit .* give --workers 1"):
        refuse_what_cannot_fit(cells, estimates, 2, 9_999_999_999)
    refuse_what_cannot_fit(cells, estimates, 2, 10_000_000_000)
    refuse_what_cannot_fit(cells, [Estimate(None, None)] * 2, 2, 1)
    refuse_what_cannot_fit([], [], 2, 1)
