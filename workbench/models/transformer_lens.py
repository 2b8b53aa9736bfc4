"""The ``transformer-lens`` backend: TransformerBridge objects behind the workbench's protocol.

The bridge keeps the checkpoint's own weights: nothing is folded or centred, so every number is the
hf backend's within rounding. It always makes whole patterns; here each layer's is reduced inside
its hook and freed before the next layer runs.
"""

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import (
    ActivationEdit,
    Edit,
    Intervention,
)
from workbench.errors import CapabilityError, EngineError
from workbench.interventions.active import ActiveEdits
from workbench.models.base import Captured, ModelSpec, Reducers, Site
from workbench.models.bridge_hooks import BridgeHooks
from workbench.models.checks import check_editable
from workbench.models.continuing import continue_by_edit
from workbench.models.families import LLAMA, Family
from workbench.models.generating import following_beams, uncompiled
from workbench.models.inputs import Inputs, mask_and_positions, prepare_inputs
from workbench.models.memory import tell_pattern_memory
from workbench.models.outside import layout_of, spec_of
from workbench.models.pattern_edits import PatternChange, counted
from workbench.models.reading import keeper, reductions
from workbench.models.sublayers import final_norm, mlp_of_embedding
from workbench.models.text import generate_with, token_loop


class TransformerLensModel:
    """A TransformerBridge; see ``workbench.models.base.ModelAdapter``."""

    backend = "transformer-lens"
    attention = "eager"
    """The bridge makes every pattern: the kernel is always the plain one."""

    def __init__(
        self, bridge: Any, tokenizer: Any = None, *, name: str = "", revision: str = ""
    ) -> None:
        """Take over a bridge: eval mode, weights frozen.

        Args:
            bridge: A ``TransformerBridge`` around a causal language model of transformers.
            tokenizer: Its tokenizer, if texts are to be read.
            name: What people call it.
            revision: Hub commit or hash of the weights.

        Raises:
            CapabilityError: The bridge is in compatibility mode.
        """
        if bridge.compatibility_mode:
            raise CapabilityError(
                "the bridge must hold the checkpoint's own weights; this one is in compatibility mode, "
                "which folds and centres them (logits of a GPT-OSS were off by 2.47); wrap it before "
                "enable_compatibility_mode()"
            )
        self.bridge = bridge.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.spec = _spec(bridge, name=name, revision=revision)
        self.hooks = BridgeHooks(bridge, self.spec)
        # One forward pass at a time: the hook points are the bridge's, not a caller's.
        self._lock = threading.RLock()
        self._edits = ActiveEdits(self.spec, self._lock, self._refuse_edit)
        accepted = inspect.signature(bridge.original_model.forward).parameters
        self._takes_positions = "position_ids" in accepted

    @property
    def capabilities(self) -> frozenset[str]:
        """What this model can do; without attention there are residual sites only."""
        can = {"capture", "continue", "edits", "generate", "weights"}
        if self._takes_positions:
            can.add("positions")
        with self._lock:
            if all(self.hooks.shows(Site(name, 0)) for name in ("q", "k", "v", "z")):
                can.add("attention")
            if self.hooks.shows(Site("pattern", 0)):
                can |= {"patterns", "streaming"}
        return frozenset(can)

    @property
    def model(self) -> Any:
        """The transformers model inside, with the bridge's modules in it."""
        return self.bridge.original_model

    @property
    def dtype(self) -> str:
        """The dtype of the weights, e.g. ``float32``."""
        return str(self.bridge.W_E.dtype).removeprefix("torch.")

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The interventions that are active now."""
        return self._edits.interventions

    # Forward passes

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Run one forward pass and return the logits, on the CPU in float32."""
        inputs = prepare_inputs(self.spec, tokens, attention_mask)
        with self._lock, torch.no_grad(), self._hooked({}, inputs):
            logits = self._forward(inputs).float().cpu()
        return logits if last is None else logits[:, -last:]

    def capture(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[Site | str],
        reduce: Reducers = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> Captured:
        """Run one forward pass and return the activation at each site; see ``ModelAdapter``."""
        parsed = [Site.parse(site) for site in sites]
        reads = reductions(self.spec, parsed, reduce)
        inputs = prepare_inputs(self.spec, tokens, attention_mask, position_ids)
        tell_pattern_memory(self.spec, inputs, reads)
        with self._lock, torch.no_grad(), self._hooked(reads, inputs) as captured:
            self._forward(inputs)
        return Captured({site: captured[site] for site in parsed})

    def continue_from(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Go on from ``resid_pre`` of one block, by a whole forward pass; see ``ModelAdapter``."""
        return continue_by_edit(self, layer, resid, attention_mask, last)

    def generate(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """Continue a text or tokens; edits act on the prompt and on every new token."""
        defaults = self.model.generation_config
        return generate_with(
            self, self._generate_tokens, prompt, max_new_tokens, options, defaults=defaults
        )

    def _generate_tokens(
        self, tokens: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        inputs = prepare_inputs(self.spec, tokens, attention_mask)
        with self._lock, torch.no_grad(), self._hooked({}, inputs):
            # Not the bridge's own loop: it needs a tokenizer and takes other arguments.
            return token_loop(self, self.hooks.device, tokens, attention_mask, options)

    def edit(self, *interventions: Any) -> AbstractContextManager[None]:
        """Within the context, logits, capture, generate and every probe see the edits.

        Args:
            interventions: Objects, the content of intervention files, or their paths.

        Raises:
            CapabilityError: The bridge cannot carry an edit out on this architecture.
        """
        return self._edits.adding(interventions)

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """One weight in TransformerLens' layout, float32 on the CPU; see ``base.WEIGHTS``.

        Raises:
            CapabilityError: The architecture has no such weight.
        """
        holder = self.bridge
        if layer is not None and self.spec.n_heads and layer < self.spec.n_layers:
            holder = self.bridge.blocks[layer].attn
        of_layer = name in ("W_Q", "W_K", "W_V", "W_O")
        known = (
            of_layer
            or name in ("W_E", "W_U")
            or (name, self.spec.positions) == ("W_pos", "learned")
        )
        if not known or of_layer != (holder is not self.bridge):
            raise CapabilityError(
                f"{self.spec.family} has no weight {name} at layer {layer}; see workbench.models.base.WEIGHTS"
            )
        found: Tensor = getattr(holder, name)
        return found.detach().float().cpu()

    def mlp_of_embedding(self, layer: int, x: Float[Tensor, "n d_model"], *, norm: bool) -> Tensor:
        """Apply one block's MLP to vectors, behind its norm if asked; float32, CPU."""
        return mlp_of_embedding(self.model, self._layout, self.spec, layer, x, norm=norm)

    def final_norm(self, resid: Float[Tensor, "*batch d_model"]) -> Tensor:
        """Apply the norm before the unembedding; float32, CPU."""
        return final_norm(self.model, self._layout, resid)

    # How it is done

    @property
    def _layout(self) -> Family | None:
        return layout_of(self.model.config.get_text_config())

    def _forward(self, inputs: Inputs) -> Tensor:
        device = self.hooks.device
        logits: Tensor = self.bridge(
            inputs.tokens.to(device),
            return_type="logits",
            use_cache=False,
            **mask_and_positions(self.spec, inputs, device, takes_positions=self._takes_positions),
        )
        return logits

    @contextmanager
    def _hooked(self, reads: Mapping[Site, Any], inputs: Inputs) -> Iterator[dict[Site, Any]]:
        """Install what the reads and the active edits need; remove it on every way out."""
        captured: dict[Site, Any] = {}
        calls: Counter[str] = Counter()
        expected = []
        with ExitStack() as stack:
            if reads or self._edits.interventions:
                stack.enter_context(self.hooks.batch_noted())
                stack.enter_context(uncompiled())
            edits = self._edits.plan()
            stack.enter_context(following_beams(self.model, edits))
            for edit in edits:
                site, change = self._change(edit, inputs)
                expected.append(str(site))
                stack.enter_context(self.hooks.changing(site, counted(change, calls, str(site))))
            for site, reduce in reads.items():
                keep = keeper(site, reduce, inputs, captured)
                stack.enter_context(self.hooks.reading(site, keep))
            yield captured
        silent = [site for site in expected if not calls[site]]
        silent += [str(site) for site in reads if site not in captured]
        if silent:
            raise EngineError(
                f"every hook must run in a forward pass; {', '.join(silent)} did not in this bridge of "
                f"{self.spec.family}; use --backend hf"
            )

    def _change(self, edit: Edit, inputs: Inputs) -> tuple[Site, Callable[[Tensor], Tensor]]:
        if isinstance(edit, ActivationEdit):
            return edit.site, edit.change
        return Site("pattern", edit.layer), PatternChange(
            edit, inputs.first_key(), inputs.row_valid(torch.device("cpu"))
        )

    def _refuse_edit(self, edit: Edit) -> None:
        if isinstance(edit, ActivationEdit):
            check_editable(edit.site)
        site, _ = self._change(edit, Inputs(torch.zeros(1, 1, dtype=torch.long), None, None))
        with self.hooks.changing(site, lambda x: x):
            pass


def _spec(bridge: Any, *, name: str, revision: str) -> ModelSpec:
    model = bridge.original_model
    family = layout_of(model.config.get_text_config())
    if family is None:
        has_attention = any("attn.hook_z" in hook for hook in bridge.hook_dict)
        kind = getattr(bridge.cfg, "positional_embedding_type", "rotary")
        positions = "learned" if kind == "standard" else str(kind)
        attn = "attn" if has_attention else None
        family = replace(LLAMA, attn=attn, positions=positions)
    return spec_of(model, family, name=name, revision=revision)
