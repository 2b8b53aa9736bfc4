import pytest
import torch

from tests.models.agreement import (
    BOUND,
    LIBRARY_WARNINGS,
    disagreements,
    edited_logits,
    readable,
    through_bridge,
    through_nnsight,
    tokens,
)
from tests.zoo import ALL_FAMILIES, ATTENTION_FAMILIES, FAMILIES, padded, tiny_model
from workbench.attention.statistics import ColumnMean
from workbench.errors import CapabilityError
from workbench.interventions.add_vector import AddVector
from workbench.interventions.zero_heads import ZeroHeads
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import ModelAdapter, Site
from workbench.models.huggingface import HuggingFaceModel
from workbench.models.load import wrap
from workbench.models.nnsight import NNsightModel

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

VECTOR = torch.linspace(-1, 1, 32)
EDITS = [
    ZeroTuning(2.5),
    ZeroTuning(0.3, heads=((1, 2),)),
    ZeroHeads(((0, 1), (1, 3))),
    AddVector("L1.resid_pre", VECTOR),
    AddVector("L0.mlp_out", VECTOR),
    AddVector("L0.attn_out", VECTOR),
    AddVector("embed", VECTOR),
]


@pytest.fixture(scope="module")
def pairs():
    """By family: the model through the hf backend, and equal weights through nnsight."""
    made = {}

    def pair(family):
        if family not in made:
            traced = through_nnsight(tiny_model(family, attn_implementation="eager"))
            made[family] = HuggingFaceModel(tiny_model(family)), traced
        return made[family]

    return pair


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_spec_and_every_site_equal_the_hf_backend(pairs, family, side):
    hf, traced = pairs(family)
    assert traced.spec == hf.spec
    if (family, side) == ("mamba", "left"):
        with pytest.raises(CapabilityError, match="pad on the right"):
            traced.logits(*padded(tokens(), [12, 7, 4], side))
        return
    assert disagreements(traced, hf, readable(hf), side) == []


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_edits_equal_the_hf_backend(pairs, family, side):
    hf, traced = pairs(family)
    for edit in EDITS:
        wanted = edited_logits(hf, edit, side)
        assert (edited_logits(traced, edit, side) - wanted).abs().max() <= BOUND, edit


OUTSIDE = sorted(set(ALL_FAMILIES) - set(FAMILIES))
READ_BY_BOTH = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "pattern")


@pytest.mark.parametrize("family", OUTSIDE)
def test_families_outside_the_hf_backend_equal_the_bridge(family):
    traced = through_nnsight(tiny_model(family, attn_implementation="eager"))
    bridge = through_bridge(tiny_model(family))
    assert traced.spec == bridge.spec
    sites = [Site(name, 1) for name in READ_BY_BOTH] + [Site("embed"), Site("ln_final")]
    for side in (None, "left"):
        assert disagreements(traced, bridge, sites, side) == []
    for edit in EDITS[2:]:
        wanted = edited_logits(bridge, edit, None)
        assert (edited_logits(traced, edit, None) - wanted).abs().max() <= BOUND, edit


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_attention_in_line_is_refused_with_the_backend_that_can(family):
    traced = through_nnsight(tiny_model(family, attn_implementation="eager"))
    assert "attention" not in traced.capabilities
    assert {"patterns", "streaming"} <= traced.capabilities
    with pytest.raises(CapabilityError, match="use --backend transformer-lens"):
        traced.capture(tokens(), ["L0.q"])
    with (
        pytest.raises(CapabilityError, match="use --backend transformer-lens"),
        traced.edit(ZeroTuning(2.0)),
    ):
        pass


@pytest.mark.parametrize("family", ["gptj", "gpt_neo"])
def test_own_attention_methods_are_read_and_edited_exactly(family):
    traced = through_nnsight(tiny_model(family, attn_implementation="eager"))
    names = ("q", "k", "v", "pattern", "z")
    found = traced.capture(tokens(), [Site(name, 1) for name in names])
    q, k, v, pattern, z = (found[Site(name, 1)] for name in names)
    # GPT-Neo does not scale its scores.
    scale = q.shape[-1] ** -0.5 if family == "gptj" else 1.0
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    wanted = scores.masked_fill(~causal, -torch.inf).softmax(dim=-1)
    assert (pattern - wanted).abs().max() <= BOUND
    assert (torch.einsum("bhqk,bkhd->bqhd", pattern, v) - z).abs().max() <= BOUND
    with traced.edit(ZeroTuning(2.0, heads=((1, 0),))):
        edited = traced.capture(tokens(), ["L1.pattern", "L1.z"])
    mixed = torch.einsum("bhqk,bkhd->bqhd", edited["L1.pattern"], v)
    assert (mixed - edited["L1.z"]).abs().max() <= BOUND
    assert (edited["L1.pattern"][:, 0] - pattern[:, 0]).abs().max() > 0.01
    assert torch.equal(edited["L1.pattern"][:, 1:], pattern[:, 1:])


def test_nothing_active_and_a_no_op_are_bitwise_the_model(pairs):
    _, traced = pairs("llama")
    with torch.no_grad():
        plain = traced.model(tokens()).logits
    assert torch.equal(traced.logits(tokens()), plain)
    with traced.edit(ZeroTuning(1.0), AddVector("L0.resid_pre", VECTOR, scale=0.0)):
        assert torch.equal(traced.logits(tokens()), plain)


def test_an_exception_in_a_reduction_comes_out_and_leaves_nothing_behind(pairs):
    _, traced = pairs("gpt2")
    plain = traced.logits(tokens())

    def fail(x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"), traced.edit(ZeroTuning(2.0)):
        traced.capture(tokens(), ["L0.pattern"], reduce=fail)
    assert traced.interventions == ()
    assert torch.equal(traced.logits(tokens()), plain)


def test_patterns_need_eager_attention_and_say_so():
    traced = through_nnsight(tiny_model("llama", attn_implementation="sdpa"))
    assert "patterns" not in traced.capabilities
    with pytest.raises(CapabilityError, match="attn_implementation='eager'"):
        traced.capture(tokens(), ["L0.pattern"], reduce={"pattern": ColumnMean()})


def test_generation_is_refused_and_not_declared(pairs):
    _, traced = pairs("gpt2")
    assert "generate" not in traced.capabilities
    with pytest.raises(CapabilityError, match="does not generate"):
        traced.generate(tokens())


def test_an_unknown_architecture_gives_logits_only():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "stablelm", vocab_size=101, intermediate_size=32, num_key_value_heads=2, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    traced = through_nnsight(model)
    with torch.no_grad():
        assert torch.equal(traced.logits(tokens()), model(tokens()).logits)
    assert "capture" not in traced.capabilities
    with pytest.raises(CapabilityError, match="use --backend transformer-lens"):
        traced.capture(tokens(), ["L0.resid_pre"])
    with (
        pytest.raises(CapabilityError, match="modules are known"),
        traced.edit(ZeroHeads(((0, 0),))),
    ):
        pass


def test_remote_without_a_key_is_refused(monkeypatch):
    from nnsight import CONFIG, NNsight

    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(CapabilityError, match="NDIF_API_KEY"):
        NNsightModel(NNsight(tiny_model("gpt2")), remote=True)


def test_what_people_hold_is_wrapped():
    from nnsight import NNsight

    model = wrap(NNsight(tiny_model("gpt2", attn_implementation="eager")))
    assert isinstance(model, ModelAdapter)
    assert model.backend == "nnsight"


def test_a_folder_loads_as_the_hf_backend_loads_it(tmp_path):
    from workbench.models.load import load

    tiny_model("qwen2").save_pretrained(tmp_path)
    hf = load(str(tmp_path), device="cpu")
    traced = load(str(tmp_path), backend="nnsight", device="cpu")
    assert traced.spec == hf.spec
    assert traced.attention == "eager"
    assert (traced.logits(tokens()) - hf.logits(tokens())).abs().max() <= BOUND
    assert torch.equal(traced.weight("W_Q", 1), hf.weight("W_Q", 1))
