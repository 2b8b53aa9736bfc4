"""The state-space toy: its data, its layer against the theory's velocity, and its record."""

import dataclasses

import pytest
import torch

from probes.figures.state_space import figures, finding
from probes.state_space_dynamics import Systems, velocity
from toy_tasks.state_space import (
    VARIANTS,
    SelectiveLayer,
    SelectiveStack,
    StateSpaceConfig,
    draw_sequences,
    positive_share,
    train_state_space,
)
from toy_tasks.training import TrainingError
from workbench.models.selective import exclude_regime, scan_of

SMALL = StateSpaceConfig(
    n_layers=2, d_model=8, d_state=2, n_pos=6, batch_size=8, steps=4, record_every=2
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train_state_space(SMALL, folder)


def stack(variant, seed=0):
    torch.manual_seed(seed)
    return SelectiveStack(SMALL, variant)


def test_a_sequence_has_one_signal_in_its_first_half():
    tokens, label = draw_sequences(SMALL, 200, torch.Generator().manual_seed(0))
    signal = tokens >= SMALL.n_noise
    assert (signal.sum(1) == 1).all()
    assert not signal[:, 3:].any()
    assert torch.equal(tokens[signal] - SMALL.n_noise, label)
    assert set(label.tolist()) == set(range(SMALL.n_classes))


def test_the_layer_moves_tokens_by_the_theorys_velocity():
    # Independent of the scan: the simulator's right-hand side, decay a = 1, no time-step bias.
    torch.manual_seed(0)
    layer = SelectiveLayer(8, 2).double()
    with torch.no_grad():
        layer.dt_proj.bias.zero_()
    delta, b, c = layer.x_proj.weight.detach().split([layer.time_step_rank, 2, 2])
    systems = Systems(
        (c.T @ b)[None], (layer.dt_proj.weight.detach() @ delta)[None], torch.ones(1, 8).double()
    )
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x).detach() - x, velocity(systems, x), rtol=1e-4, atol=1e-6)


def test_one_small_layer_shrinks_or_grows_tokens_by_its_sign():
    for sign, grows in (("positive", True), ("negative", False)):
        torch.manual_seed(1)
        layer = SelectiveLayer(8, 8)  # a full-rank M, so that no direction is left out
        exclude_regime(layer, sign)
        x = torch.randn(4, 1, 8)  # one token: x' = Delta (x^T M x) x, with the sign of M
        moved = layer(x).norm(dim=-1) > x.norm(dim=-1)
        assert (moved == grows).all()


def test_signs_turned_behind_an_output_projection_are_the_same_function():
    # Why the toy has no output projection.
    torch.manual_seed(0)
    layer, x = SelectiveLayer(8, 2), torch.randn(2, 5, 8)
    before = scan_of(layer, x)
    with torch.no_grad():
        layer.x_proj.weight[layer.time_step_rank : layer.time_step_rank + 2] *= -1
    torch.testing.assert_close(scan_of(layer, x), -before)


@pytest.mark.parametrize(
    ("variant", "share"), [("positive", 1.0), ("negative", 0.0), ("mixed", 0.5)]
)
def test_variants_keep_their_signs(run, variant, share):
    assert positive_share(stack(variant)) == share
    assert (run[1].positive_share[VARIANTS.index(variant)] == share).all()


def test_variants_start_alike_and_only_one_is_reordered():
    tokens, _ = draw_sequences(SMALL, 5, torch.Generator().manual_seed(0))
    free, reordered = stack("free"), stack("reordered")
    torch.testing.assert_close(free.embed.weight, reordered.embed.weight)
    torch.testing.assert_close(free.head.weight, reordered.head.weight)
    reordered.order = None
    torch.testing.assert_close(free(tokens)[0], reordered(tokens)[0])


def test_a_run_is_recorded_repeatable_and_taken_up_again(run, tmp_path):
    folder, first = run
    assert first.step.tolist() == [0, 2, 4]
    assert first.loss.shape == (5, 3)
    assert first.token_norm.shape == (5, 3, 3)
    again = train_state_space(SMALL, tmp_path)
    torch.testing.assert_close(again.loss, first.loss)
    # What is done is read, not trained.
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*d.safetensors")}
    (tmp_path / "mixed.safetensors").unlink()
    taken_up = train_state_space(SMALL, tmp_path)
    torch.testing.assert_close(taken_up.loss, first.loss)
    assert {path: path.stat().st_mtime_ns for path in stamps if "mixed" not in path.name} == {
        path: stamp for path, stamp in stamps.items() if "mixed" not in path.name
    }
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(TrainingError, match="settings it began with"):
        train_state_space(dataclasses.replace(SMALL, lr=0.5), tmp_path)


def test_figures_and_finding_show_the_record(run):
    result = run[1]
    drawn = figures(result)
    assert list(drawn) == ["learning", "token_norms"]
    traces = {trace.name: trace for trace in drawn["learning"].data[: len(VARIANTS)]}
    torch.testing.assert_close(torch.tensor(traces["mixed"].y), result.accuracy[3])
    assert "reordered" in finding(result)
    assert len(result.table()["variant"]) == 5


def test_it_learns_when_it_may(tmp_path):
    config = StateSpaceConfig(
        n_layers=1,
        d_model=12,
        d_state=4,
        n_pos=4,
        n_classes=2,
        n_noise=2,
        steps=60,
        record_every=60,
    )
    result = train_state_space(config, tmp_path)
    assert (result.accuracy[:, -1] > 0.9).all()
    assert (result.accuracy[:, 0] < 0.8).all()


def test_more_states_than_numbers_are_refused():
    with pytest.raises(TrainingError, match="d_state must be at most d_model"):
        StateSpaceConfig(d_model=4, d_state=8)
