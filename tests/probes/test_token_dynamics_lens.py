"""Lenses and the decoding path."""

import json

import pytest
import torch

import workbench as wb
from probes.token_dynamics import TokenDynamicsConfig
from probes.token_dynamics_lens import decode, kl_divergence
from tests.probes.walks import walk
from tests.zoo import random_tokens, tiny_model
from workbench.errors import ConfigError, DataError
from workbench.models.base import Site


def save_lens(folder, weights, biases, kind):
    folder.mkdir()
    state = {f"{i}.weight": w.clone() for i, w in enumerate(weights)}
    state |= {f"{i}.bias": b.clone() for i, b in enumerate(biases)}
    sizes = {"num_hidden_layers": len(weights), "d_model": len(weights[0])}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    if kind == "pt":
        torch.save(state, folder / "params.pt")
    else:
        from safetensors.torch import save_file

        save_file(state, folder / "params.safetensors")


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_tuned_lens_adds_its_map(tmp_path, kind):
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(2, 10)
    generator = torch.Generator().manual_seed(0)
    weights = [0.2 * torch.randn(32, 32, generator=generator) for _ in range(2)]
    biases = [torch.randn(32, generator=generator) for _ in range(2)]
    save_lens(tmp_path / "lens", weights, biases, kind)
    config = TokenDynamicsConfig(new_tokens=0, tuned_lens=str(tmp_path / "lens"))
    found = walk(model, tokens, config)
    full = model.logits(tokens).log_softmax(-1)
    for layer in range(2):
        site = Site("resid_pre", layer)
        resid = model.capture(tokens, [site])[site]
        moved = resid + resid @ weights[layer].T + biases[layer]
        expected = kl_divergence(full, decode(model, moved, None)[0])[:, 1:].mean(1)
        torch.testing.assert_close(found.tuned_kl[:, layer], expected, rtol=1e-4, atol=1e-5)


def test_a_zero_lens_is_the_logit_lens_and_is_named_by_its_content(tmp_path):
    zero = [torch.zeros(32, 32)] * 2
    save_lens(tmp_path / "a", zero, [torch.zeros(32)] * 2, "safetensors")
    save_lens(tmp_path / "b", zero, [torch.ones(32)] * 2, "safetensors")
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(2, 10)
    config = TokenDynamicsConfig(new_tokens=0, tuned_lens=str(tmp_path / "a"))
    found = walk(model, tokens, config)
    torch.testing.assert_close(found.tuned_kl, found.lens_kl[:, :-1:2])
    assert config.tuned_lens.startswith("a@")
    assert str(tmp_path) not in config.tuned_lens
    other = TokenDynamicsConfig(tuned_lens=str(tmp_path / "b")).tuned_lens
    assert other.split("@")[1] != config.tuned_lens.split("@")[1]
    with pytest.raises(DataError, match=r"1 layers of 32 .* has 2 of 32"):
        walk(wb.wrap(tiny_model("gpt2", n_layer=1)), tokens, config)


def test_another_lens_in_the_same_folder_is_another_result(tiny_folder, tmp_path):
    # Asked for by the model's name, so that the store's memory of requests is used.
    found = []
    for rank in range(2):
        save_lens(
            tmp_path / "lens", [torch.eye(16)] * 2, [rank * torch.arange(16.0)] * 2, "safetensors"
        )
        found.append(
            wb.run(
                "token-dynamics",
                str(tiny_folder),
                random_tokens(2, 8),
                store=tmp_path / "store",
                new_tokens=0,
                tuned_lens=str(tmp_path / "lens"),
            )
        )
        for path in (tmp_path / "lens").iterdir():
            path.unlink()
        (tmp_path / "lens").rmdir()
    assert found[0].key != found[1].key
    assert not torch.equal(found[0].tuned_kl, found[1].tuned_kl)
    assert found[0].measured.config.tuned_lens == found[0].config["tuned_lens"]


def test_a_folder_without_a_lens_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json and params\.safetensors"):
        TokenDynamicsConfig(tuned_lens=str(tmp_path))


def test_the_decoding_path_is_that_of_a_greedy_loop():
    plain, tokens = tiny_model("gpt2"), random_tokens(2, 6)
    found = walk(wb.wrap(tiny_model("gpt2")), tokens, TokenDynamicsConfig(new_tokens=4))
    for row in range(2):
        prompt, vectors, log_p, chosen = tokens[row : row + 1], [], [], []
        for _ in range(4):
            with torch.no_grad():
                hidden = plain.transformer(prompt).last_hidden_state[0, -1]
                logits = plain.lm_head(hidden)
            vectors.append(hidden)
            log_p.append(logits.log_softmax(-1))
            chosen.append(int(logits.argmax()))
            prompt = torch.cat([prompt, torch.tensor([[chosen[-1]]])], 1)
        u = plain.lm_head.weight.detach()
        gaps = torch.stack(vectors).diff(dim=0).norm(dim=-1)
        torch.testing.assert_close(found.decoding_step[row], gaps, rtol=1e-4, atol=1e-4)
        for i, (c, log) in enumerate(zip(vectors, log_p, strict=True)):
            angle = torch.nn.functional.cosine_similarity(c[None], u, dim=-1)
            expected = torch.corrcoef(torch.stack([angle, log]))[0, 1]
            assert found.proximity[row, i].item() == pytest.approx(expected.item(), abs=1e-4)
            assert found.chosen_cosine[row, i].item() == pytest.approx(
                angle[chosen[i]].item(), abs=1e-4
            )
