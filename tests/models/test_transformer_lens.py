import threading

import pytest
import torch

from tests.models.agreement import (
    BOUND,
    LIBRARY_WARNINGS,
    disagreements,
    edited_logits,
    readable,
    through_bridge,
    tokens,
)
from tests.zoo import ALL_FAMILIES, ATTENTION_FAMILIES, FAMILIES, padded, tiny_model
from workbench.attention.statistics import ColumnMean, RowEntropy
from workbench.errors import CapabilityError, ConfigError, EngineError
from workbench.interventions.add_vector import AddVector
from workbench.interventions.zero_heads import ZeroHeads
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import ModelAdapter, Site
from workbench.models.bridge_building import bridge_of, load_bridge
from workbench.models.checkpoint import Source
from workbench.models.huggingface import HuggingFaceModel
from workbench.models.load import wrap
from workbench.models.transformer_lens import TransformerLensModel

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

VECTOR = torch.linspace(-1, 1, 32)


@pytest.fixture(scope="module")
def pairs():
    """By family: the model through the hf backend, and a bridge on the same weights."""
    made = {}

    def pair(family):
        if family not in made:
            model = tiny_model(family)
            made[family] = HuggingFaceModel(model), through_bridge(model)
        return made[family]

    return pair


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_and_every_site_equal_the_hf_backend(pairs, family):
    hf, bridge = pairs(family)
    assert bridge.spec == hf.spec
    sites = readable(hf)
    if family == "opt":  # its own attention runs: the bridge shows no scores
        sites = [site for site in sites if site.name != "attn_scores"]
    assert disagreements(bridge, hf, sites, None) == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_prompts_equal_the_hf_backend(pairs, family, side):
    hf, bridge = pairs(family)
    if (family, side) == ("mamba", "left"):
        with pytest.raises(CapabilityError, match="pad on the right"):
            bridge.logits(*padded(tokens(), [12, 7, 4], side))
        return
    sites = [site for site in readable(hf) if (family, site.name) != ("opt", "attn_scores")]
    assert disagreements(bridge, hf, sites, side) == []


EDITS = [
    ZeroTuning(2.5),
    ZeroTuning(0.3, heads=((1, 2),)),
    ZeroHeads(((0, 1), (1, 3))),
    AddVector("L1.resid_pre", VECTOR),
    AddVector("L0.mlp_out", VECTOR),
    AddVector("L0.attn_out", VECTOR),
    AddVector("embed", VECTOR),
]


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("family", [name for name in ATTENTION_FAMILIES if name != "opt"])
def test_edits_equal_the_hf_backend(pairs, family, side):
    hf, bridge = pairs(family)
    for edit in EDITS:
        wanted = edited_logits(hf, edit, side)
        assert (edited_logits(bridge, edit, side) - wanted).abs().max() <= BOUND, edit


def test_opt_takes_activation_edits_and_refuses_attention_edits(pairs):
    hf, bridge = pairs("opt")
    for edit in EDITS[2:]:
        wanted = edited_logits(hf, edit, None)
        assert (edited_logits(bridge, edit, None) - wanted).abs().max() <= BOUND, edit
    with (
        pytest.raises(CapabilityError, match="shows the pattern afterwards"),
        bridge.edit(EDITS[0]),
    ):
        pass


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mistral", "gemma3_text", "gpt_oss"])
def test_generation_under_an_edit_equals_hf_with_and_without_cache(pairs, family):
    hf, bridge = pairs(family)
    prompts, mask = padded(tokens(), [12, 7, 4], "left")
    made = []
    for model, cache in ((hf, True), (bridge, True), (bridge, False)):
        with model.edit(ZeroTuning(3.0)):
            made.append(
                model.generate(prompts, 10, attention_mask=mask, do_sample=False, use_cache=cache)
            )
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[1], made[2])
    plain = bridge.generate(prompts, 10, attention_mask=mask, do_sample=False)
    assert not torch.equal(plain, made[1])


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_oss"])
def test_streamed_statistics_equal_the_hf_backend(pairs, family):
    hf, bridge = pairs(family)
    site = Site("pattern", 1)
    several = {"pattern": {"received": ColumnMean(), "entropy": RowEntropy()}}
    for side in ("left", "right"):
        prompts, mask = padded(tokens(), [12, 7, 4], side)
        got, wanted = (
            model.capture(prompts, [site], reduce=several, attention_mask=mask)[site]
            for model in (bridge, hf)
        )
        for name in wanted:
            assert (got[name] - wanted[name]).abs().max() <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_the_hf_backend(pairs, family):
    hf, bridge = pairs(family)
    names = [("W_E", None), ("W_U", None)]
    if hf.spec.n_heads:
        names += [(name, 1) for name in ("W_Q", "W_K", "W_V", "W_O")]
    if hf.spec.positions == "learned":
        names.append(("W_pos", None))
    for name, layer in names:
        assert torch.equal(bridge.weight(name, layer), hf.weight(name, layer)), name


def test_unknown_weight_is_refused(pairs):
    _, bridge = pairs("llama")
    for name, layer in (("W_pos", None), ("W_Q", None), ("W_E", 0), ("W_Q", 9)):
        with pytest.raises(CapabilityError, match="has no weight"):
            bridge.weight(name, layer)


@pytest.mark.parametrize("family", sorted(set(ALL_FAMILIES) - set(FAMILIES)))
def test_families_outside_the_hf_backend_equal_eager_transformers(family):
    model = tiny_model(family, attn_implementation="eager")
    bridge = through_bridge(model)
    with torch.no_grad():
        wanted = model(tokens(), output_hidden_states=True, output_attentions=True)
    sites = [Site("resid_pre", 1), Site("pattern", 0), Site("pattern", 1)]
    got = bridge.capture(tokens(), sites)
    assert (bridge.logits(tokens()) - wanted.logits).abs().max() <= BOUND
    assert (got[sites[0]] - wanted.hidden_states[1]).abs().max() <= BOUND
    for site in sites[1:]:
        assert (got[site] - wanted.attentions[site.layer]).abs().max() <= BOUND


@pytest.mark.parametrize("family", sorted(set(ALL_FAMILIES) - set(FAMILIES)))
def test_residual_stream_adds_up_outside_the_hf_backend(family):
    bridge = through_bridge(tiny_model(family))
    names = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    found = bridge.capture(tokens(), [Site(name, 1) for name in names])
    pre, attn, mlp, post = (found[Site(name, 1)] for name in names)
    assert (pre + attn + mlp - post).abs().max() <= BOUND


def test_gptj_shows_no_rotated_queries_and_says_so():
    bridge = through_bridge(tiny_model("gptj"))
    assert "attention" not in bridge.capabilities
    assert "patterns" in bridge.capabilities
    with pytest.raises(CapabilityError, match="nnsight"):
        bridge.capture(tokens(), ["L0.q"])
    # The hook of that name shows the pattern there, a second time.
    with pytest.raises(CapabilityError, match="attn_scores"):
        bridge.capture(tokens(), ["L0.attn_scores"])


def test_new_falcon_layout_is_refused_with_the_reason():
    model = tiny_model("falcon", new_decoder_architecture=True, num_kv_heads=2)
    with pytest.raises(CapabilityError, match=r"TransformerLens .* cannot bridge this falcon"):
        bridge_of(model)


def test_compatibility_mode_is_refused(pairs):
    bridge = bridge_of(tiny_model("gpt2"))
    bridge.compatibility_mode = True
    with pytest.raises(CapabilityError, match="compatibility mode"):
        TransformerLensModel(bridge)


def test_a_model_that_goes_to_transformer_lens_stays_as_it_is():
    model = tiny_model("llama")
    hf = HuggingFaceModel(model)
    before = hf.logits(tokens())
    bridge = hf.to_transformer_lens()
    assert torch.equal(hf.logits(tokens()), before)
    assert bridge.original_model.get_input_embeddings().weight.data_ptr() == (
        model.get_input_embeddings().weight.data_ptr()
    )
    adapter = wrap(bridge)
    assert isinstance(adapter, ModelAdapter)
    assert adapter.backend == "transformer-lens"


@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")]
)
def test_a_model_of_few_positions_is_bridged_too(family, name):
    model = tiny_model(family, **{name: 8})
    prompt = tokens()[:, :8]
    found = through_bridge(model).logits(prompt)
    torch.testing.assert_close(found, HuggingFaceModel(model).logits(prompt), atol=1e-5, rtol=0)


def test_a_bridge_that_changes_the_numbers_is_refused():
    # The bridge always divides GPT-2's scores by sqrt(d_head), whatever the config says.
    model = tiny_model("gpt2", scale_attn_weights=False)
    with pytest.raises(CapabilityError, match=r"logits must be the model's"):
        bridge_of(model)


def test_nothing_active_and_a_no_op_are_bitwise_the_bridge(pairs):
    _, bridge = pairs("llama")
    with torch.no_grad():
        plain = bridge.bridge(tokens())
    assert torch.equal(bridge.logits(tokens()), plain)
    with bridge.edit(ZeroTuning(1.0), AddVector("L0.resid_pre", VECTOR, scale=0.0)):
        assert torch.equal(bridge.logits(tokens()), plain)


def n_hooks(bridge):
    return sum(len(point._forward_hooks) for point in bridge.hooks.points.values())


def test_hooks_are_gone_after_an_exception(pairs):
    _, bridge = pairs("gpt2")
    bridge.capture(tokens(), ["L0.q"])

    def interrupt(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), bridge.edit(ZeroTuning(2.0)):
        bridge.capture(tokens(), ["L0.pattern", "L1.z"], reduce=interrupt)
    assert n_hooks(bridge) == 0
    assert bridge.interventions == ()


def test_a_hook_that_does_not_fire_is_an_error(pairs):
    _, bridge = pairs("gpt2")
    bridge.hooks.order["blocks.0.hook_mlp_in"] = 999
    from workbench.models import bridge_hooks

    names = dict(bridge_hooks._NAMES, mlp_out=("hook_mlp_in",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge_hooks, "_NAMES", names)
        with pytest.raises(EngineError, match=r"L0\.mlp_out did not"):
            bridge.capture(tokens(), ["L0.mlp_out"])


def test_a_statistic_reads_the_pattern_only(pairs):
    _, bridge = pairs("gpt2")
    with pytest.raises(ConfigError, match="site pattern only"):
        bridge.capture(tokens(), ["L0.z"], reduce={"z": ColumnMean()})
    with pytest.raises(ConfigError, match="layer must be below 2"):
        bridge.capture(tokens(), ["L2.z"])


def test_threads_do_not_see_each_others_edits(pairs):
    _, bridge = pairs("gpt2")
    plain = bridge.logits(tokens())
    found = []

    def read():
        found.append(torch.equal(bridge.logits(tokens()), plain))

    with bridge.edit(ZeroTuning(4.0)):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(timeout=0.2)
    thread.join()
    assert found == [True]


def test_a_folder_loads_as_the_hf_backend_loads_it(tmp_path):
    from workbench.models.load import load

    tiny_model("qwen2").save_pretrained(tmp_path)
    hf = load(str(tmp_path), device="cpu")
    bridge = load(str(tmp_path), backend="transformer-lens", device="cpu")
    assert bridge.spec == hf.spec
    assert (bridge.logits(tokens()) - hf.logits(tokens())).abs().max() <= BOUND
    with pytest.raises(ConfigError, match="eager attention only"):
        load_bridge(Source(str(tmp_path), "x", attn_implementation="sdpa"))


def test_a_model_goes_to_transformer_lens_with_its_tokenizer(tiny_folder):
    from workbench.models.load import load

    hf = load(str(tiny_folder), device="cpu")
    bridge = hf.to_transformer_lens()
    wanted = hf.tokenizer("some text")["input_ids"]
    assert bridge.to_tokens("some text", prepend_bos=False)[0].tolist() == wanted
    adapter = wrap(bridge)
    made = [model.generate("some text", 4, do_sample=False) for model in (hf, adapter)]
    assert made[0] == made[1]
    assert hf.tokenizer.pad_token is None
