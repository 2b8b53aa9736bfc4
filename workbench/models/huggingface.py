"""The ``hf`` backend: transformers models, read and edited inside their own forward pass.

Attention goes through the hook point of ``workbench.attention.interface``, the residual stream
through ordinary forward hooks on the modules that ``families`` names. With nothing to read or edit
the model runs untouched; every hook is removed on every way out.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.attention.edits import (
    ActivationEdit,
    AttentionEdit,
    Edit,
    Intervention,
)
from workbench.attention.interface import (
    STOCK_IMPLEMENTATIONS,
    AttentionSession,
    implementation_name,
    reduced,
)
from workbench.errors import CapabilityError
from workbench.interventions.active import ActiveEdits
from workbench.models.base import (
    ATTENTION_SITES,
    Captured,
    ModelSpec,
    Reducers,
    Site,
)
from workbench.models.checks import check_editable, check_layer
from workbench.models.continuing import (
    Shares,
    attention_given,
    comes_later,
    ending_at,
    prepare_residual,
    read_by_later_positions,
    starting_at,
)
from workbench.models.families import Family, family_of, read_weight
from workbench.models.generating import following_beams, uncompiled
from workbench.models.inputs import Inputs, prepare_inputs
from workbench.models.memory import tell_pattern_memory
from workbench.models.offload import running_device
from workbench.models.prefix import (
    KeysValues,
    Prefix,
    check_prefix,
    make_prefix,
    prefix_of_kept,
    with_prefix,
)
from workbench.models.reading import reductions
from workbench.models.sublayers import final_norm, mlp_of_embedding
from workbench.models.text import generate_with, pad_token

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
        self._blocks: list[nn.Module] = list(model.get_submodule(self.family.blocks))
        # One forward pass at a time: hooks and the attention implementation are model-wide.
        self._lock = threading.RLock()
        self._edits = ActiveEdits(self.spec, self._lock, self._refuse_edit)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self.stock = model.config._attn_implementation or "eager"

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
        return self.stock if self.family.attn else "none"

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
            self._check_prefixes()
            check_prefix(self.spec, prefix, inputs)
        with (
            self._lock,
            torch.set_grad_enabled(resid.requires_grad),
            self._hooked({}, inputs, layer, z_given=z is not None),
            uncompiled(),  # compiled code would not see where it is to start
            starting_at(self._blocks, layer, resid),
            self._giving(layer, z),
            self._ending(last, resid.shape[1]),
        ):
            return self._logits(inputs, last, prefix).float().to(resid.device)

    def _giving(self, layer: int, z: Tensor | None) -> AbstractContextManager[None]:
        if z is None:
            return nullcontext()
        family, block = self.family, self._blocks[layer]
        assert family.attn is not None  # z is a site of attention
        assert family.w_o is not None
        return attention_given(block.get_submodule(family.attn), block.get_submodule(family.w_o), z)

    def _ending(self, last: int | None, n_pos: int) -> AbstractContextManager[None]:
        """Leave out of the last block what nobody reads; an edit might."""
        if last is None or last >= n_pos or self.interventions:
            return nullcontext()
        return ending_at(read_by_later_positions(self._blocks[-1], self.family), last)

    def shares(self, layer: int) -> Shares:
        """What ``continue_from`` leaves out of a block, given its z, or if it is the last."""
        return Shares.of(self._blocks[layer], self.family)

    def kept_prefix(
        self, kept: Sequence[KeysValues], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Prefix:
        """A prefix from the keys and values of every layer, as captured; see ``prefix_of_kept``."""
        self._check_prefixes()
        return prefix_of_kept(self.model.config, kept, attention_mask, self._device)

    def prefix(self, tokens: Int[Tensor, "batch pos"]) -> Prefix:
        """Keys and values of the first tokens of some prompts, for ``continue_from``.

        Raises:
            CapabilityError: No attention, or edits are active (one may depend on the position).
        """
        self._check_prefixes()
        with self._lock:
            return make_prefix(self.model, self._arguments(prepare_inputs(self.spec, tokens)))

    def _check_prefixes(self) -> None:
        if self.family.attn is None or self.interventions:
            found = "is edited" if self.family.attn else f"({self.spec.family}) has none"
            raise CapabilityError(
                f"a prefix must be keys and values of an unedited model; {self.spec.name} {found}; "
                "continue from the whole residual stream, without prefix"
            )

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
        options.setdefault("pad_token_id", pad_token(self.tokenizer, self.model.generation_config))
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        with self._lock, torch.no_grad(), self._hooked({}, inputs):
            output: Tensor = self.model.generate(
                tokens.to(self._device), attention_mask=mask.to(self._device), **options
            )
        return output.cpu()

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

    @property
    def _device(self) -> torch.device:
        return running_device(self.model.get_input_embeddings())

    def _arguments(self, inputs: Inputs) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "input_ids": inputs.tokens.to(self._device),
            "use_cache": False,
        }
        if inputs.attention_mask is not None:
            arguments["attention_mask"] = inputs.attention_mask.to(self._device)
        if inputs.position_ids is not None:
            if not self._takes_positions:
                raise CapabilityError(
                    f"explicit positions and left padding need a model that takes position ids; "
                    f"{self.spec.family} does not; pad on the right"
                )
            arguments["position_ids"] = inputs.position_ids.to(self._device)
        return arguments

    def _reads(self, sites: Sequence[Site], reduce: Reducers) -> dict[Site, Any]:
        for site in sites:
            self._check_site(site)
        return reductions(self.spec, sites, reduce)

    def _refuse_edit(self, edit: Edit) -> None:
        if isinstance(edit, AttentionEdit):
            self._check_site(Site("pattern", edit.layer))
        else:
            check_editable(edit.site)
            self._check_site(edit.site)

    def _check_site(self, site: Site) -> None:
        check_layer(self.spec, site)
        if site.name in ATTENTION_SITES | {"attn_out"} and self.family.attn is None:
            raise CapabilityError(
                f"{site} needs attention; {self.spec.family} has none; read resid_pre, resid_post or mlp_out"
            )
        if site.name == "resid_mid" and self.family.mid is None:
            raise CapabilityError(
                f"{site} needs attention before the MLP; in {self.spec.family} here they are parallel "
                "or one; read resid_pre, attn_out and mlp_out"
            )

    @contextmanager
    def _hooked(
        self,
        reads: Mapping[Site, Any],
        inputs: Inputs,
        start: int | None = None,
        *,
        z_given: bool = False,
    ) -> Iterator[dict[Site, Any]]:
        """Install what the reads and the active edits need; remove it on every way out.

        Args:
            reads: Reductions by site.
            inputs: Of the forward pass.
            start: The block whose ``resid_pre`` is given; what lies before it does not happen.
            z_given: Nor does its attention.
        """
        edits = self._edits.plan()
        if start is not None:
            edits = [edit for edit in edits if comes_later(edit.site, start, z_given=z_given)]
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
            runs = (start or 0) + z_given
            session = self._attention_session(reads, edits, inputs, captured, runs)
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
        start: int,
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
        assert attn is not None  # _check_site has refused what needs attention
        layers = {
            block.get_submodule(attn): layer
            for layer, block in enumerate(self._blocks)
            if layer >= start
        }
        row_valid = inputs.row_valid(self._device)
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
        block = self._blocks[site.layer]
        if site.name in ("resid_pre", "resid_post"):
            return block, site.name == "resid_pre"
        if site.name == "resid_mid":
            return block.get_submodule(family.mid or ""), True
        path = family.attn_out if site.name == "attn_out" else family.mlp_out
        return block.get_submodule(path or ""), False


def make_spec(model: Any, family: Family, *, name: str, revision: str) -> ModelSpec:
    """Read the sizes of a transformers model from its config and modules."""
    config = model.config.get_text_config()
    n_heads = config.num_attention_heads if family.attn else 0
    d_head = getattr(config, "head_dim", None) or (config.hidden_size // n_heads if n_heads else 0)
    d_mlp = next(
        (
            size
            for key in ("intermediate_size", "n_inner", "ffn_dim")
            if (size := getattr(config, key, None)) is not None
        ),
        4 * config.hidden_size,
    )
    return ModelSpec(
        # Only the last part of a path: results must not tell where a folder lies.
        name=name or (config.name_or_path or config.model_type).rstrip("/").split("/")[-1],
        revision=revision,
        family=config.model_type,
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=(getattr(config, "num_key_value_heads", None) or n_heads) if n_heads else 0,
        d_model=config.hidden_size,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=model.get_input_embeddings().weight.shape[0],
        n_ctx=getattr(config, "max_position_embeddings", None) or 1 << 30,
        positions=family.positions,
    )


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
