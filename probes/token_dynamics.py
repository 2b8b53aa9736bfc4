"""Token dynamics: how a model moves its tokens, as a walk or by the weights that drive it.

``mode=walk`` (attention models). A token's residual stream is a walk: r_0 the embedding, then the
attention and the MLP of each block add a step s_i,

    r_{2L} = r_0 + sum of s_i,        s_{2l} = attn_out of block l,  s_{2l+1} = mlp_out of block l

Measured: lengths, straightness |r_{2L} - r_0| / sum |s_i|, angles, where the final token arrives
(logit lens, tuned lens), how much of the path attention walks ("aggregate") and how much the MLPs
("filter"), what each source token adds to attention's output, how far attention is from a uniform
average (association bias) and how little that matters (redundancy), and the path of context vectors
while the model generates.

``mode=state-space`` (Mamba). With B_l = S_B x_l and C_l = S_C x_l the signs of the eigenvalues of
S_C^T S_B say whether tokens converge to 0 or diverge; only weights are read.

Papers: Singh 2023, "Analyzing Transformer Dynamics as Movement through Embedding Space",
arXiv:2308.10874 (the walk: its claims; the measurements that stand for them are ours); Vo et al.
2025, "Demystifying the Token Dynamics of Deep Selective State Space Models", arXiv:2410.03292.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from probes.token_dynamics_decoding import check_room, prompt_lengths
from probes.token_dynamics_lens import load_lens
from probes.token_dynamics_measure import Plan, measure_batch
from probes.token_dynamics_results import (
    REGIMES,
    VIEWS,
    StateSpaceResult,
    TokenDynamicsConfig,
    TokenDynamicsResult,
    WalkResult,
)
from probes.token_dynamics_state_space import measure_state_space
from workbench.context import Context
from workbench.encoding import token_labels
from workbench.errors import CapabilityError, DataError
from workbench.models.base import ModelAdapter, require
from workbench.registry import probe

WALK_NEEDS = frozenset({"capture", "attention", "streaming", "edits", "continue", "weights"})

__all__ = ["StateSpaceResult", "TokenDynamicsConfig", "TokenDynamicsResult", "WalkResult"]


@probe(
    "token-dynamics",
    config=TokenDynamicsConfig,
    result=TokenDynamicsResult,
    paper="arXiv:2410.03292",
    needs={"weights"},
    takes_data=True,
    needs_data=False,
)
def measure_token_dynamics(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: TokenDynamicsConfig,
    context: Context | None = None,
) -> TokenDynamicsResult:
    """Follow each token's walk through a transformer, or read a Mamba's regime from its weights."""
    context = context or Context()
    if config.mode == "state-space":
        found = measure_state_space(model, context)
        names = tuple(REGIMES[int(code) + 1] for code in found["regime"])
        labels = {"regime": names, "part": ("real", "imaginary"), "bound": ("min", "mean", "max")}
        return StateSpaceResult(**found, config=config, labels=labels)
    _check(model, tokens, config, context)
    order = torch.randperm(2 * model.spec.n_layers, generator=context.generator())
    plan = Plan(config, load_lens(config.tuned_lens, model.spec), order)
    parts = context.each_batch(tokens, lambda batch: measure_batch(model, batch, plan))
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return _walk_result(
        dict.fromkeys(_OPTIONAL) | whole, config, token_labels(model.tokenizer, tokens)
    )


_OPTIONAL = (
    "tuned_kl",
    "decoding_step",
    "decoding_turning",
    "decoding_straightness",
    "proximity",
    "chosen_cosine",
)


def _check(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: TokenDynamicsConfig,
    context: Context,
) -> None:
    """Refuse what cannot be measured before anything runs."""
    if not model.spec.n_heads:
        raise CapabilityError(
            f"mode=walk needs attention; {model.spec.name} ({model.spec.family}) has none; set "
            "mode=state-space"
        )
    if not len(tokens):
        raise DataError(
            "mode=walk needs prompts; none were given; try --data builtin:natural, or give texts or "
            "tokens as data"
        )
    require(model, WALK_NEEDS, "probe token-dynamics, mode=walk,")
    lengths = prompt_lengths(tokens, context)
    row, shortest = lengths.index(min(lengths)), min(lengths)
    reach = max([2, *(pos + 1 if pos >= 0 else -pos for pos in config.queries)])
    if shortest < reach:
        raise DataError(
            f"prompts must have at least {reach} tokens, because the walk leaves the first out and "
            f"queries={','.join(map(str, config.queries))} must lie inside; prompt {row} has "
            f"{shortest}; leave it out, or set other queries"
        )
    if config.new_tokens:
        check_room(model, lengths, config.new_tokens)


def _walk_result(
    found: dict[str, Any], config: TokenDynamicsConfig, names: dict[str, tuple[str, ...]]
) -> WalkResult:
    """Put the views side by side and name the axes."""

    def views(what: str) -> Tensor:
        return torch.stack([found.pop(f"{what}_{view}") for view in ("raw", "centred", "normed")])

    n_steps = found["step_norm"].shape[-1]
    steps = tuple(f"L{i // 2}.{('attn', 'mlp')[i % 2]}" for i in range(n_steps))
    labels = {
        "view": VIEWS,
        "step": steps,
        "model": ("full", "baseline", "silenced"),
        "query": tuple(map(str, config.queries)),
        **names,
    }
    by_view = {
        "straightness_by_view": views("straight"),
        "view_cosine": views("cosine"),
        "view_turning": views("turning"),
    }
    return WalkResult(**found, **by_view, config=config, labels=labels)
