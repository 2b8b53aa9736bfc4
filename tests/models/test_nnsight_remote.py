"""Models that run elsewhere: by way of nnsight's serialisation, and on a server of NDIF's protocol."""

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
from tests import zoo
from workbench.attention.statistics import ColumnMean
from workbench.errors import CapabilityError

SITES = [
    "embed",
    *(f"L1.{name}" for name in ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out")),
    *("L1.attn_scores", "L1.mlp_out", "L1.resid_post"),
]


def assert_close(got, wanted):
    """1e-5: other kernels than eager attention's run behind the server."""
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def pair(request, tiny_folder):
    """A model here, and the same behind nnsight's simulation of a server."""
    nnsight = pytest.importorskip("nnsight")
    from transformers import AutoTokenizer

    from workbench.models.nnsight import NNsightModel

    module = zoo.tiny_model(request.param)
    # nnsight wants a tokenizer at hand; none is used.
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    lm = nnsight.TransformersModel(module, task="text-generation", tokenizer=tokenizer)
    return wb.wrap(zoo.tiny_model(request.param)), NNsightModel(lm, remote="local")


def test_every_site_is_that_of_the_model_here(pair):
    here, there = pair
    tokens = zoo.random_tokens(2)
    sites = [site for site in SITES if site != "L1.attn_scores"]
    found, expected = there.capture(tokens, sites), here.capture(tokens, sites)
    for site in sites:
        assert_close(found[site], expected[site])


def test_padding_and_statistics_are_those_of_the_model_here(pair):
    here, there = pair
    tokens = zoo.random_tokens(2)
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    how = {"reduce": {"pattern": ColumnMean()}, "attention_mask": mask}
    assert_close(
        there.capture(tokens, ["L0.pattern"], **how)["L0.pattern"],
        here.capture(tokens, ["L0.pattern"], **how)["L0.pattern"],
    )


def test_logits_and_their_end_come_back(pair):
    here, there = pair
    tokens = zoo.random_tokens(2)
    assert_close(there.logits(tokens), here.logits(tokens))
    assert_close(there.logits(tokens, last=2), here.logits(tokens, last=2))


def test_weights_come_when_they_are_asked_for(pair):
    here, there = pair
    for name, layer in (("W_O", 1), ("W_Q", 0), ("W_E", None), ("W_U", None)):
        assert_close(there.weight(name, layer), here.weight(name, layer))
    x = torch.ones(2, here.spec.d_model)
    assert_close(there.final_norm(x), here.final_norm(x))
    assert_close(there.mlp_of_embedding(1, x, norm=True), here.mlp_of_embedding(1, x, norm=True))


def test_edits_are_refused_with_the_reason(pair):
    _, there = pair
    assert "edits" not in there.capabilities
    with (
        pytest.raises(CapabilityError, match="edits need the model on this machine"),
        there.edit(wb.ZeroTuning(gamma=2.0)),
    ):
        pass


@pytest.fixture
def server(tiny_folder, tmp_path, monkeypatch):
    """A server that holds the tiny model as ``models/tiny``, and nnsight told to use it."""
    pytest.importorskip("nnsight")
    for needed in ("starlette", "uvicorn", "python_multipart"):
        pytest.importorskip(needed)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = Path(__file__).with_name("ndif_stand_in.py").read_text("utf-8")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            # Not as a file: its folder would be on the path.
            [sys.executable, "-c", code, str(port), "models/tiny"],
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        yield wait_for(address, process, tmp_path / "log")
    finally:
        process.terminate()
        process.wait()


def wait_for(address, process, log):
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/ready"):
                return address
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_a_sweep_runs_on_a_server_that_knows_nothing_of_the_workbench(
    server, tiny_folder, tmp_path, monkeypatch
):
    import nnsight

    from workbench.execute.plan import make_plan
    from workbench.execute.remote import RemoteExecutor
    from workbench.execute.sweep import run_plan
    from workbench.store.results import Store

    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a key")
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    store = Store(tmp_path / "store")
    about = {"data": "builtin:natural", "n_pos": 16, "limit": 2}
    plan = make_plan(
        {
            "models": ["models/tiny"],
            "probes": ["attention-sinks"],
            "backends": "nnsight",
            "seeds": [0, 1],
            **about,
        }
    )
    summary = run_plan(plan, store, RemoteExecutor())
    assert [one.error for one in summary.outcomes] == [None, None]
    here = wb.run("attention-sinks", str(tiny_folder), **about)
    there = store.get(summary.outcomes[0].result)
    assert there.provenance["backend"] == "nnsight"
    for name, expected in here.arrays.items():
        np.testing.assert_allclose(there.arrays[name], expected, atol=1e-5)
