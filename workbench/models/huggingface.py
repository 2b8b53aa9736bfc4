"""The ``hf`` backend: transformers models, read and edited inside their own forward pass.

``module_hooks`` holds what is hooked and how. With nothing to read or edit the model runs untouched.
"""

import inspect
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import (
    AttentionEdit,
    Edit,
    Intervention,
)
from workbench.interventions.active import ActiveEdits
from workbench.models.base import (
    Captured,
    Reducers,
    Site,
)
from workbench.models.checks import check_editable, check_place
from workbench.models.continuing import (
    Shares,
    attention_given,
    comes_later,
    ending_at,
    prepare_residual,
    read_by_later_positions,
    starting_at,
)
from workbench.models.families import Family, family_of
from workbench.models.generating import uncompiled
from workbench.models.inputs import Inputs, mask_and_positions, prepare_inputs
from workbench.models.memory import tell_pattern_memory
from workbench.models.module_hooks import ModuleHooks
from workbench.models.prefix import (
    KeysValues,
    Prefix,
    check_prefix,
    check_prefixes,
    make_prefix,
    prefix_of_kept,
    with_prefix,
)
from workbench.models.reading import reductions
from workbench.models.sizes import make_spec
from workbench.models.sublayers import final_norm, mlp_of_embedding
from workbench.models.text import generate_with, token_loop
from workbench.models.weights import read_weight

_CAPABILITIES = frozenset({"capture", "continue", "edits", "generate", "gradients", "weights"})
_WITH_ATTENTION = frozenset({"attention", "patterns", "streaming"})


class HuggingFaceModel:
    """A transformers causal language model; see ``workbench.models.base.ModelAdapter``."""

    backend = "hf"

    def __init__(
        self, model: Any, tokenizer: Any = None, *, name: str = "", revision: str = ""
    ) -> None:
        """Take over a loaded model: eval mode, weights frozen.

        Args:
            model: A ``PreTrainedModel`` with a language-modelling head.
            tokenizer: Its tokenizer, if texts are to be read.
            name: What people call it.
            revision: Hub commit or hash of the weights.

        Raises:
            CapabilityError: An architecture or kernel that this backend cannot hook.
        """
        config = model.config.get_text_config()
        self.family: Family = family_of(config.model_type, config)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.spec = make_spec(model, self.family, name=name, revision=revision)
        self.hooks = ModuleHooks(self.model, self.family)
        # One forward pass at a time: hooks and the attention implementation are model-wide.
        self._lock = threading.RLock()
        self._edits = ActiveEdits(self.spec, self._lock, self._refuse_edit)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted

    @property
    def capabilities(self) -> frozenset[str]:
        """What this model can do; without attention there are residual sites only."""
        extra = {"positions"} if self._takes_positions else set()
        return _CAPABILITIES | extra | (_WITH_ATTENTION if self.family.attn else frozenset())

    @property
    def dtype(self) -> str:
        """The dtype of the weights, e.g. ``float32``."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def attention(self) -> str:
        """The stock attention implementation (``sdpa``, ``eager``)."""
        return self.hooks.stock if self.family.attn else "none"

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
            return self._logits(inputs, last).float().cpu()

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
        reads = self._reads(parsed, reduce)
        inputs = prepare_inputs(self.spec, tokens, attention_mask, position_ids)
        tell_pattern_memory(self.spec, inputs, reads)
        with self._lock, torch.no_grad(), self._hooked(reads, inputs) as captured:
            # Without the unembedding: no site lies behind it.
            self.model.base_model(**self._arguments(inputs))
        return Captured({site: captured[site] for site in parsed})

    def continue_from(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
        prefix: Prefix | None = None,
        z: Float[Tensor, "batch pos head d_head"] | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Go on from ``resid_pre`` of one block; see ``ModelAdapter``.

        With a ``prefix``, ``resid`` and the mask are those of the positions after it. With ``z`` the
        block's attention is not run: that is its outcome, with whatever edits belong to it.
        """
        inputs = prepare_residual(self.spec, layer, resid, attention_mask)
        if prefix is not None:
            check_prefixes(self)
            check_prefix(self.spec, prefix, inputs)
        with (
            self._lock,
            torch.set_grad_enabled(resid.requires_grad),
            self._hooked({}, inputs, layer, z_given=z is not None),
            uncompiled(),  # compiled code would not see where it is to start
            starting_at(self.hooks.blocks, layer, resid),
            self._giving(layer, z),
            self._ending(last, resid.shape[1]),
        ):
            return self._logits(inputs, last, prefix).float().to(resid.device)

    def _giving(self, layer: int, z: Tensor | None) -> AbstractContextManager[None]:
        if z is None:
            return nullcontext()
        return attention_given(self.hooks.blocks[layer], self.family, z)

    def _ending(self, last: int | None, n_pos: int) -> AbstractContextManager[None]:
        """Leave out of the last block what nobody reads; an edit might."""
        if last is None or last >= n_pos or self.interventions:
            return nullcontext()
        return ending_at(read_by_later_positions(self.hooks.blocks[-1], self.family), last)

    def shares(self, layer: int) -> Shares:
        """What ``continue_from`` leaves out of a block, given its z, or if it is the last."""
        return Shares.of(self.hooks.blocks[layer], self.family)

    def kept_prefix(
        self, kept: Sequence[KeysValues], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Prefix:
        """A prefix from the keys and values of every layer, as captured; see ``prefix_of_kept``."""
        check_prefixes(self)
        return prefix_of_kept(self.model.config, kept, attention_mask, self.hooks.device)

    def prefix(self, tokens: Int[Tensor, "batch pos"]) -> Prefix:
        """Keys and values of the first tokens of some prompts, for ``continue_from``.

        Raises:
            CapabilityError: No attention, or edits are active (one may depend on the position).
        """
        check_prefixes(self)
        with self._lock:
            return make_prefix(self.model, self._arguments(prepare_inputs(self.spec, tokens)))

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
            return token_loop(self, self.hooks.device, tokens, attention_mask, options)

    def edit(self, *interventions: Any) -> AbstractContextManager[None]:
        """Within the context, logits, capture, generate and every probe see the edits.

        Args:
            interventions: Objects, the content of intervention files, or their paths.
        """
        return self._edits.adding(interventions)

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The interventions that are active now."""
        return self._edits.interventions

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """One weight in TransformerLens' layout, float32 on the CPU; see ``base.WEIGHTS``."""
        return read_weight(self.model, self.family, self.spec, name, layer)

    def to_transformer_lens(self) -> Any:
        """A TransformerBridge on the same weights; this model stays as it is."""
        from workbench.models.bridge_building import bridge_of

        return bridge_of(self.model, self.tokenizer)

    def mlp_of_embedding(self, layer: int, x: Float[Tensor, "n d_model"], *, norm: bool) -> Tensor:
        """Apply one block's MLP to vectors, behind its norm if asked; float32, CPU."""
        return mlp_of_embedding(self.model, self.family, self.spec, layer, x, norm=norm)

    def final_norm(self, resid: Float[Tensor, "*batch d_model"]) -> Tensor:
        """Apply the norm before the unembedding; float32, CPU."""
        return final_norm(self.model, self.family, resid)

    # How it is done

    def _logits(self, inputs: Inputs, last: int | None, prefix: Prefix | None = None) -> Tensor:
        # Only where they are wanted: the unembedding is a third of a small model's work.
        kept = {} if last is None else {"logits_to_keep": last}
        arguments = self._arguments(inputs)
        if prefix is not None:
            arguments = with_prefix(arguments, prefix)
        logits: Tensor = self.model(**arguments, **kept).logits
        return logits

    def _arguments(self, inputs: Inputs) -> dict[str, Any]:
        device = self.hooks.device
        return {
            "input_ids": inputs.tokens.to(device),
            "use_cache": False,
            **mask_and_positions(self.spec, inputs, device, takes_positions=self._takes_positions),
        }

    def _reads(self, sites: Sequence[Site], reduce: Reducers) -> dict[Site, Any]:
        for site in sites:
            check_place(self.spec, self.family, site)
        return reductions(self.spec, sites, reduce)

    def _refuse_edit(self, edit: Edit) -> None:
        if isinstance(edit, AttentionEdit):
            check_place(self.spec, self.family, Site("pattern", edit.layer))
        else:
            check_editable(edit.site)
            check_place(self.spec, self.family, edit.site)

    def _hooked(
        self,
        reads: Mapping[Site, Any],
        inputs: Inputs,
        start: int | None = None,
        *,
        z_given: bool = False,
    ) -> AbstractContextManager[dict[Site, Any]]:
        """Within the context, a forward pass is read and edited; the dict fills with what is read.

        Args:
            reads: Reductions by site.
            inputs: Of the forward pass.
            start: The block whose ``resid_pre`` is given; what lies before it does not happen.
            z_given: Nor does its attention.
        """
        edits = self._edits.plan()
        if start is not None:
            edits = [edit for edit in edits if comes_later(edit.site, start, z_given=z_given)]
        return self.hooks.installed(reads, edits, inputs, (start or 0) + z_given)
