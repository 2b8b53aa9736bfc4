"""Contexts and targets: drawn, cut from prompts, and checked against the model."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.activation_attacks_config import ActivationAttackConfig
from workbench.context import Context
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.models.base import ModelAdapter, ModelSpec

LONGEST = 1000
"""The paper forces up to about as many tokens."""
TIED = 1e-6
"""Relative distance of two unembeddings that are the same up to rounding."""
MAX_REDRAWS = 200
TRIED_POINTS = 3
SLOPE_STEP = 1e-3


@dataclass(frozen=True)
class Cases:
    """What is attacked, one pair a row."""

    contexts: Int[Tensor, "row pos"]
    targets: Int[Tensor, "row t"]
    """Whole; a problem of t tokens forces the first t."""


def draw_cases(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: ActivationAttackConfig,
    context: Context,
) -> Cases:
    """Contexts and targets: uniform ids, or from prompts where there are some.

    Raises:
        ConfigError: They do not fit into n_ctx.
        DataError: Too few or too short prompts, or a target that cannot be forced.
    """
    spec, n_rows = model.spec, config.n_seeds
    limit = target_limit(spec, config)
    generator = context.generator()
    contexts = torch.randint(spec.d_vocab, (n_rows, config.context), generator=generator)
    targets = _draw_targets(model, (n_rows, limit), config.distinct, generator)
    if tokens.numel():
        wanted = config.context + (limit if config.targets == "text" else 0)
        _check_prompts(tokens, context.attention_mask, n_rows, wanted)
        contexts = tokens[:n_rows, : config.context]
        if config.targets == "text":
            targets = tokens[:n_rows, config.context : wanted]
    elif config.targets == "text":
        raise DataError("targets=text needs prompts; none were given; add --data")
    check_cases(model, contexts, targets)
    return Cases(contexts, targets)


def _draw_targets(
    model: ModelAdapter, shape: tuple[int, int], distinct: float, generator: torch.Generator
) -> Int[Tensor, "row t"]:
    """Uniform ids among those whose unembedding is far enough from every other."""
    d_vocab = model.spec.d_vocab
    targets = torch.randint(d_vocab, shape, generator=generator)
    for _ in range(MAX_REDRAWS):
        near = distance_to_others(model, targets) <= distinct
        if not bool(near.any()):
            return targets
        targets[near] = torch.randint(d_vocab, (int(near.sum()),), generator=generator)
    raise DataError(
        f"random targets need tokens whose unembedding differs from every other by more than distinct "
        f"= {distinct} of its norm; {model.spec.name} has hardly any; lower distinct"
    )


def target_limit(spec: ModelSpec, config: ActivationAttackConfig) -> int:
    """The longest target, in tokens.

    Raises:
        ConfigError: Context and target do not fit into n_ctx.
    """
    room = spec.n_ctx - config.context
    if room < 1 or (config.t_limit or 1) > room:
        raise ConfigError(
            f"context and target together must have at most n_ctx = {spec.n_ctx} tokens for "
            f"{spec.name}; got {config.context} + {config.t_limit or 1}; lower context or t_limit"
        )
    return min(room, LONGEST) if config.t_limit is None else config.t_limit


def check_cases(
    model: ModelAdapter, contexts: Int[Tensor, "row pos"], targets: Int[Tensor, "row t"]
) -> None:
    """Refuse targets that no attack could reach.

    Raises:
        DataError: Ids outside the vocabulary, or one whose logit always equals another's.
    """
    d_vocab = model.spec.d_vocab
    for name, ids in (("context", contexts), ("target", targets)):
        outside = (ids < 0) | (ids >= d_vocab)
        if bool(outside.any()):
            row, place = outside.nonzero()[0].tolist()
            raise DataError(
                f"{name} ids must lie in 0 ... {d_vocab - 1}, the vocabulary of {model.spec.name}; "
                f"got {int(ids[row, place])} in row {row}; use this model's tokenizer"
            )
    tied = distance_to_others(model, targets) < TIED
    if bool(tied.any()):
        row, place = tied.nonzero()[0].tolist()
        raise DataError(
            "a target must be able to be the only argmax; the unembedding of token "
            f"{int(targets[row, place])} (row {row}) equals that of another token, so their logits are "
            "always tied; choose another target"
        )


def distance_to_others(model: ModelAdapter, ids: Int[Tensor, "*size"]) -> Float[Tensor, "*size"]:
    """How far the unembedding of each token is from the nearest other one, over its own norm.

    0: the two logits are always tied, so neither token can be the only argmax. Tokens that training
    never met stay close to each other, and no attack can tell them apart.
    """
    weight = model.weight("W_U").T.double()
    asked, place = ids.unique(return_inverse=True)
    nearest = []
    for part in asked.split(256):
        distance = torch.cdist(weight[part], weight)
        distance[torch.arange(len(part)), part] = torch.inf
        nearest.append(distance.amin(dim=1) / weight[part].norm(dim=1))
    return torch.cat(nearest)[place].float()


def attacked_positions(
    config: ActivationAttackConfig, n_attacked: int, generator: torch.Generator
) -> tuple[int, ...]:
    """The attacked positions, ascending; those of a smaller a are among those of a larger one."""
    listed = config.listed_positions()
    if config.positions == "random":
        listed = tuple(torch.randperm(config.context, generator=generator).tolist())
    elif config.positions == "last":
        listed = tuple(reversed(range(config.context)))
    elif listed is None:
        listed = tuple(range(config.context))
    return tuple(sorted(listed[:n_attacked]))


def dimension_mask(
    d_model: int, config: ActivationAttackConfig, share: float, generator: torch.Generator
) -> Float[Tensor, " d_model"]:
    """1 at the dimensions that may be perturbed: a random share of the listed ones.

    Raises:
        ConfigError: No such dimension, or a share that is less than one dimension.
    """
    listed = torch.tensor(config.dimensions or range(d_model), dtype=torch.long)
    if int(listed.max()) >= d_model:
        raise ConfigError(
            f"dimensions must be below d_model = {d_model}; got {int(listed.max())}; leave it out"
        )
    count = round(share * len(listed))
    if count < 1:
        raise ConfigError(
            f"fractions must leave at least one of {len(listed)} dimensions; got {share}; raise it"
        )
    mask = torch.zeros(d_model)
    mask[listed[torch.randperm(len(listed), generator=generator)[:count]]] = 1.0
    return mask


def refuse_without_gradients(model: ModelAdapter, layer: int) -> None:
    """Try a gradient: quantised kernels have none, whatever the backend says.

    A layer without one may hide behind the residual stream, which goes around it; so in float32 the
    gradient must also be the slope of the logits.

    Raises:
        CapabilityError: Names the backend that could.
    """
    generator = torch.Generator().manual_seed(0)
    reason = ""
    for _ in range(TRIED_POINTS):  # a kink or a change of expert may spoil one
        resid = torch.randn(1, 2, model.spec.d_model, generator=generator)
        reason = _gradient_fault(model, layer, resid)
        if not reason:
            return
    raise CapabilityError(
        f"activation attacks need gradients of the logits; {model.spec.name} ({model.dtype}) on "
        f"{model.backend} gives none ({reason}); load float weights with --backend hf --dtype "
        "float32 or bfloat16, without int8"
    )


def _gradient_fault(model: ModelAdapter, layer: int, resid: Float[Tensor, "1 pos d_model"]) -> str:
    """What is wrong with the gradient at one point; "" if nothing is."""

    def value(resid: Tensor) -> Tensor:
        return model.continue_from(layer, resid, last=1).log_softmax(dim=-1)[0, 0, 0]

    wanted = resid.clone().requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(value(wanted), wanted, allow_unused=True)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0][:120]
    if gradient is None:
        return "the gradient is empty"
    if model.dtype != "float32":
        return ""  # too coarse for a difference quotient
    length = gradient.norm()
    step = SLOPE_STEP * gradient / length.clamp(min=1e-30)
    slope = (value(resid + step) - value(resid - step)) / (2 * SLOPE_STEP)
    if bool((slope - length).abs() <= 0.5 * length):
        return ""
    return f"a slope of {float(slope):.2g} where the gradient says {float(length):.2g}"


def _check_prompts(
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
    n_rows: int,
    wanted: int,
) -> None:
    if len(tokens) < n_rows:
        raise DataError(
            f"there must be at least n_seeds = {n_rows} prompts; got {len(tokens)}; give more, or "
            "lower n_seeds"
        )
    lengths = torch.full((len(tokens),), tokens.shape[1]) if mask is None else mask.sum(dim=1)
    shortest = int(lengths[:n_rows].min())
    if shortest < wanted:
        raise DataError(
            f"the first {n_rows} prompts must have at least {wanted} tokens (context, and the target "
            f"with targets=text); the shortest has {shortest}; lower context or t_limit"
        )
