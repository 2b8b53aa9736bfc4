"""What a cell takes, by hand, and the refusal of what cannot fit."""

import json

import pytest

from tests.execute.conftest import sinks
from workbench.errors import ConfigError
from workbench.execute.estimate import (
    LIBRARY_BYTES,
    Estimate,
    Estimator,
    Room,
    memory_bytes,
    model_sizes,
    refuse_what_cannot_fit,
    room_here,
)
from workbench.execute.inputs import PlanInputs


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
    assert memory_bytes(cell, sizes, n_prompts=1) == LIBRARY_BYTES + sizes.weight_bytes + one


def test_tokens_are_counted_over_prompts_and_domains(two_models):
    inputs = PlanInputs()
    assert inputs.prompts("builtin:natural", 2).n_tokens(16) == 2 * 16
    domains = {"a": "builtin:natural", "b": "builtin:code"}
    assert inputs.prompts(domains, 2).n_tokens(16) == 2 * 2 * 16
    assert inputs.prompts([[1, 2, 3], [4]], None).n_tokens(None) == 4
    assert inputs.prompts("random", 5).n_tokens(None) == 5 * 64
    assert inputs.prompts("random", None).n_tokens(128) == 100 * 128
    assert inputs.prompts(None, 5) is None


def test_time_is_a_lower_bound_until_the_store_knows(two_models, store):
    import workbench as wb

    cell = cell_of(two_models)
    first = Estimator(store, PlanInputs()).estimate(cell)
    assert first.is_lower_bound
    assert 0 < first.seconds < 1
    done = wb.run(
        "attention-sinks", two_models[0], "builtin:natural", n_pos=16, limit=2, store=store
    )
    then = Estimator(store, PlanInputs()).estimate(cell)
    assert (then.seconds, then.is_lower_bound) == (done.provenance["seconds"], False)
    unknown = Estimator(store, PlanInputs()).estimate(cell_of(two_models, models="nobody/nothing"))
    assert unknown == Estimate(None, None)


def test_what_cannot_fit_is_refused_with_what_to_lower(two_models):
    cells = sinks(two_models).cells
    estimates = [Estimate(3_000_000_000, 1.0), Estimate(5_000_000_000, 1.0)]
    with pytest.raises(ConfigError, match=r"1 of 2 do not: .*other.* 5\.0 GB and 4\.0 GB are free"):
        refuse_what_cannot_fit(cells, estimates, Room(4_000_000_000))
    with pytest.raises(ConfigError, match=r"2 workers must fit .* give --workers 1"):
        refuse_what_cannot_fit(cells, estimates, Room(9_999_999_999, 2))
    refuse_what_cannot_fit(cells, estimates, Room(10_000_000_000, 2))
    refuse_what_cannot_fit(cells, [Estimate(None, None)] * 2, Room(1, 2))
    refuse_what_cannot_fit([], [], Room(1, 2))


def test_each_gpu_has_room_of_its_own(two_models):
    cells = sinks(two_models, seeds=[0, 1]).cells
    estimates = [Estimate(5_000_000_000, 1.0)] * 4
    refuse_what_cannot_fit(cells, estimates, Room(6_000_000_000, 2, n_places=2))
    with pytest.raises(
        ConfigError, match=r"2 workers must fit .* of each of 2 GPUs .* --workers 2"
    ):
        refuse_what_cannot_fit(cells, estimates, Room(6_000_000_000, 4, n_places=2))


def test_room_is_the_gpus_where_cells_run_on_them(two_models, monkeypatch):
    free = [9 << 30, 8 << 30]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (free[index], 10 << 30))
    monkeypatch.setattr("workbench.memory.free_memory_bytes", lambda: 7)
    assert room_here(sinks(two_models).cells, 3) == Room(8 << 30, 3, 2)
    assert room_here(sinks(two_models, device_map="auto").cells, 3) == Room(17 << 30, 3, 1)
    assert room_here(sinks(two_models, device="cpu").cells, 3) == Room(7, 3)


def test_a_device_that_is_not_here_is_refused_here_and_unknown_elsewhere(two_models, store):
    cells = sinks(two_models, device="cuda").cells
    with pytest.raises(ConfigError, match="finds no CUDA here"):
        room_here(cells, 1)
    estimate = Estimator(store, PlanInputs()).estimate(cells[0])
    assert (estimate.seconds, estimate.memory_bytes is None) == (None, False)


def test_a_hub_model_of_the_cache_has_sizes(two_models, tmp_path, monkeypatch):
    import shutil

    home = tmp_path / "models--some--body"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    cell = cell_of(two_models, models="some/body")
    assert model_sizes(cell) is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(two_models[0], home / "snapshots" / ("a" * 40))
    assert model_sizes(cell) == model_sizes(cell_of(two_models))


def test_the_newest_results_tell_the_time_and_no_others_are_read(two_models, store, monkeypatch):
    import workbench as wb
    from workbench.execute.estimate import PAST_RUNS

    for seed in range(PAST_RUNS + 2):
        wb.run(
            *("attention-sinks", two_models[0], "builtin:natural"),
            **{"n_pos": 16, "limit": 2, "seed": seed, "store": store},
        )
    read, whole = [], store.shelf.read
    monkeypatch.setattr(
        store.shelf, "read", lambda key, **how: read.append(key) or whole(key, **how)
    )
    cell, again = sinks(two_models[:1], seeds=[98, 99]).cells
    store.list()
    read.clear()
    estimator = Estimator(store, PlanInputs())
    newest = [entry.key for entry in store.list()[:PAST_RUNS]]
    assert estimator.estimate(cell) == estimator.estimate(again)
    assert read == newest


def test_an_earlier_result_that_is_no_good_says_nothing_of_the_time(two_models, store):
    import workbench as wb

    done = wb.run(
        "attention-sinks", two_models[0], "builtin:natural", n_pos=16, limit=2, store=store
    )
    store.list()  # the catalogue has it
    manifest = store.folder(done.key) / "manifest.json"
    newer = json.loads(manifest.read_text()) | {"schema": 99}
    for content in (json.dumps(newer), "{cut"):
        manifest.write_text(content)
        found = Estimator(store, PlanInputs()).estimate(cell_of(two_models, seeds=[5]))
        assert found.is_lower_bound
