"""A toy written for transformers computes the same, through every library that loads it."""

import json

import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from tests.models.agreement import LIBRARY_WARNINGS
from tests.toy_tasks.test_model import SMALL, build
from toy_tasks.model import KERNELS, describe_model
from workbench.errors import CapabilityError, ModelError
from workbench.models.base import Site
from workbench.models.toy_export import as_transformers, refusal, write_transformers

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

VARIANTS = [
    {"n_layers": 1},
    {"n_layers": 3, "n_heads": 4},
    {"d_mlp": 0},
    {"positions": "none", "bias": "value"},
    {"attention": "softmax-scale", "row_sum": 0.3, "bias": "value"},
    {"positions": "rotary"},
    {"positions": "rotary", "bias": "value", "d_mlp": 0},
    {"norm": "post"},
    {"norm": "post", "bias": "value", "positions": "none"},
]
ARCHITECTURE = {"pre": "gpt2", "rotary": "gpt_neox", "post": "opt"}


def kind(variant):
    return (
        ARCHITECTURE[variant.get("positions")]
        if "rotary" in variant.values()
        else ARCHITECTURE[variant.get("norm", "pre")]
    )


def saved(folder, **variant):
    """A toy with random weights large enough that a lost norm or scale would show."""
    model = build(n_ctx=16, **variant)
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    described = {**describe_model(model.config), "tokens": [*"abcdefghij", "<s>"]}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors")
    return model.eval()


def tokens():
    return torch.randint(0, 11, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_transformers_computes_the_same_logits(tmp_path, variant):
    from transformers import AutoModelForCausalLM

    model = saved(tmp_path, **variant)
    folder = write_transformers(tmp_path)
    assert folder == tmp_path / "transformers"
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.model_type == kind(variant)
    assert theirs.config.bos_token_id == 10
    with torch.no_grad():
        wanted, found = model(tokens()).logits, theirs.eval()(tokens()).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["hf", "transformer-lens", "nnsight"])
@pytest.mark.parametrize(
    "variant", [variant for variant in VARIANTS if kind(variant) != "opt"], ids=str
)
def test_every_backend_reads_the_same_logits_and_patterns(tmp_path, variant, backend):
    saved(tmp_path, **variant)
    toy = wb.load(f"toy:{tmp_path}")
    theirs = wb.load(str(write_transformers(tmp_path)), backend=backend)
    ids = tokens()
    torch.testing.assert_close(theirs.logits(ids), toy.logits(ids), atol=5e-5, rtol=1e-4)
    site = Site("pattern", 0)
    pattern = toy.capture(ids, [site])[site] / variant.get("row_sum", 1.0)
    found = theirs.capture(ids, [site])[site]
    torch.testing.assert_close(found, pattern, atol=1e-5, rtol=1e-4)


def test_the_sink_probe_finds_the_same_through_transformers(tmp_path):
    saved(tmp_path)
    folder = write_transformers(tmp_path)
    scores = [
        wb.run("attention-sinks", name, tokens(), cache="off").score
        for name in (f"toy:{tmp_path}", str(folder))
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        *(({"attention": name}, f"attention={name}") for name in KERNELS if "softmax" not in name),
        ({"bias": "key"}, "bias=key"),
        ({"bias": "key-value"}, "bias=key-value"),
        ({"bias": "sink-token"}, "bias=sink-token"),
        ({"norm": "post", "positions": "rotary"}, "norm=post with positions=rotary"),
        ({"norm": "post", "d_mlp": 0}, "norm=post without an MLP"),
    ],
    ids=str,
)
def test_other_variants_are_refused_with_the_reason(tmp_path, variant, words):
    saved(tmp_path, **variant)
    with pytest.raises(CapabilityError, match=words):
        write_transformers(tmp_path)
    assert not (tmp_path / "transformers").exists()


def test_scan_snap_and_strangers_are_refused():
    assert "hides a query from itself" in refusal({"model_type": "scan-snap"})
    with pytest.raises(CapabilityError, match="gpt2 is no toy"):
        as_transformers({"model_type": "gpt2"}, {})


def test_an_unfinished_or_damaged_toy_is_refused(tmp_path):
    with pytest.raises(ModelError, match="must have a whole"):
        write_transformers(tmp_path)
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="train it again"):
        write_transformers(tmp_path)


def test_a_half_precision_toy_stays_one(tmp_path):
    model = build().bfloat16()
    config, weights = as_transformers(describe_model(model.config), model.state_dict())
    assert config["dtype"] == "bfloat16"
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert config["bos_token_id"] is None
    assert config["vocab_size"] == SMALL["d_vocab"]
