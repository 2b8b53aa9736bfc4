"""What reads and edits one forward pass of a transformers model, and is gone after it.

Attention goes through the hook point of ``workbench.attention.interface``, the residual stream
through ordinary forward hooks on the modules that ``families`` names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.attention.edits import ActivationEdit, AttentionEdit, Edit
from workbench.attention.interface import (
    STOCK_IMPLEMENTATIONS,
    AttentionSession,
    implementation_name,
    reduced,
)
from workbench.errors import CapabilityError
from workbench.models.base import ATTENTION_SITES, Site
from workbench.models.families import Family
from workbench.models.generating import following_beams, uncompiled
from workbench.models.inputs import Inputs
from workbench.models.offload import running_device


class ModuleHooks:
    """The places of one model where it is read and edited."""

    def __init__(self, model: Any, family: Family) -> None:
        """Find the blocks; nothing is hooked yet.

        Args:
            model: A ``PreTrainedModel``.
            family: Where it keeps its parts.
        """
        self.model = model
        self.family = family
        self.blocks: list[nn.Module] = list(model.get_submodule(family.blocks))
        self.stock: str = model.config._attn_implementation or "eager"
        """The attention implementation of an untouched forward pass."""

    @property
    def device(self) -> torch.device:
        """Where a forward pass begins."""
        return running_device(self.model.get_input_embeddings())

    @contextmanager
    def installed(
        self,
        reads: Mapping[Site, Any],
        edits: Sequence[Edit],
        inputs: Inputs,
        first_attention: int = 0,
    ) -> Iterator[dict[Site, Any]]:
        """Install what the reads and the edits need; remove it on every way out.

        Args:
            reads: Reductions by site.
            edits: In the order in which they apply.
            inputs: Of the forward pass.
            first_attention: The first layer whose attention runs.

        Raises:
            CapabilityError: The model was loaded with an attention implementation that hides its work.
        """
        captured: dict[Site, Any] = {}
        with ExitStack() as stack:
            hooked = [e for e in edits if isinstance(e, ActivationEdit) and e.site.name != "z"]
            if hooked or reads:
                stack.enter_context(uncompiled())
            for edit in hooked:
                stack.callback(self._hook_edit(edit, inputs).remove)
            for site, reduce in reads.items():
                if site.name not in ATTENTION_SITES:
                    stack.callback(self._hook_read(site, reduce, inputs, captured).remove)
            session = self._attention_session(reads, edits, inputs, captured, first_attention)
            if session is None:
                yield captured
                return
            stack.enter_context(session)
            stack.enter_context(following_beams(self.model, edits))
            stack.callback(self.model.set_attn_implementation, self.stock)
            self.model.set_attn_implementation(implementation_name(self.stock))
            yield captured
            session.check_calls()

    def _attention_session(
        self,
        reads: Mapping[Site, Any],
        edits: Sequence[Edit],
        inputs: Inputs,
        captured: dict[Site, Any],
        first: int,
    ) -> AttentionSession | None:
        by_layer: dict[int, dict[str, Any]] = {}
        for site, reduce in reads.items():
            if site.name in ATTENTION_SITES and site.layer is not None:
                by_layer.setdefault(site.layer, {})[site.name] = reduce
        changes: dict[int, list[Edit]] = {}
        for edit in edits:
            if isinstance(edit, AttentionEdit):
                changes.setdefault(edit.layer, []).append(edit)
            elif edit.site.name == "z" and edit.site.layer is not None:
                changes.setdefault(edit.site.layer, []).append(edit)
        if not by_layer and not changes:
            return None
        if self.stock not in STOCK_IMPLEMENTATIONS:
            raise CapabilityError(
                f"captures and edits need the attention implementation sdpa or eager; this model was "
                f"loaded with {self.stock}; load it with attn_implementation='sdpa'"
            )
        attn = self.family.attn
        assert attn is not None  # sites and edits that need attention have been refused
        layers = {
            block.get_submodule(attn): layer
            for layer, block in enumerate(self.blocks)
            if layer >= first
        }
        row_valid = inputs.row_valid(self.device)
        return AttentionSession(
            self.stock, layers, by_layer, changes, row_valid, inputs.first_key(), captured
        )

    def _hook_read(self, site: Site, reduce: Any, inputs: Inputs, captured: dict[Site, Any]) -> Any:
        module, before = self._module(site)

        def read(activation: Tensor) -> Tensor:
            captured[site] = reduced(_with_batch(activation, inputs), reduce)
            return activation

        return _hook(module, read, before=before)

    def _hook_edit(self, edit: ActivationEdit, inputs: Inputs) -> Any:
        module, before = self._module(edit.site)

        def change(activation: Tensor) -> Tensor:
            return edit.change(_with_batch(activation, inputs)).view_as(activation)

        return _hook(module, change, before=before)

    def _module(self, site: Site) -> tuple[nn.Module, bool]:
        """The module at a site, and whether the site is its input."""
        family = self.family
        if site.name == "embed":
            embedding: nn.Module = self.model.get_input_embeddings()
            return embedding, False
        if site.layer is None:
            return self.model.get_submodule(family.ln_final), False
        block = self.blocks[site.layer]
        if site.name in ("resid_pre", "resid_post"):
            return block, site.name == "resid_pre"
        if site.name == "resid_mid":
            return block.get_submodule(family.mid or ""), True
        path = family.attn_out if site.name == "attn_out" else family.mlp_out
        return block.get_submodule(path or ""), False


def _hook(module: nn.Module, change: Callable[[Tensor], Tensor], *, before: bool) -> Any:
    """Pass a module's input or output (the first of a tuple) through ``change``."""
    if before:

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(on_input, with_kwargs=True)

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return module.register_forward_hook(on_output)


def _with_batch(activation: Tensor, inputs: Inputs) -> Tensor:
    """``[batch pos d]``, also where a block has flattened batch and positions (OPT's MLP)."""
    if activation.dim() == 3:
        return activation
    return activation.view(inputs.tokens.shape[0], -1, activation.shape[-1])
