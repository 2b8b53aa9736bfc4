"""The kernel of column sums against softmax in double precision, and what it refuses.

On a CPU it runs in Triton's interpreter, which ``TRITON_INTERPRET=1`` must ask for before triton is imported: where
triton is installed, a process of its own runs this file so. It does not know what a GPU does with the same program.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import workbench as wb
from tests.attention.test_streaming import reference
from tests.zoo import random_tokens, tiny_model
from workbench.attention import column_kernel
from workbench.attention.column_kernel import SETTING, column_sums, why_not_here, why_not_served
from workbench.attention.inputs import AttentionInputs
from workbench.attention.statistics import ColumnMean, RowEntropy
from workbench.errors import CapabilityError, ConfigError
from workbench.models.base import Site

LAST = Site("resid_post", 1)
CAUSAL = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if needed := why_not_here(request.param):
        pytest.skip(f"needs {needed}")
    return request.param


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv(SETTING, "triton")


def drawn(batch=1, heads=2, kv_heads=2, n_q=6, n_k=6, d_head=16, **changes):
    """Queries as transformers hands them over: a view of positions before heads."""
    generator = torch.Generator().manual_seed(7)
    query = torch.randn(batch, n_q, heads, d_head, generator=generator).transpose(1, 2)
    key, value = torch.randn(2, batch, kv_heads, n_k, d_head, generator=generator)
    return AttentionInputs(query, key, value, None, 0.4, **changes)


def sums(inputs, device, row_valid=None):
    """Found and wanted."""
    pattern, _, log_sum = reference(inputs)
    if row_valid is not None:
        pattern = pattern * row_valid[:, None, :, None]
        row_valid = row_valid.to(device)
    query, key = inputs.query.to(device), inputs.key.to(device)
    there = replace(inputs, query=query, key=key, value=inputs.value.to(device))
    found = column_sums(there, log_sum.float().to(device), row_valid)
    return found.cpu().double(), pattern.sum(dim=-2)


SIZES = {
    "one block, ragged": {"n_q": 13, "n_k": 13},
    "whole blocks": {"n_q": 256, "n_k": 256},
    "several blocks, ragged": {"n_q": 300, "n_k": 300, "batch": 2},
    "grouped queries": {"n_q": 70, "n_k": 70, "heads": 6, "kv_heads": 2, "batch": 2},
    "behind a cache": {"n_q": 70, "n_k": 300},
    "one query": {"n_q": 1, "n_k": 140},
    "head size 24": {"n_q": 70, "n_k": 70, "d_head": 24},
    "head size 136": {"n_q": 70, "n_k": 70, "d_head": 136},
}


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_of_the_pattern(size, device):
    found, wanted = sums(drawn(**SIZES[size]), device)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_exactly_and_summed_in_float32(dtype, device):
    inputs = drawn(n_q=140, n_k=140)
    inputs = replace(inputs, query=inputs.query.to(dtype), key=inputs.key.to(dtype))
    found, wanted = sums(inputs, device)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_rows_of_padding_give_nothing(device):
    valid = (torch.arange(70) < torch.tensor([[70], [41]])).float()
    found, wanted = sums(drawn(batch=2, n_q=70, n_k=70), device, valid)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found[1, :, 41:] == 0).all()


def test_a_hidden_score_far_above_the_seen_ones_changes_nothing(device):
    inputs = drawn(n_q=80, n_k=80)
    inputs.key[:, :, 70] *= 1e3  # exp of the score that the first 70 rows do not see is infinite
    found, wanted = sums(inputs, device)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def sinks_of(model, n_pos=9, pattern=None):
    """Column means of a whole model, and its last residual stream."""
    sites = [Site("pattern", 0), Site("pattern", 1), LAST]
    reduce = {"pattern": pattern or ColumnMean()}
    return wb.wrap(model).capture(random_tokens(2, n_pos), sites, reduce)


def test_a_whole_model_reads_the_same_under_the_setting(device, monkeypatch):
    # CUDA's flash attention takes half precision alone.
    dtype, apart = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 2e-2)
    calls = []

    def counted(*given):
        calls.append(given)
        return column_sums(*given)

    monkeypatch.setattr(column_kernel, "column_sums", counted)
    model = tiny_model("llama", max_position_embeddings=160).to(device, dtype)
    without = sinks_of(model, 150)
    stock = wb.wrap(model).capture(random_tokens(2, 150), [LAST])[LAST]
    assert not calls
    monkeypatch.setenv(SETTING, "triton")
    found = sinks_of(model, 150)
    assert len(calls) == 2
    # Its output is the stock kernel's; on CUDA, SDPA may take another one than flash attention.
    same = 0.0 if device == "cpu" else apart
    torch.testing.assert_close(found.pop(LAST), stock, rtol=0, atol=same)
    for site in found:
        torch.testing.assert_close(found[site], without[site], rtol=0, atol=apart)


LEFT = {
    "plain scores; this layer caps": {"softcap": 2.0},
    "or has learned sinks": {"sinks": torch.zeros(2)},
    "no mask": {"mask": CAUSAL},
    "causal attention": {"causal": False},
    "no gradients": {"query": drawn().query.clone().requires_grad_()},
    "the model is in float64": {"query": drawn().query.double()},
    "heads of at most 256": {"query": torch.zeros(1, 2, 6, 264), "key": torch.zeros(1, 2, 6, 264)},
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_the_kernel_does_not_serve_it_says(reason):
    assert why_not_served(drawn()) == ""
    inputs = replace(drawn(), **LEFT[reason])
    assert reason in why_not_served(inputs)
    with pytest.raises(CapabilityError, match=f"must have .*{reason}.*; leave {SETTING} out"):
        column_sums(inputs, torch.zeros(1, 2, 6))


def test_with_no_gradient_to_keep_a_weight_that_could_have_one_is_served():
    with torch.no_grad():
        assert why_not_served(replace(drawn(), **LEFT["no gradients"])) == ""


@pytest.mark.parametrize(
    ("kind", "reason"), [("gemma2", "this layer caps"), ("gpt_oss", "learned sinks")]
)
def test_a_model_with_other_scores_is_refused_not_read_another_way(kind, reason, asked):
    with pytest.raises(CapabilityError, match=reason):
        sinks_of(tiny_model(kind))


def test_padded_prompts_are_refused(asked):
    model = wb.wrap(tiny_model("llama"))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    site = Site("pattern", 0)
    with pytest.raises(CapabilityError, match="no mask; this call has one"):
        model.capture(random_tokens(2, 9), [site], {"pattern": ColumnMean()}, attention_mask=mask)


def test_an_edit_and_another_statistic_are_refused(asked):
    model, site = wb.wrap(tiny_model("llama")), Site("pattern", 0)
    both = {"received": ColumnMean(), "entropy": RowEntropy()}
    with pytest.raises(CapabilityError, match="no other statistic"):
        model.capture(random_tokens(1, 9), [site], {"pattern": both})
    with model.edit(wb.ZeroTuning(2.0)), pytest.raises(CapabilityError, match="no edit"):
        model.capture(random_tokens(1, 9), [site], {"pattern": ColumnMean()})


def test_what_asks_for_no_column_mean_is_left_to_the_tiles(monkeypatch):
    model = tiny_model("llama")
    without = sinks_of(model, pattern=RowEntropy())
    monkeypatch.setenv(SETTING, "triton")
    found = sinks_of(model, pattern=RowEntropy())
    assert all(torch.equal(found[site], wanted) for site, wanted in without.items())


def test_an_unknown_value_of_the_setting_is_refused(monkeypatch):
    monkeypatch.setenv(SETTING, "cutlass")
    with pytest.raises(ConfigError, match=f"{SETTING} must be triton, or not set; it is 'cutlass'"):
        sinks_of(tiny_model("llama"))


def test_without_triton_it_is_refused(asked, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"must have triton, .* it is not installed"):
        column_sums(drawn(), torch.zeros(1, 2, 6))


@pytest.mark.slow
def test_everything_passes_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that process")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert " 1 skipped" in run.stdout, run.stdout
