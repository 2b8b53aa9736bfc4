"""The ``toy`` backend: models of the toy tasks, which show every activation to a tap.

A toy model's forward pass is ``model(tokens, attention_mask, position_ids, tap)``; ``tap(site, x)``
is shown the activation at every site and returns what is used in its place. So reading and editing
are a function each, and there is nothing to hook or to remove. Patterns are made whole.
"""

import importlib
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
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
from workbench.attention.whole import change_pattern
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.interventions.active import ActiveEdits
from workbench.models.base import WEIGHTS, Captured, ModelSpec, Reducers, Site
from workbench.models.checks import check_editable, check_layer
from workbench.models.continuing import prepare_residual
from workbench.models.inputs import Inputs, prepare_inputs
from workbench.models.memory import tell_pattern_memory
from workbench.models.reading import keeper, reductions
from workbench.models.text import generate_with

_CAPABILITIES = frozenset(
    {
        "capture",
        "continue",
        "gradients",
        "attention",
        "patterns",
        "streaming",
        "edits",
        "generate",
        "weights",
        "positions",
    }
)


class ToyAdapter:
    """A toy model; see ``workbench.models.base.ModelAdapter``."""

    backend = "toy"
    capabilities = _CAPABILITIES
    tokenizer = None

    def __init__(self, model: nn.Module, *, name: str = "toy", revision: str = "") -> None:
        """Take over a toy model: eval mode, weights frozen.

        Args:
            model: A ``toy_tasks.model.ToyModel``, or a ``toy_tasks.scan_snap_model.ScanSnapModel``.
            name: What people call it.
            revision: Hash of its folder; "": the weights are hashed when a key is needed.
        """
        self.model: Any = model.eval().requires_grad_(False)
        self._config: Any = model.config
        self._architecture: Any = importlib.import_module(type(model).__module__)
        self.spec = _make_spec(self._config, name, revision)
        self._lock = threading.RLock()
        self._edits = ActiveEdits(self.spec, self._lock, self._refuse_edit)

    @property
    def dtype(self) -> str:
        """The dtype of the weights, e.g. ``float32``."""
        return str(self._weight.dtype).removeprefix("torch.")

    @property
    def attention(self) -> str:
        """The kernel of its attention, e.g. ``softmax`` or ``relu``."""
        return str(self._config.attention)

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
        with torch.no_grad():
            logits = self._run(inputs, {}, {}).float().cpu()
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
        for site in parsed:
            self._check_site(site)
        reads = reductions(self.spec, parsed, reduce)
        inputs = prepare_inputs(self.spec, tokens, attention_mask, position_ids)
        tell_pattern_memory(self.spec, inputs, reads)
        captured: dict[Site, Any] = {}
        with torch.no_grad():
            self._run(inputs, reads, captured)
        return Captured({site: captured[site] for site in parsed})

    def continue_from(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Go on from ``resid_pre`` of one block; see ``ModelAdapter``.

        The blocks before it run and are thrown away: a toy has three at most.
        """
        inputs = prepare_residual(self.spec, layer, resid, attention_mask)

        def given(x: Tensor) -> Tensor:
            return resid.to(x)

        edit = ActivationEdit(Site("resid_pre", layer), given)
        with torch.set_grad_enabled(resid.requires_grad):
            logits = self._run(inputs, {}, {}, (edit,))
        return (logits if last is None else logits[:, -last:]).float().to(resid.device)

    def generate(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """Continue tokens, always with the most likely one; there is no cache."""
        return generate_with(self, self._generate_tokens, prompt, max_new_tokens, options)

    def _generate_tokens(
        self, tokens: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        n_new = options.pop("max_new_tokens")
        if options.pop("do_sample", False) or options:
            raise ConfigError(
                "a toy model takes the most likely token and no sampling arguments; got "
                f"{', '.join(options) or 'do_sample=True'}; leave it out"
            )
        if tokens.shape[-1] + n_new > self.spec.n_ctx:
            raise DataError(
                f"prompt and new tokens must fit in n_ctx = {self.spec.n_ctx} of {self.spec.name}; "
                f"got {tokens.shape[-1]} + {n_new}; lower max_new_tokens"
            )
        for _ in range(n_new):
            chosen = self.logits(tokens, attention_mask)[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], dim=1)
            if attention_mask is not None:
                ones = torch.ones_like(attention_mask[:, :1])
                attention_mask = torch.cat([attention_mask, ones], dim=1)
        return tokens

    def edit(self, *interventions: Any) -> AbstractContextManager[None]:
        """Within the context, logits, capture, generate and every probe see the edits.

        Args:
            interventions: Objects, the content of intervention files, or their paths.

        Raises:
            CapabilityError: A change of the pattern's rows where they are no distributions.
        """
        return self._edits.adding(interventions)

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """One weight in TransformerLens' layout, float32 on the CPU; see ``base.WEIGHTS``."""
        found = self._find_weight(name, layer)
        return found.detach().float().cpu()

    def mlp_of_embedding(self, layer: int, x: Float[Tensor, "n d_model"], *, norm: bool) -> Tensor:
        """Apply one block's MLP to vectors, behind its norm if asked; float32, CPU."""
        self._check_site(Site("mlp_out", layer))
        block = self.model.blocks[layer]
        with torch.no_grad():
            x = x.to(self._weight)
            return block.mlp(block.ln_mlp(x) if norm else x).float().cpu()

    def final_norm(self, resid: Float[Tensor, "*batch d_model"]) -> Tensor:
        """Apply the norm before the unembedding; float32, CPU."""
        with torch.no_grad():
            return self.model.ln_final(resid.to(self._weight)).float().cpu()

    # How it is done

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = next(self.model.parameters())
        return weight

    def _run(
        self,
        inputs: Inputs,
        reads: Mapping[Site, Any],
        captured: dict[Site, Any],
        further: tuple[Edit, ...] = (),
    ) -> Float[Tensor, "batch pos d_vocab"]:
        with self._lock:  # another thread's edits are none of ours
            edits = [*self._edits.plan(), *further]
        keep = {site: keeper(site, how, inputs, captured) for site, how in reads.items()}

        def tap(site: Site, x: Tensor) -> Tensor:
            for edit in edits:
                x = self._apply(edit, site, x, inputs)
            if site in keep:
                keep[site](x)
            return x

        device = self._weight.device
        mask, positions = inputs.attention_mask, inputs.position_ids
        logits: Tensor = self.model(
            inputs.tokens.to(device),
            None if mask is None else mask.to(device),
            None if positions is None else positions.to(device),
            tap=tap,
        ).logits
        return logits

    def _apply(self, edit: Edit, site: Site, x: Tensor, inputs: Inputs) -> Tensor:
        if isinstance(edit, ActivationEdit):
            return edit.change(x).view_as(x) if edit.site == site else x
        if site != Site(self._architecture.WHOLE_PATTERN, edit.layer):
            return x
        # With the columns of learned keys, so that they are renormalised with the others.
        first = inputs.first_key()
        first = torch.zeros(x.shape[0], dtype=torch.long) if first is None else first
        n_learned = self._architecture.n_learned_keys(self._config)
        first, valid = (first + n_learned).to(x.device), inputs.row_valid(x.device)
        # A learned first token is a row as well.
        extra = x.shape[-2] - inputs.tokens.shape[1]
        if valid is not None:
            valid = torch.nn.functional.pad(valid, (extra, 0), value=1.0)
        return change_pattern(edit, x, first, valid, n_before=-extra, first_column=-n_learned)

    def _refuse_edit(self, edit: Edit) -> None:
        if isinstance(edit, AttentionEdit):
            if self.attention not in self._architecture.NORMALISED:
                raise CapabilityError(
                    "an edit that renormalises attention needs rows that sum to 1; those of "
                    f"{self.attention} in {self.spec.name} do not; edit z instead"
                )
            return
        check_editable(edit.site)
        self._check_site(edit.site)

    def _check_site(self, site: Site) -> None:
        check_layer(self.spec, site)
        if site.name == "mlp_out" and not self.spec.d_mlp:
            raise CapabilityError(
                f"{site} needs an MLP; {self.spec.name} has none; read resid_post"
            )

    def _find_weight(self, name: str, layer: int | None) -> Tensor:
        whole = {"W_E": "embed", "W_pos": "position", "W_U": "unembed"}
        if name in whole and hasattr(self.model, whole[name]):
            weight: Tensor = getattr(self.model, whole[name]).weight
            return weight.T if name == "W_U" else weight
        if name in whole or name not in WEIGHTS or layer is None:
            raise CapabilityError(
                f"weight must be one of {', '.join(WEIGHTS)}, with a layer for those of attention; "
                f"got {name} of {self.spec.name}"
            )
        self._check_site(Site("z", layer))
        matrix: Tensor = getattr(self.model.blocks[layer].attention, name).weight
        if name == "W_O":
            return matrix.T.unflatten(0, (self.spec.n_heads, -1))
        return matrix.unflatten(0, (self.spec.n_heads, -1)).transpose(1, 2)


def _make_spec(config: Any, name: str, revision: str) -> ModelSpec:
    return ModelSpec(
        name=name,
        revision=revision,
        family="toy",
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
        d_model=config.d_model,
        d_head=config.d_head,
        d_mlp=config.d_mlp,
        d_vocab=config.d_vocab,
        n_ctx=config.n_ctx,
        positions=config.positions,
    )
