"""Forward passes that start in the middle of a model.

The ``hf`` backend skips the blocks before (``starting_at``); the others run them and throw their
work away (``continue_by_edit``): the same numbers for more time.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.attention.edits import ActivationEdit, Edit
from workbench.errors import CapabilityError, DataError, EngineError
from workbench.models.base import ATTENTION_SITES, ModelAdapter, ModelSpec, Site
from workbench.models.checks import check_layer
from workbench.models.families import Family
from workbench.models.inputs import Inputs, prepare_inputs


def prepare_residual(
    spec: ModelSpec,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    attention_mask: Int[Tensor, "batch pos"] | None,
) -> Inputs:
    """Check a residual stream against the model; the tokens that come back are placeholders.

    Raises:
        ConfigError: No such layer.
        DataError: Another width than the model's.
    """
    check_layer(spec, layer)
    if resid.dim() != 3 or resid.shape[-1] != spec.d_model or not resid.is_floating_point():
        raise DataError(
            f"resid must be floats [batch pos {spec.d_model}] for {spec.name}; got {resid.dtype} "
            f"{list(resid.shape)}; capture resid_pre of layer {layer}"
        )
    tokens = resid.new_zeros(resid.shape[:2]).long().cpu()
    return prepare_inputs(spec, tokens, attention_mask)


def comes_later(site: Site, layer: int, *, z_given: bool = False) -> bool:
    """Whether a site still lies ahead when ``resid_pre`` of ``layer`` is given, and perhaps its z."""
    if site.layer is None:
        return site.name == "ln_final"
    if site.layer == layer:
        return site.name != "resid_pre" and not (z_given and site.name in ATTENTION_SITES)
    return site.layer > layer


@contextmanager
def starting_at(
    blocks: Sequence[nn.Module], layer: int, resid: Float[Tensor, "batch pos d_model"]
) -> Iterator[None]:
    """Within the context, a forward pass skips the blocks before ``layer`` and gives it ``resid``.

    The model's own code makes masks and positions, so this holds for every architecture.
    """
    with ExitStack() as stack:
        for block in blocks[:layer]:
            stack.callback(_restore, block, block.__dict__.get("forward"))
            block.forward = _skip
        hook = blocks[layer].register_forward_pre_hook(_giving(resid), with_kwargs=True)
        stack.callback(hook.remove)
        yield


@contextmanager
def attention_given(
    block: nn.Module, family: Family, z: Float[Tensor, "batch pos head d_head"]
) -> Iterator[None]:
    """Within the context, a block's attention is not run: its z is this.

    Every architecture of the family table calls its attention for (output, pattern).
    """
    attention, w_o = _attention_and_output(block, family)

    def given(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return w_o(z.to(hidden).flatten(-2)), None

    own = attention.__dict__.get("forward")
    attention.forward = given
    try:
        yield
    finally:
        _restore(attention, own)


@contextmanager
def ending_at(modules: Sequence[nn.Module], last: int) -> Iterator[None]:
    """Within the context, some modules of the last block read the last positions only.

    Nobody reads the others when only the last logits are made: behind these modules come sums, norms
    and the unembedding, position by position. Without them the queries, the attention's output and
    the MLP of a block are left out, three quarters of it and more.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_reading_last(module, last))
        yield


@contextmanager
def _reading_last(module: nn.Module, last: int) -> Iterator[None]:
    """Within the context, a module is given the last positions; of the others it says 0."""
    left_out = 0

    def cut(module: nn.Module, args: tuple[Any, ...]) -> Any:
        nonlocal left_out
        left_out = args[0].shape[1] - last
        # Some MLPs flatten what they are given with a view.
        return (args[0][:, -last:].contiguous(), *args[1:])

    def pad(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        whole = nn.functional.pad(first, (0, 0, left_out, 0))
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(cut).remove)
        stack.callback(module.register_forward_hook(pad).remove)
        yield


@dataclass(frozen=True)
class Shares:
    """Parts of one block, by the entries of its matrices: what a position costs that needs less."""

    behind: float
    """What comes behind the mix of values: the attention's output and the MLP."""
    unread: float
    """What is left out where only later blocks' positions would read it; see ``ending_at``."""

    @staticmethod
    def of(block: nn.Module, family: Family) -> "Shares":
        """Count the matrices of a block; its attention must be known."""
        attention, w_o = _attention_and_output(block, family)
        total, output = _entries(block), _entries(w_o)
        unread = sum(map(_entries, read_by_later_positions(block, family)))
        return Shares((total - _entries(attention) + output) / total, unread / total)


def _attention_and_output(block: nn.Module, family: Family) -> tuple[nn.Module, nn.Module]:
    assert family.attn is not None  # z is a site of attention
    assert family.w_o is not None
    return block.get_submodule(family.attn), block.get_submodule(family.w_o)


def _entries(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)


def read_by_later_positions(block: nn.Module, family: Family) -> list[nn.Module]:
    """The modules of a last block that nothing needs but at the positions whose logits are made."""
    paths = (family.w_q, family.w_o, family.mlp)
    return [block.get_submodule(path) for path in paths if path is not None]


def _skip(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _restore(block: nn.Module, own: Any) -> None:
    # accelerate, too, keeps its forward in the instance.
    if own is None:
        del block.forward
    else:
        block.forward = own


def _giving(resid: Tensor) -> Any:
    def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: Tensor = args[0] if args else kwargs["hidden_states"]
        if given.shape != resid.shape:
            raise EngineError(
                f"a skipped block must hand on [batch pos d_model] = {list(resid.shape)}; the next one "
                f"got {list(given.shape)}; this version of the architecture cannot be started in the "
                "middle"
            )
        resumed = resid.to(given)
        return (
            ((resumed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": resumed})
        )

    return give


def continue_by_edit(
    model: ModelAdapter,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    attention_mask: Int[Tensor, "batch pos"] | None,
    last: int | None,
) -> Float[Tensor, "batch kept d_vocab"]:
    """``continue_from`` by a whole forward pass on placeholder tokens.

    Raises:
        CapabilityError: A gradient is wanted.
    """
    if resid.requires_grad and torch.is_grad_enabled():
        raise CapabilityError(
            f"gradients need --backend hf or a toy model; the {model.backend} backend has none for "
            f"{model.spec.name}; load it with --backend hf"
        )
    tokens = prepare_residual(model.spec, layer, resid, attention_mask).tokens
    with model.edit(_Given(layer, resid)):
        logits = model.logits(tokens, attention_mask)
    return (logits if last is None else logits[:, -last:]).to(resid.device)


@dataclass(frozen=True, eq=False)
class _Given:
    """Puts a residual stream in front of a block, whatever came there."""

    layer: int
    resid: Tensor
    name: str = "given-residual"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        return [ActivationEdit(Site("resid_pre", self.layer), lambda x: self.resid.to(x))]
