"""The ways of reading a whole model that ``capture.py`` measures: each builds its model and returns what runs it."""

from collections.abc import Callable
from typing import Any

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 4096, "vocab_size": 50257}


def build(attention: str) -> Any:
    """A GPT-2 of SHAPE with random weights and one kind of attention."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**SHAPE, attn_implementation=attention)
    return GPT2LMHeadModel(config).eval()


def plain(attention: str) -> Callable[[Any], Any]:
    """A whole forward pass; eager returns its maps, ``[batch head pos pos]`` a layer."""
    model = build(attention)
    options = {"output_attentions": True} if attention == "eager" else {}
    return lambda tokens: model(tokens, use_cache=False, **options)


def without_head() -> Callable[[Any], Any]:
    """The blocks and the final norm, without the unembedding."""
    model = build("sdpa")
    return lambda tokens: model.transformer(tokens, use_cache=False)


def workbench_capture(*, with_logits: bool) -> Callable[[Any], Any]:
    """Mean attention a key receives, norms of values and of the residual stream, reduced in the pass."""
    import torch

    import workbench as wb
    from workbench.attention.statistics import ColumnMean
    from workbench.models.base import Site

    model = wb.wrap(build("sdpa"))
    if with_logits:  # the same work as a plain forward, unembedding included

        def unembed(module: Any, args: Any, output: Any) -> None:
            model.model.lm_head(output.last_hidden_state)

        model.model.transformer.register_forward_hook(unembed)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x.norm(dim=-1)

    layers = range(SHAPE["n_layer"])
    sites = [Site("resid_pre", 0)]
    sites += [Site(name, layer) for layer in layers for name in ("pattern", "v", "resid_post")]
    reduce = {"pattern": ColumnMean(), "v": norm, "resid_pre": norm, "resid_post": norm}
    return lambda tokens: model.capture(tokens, sites, reduce)


def bridge(*, patterns_only: bool) -> Callable[[Any], Any]:
    """TransformerBridge's cache: everything, or the patterns alone."""
    from workbench.models.bridge_building import build_bridge

    model = build_bridge(build("eager"), None)  # the plain bridge, without asking the hub
    if patterns_only:
        return lambda tokens: model.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_pattern")
        )
    return lambda tokens: model.run_with_cache(tokens)


def nnsight_trace() -> Callable[[Any], Any]:
    """Patterns and blocks' outputs, saved whole."""
    from nnsight import NNsight

    model = NNsight(build("eager"))

    def run(tokens: Any) -> Any:
        saved: list[Any] = []
        with model.trace(tokens, use_cache=False, output_attentions=True):
            for block in model.transformer.h:
                saved.append(block.attn.output[1].save())
                saved.append(block.output.save())
        return saved

    return run


def interp_engine_capture() -> Callable[[Any], Any]:
    """Its eager backend; the package is no dependency of ours (pip install --no-deps interp-engine)."""
    from interp_engine.capture import capture
    from interp_engine.model import EagerModel

    # A tokenizer is asked for and not used: ids go in.
    given: Any = {"hf_model": build("eager"), "tokenizer": object(), "device": "cpu"}
    model = EagerModel("gpt2", attn_implementation="eager", **given)
    names = ("attn_probs", "value", "resid_post")
    points = [f"{name}.{layer}" for layer in range(SHAPE["n_layer"]) for name in names]
    return lambda tokens: capture(model, tokens, ["resid_pre.0", *points])


METHODS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "plain SDPA forward": lambda: plain("sdpa"),
    "plain SDPA forward, no unembedding": without_head,
    "workbench: sinks + value norms + residual norms": lambda: workbench_capture(with_logits=False),
    "workbench, unembedding included": lambda: workbench_capture(with_logits=True),
    "eager, output_attentions": lambda: plain("eager"),
    "TransformerBridge, patterns only": lambda: bridge(patterns_only=True),
    "TransformerBridge, full cache": lambda: bridge(patterns_only=False),
    "nnsight, attention + residual": nnsight_trace,
    "interp-engine (eager), attention + values + residual": interp_engine_capture,
}


WITHOUT_HEAD = {
    "plain SDPA forward, no unembedding",
    "workbench: sinks + value norms + residual norms",
}
"""These do less work than the others and are compared with each other."""
LONGEST_OF_MAPS = 2048
"""Of the peers that keep whole patterns only plain eager is run on longer prompts."""
PEERS = {
    "TransformerBridge, patterns only": "transformer-lens",
    "TransformerBridge, full cache": "transformer-lens",
    "nnsight, attention + residual": "nnsight",
    "interp-engine (eager), attention + values + residual": "interp-engine",
}
"""Which package a method is; the others are transformers' own model."""
