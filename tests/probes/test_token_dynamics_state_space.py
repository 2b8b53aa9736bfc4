"""State-space mode: spectra worked by hand, planted regimes, and real mixers of transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from probes.token_dynamics import TokenDynamicsConfig, measure_token_dynamics
from probes.token_dynamics_state_space import (
    count_signs,
    layer_numbers,
    regime_of,
    short_eigenvalues,
    symmetric_eigenvalues,
)
from tests.zoo import random_tokens, tiny_model
from workbench.context import Context
from workbench.errors import CapabilityError

N = 8
"""d_state of the tiny Mamba."""
CONFIG = TokenDynamicsConfig(mode="state-space")
NO_TOKENS = torch.zeros(0, 0, dtype=torch.long)


def measure(model):
    return measure_token_dynamics(model, NO_TOKENS, CONFIG)


def triangle(seed=0, n=N, d=20):
    """A matrix of full row rank: ones on the diagonal, zeros below."""
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return drawn.triu(1) + torch.eye(n, d)


SIGNS = {
    "divergent": torch.ones(N),
    "convergent": -torch.ones(N),
    "mixed": torch.cat([torch.ones(N // 2), -torch.ones(N // 2)]),
}


# Mathematics


def test_a_spectrum_by_hand():
    # M = S_C^T S_B = [[2, 0], [0, -3]].
    s_c, s_b = torch.eye(2), torch.tensor([[2.0, 0], [0, -3.0]])
    values = short_eigenvalues(s_b, s_c).real.sort().values
    torch.testing.assert_close(values, torch.tensor([-3.0, 2.0], dtype=torch.float64))
    found = layer_numbers(s_b[None], s_c[None], torch.eye(2), torch.tensor([[1.0], [3.0]]))
    assert found["eigenvalues"].tolist() == [[-3, 0], [2, 0]]
    assert (int(found["n_positive"]), int(found["n_negative"]), int(found["regime"])) == (1, 1, 0)
    assert found["decay"].tolist() == [1, 2, 3]
    assert found["delta_norm"].item() == pytest.approx(2**0.5)


def test_complex_pairs_are_kept_as_two_columns():
    s_c, s_b = torch.eye(2), torch.tensor([[1.0, -2.0], [2.0, 1.0]])
    found = layer_numbers(s_b[None], s_c[None], torch.eye(2), torch.ones(2, 1))["eigenvalues"]
    assert found[:, 0].tolist() == pytest.approx([1, 1])
    assert sorted(found[:, 1].tolist()) == pytest.approx([-2, 2])


@given(n=st.integers(1, 6), d=st.integers(7, 30), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_shortcut_gives_the_whole_spectrum(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    s_b, s_c = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    whole = torch.linalg.eigvals(s_c.T @ s_b)
    largest = whole[whole.abs().argsort(descending=True)[:n]]
    short = short_eigenvalues(s_b, s_c)
    for value in largest:
        assert (short - value).abs().min() < 1e-6 * largest.abs().max()
    # The other d - n are zero.
    assert whole.abs().sort().values[: d - n].max() < 1e-4 * largest.abs().max()


@given(n=st.integers(1, 5), d=st.integers(11, 24), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_small_basis_gives_the_inertia(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    s_b, s_c = (torch.randn(n, d, generator=generator) for _ in range(2))
    whole = (s_c.T @ s_b).double()
    expected = torch.linalg.eigvalsh((whole + whole.T) / 2)
    found = symmetric_eigenvalues(s_b, s_c)
    scale = expected.abs().max().item()
    assert count_signs(found, scale) == (
        int((expected > 1e-5 * scale).sum()),
        int((expected < -1e-5 * scale).sum()),
    )
    torch.testing.assert_close(found.min(), expected.min(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SIGNS)
def test_planted_regimes_are_named(name):
    # Card section 7.3: S_C = P, S_B = lam P, P of full row rank: signs of lam are those of M.
    p, lam = triangle(), SIGNS[name] * (0.7 + torch.arange(N))
    found = layer_numbers((lam[:, None] * p)[None], p[None], torch.eye(20), torch.ones(20, 1))
    expected = int((lam > 0).sum()), int((lam < 0).sum())
    assert (int(found["n_positive"]), int(found["n_negative"])) == expected
    assert ("convergent", "mixed", "divergent")[int(found["regime"]) + 1] == name
    assert (int(found["symmetric_positive"]), int(found["symmetric_negative"])) == expected


def test_generic_matrices_have_an_indefinite_symmetric_part():
    s_b, s_c = (torch.randn(N, 40, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert count_signs(symmetric_eigenvalues(s_b, s_c), 1.0) == (N, N)


def test_nothing_is_neither():
    assert [regime_of(*counts) for counts in ((0, 0), (3, 0), (0, 2), (1, 1))] == [0, 1, -1, 0]
    zero = torch.zeros(1, 3, 5)
    assert layer_numbers(zero, zero, torch.eye(5), torch.ones(5, 1))["regime"] == 0


def test_the_spectrum_does_not_depend_on_the_basis():
    s_b, s_c = torch.randn(N, 20), torch.randn(N, 20)
    rotation = torch.linalg.qr(torch.randn(20, 20)).Q
    order = torch.randperm(N)
    decay = torch.ones(20, 1)
    found = layer_numbers(s_b[None], s_c[None], torch.eye(20), decay)
    moved = layer_numbers(
        (s_b @ rotation)[order][None], (s_c @ rotation)[order][None], torch.eye(20), decay
    )
    real = found["eigenvalues"][:, 0], moved["eigenvalues"][:, 0]
    torch.testing.assert_close(*real, rtol=1e-3, atol=1e-3)
    for name in ("n_positive", "n_negative", "symmetric_positive", "symmetric_negative"):
        assert found[name] == moved[name]


# Checkpoints


def test_a_mamba_is_read_row_by_row():
    model = tiny_model("mamba")
    found = measure(wb.wrap(model))
    for layer, block in enumerate(model.backbone.layers):
        mixer = block.mixer
        rank = mixer.dt_proj.weight.shape[1]
        rows = mixer.x_proj.weight.detach().double()
        b, c = rows[rank : rank + N], rows[rank + N : rank + 2 * N]
        whole = torch.linalg.eigvals(c.T @ b)
        real = whole[whole.abs().argsort()[-N:]].real.sort().values
        torch.testing.assert_close(
            found.eigenvalues[layer, :, 0].double(), real, rtol=1e-4, atol=1e-4
        )
        delta = mixer.dt_proj.weight @ mixer.x_proj.weight[:rank]
        torch.testing.assert_close(found.delta_norm[layer], delta.detach().norm())
        a = mixer.A_log.detach().exp()
        torch.testing.assert_close(found.decay[layer], torch.stack([a.min(), a.mean(), a.max()]))
    assert (found.n_positive + found.n_negative == N).all()
    assert found.labels["regime"] == ("mixed", "mixed")
    assert found.metrics()["share_mixed"] == 1.0


def test_b_and_c_are_those_of_the_forward_pass():
    # Independent of row arithmetic: what the mixer itself splits into B and C.
    model = tiny_model("mamba")
    mixer, x = model.backbone.layers[0].mixer, torch.randn(3, model.config.intermediate_size)
    _, b, c = torch.split(mixer.x_proj(x), [mixer.time_step_rank, N, N], dim=-1)
    wrapped = wb.wrap(model)
    torch.testing.assert_close(x @ wrapped.weight("S_B", 0)[0].T, b.detach())
    torch.testing.assert_close(x @ wrapped.weight("S_C", 0)[0].T, c.detach())
    delta = mixer.dt_proj(mixer.x_proj(x)[:, : mixer.time_step_rank]).detach()
    expected = x @ wrapped.weight("S_Delta", 0).T + wrapped.weight("Delta_bias", 0)
    torch.testing.assert_close(expected, delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SIGNS)
def test_planted_checkpoints_are_named(name):
    model = tiny_model("mamba")
    for layer, block in enumerate(model.backbone.layers):
        p = triangle(layer, d=model.config.intermediate_size)
        rank = block.mixer.time_step_rank
        with torch.no_grad():
            block.mixer.x_proj.weight[rank : rank + N] = SIGNS[name][:, None] * p
            block.mixer.x_proj.weight[rank + N :] = p
    found = measure(wb.wrap(model))
    assert found.labels["regime"] == (name, name)
    metrics = found.metrics()
    assert metrics["share_convergent"] == float(name == "convergent")
    assert metrics["share_divergent"] == float(name == "divergent")


def mamba2(n_groups):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba2",
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=N,
        num_heads=8,
        head_dim=8,
        n_groups=n_groups,
        expand=2,
        chunk_size=8,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("n_groups", [1, 2])
def test_mamba2_keeps_b_and_c_in_its_input_projection(n_groups):
    model = mamba2(n_groups)
    mixer, u = model.backbone.layers[1].mixer, torch.randn(3, 32)
    inner, wide = mixer.intermediate_size, n_groups * N
    # As the mixer splits: gate | x and B and C | time step.
    rest = mixer.in_proj(u)[:, inner:].detach()
    _, b, c, delta = rest.split([inner, wide, wide, mixer.num_heads], dim=-1)
    wrapped = wb.wrap(model)
    b_found = torch.einsum("td,gnd->tgn", u, wrapped.weight("S_B", 1)).flatten(1)
    c_found = torch.einsum("td,gnd->tgn", u, wrapped.weight("S_C", 1)).flatten(1)
    torch.testing.assert_close(b_found, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(c_found, c, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(u @ wrapped.weight("S_Delta", 1).T, delta, rtol=1e-4, atol=1e-5)
    found = measure(wrapped)
    assert found.eigenvalues.shape == (2, n_groups * N, 2)
    real = found.eigenvalues[..., 0]
    assert (real.diff(dim=1) >= 0).all()
    expected = (
        torch.cat(
            [
                short_eigenvalues(wrapped.weight("S_B", 1)[g], wrapped.weight("S_C", 1)[g])
                for g in range(n_groups)
            ]
        )
        .real.sort()
        .values
    )
    torch.testing.assert_close(real[1].double(), expected, rtol=1e-5, atol=1e-5)


# From the outside


def test_it_runs_without_data_and_says_what_it_kept(tmp_path):
    model = wb.wrap(tiny_model("mamba"))
    result = wb.run("token-dynamics", model, mode="state-space", store=tmp_path)
    assert set(result.arrays) == {
        "eigenvalues",
        "n_positive",
        "n_negative",
        "regime",
        "symmetric_positive",
        "symmetric_negative",
        "delta_norm",
        "decay",
    }
    assert result.labels["regime"] == ["mixed", "mixed"]
    again = wb.Store(tmp_path).get(result.key)
    assert again.measured.metrics() == result.metrics()
    assert list(again.figures()) == ["eigenvalues", "signs"]
    table, real = again.table(), again.eigenvalues[..., 0]
    assert (table["layer"], table["mean_decay"]) == ([0, 1], again.decay.median(1).values.tolist())
    assert table["smallest_real_part"] == real.amin(dim=1).tolist()
    assert table["largest_real_part"] == real.amax(dim=1).tolist()


def test_layers_are_pieces_and_progress_is_told():
    told, kept = [], []

    def keep(name, compute):
        kept.append(name)
        return compute()

    context = Context(progress=lambda done, total: told.append((done, total)), keep=keep)
    measure_token_dynamics(wb.wrap(tiny_model("mamba")), NO_TOKENS, CONFIG, context)
    assert kept == ["layer-0", "layer-1"]
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_transformer_has_no_state_space(family):
    with pytest.raises(CapabilityError, match=rf"mode=state-space needs.*{family}.*set mode=walk"):
        measure(wb.wrap(tiny_model(family)))


def test_a_backend_without_the_weights_is_told_which_has_them(monkeypatch):
    def refuse(self, name, layer=None):
        raise CapabilityError(f"no {name}")

    model = wb.wrap(tiny_model("mamba"))
    monkeypatch.setattr(type(model), "weight", refuse)
    monkeypatch.setattr(type(model), "backend", "transformer-lens")
    with pytest.raises(CapabilityError, match=r"transformer-lens backend.*--backend hf"):
        measure(model)


def test_tokens_are_ignored():
    model = wb.wrap(tiny_model("mamba"))
    with_tokens = measure_token_dynamics(model, random_tokens(1, 4), CONFIG)
    assert torch.equal(with_tokens.eigenvalues, measure(model).eigenvalues)
