"""Ways of generating under an edit: beams, samples, static caches, compiled models, and what is refused."""

import shutil

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import workbench as wb
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge
from tests.zoo import padded, random_tokens, tiny_model
from workbench.errors import ConfigError
from workbench.models.base import Site

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

ACTING = wb.ACT(alpha=1.2, beta=0.2)
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


BEAMED = [(family, "hf") for family in ("gpt2", "llama", "mistral", "gemma2", "gpt_oss")]


@pytest.mark.parametrize(("family", "backend"), [*BEAMED, ("llama", "transformer-lens")])
def test_running_statistics_follow_the_beams(family, backend):
    wrap = wb.wrap if backend == "hf" else through_bridge
    model = wrap(tiny_model(family))
    tokens, mask = padded(random_tokens(2, 8), [8, 5], "left")
    beams = {**GREEDY, "num_beams": 4, "num_return_sequences": 2, "attention_mask": mask}
    with model.edit(ACTING):
        cached = model.generate(tokens, **beams)
        # Without a cache every pass counts all rows anew: no statistics to lose.
        whole = model.generate(tokens, use_cache=False, **beams)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, model.generate(tokens, **beams))
    assert "_reorder_cache" not in vars(model.model)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beams", "samples"],
)
@pytest.mark.parametrize("edit", [wb.ZeroTuning(5.0), wb.ZeroTuning(1.7, mode="key")])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_one_prompt_know_its_first_key(family, edit, options):
    model = wb.wrap(tiny_model(family))
    tokens, mask = padded(random_tokens(2, 8), [8, 5], "left")
    ways = {**GREEDY, "max_new_tokens": 5, "attention_mask": mask, **options}

    def drawn(**more):
        torch.manual_seed(0)
        return model.generate(tokens, **ways, **more)

    with model.edit(edit):
        cached = drawn()
        assert torch.equal(cached, drawn(use_cache=False))
    assert not torch.equal(cached, drawn())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["samples", "beam samples"])
def test_a_no_op_samples_the_tokens_of_the_stock_model(options):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, 6)
    sampled = {**GREEDY, "do_sample": True, "num_return_sequences": 2, **options}

    def drawn(*edits):
        torch.manual_seed(0)
        with model.edit(*edits):
            return model.generate(tokens, **sampled)

    stock = model.model.generate
    torch.manual_seed(0)
    plain = stock(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=2, **sampled)
    assert torch.equal(drawn(), plain)
    assert torch.equal(drawn(wb.ZeroTuning(1.0), wb.ACT(beta=1.0), wb.ZeroHeads(())), plain)
    assert torch.equal(drawn(wb.ZeroTuning(3.0, ()), wb.ACT(heads=())), plain)
    assert not torch.equal(drawn(ACTING), plain)


EDITS = {
    "act": ACTING,
    "act full": wb.ACT(alpha=1.2, beta=0.2, mode="full"),
    "zerotuning": wb.ZeroTuning(5.0),
    "key": wb.ZeroTuning(1.7, mode="key"),
    "zero-heads": wb.ZeroHeads(((0, 1), (1, 2))),
    "add-vector": wb.AddVector("L0.resid_post", torch.ones(32)),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_static_cache_sees_the_same_edit(family, name):
    # Longer than the window of 5: the sliding layers' caches turn over.
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, 6)
    with model.edit(EDITS[name]):
        usual = model.generate(tokens, **GREEDY)
        assert torch.equal(usual, model.generate(tokens, cache_implementation="static", **GREEDY))


def compiled(backend="eager"):
    """transformers' own compilation of decoding, on a CPU too; "eager": traced, not optimised."""
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def test_a_compiled_model_sees_every_edit_even_those_that_come_after_it_was_compiled():
    edits_under("eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_model_that_inductor_compiled_sees_every_edit():
    edits_under("inductor")


def edits_under(backend):
    """Tokens of a model compiled by one backend are those of the model as it was written."""
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, 6)
    stock = model.generate(tokens, **GREEDY)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(tokens, **GREEDY, **compiled(backend)), stock)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
    for edit in (
        *EDITS.values(),
        wb.ZeroTuning(0.2),
        wb.AddVector("L0.resid_post", -torch.ones(32)),
    ):
        with model.edit(edit):
            usual = model.generate(tokens, **GREEDY)
            found = model.generate(tokens, **GREEDY, **compiled(backend))
            assert torch.equal(found, usual), edit
        assert not torch.equal(usual, stock), edit
    assert torch.equal(model.generate(tokens, **GREEDY, **compiled(backend)), stock)


def test_a_model_whose_forward_was_compiled_is_read_and_edited():
    plain, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(2)
    fast = tiny_model("gpt2")
    fast.forward = torch.compile(fast.forward, backend="eager")
    model = wb.wrap(fast)
    for edit in (None, wb.ZeroTuning(4.0), ACTING, EDITS["add-vector"]):
        for each in (plain, model):
            each.logits(tokens)  # compiled before the edit comes
        for layer in (0, 1):
            resid = plain.capture(tokens, [Site("resid_pre", layer)])[Site("resid_pre", layer)]
            found = model.continue_from(layer, resid)
            torch.testing.assert_close(found, plain.logits(tokens), rtol=0, atol=1e-5)
        edits = () if edit is None else (edit,)
        with plain.edit(*edits), model.edit(*edits):
            torch.testing.assert_close(
                model.logits(tokens), plain.logits(tokens), rtol=0, atol=1e-5
            )
            found = model.capture(tokens, ["L1.resid_post", "L0.pattern"])
            wanted = plain.capture(tokens, ["L1.resid_post", "L0.pattern"])
            for site, value in wanted.items():
                torch.testing.assert_close(found[site], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_lookup_num_tokens": 3}, "without prompt_lookup_num_tokens"),
        ({"past_key_values": DynamicCache()}, "without past_key_values"),
        ({"custom_generate": "somebody/something"}, "without custom_generate"),
        ({"compile_config": CompileConfig(fullgraph=True)}, "fullgraph=False"),
    ],
)
def test_ways_that_would_not_be_exact_are_refused_by_name(options, words):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(1, 6)
    with model.edit(wb.ZeroTuning(3.0)), pytest.raises(ConfigError, match=words):
        model.generate(tokens, max_new_tokens=2, **options)


def test_the_model_s_own_generation_config_is_looked_at_too():
    hf = tiny_model("llama")
    hf.generation_config.use_cache = False
    model, tokens = wb.wrap(hf), random_tokens(1, 6)
    with model.edit(wb.ACT(mode="full")), pytest.raises(ConfigError, match="with the cache"):
        model.generate(tokens, max_new_tokens=2)
    with model.edit(wb.ACT(mode="full")), pytest.raises(ConfigError, match="prefill_chunk_size=3"):
        model.generate(tokens, max_new_tokens=2, use_cache=True, prefill_chunk_size=3)


def test_a_prompt_given_in_parts_sees_the_same_causal_edits():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, 9)
    for edit in (ACTING, wb.ZeroTuning(5.0), wb.ZeroTuning(1.7, mode="key")):
        with model.edit(edit):
            usual = model.generate(tokens, **GREEDY)
            assert torch.equal(model.generate(tokens, prefill_chunk_size=4, **GREEDY), usual)


def test_edits_of_one_layer_go_on_together_when_the_first_token_has_left_the_window():
    model, tokens = wb.wrap(tiny_model("mistral")), random_tokens(2, 6)
    with model.edit(wb.ZeroTuning(5.0), ACTING, wb.ZeroTuning(1.5, mode="key")):
        cached = model.generate(tokens, **GREEDY)
        assert torch.equal(cached, model.generate(tokens, use_cache=False, **GREEDY))


def test_threads_that_leave_in_any_order_leave_torch_as_it_was():
    from torch._dynamo import eval_frame

    from workbench.models.generating import uncompiled

    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert eval_frame._stance.stance == "default"
