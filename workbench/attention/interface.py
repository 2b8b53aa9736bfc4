"""The one hook point for attention on all transformers architectures that have it.

transformers hands q, k, v, mask and scale of every layer to a registered attention function. Ours
is registered once under two names, for models whose stock kernel is SDPA and for those whose is
eager (the mask differs). A model runs its own kernel unless a session is active on it; then the
function serves the session that the calling attention module belongs to, so two models in one
process never see each other.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from workbench.attention.compute import Pass, compute
from workbench.attention.decode import Handed
from workbench.attention.edits import ActivationEdit, AttentionEdit, Edit
from workbench.attention.inputs import AttentionInputs
from workbench.attention.rows import rows_of_call
from workbench.attention.shared import Shared
from workbench.attention.statistics import WholePattern
from workbench.attention.streaming import PatternStatistic, attention_scores
from workbench.errors import CapabilityError, EngineError
from workbench.models.base import Site

STOCK_IMPLEMENTATIONS = ("sdpa", "eager")
"""The stock kernels that a session can stand in for."""

_sessions: "WeakKeyDictionary[nn.Module, AttentionSession]" = WeakKeyDictionary()


def implementation_name(stock: str) -> str:
    """The name under which our function stands in for a stock kernel; registers it once."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = f"workbench_{stock}"
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _breaking_attention)
        # Without a mask function of its own, transformers would drop padding and windows.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])
    return name


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q ``[batch head q_pos d_head]`` -> ``[batch q_pos head d_head]``."""
    session = _sessions.get(module)
    if session is None:
        raise EngineError(
            f"every attention module must belong to an active session; {type(module).__name__} does "
            "not; use the model through workbench, not directly, while a capture or edit is active"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return session.attend(module, query, key, value, attention_mask, scaling, kwargs), None


def _breaking_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """What an edit remembers lives in Python: compiled code breaks off here and goes on behind it."""
    if torch.compiler.is_compiling():
        return _uncompiled_attention(module, *args, **kwargs)
    # Without the break's own price, which is a tenth of a decoded token's attention.
    return _attention(module, *args, **kwargs)


_uncompiled_attention = torch.compiler.disable(_attention)


def stock_attention(stock: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The model's own kernel: a shared one, or the eager function beside its module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if stock == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[stock]


@dataclass
class AttentionSession:
    """What is read and changed at the attention hook point during some forward passes."""

    stock: str
    layers: Mapping[nn.Module, int]
    """Layer of every attention module."""
    reads: Mapping[int, Mapping[str, Any]]
    """By layer, the reduction of every attention site that is read (None: whole)."""
    edits: Mapping[int, list[Edit]]
    row_valid: Tensor | None = None
    """``[batch pos]`` float, 1 for real tokens; None: no padding."""
    first_key: Tensor | None = None
    """``[batch]`` index of the first real token; None: 0 for all."""
    captured: dict[Site, Any] = field(default_factory=dict)
    calls: Counter[int] = field(default_factory=Counter)
    seen: Counter[int] = field(default_factory=Counter)
    """Tokens each layer has been given, to notice a sliding cache that dropped the first."""
    _shared: Shared = field(default_factory=Shared)
    _last_layer: int = -1

    def __enter__(self) -> "AttentionSession":
        """Make it the session of its modules."""
        for module in self.layers:
            _sessions[module] = self
        return self

    def __exit__(self, *error: object) -> None:
        """Release the modules."""
        for module in self.layers:
            _sessions.pop(module, None)

    def check_calls(self) -> None:
        """Refuse a forward pass in which some layer did not come through here.

        Raises:
            EngineError: Names the layers.
        """
        missing = [layer for layer in self.layers.values() if not self.calls[layer]]
        if missing:
            raise EngineError(
                f"attention of all {len(self.layers)} layers must run through the hook point; it did "
                f"not in layers {missing}; this architecture needs --backend transformer-lens or nnsight"
            )

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Run one layer's attention, read what is asked and apply the edits."""
        layer = self.layers[module]
        self.calls[layer] += 1
        if layer <= self._last_layer:
            self._shared = Shared()  # a new pass
        self._last_layer = layer
        n_q, n_k = query.shape[2], key.shape[2]
        # As many queries as keys: a first pass, or one without a cache; the count starts anew.
        seen = self.seen[layer] = n_q + (self.seen[layer] if n_q < n_k else 0)
        inputs = self._inputs(module, (query, key, value), mask, scaling, kwargs, seen)
        reads = self.reads.get(layer, {})
        edits = self.edits.get(layer, [])
        statistics = _statistics(reads)
        attention_edits = [edit for edit in edits if isinstance(edit, AttentionEdit)]
        first_key = self._first_key(inputs, layer)

        def stock(mask: Tensor | None) -> Tensor:
            run = stock_attention(self.stock, module)
            return run(module, query, key, value, mask, dropout=0.0, scaling=scaling, **kwargs)[0]

        rows, handed = self._rows(inputs), Handed(mask, n_k, self.stock == "sdpa")
        pass_ = Pass(inputs, layer, first_key, rows, seen - n_q, handed, self._shared)
        z, found = compute(pass_, statistics, attention_edits, stock)
        for edit in edits:
            if isinstance(edit, ActivationEdit):
                z = edit.change(z)
        self._keep(layer, reads, inputs, z, found)
        return z

    def _inputs(
        self,
        module: nn.Module,
        projected: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scaling: float,
        kwargs: dict[str, Any],
        seen: int,
    ) -> AttentionInputs:
        """What attention is computed from: of a static cache, what has come so far."""
        query, key, value = projected
        mask = _with_position_bias(mask, kwargs.get("position_bias"))
        if seen < key.shape[2]:
            # A static cache is handed over whole: what lies behind the tokens so far is still empty.
            key, value = key[:, :, :seen], value[:, :, :seen]
            if mask is not None:
                mask = self._shared.get("filled", lambda whole, n: whole[..., :n], mask, seen)
        inputs = AttentionInputs(
            query,
            key,
            value,
            mask,
            scaling,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            causal=_is_causal(module, kwargs.get("is_causal")),
        )
        if self.stock == "sdpa" and (inputs.softcap is not None or inputs.sinks is not None):
            # Some versions of transformers (5.17) drop the softcap here without a word: the stock
            # model would not be the model, and nothing read from it would be exact.
            raise CapabilityError(
                "a model with capped scores or learned sinks must run eager attention; it was loaded "
                "with sdpa, which ignores them; load it with attn_implementation='eager'"
            )
        return inputs

    def _first_key(self, inputs: AttentionInputs, layer: int) -> Tensor | None:
        dropped = max(0, self.seen[layer] - inputs.key.shape[2])
        if self.first_key is None and not dropped:
            return None
        size, device = (inputs.query.shape[0], dropped), inputs.query.device
        found: Tensor = self._shared.get("first key", _columns_of, self.first_key, *size, device)
        return found

    def _rows(self, inputs: AttentionInputs) -> Tensor | None:
        """Which rows are real, where the layer runs; new tokens are."""
        if self.row_valid is None:
            return None
        # Layers of a model that is spread over several devices have their inputs on their own.
        here = self._shared.get("rows", Tensor.to, self.row_valid, inputs.query.device)
        return rows_of_call(here, inputs.query.shape[0], inputs.query.shape[2])

    def _keep(
        self,
        layer: int,
        reads: Mapping[str, Any],
        inputs: AttentionInputs,
        z: Tensor,
        found: dict[str, Tensor],
    ) -> None:
        whole = {"q": inputs.query, "k": inputs.key, "v": inputs.value}
        for name, reduce in reads.items():
            site = Site(name, layer)
            if name == "pattern" and isinstance(reduce, PatternStatistic):
                self.captured[site] = found[""].cpu()
            elif name == "pattern" and isinstance(reduce, Mapping):
                self.captured[site] = {key: found[key].cpu() for key in reduce}
            elif name == "pattern":
                self.captured[site] = reduced(found["whole"], reduce)
            elif name == "attn_scores":
                self.captured[site] = reduced(attention_scores(inputs), reduce)
            elif name == "z":
                self.captured[site] = reduced(z, reduce)
            else:
                self.captured[site] = reduced(whole[name].transpose(1, 2), reduce)


def reduced(activation: Tensor, reduce: Callable[[Tensor], Any] | None) -> Any:
    """Keep an activation whole (float32, CPU) or as its reduction (tensors moved to the CPU)."""
    if reduce is None:
        # A copy, also where nothing is converted: the model may go on in place.
        return activation.detach().to("cpu", torch.float32, copy=True)
    result = reduce(activation)
    return result.cpu() if isinstance(result, Tensor) else result


def _columns_of(
    first: Tensor | None, batch: int, dropped: int, device: torch.device
) -> Int[Tensor, " batch"]:
    """Where the first key of every row is; beams and several samples repeat each prompt's row."""
    if first is None:
        first = torch.zeros(1, dtype=torch.long)
    return first.to(device).repeat_interleave(batch // first.shape[0]) - dropped


def _is_causal(module: nn.Module, said: bool | None) -> bool:
    """As the stock kernels decide it: what the call says goes before what the module says."""
    return bool(getattr(module, "is_causal", True) if said is None else said)


def _with_position_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The mask with T5's relative position bias, which is added to the scores as masks are."""
    if bias is None:
        return mask
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -torch.inf)
    return bias + mask


def _statistics(reads: Mapping[str, Any]) -> dict[str, PatternStatistic]:
    if "pattern" not in reads:
        return {}
    reduce = reads["pattern"]
    if isinstance(reduce, PatternStatistic):
        return {"": reduce}
    if isinstance(reduce, Mapping):
        return dict(reduce)
    return {"whole": WholePattern()}
