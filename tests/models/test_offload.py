"""A model spread over devices: here the CPU and the disk, whose weights come for each pass."""

import numpy as np
import pytest
import torch

import workbench as wb
from tests import zoo
from workbench.errors import ModelError
from workbench.identity import weights_hash
from workbench.models.offload import tensors_at_hand


def spread(model, first="cpu", second="disk"):
    """A device map: the second block (and on a disk the embedding too) elsewhere."""
    blocks = next(name for name, part in model.named_modules() if name.endswith((".h", ".layers")))
    inner = blocks.rpartition(".")[0]
    places = {f"{inner}.{name}": first for name, _ in model.get_submodule(inner).named_children()}
    del places[blocks]
    places |= {f"{blocks}.0": first, f"{blocks}.1": second, "lm_head": first}
    if second == "disk" and not model.config.tie_word_embeddings:
        places[f"{inner}.embed_tokens"] = "disk"
    return places


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("spread") / request.param
    model = zoo.tiny_model(request.param)
    model.save_pretrained(path)
    return str(path), spread(model)


@pytest.fixture(scope="module")
def pair(folder):
    """The model plain, and spread."""
    path, places = folder
    plain, parted = wb.load(path), wb.load(path, device_map=places)
    assert {p.device.type for p in parted.model.parameters()} == {"cpu", "meta"}
    return plain, parted


def test_every_site_and_the_logits_are_those_of_the_whole_model(pair):
    plain, parted = pair
    tokens = zoo.random_tokens(2)
    assert torch.equal(parted.logits(tokens), plain.logits(tokens))
    names = ("resid_pre", "resid_post", "q", "k", "v", "pattern", "z", "attn_out", "mlp_out")
    sites = [f"L{layer}.{name}" for layer in (0, 1) for name in names]
    whole, parts = (model.capture(tokens, sites) for model in pair)
    for site in whole:
        assert torch.equal(parts[site], whole[site]), site


def test_weights_can_be_read_between_passes(pair):
    plain, parted = pair
    for layer in (0, 1):
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            assert torch.equal(parted.weight(name, layer), plain.weight(name, layer))
        x = torch.randn(3, plain.spec.d_model, generator=torch.Generator().manual_seed(0))
        mlps = [model.mlp_of_embedding(layer, x, norm=True) for model in pair]
        assert torch.equal(*mlps)
    assert torch.equal(parted.weight("W_E"), plain.weight("W_E"))
    assert torch.equal(parted.weight("W_U"), plain.weight("W_U"))
    assert torch.equal(parted.final_norm(x), plain.final_norm(x))
    # Read or not, they are where they were: nothing piles up in memory.
    assert {p.device.type for p in parted.model.parameters()} == {"cpu", "meta"}


def test_the_hash_of_the_weights_does_not_depend_on_where_they_are(pair):
    plain, parted = pair
    assert weights_hash(parted) == weights_hash(plain)
    assert all(tensor.device.type == "cpu" for _, tensor in tensors_at_hand(parted.model))


def test_an_edit_reaches_a_block_that_is_elsewhere(pair):
    tokens = zoo.random_tokens(1)
    written = []
    for model in pair:
        with model.edit(wb.ZeroTuning(gamma=3.0)):
            written.append(model.generate(tokens, max_new_tokens=4))
    assert torch.equal(*written)


def test_a_nan_is_found_on_the_disk(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    path, places = folder
    bad = tmp_path / "bad"
    shutil.copytree(path, bad)
    weights = load_file(bad / "model.safetensors")
    name = next(name for name in weights if ".1." in name and weights[name].dim() == 2)
    weights[name][0, 0] = torch.nan
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=name):
        wb.load(str(bad), device_map=places)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_numbers_of_one(folder):
    path, places = folder
    places = {name: int(place == "disk") for name, place in places.items()}
    tokens = zoo.random_tokens(2)
    one, two = wb.load(path, device="cuda:0"), wb.load(path, device_map=places)
    sites = ["L0.resid_post", "L1.pattern", "L1.z"]
    whole, parts = one.capture(tokens, sites), two.capture(tokens, sites)
    for site in whole:
        np.testing.assert_allclose(parts[site], whole[site], atol=1e-5)
