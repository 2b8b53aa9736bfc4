"""Ways to generate under an edit of all heads: the workbench's, and what people would use instead.

Each takes a case and gives the unembedding, whose calls can be timed, and a function that generates.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

from reference import eager_zerotuning

GAMMA = 2.0
WHOLE = {"n_layer": 12, "n_embd": 768, "vocab_size": 50257}
THIRD = {"n_layer": 4, "n_embd": 768, "vocab_size": 8192}
CASES: dict[str, dict[str, Any]] = {
    "short": {"model": WHOLE, "batch": 1, "n_pos": 64, "n_new": 16},
    "short-batch": {"model": WHOLE, "batch": 8, "n_pos": 64, "n_new": 8},
    "tiny": {
        "model": {"n_layer": 2, "n_embd": 768, "vocab_size": 512},
        "batch": 2,
        "n_pos": 8,
        "n_new": 4,
    },
    "long": {"model": THIRD, "batch": 1, "n_pos": 1024, "n_new": 24},
    "long-batch": {"model": THIRD, "batch": 8, "n_pos": 1024, "n_new": 12},
}
"""GPT-2-small's width and heads; all its 12 layers, or 4 where a prompt of 1,024 tokens is long for a CPU:
work and overhead of an edit are both by layer."""


def build(case: dict[str, Any], attention: str) -> Any:
    """The case's model with one kind of attention; all share their weights."""
    return twin(base_model(**case["model"]), attention)


def twin(model: Any, attention: str) -> Any:
    """The model with another kind of attention, on the same weights."""
    other = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    other.set_attn_implementation(attention)
    return other


@functools.cache
def base_model(n_layer: int, n_embd: int, vocab_size: int) -> Any:
    """GPT-2-small's width, random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "vocab_size": vocab_size, "n_positions": 2048}
    config = GPT2Config(**sizes, initializer_range=0.05, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


Run = Callable[[Any, int], Any]
"""(tokens [batch pos], how many new ones) -> tokens with the new ones."""


def workbench(case: dict[str, Any], edits: list[str]) -> tuple[Any, Run]:
    """Stock generate, or the workbench's edits on all heads."""
    import workbench as wb

    model = wb.wrap(build(case, "sdpa"))
    known = {
        "score": wb.ZeroTuning(GAMMA),
        "key": wb.ZeroTuning(1.2, mode="key"),
        "causal": wb.ACT(),
        "full": wb.ACT(mode="full"),
    }

    def run(tokens: Any, n_new: int) -> Any:
        with model.edit(*(known[name] for name in edits)):
            return model.generate(tokens, max_new_tokens=n_new, do_sample=False, eos_token_id=None)

    return model.model.lm_head, run


def eager(case: dict[str, Any]) -> tuple[Any, Run]:
    """Eager attention with an edited pattern, as research code has it."""
    import torch

    name = eager_zerotuning.register(GAMMA)
    model = build(case, "eager")
    model.set_attn_implementation(name)

    def run(tokens: Any, n_new: int) -> Any:
        mask = torch.ones_like(tokens)
        options = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None}
        return model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)

    return model.lm_head, run


def bridge(case: dict[str, Any]) -> tuple[Any, Run]:
    """A TransformerBridge whose pattern hooks edit; transformers' loop on its modules, as it has caches."""
    import torch

    from workbench.models.bridge_building import bridge_of

    made = bridge_of(build(case, "eager"))
    model = made.original_model

    def change(pattern: Any, hook: Any) -> Any:
        return eager_zerotuning.edited(pattern.clone(), GAMMA)

    hooks = [(f"blocks.{n}.attn.hook_pattern", change) for n in range(case["model"]["n_layer"])]

    def run(tokens: Any, n_new: int) -> Any:
        options = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None}
        with made.hooks(fwd_hooks=hooks):
            return model.generate(
                tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options
            )

    return model.lm_head, run


def nnsight(case: dict[str, Any]) -> tuple[Any, Run]:
    """Nnsight's own tracing: the attention function's pattern is edited and mixed again."""
    import torch
    from nnsight import NNsight

    hf = build(case, "eager")
    model = NNsight(hf)
    layers = range(case["model"]["n_layer"])

    def step(tokens: Any, cache: Any) -> Any:
        with model.trace(input_ids=tokens, past_key_values=cache, use_cache=True):
            for n in layers:
                call = model.transformer.h[n].attn.source.node("attention_interface_1")
                value = call.inputs[0][3]
                pattern = eager_zerotuning.edited(call.output[1].clone(), GAMMA)
                call.output = (torch.matmul(pattern, value).transpose(1, 2), pattern)
            output: Any = model.output.save()
        return output

    def run(tokens: Any, n_new: int) -> Any:
        # Its tracing has no cache-aware loop of its own: greedy, one trace a token.
        new, cache = tokens, None
        for _ in range(n_new):
            output = step(new, cache)
            cache = output.past_key_values
            new = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    return hf.lm_head, run


METHODS: dict[str, Callable[[dict[str, Any]], tuple[Any, Run]]] = {
    "stock": lambda case: workbench(case, []),
    "zerotuning score": lambda case: workbench(case, ["score"]),
    "zerotuning key": lambda case: workbench(case, ["key"]),
    "act causal": lambda case: workbench(case, ["causal"]),
    "act full": lambda case: workbench(case, ["full"]),
    "eager, edited pattern": eager,
    "TransformerBridge": bridge,
    "nnsight": nnsight,
}
TILES = "the weight of every key changes, so a prompt runs in tiles and not in the fused kernel"
A_TOKEN = "the hook point's own steps in every layer"
WHY = {
    "zerotuning score": {
        "whole": "eager attention costs less than SDPA's call on short prompts",
        "decode": "eager attention costs less a token than SDPA's call, and nnsight's own loop leaves out what "
        "generate does between tokens",
    },
    "zerotuning key": {
        "whole": "a product with the first key and a mask of its own in every layer",
        "decode": "a product with the first key and a mask of its own in every layer",
    },
    "act causal": {"whole": TILES, "decode": A_TOKEN},
    "act full": {"whole": TILES, "decode": A_TOKEN},
}
"""Where others may be ahead of ours, or stock ``generate`` is: why, for a whole run and for decoding."""
SAME_EDIT = ("zerotuning score", "eager, edited pattern", "TransformerBridge", "nnsight")
PEERS = {"TransformerBridge": "transformer-lens", "nnsight": "nnsight"}
