"""The ``nnsight`` backend: any transformers model by its own module tree, read by tracing.

The model runs its own forward pass with eager attention; nothing of it is replaced. Generation is
not offered: nnsight would have to meet every edit at every step of every layer, which the other
backends do exactly and faster.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import ActivationEdit, Edit, Intervention
from workbench.errors import CapabilityError
from workbench.interventions.active import ActiveEdits
from workbench.models.base import Captured, Reducers, Site
from workbench.models.continuing import continue_by_edit
from workbench.models.families import LLAMA
from workbench.models.inputs import Inputs, mask_and_positions, prepare_inputs
from workbench.models.memory import tell_pattern_memory
from workbench.models.nnsight_remote import fetch, fetch_parameters, filled, refuse_without_key
from workbench.models.nnsight_stops import Places, Stop
from workbench.models.offload import running_device
from workbench.models.outside import layout_of, spec_of
from workbench.models.pattern_edits import PatternChange
from workbench.models.reading import keeper, reductions
from workbench.models.sublayers import final_norm, mlp_of_embedding
from workbench.models.weights import home_of_weight, read_weight


class NNsightModel:
    """An nnsight model; see ``workbench.models.base.ModelAdapter``."""

    backend = "nnsight"

    def __init__(
        self,
        lm: Any,
        tokenizer: Any = None,
        *,
        name: str = "",
        revision: str = "",
        remote: bool | str = False,
    ) -> None:
        """Take over an nnsight model: eval mode, weights frozen.

        Args:
            lm: An ``nnsight.NNsight``, ``TransformersModel`` or ``LanguageModel`` around a causal
                language model of transformers.
            tokenizer: Its tokenizer, if texts are to be read.
            name: What people call it.
            revision: Hub commit or hash of the weights.
            remote: Run every forward pass elsewhere: True: on NDIF; the address of a server that
                speaks its protocol; ``local``: here, but by way of nnsight's serialisation.

        Raises:
            CapabilityError: Remote without a key for it.
        """
        if remote is True:
            refuse_without_key()
        elif remote in (False, "local") and not getattr(lm, "dispatched", True):
            lm.dispatch()
        self.lm = lm
        self.model = lm._module
        if not remote:
            self.model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.remote = remote
        self.family = layout_of(self.model.config.get_text_config())
        self.spec = spec_of(self.model, self.family or LLAMA, name=name, revision=revision)
        self.places = Places(lm, self.family or LLAMA, self.spec, self.attention)
        self._lock = threading.RLock()
        self._edits = ActiveEdits(self.spec, self._lock, self._refuse_edit)
        self._takes_positions = (
            "position_ids" in inspect.signature(type(self.model).forward).parameters
        )

    @property
    def capabilities(self) -> frozenset[str]:
        """What this model can do; of an unknown architecture only the logits."""
        can = {"positions"} if self._takes_positions else set()
        if self.remote:
            can.add("remote")
        if self.family is None:
            return frozenset(can)
        can |= {"capture"} if self.remote else {"capture", "continue", "edits"}
        if self.family.read_qkv or not self.spec.n_heads:
            can.add("weights")
        if self.places.has_call():
            can.add("attention")
        if self.places.has_pattern() or (self.remote and self.places.has_call()):
            can |= {"patterns", "streaming"}
        return frozenset(can)

    @property
    def dtype(self) -> str:
        """The dtype of the weights, e.g. ``float32``."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def attention(self) -> str:
        """The attention implementation (``eager``, ``sdpa``)."""
        if self.family is not None and self.family.attn is None:
            return "none"
        return self.model.config._attn_implementation or "eager"

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The interventions that are active now."""
        return self._edits.interventions

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Run one forward pass and return the logits, on the CPU in float32."""
        inputs = prepare_inputs(self.spec, tokens, attention_mask)
        if self.remote:
            with self._lock:
                return self._fetch(inputs, {}, {}, last)
        with self._lock, torch.no_grad():
            logits = self._trace(inputs, self._stops({}, inputs, {})).detach().float().cpu()
        return logits if last is None else logits[:, -last:]

    def capture(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[Site | str],
        reduce: Reducers = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> Captured:
        """Run one forward pass and return the activation at each site; see ``ModelAdapter``.

        Raises:
            CapabilityError: The modules of the architecture are not known.
        """
        parsed = [Site.parse(site) for site in sites]
        reads = reductions(self.spec, parsed, reduce)
        if self.family is None:
            raise CapabilityError(
                f"sites need an architecture whose modules are known; {self.spec.family} here is not; use "
                "--backend transformer-lens, or read the logits"
            )
        inputs = prepare_inputs(self.spec, tokens, attention_mask, position_ids)
        tell_pattern_memory(self.spec, inputs, reads)
        captured: dict[Site, Any] = {}
        with self._lock, torch.no_grad():
            if self.remote:
                self._fetch(inputs, reads, captured, 0)
                return Captured({site: captured[site] for site in parsed})
            self._trace(inputs, self._stops(reads, inputs, captured))
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
        """Refuse: see the module's docstring.

        Raises:
            CapabilityError: Always.
        """
        raise CapabilityError(
            "the nnsight backend does not generate; use --backend hf where it takes the model, else "
            "transformer-lens"
        )

    def edit(self, *interventions: Any) -> AbstractContextManager[None]:
        """Within the context, logits, capture and every probe see the edits.

        Args:
            interventions: Objects, the content of intervention files, or their paths.

        Raises:
            CapabilityError: An edit cannot be carried out on this architecture.
        """
        return self._edits.adding(interventions)

    def _refuse_edit(self, edit: Edit) -> None:
        if self.remote:
            raise CapabilityError(
                "edits need the model on this machine: the code of one cannot be sent along; load it "
                "with remote=False, or use --backend hf"
            )
        if "edits" not in self.capabilities:
            raise CapabilityError(
                f"edits need an architecture whose modules are known; {self.spec.family} here is not; use "
                "--backend transformer-lens"
            )
        self.places.refuse_edit(edit.site)

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """One weight in TransformerLens' layout, float32 on the CPU; see ``base.WEIGHTS``."""
        family = self.family or LLAMA
        home = home_of_weight(self.model, family, self.spec, name, layer)
        part = {"W_O": family.w_o, "W_Q": family.attn, "W_K": family.attn, "W_V": family.attn}
        with self._at_hand(home, part.get(name)):
            return read_weight(self.model, family, self.spec, name, layer)

    def mlp_of_embedding(self, layer: int, x: Float[Tensor, "n d_model"], *, norm: bool) -> Tensor:
        """Apply one block's MLP to vectors, behind its norm if asked; float32, CPU."""
        block = self.model.get_submodule((self.family or LLAMA).blocks)[layer]
        with self._at_hand(block):
            return mlp_of_embedding(self.model, self.family, self.spec, layer, x, norm=norm)

    def final_norm(self, resid: Float[Tensor, "*batch d_model"]) -> Tensor:
        """Apply the norm before the unembedding; float32, CPU."""
        with self._at_hand(self.model.get_submodule((self.family or LLAMA).ln_final)):
            return final_norm(self.model, self.family, resid)

    # How it is done

    def _stops(
        self, reads: Mapping[Site, Any], inputs: Inputs, captured: dict[Site, Any]
    ) -> list[Stop]:
        """What happens along the forward pass, in its order."""
        self.places.batch = inputs.tokens.shape[0]
        stops: dict[Site, Stop] = {}

        def at(site: Site) -> Stop:
            if site not in stops:
                stops[site] = self.places.stop(site)
            return stops[site]

        for edit in self._edits.plan():
            if isinstance(edit, ActivationEdit):
                at(edit.site).changes.append(edit.change)
            else:
                change = PatternChange(
                    edit, inputs.first_key(), inputs.row_valid(torch.device("cpu"))
                )
                at(edit.site).changes.append(change)
        for site, reduce in reads.items():
            at(site).keeps.append(keeper(site, reduce, inputs, captured))
        return sorted(stops.values(), key=lambda stop: stop.rank)

    @contextmanager
    def _at_hand(self, home: Any, part: str | None = None) -> Iterator[None]:
        """Within the context a module holds its parameters (or those of a part of it)."""
        if not self.remote:
            yield
            return
        prefix = "" if part is None else f"{part}."
        names = [name for name, _ in home.named_parameters() if name.startswith(prefix)]
        path = next(name for name, module in self.model.named_modules() if module is home)
        with self._lock, filled(home, fetch_parameters(self.lm, path, names, self.remote)):
            yield

    def _fetch(
        self,
        inputs: Inputs,
        reads: Mapping[Site, Any],
        captured: dict[Site, Any],
        last: int | None,
    ) -> Any:
        """A forward pass elsewhere; what it sends is reduced here."""
        self.places.batch = inputs.tokens.shape[0]
        asks = {site: self.places.ask(site) for site in sorted(reads, key=self.places.rank)}
        several = list(dict.fromkeys(asks.values()))
        arguments = self._arguments(inputs, torch.device("cpu"))
        values, logits = fetch(self.lm, arguments, several, last, self.remote)
        found = dict(zip(several, values, strict=True))
        for site, ask in asks.items():
            x = self.places.answer(site, found[ask])
            keeper(site, reads[site], inputs, captured)(x)
        return logits

    def _trace(self, inputs: Inputs, stops: Sequence[Stop]) -> Tensor:
        arguments = self._arguments(inputs, running_device(self.model.get_input_embeddings()))
        # nnsight compiles the block from its source: it must stand in a file, over several lines.
        with self.lm.trace(**arguments):
            for stop in stops:
                stop.run()
            logits = self.lm.output.logits.save()
        found: Tensor = logits
        return found

    def _arguments(self, inputs: Inputs, device: torch.device) -> dict[str, Any]:
        return {
            "input_ids": inputs.tokens.to(device),
            "use_cache": False,
            **mask_and_positions(self.spec, inputs, device, takes_positions=self._takes_positions),
        }
