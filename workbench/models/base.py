"""What a probe may ask of a model, whatever library the model came from."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.streaming import PatternStatistic
from workbench.errors import CapabilityError, UnknownNameError

LAYER_SITES = {
    "resid_pre": "batch pos d_model, the residual stream before the block",
    "resid_mid": "batch pos d_model, between attention and MLP",
    "resid_post": "batch pos d_model, after the block",
    "q": "batch pos head d_head, queries after rotary and qk-norm",
    "k": "batch pos kv_head d_head, keys after rotary and qk-norm",
    "v": "batch pos kv_head d_head, values",
    "z": "batch pos head d_head, the mix of values before W_O",
    "attn_scores": "batch head q_pos k_pos, before softmax (masked entries -inf)",
    "pattern": "batch head q_pos k_pos, after softmax",
    "attn_out": "batch pos d_model, what attention adds to the residual stream",
    "mlp_out": "batch pos d_model, what the MLP adds to the residual stream",
}
"""Sites that every layer has, with shape and meaning."""

MODEL_SITES = {
    "embed": "batch pos d_model, token embeddings as they enter (before learned positions)",
    "ln_final": "batch pos d_model, after the final norm",
}
"""Sites that the model has once."""

ATTENTION_SITES = frozenset({"q", "k", "v", "z", "attn_scores", "pattern"})

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_attn_scores": "attn_scores",
    "attn.hook_pattern": "pattern",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "hook_embed": "embed",
    "ln_final.hook_normalized": "ln_final",
}
TRANSFORMER_LENS_NAMES = {name: alias for alias, name in _TRANSFORMER_LENS.items()}
"""Our site name -> the TransformerLens hook name inside ``blocks.<layer>.`` (or of the model)."""


class Site(NamedTuple):
    """One place in the forward pass, e.g. ``Site("pattern", 3)``, also written ``L3.pattern``."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        """The site as text, as ``Site.parse`` reads it."""
        return self.name if self.layer is None else f"L{self.layer}.{self.name}"

    @staticmethod
    def parse(site: "Site | str") -> "Site":
        """Read ``L3.pattern``, ``blocks.3.attn.hook_pattern``, ``embed`` or a ``Site``.

        Raises:
            UnknownNameError: The name is no site; the nearest is offered.
        """
        if isinstance(site, tuple):
            name, layer = site[0], site[1]
            text = name if layer is None else f"L{layer}.{name}"
        else:
            text = site
        match = re.fullmatch(r"(?:L|blocks\.)(\d+)\.(.+)", text)
        name = match[2] if match else text
        name = _TRANSFORMER_LENS.get(name, name)
        if name not in (LAYER_SITES if match else MODEL_SITES):
            prefix = f"L{match[1]}." if match else ""
            known = [f"{prefix or 'L0.'}{known}" for known in LAYER_SITES] + list(MODEL_SITES)
            raise UnknownNameError("site", f"{prefix}{name}", known)
        return Site(name, int(match[1]) if match else None)


class Captured(dict[Site, Any]):
    """What a capture returned, by ``Site``; the other spellings of a site find it too."""

    def __missing__(self, site: "Site | str") -> Any:
        """Look a site up under its canonical name."""
        parsed = Site.parse(site)
        if parsed not in self:
            raise KeyError(f"{site} was not captured; captured: {', '.join(map(str, self))}")
        return self[parsed]


@dataclass(frozen=True)
class ModelSpec:
    """The sizes a probe needs; ``n_kv_heads < n_heads`` means grouped-query attention."""

    name: str
    revision: str
    """Hub commit, or a hash of the weights for a local folder."""
    family: str
    """The model type of transformers ("gpt2", "llama", ...) or "toy"."""
    n_layers: int
    n_heads: int
    """Query heads; 0 for a model without attention."""
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    """The longest prompt, in tokens."""
    positions: str = "rotary"
    """How positions enter: "learned", "rotary", "alibi", "none"."""


Reduce = Callable[[Tensor], Any]
"""Applied to a site's activation where it is, inside the forward pass."""

Reducers = Reduce | PatternStatistic | Mapping[Any, Any] | None
"""One reduction for every site, or one per ``Site`` or site name (those left out are kept whole).

A reduction of ``pattern`` may be a ``workbench.attention.streaming.PatternStatistic`` (or a
mapping of names to them): then the pattern is never made, only read block by block.
"""


def reduction_for(site: Site, reduce: Reducers) -> Any:
    """The reduction of one site: its own, else that of its name, else None (keep it whole)."""
    if isinstance(reduce, Mapping):
        return reduce.get(site, reduce.get(site.name))
    return reduce


@runtime_checkable  # the test suite checks annotations with isinstance
class ModelAdapter(Protocol):
    """A loaded causal language model, in eval mode, with its weights frozen."""

    backend: str
    """ "hf", "transformer-lens", "nnsight" or "toy"."""

    tokenizer: Any
    """A transformers tokenizer, or None."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do: any of CAPABILITIES."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype of the weights, e.g. ``float32``."""
        ...

    @property
    def attention(self) -> str:
        """The attention kernel of an untouched forward pass, e.g. ``sdpa``; "none" without."""
        ...

    @property
    def interventions(self) -> tuple[Any, ...]:
        """The interventions that are active now."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """The model's name, revision and sizes."""
        ...

    def capture(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[Site | str],
        reduce: Reducers = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> Captured:
        """Run one forward pass and return the activation at each site, on the CPU.

        Whole activations come back in float32; a reduction's result as the reduction made it.
        """
        ...

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Run one forward pass and return the logits, on the CPU in float32.

        Args:
            tokens: The prompts.
            attention_mask: 1 where a token is, 0 where padding is; None: no padding.
            last: Only the logits of the last so many positions; None: of all.
        """
        ...

    def continue_from(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Go on from ``resid_pre`` of one block and return the logits, float32.

        Active edits act from there on; those at or before that ``resid_pre`` are taken to be in
        ``resid`` already, as they are in a capture. When ``resid`` requires a gradient, the logits
        can be differentiated. They come back on the device of ``resid``.

        Args:
            layer: The block that is given ``resid``; those before it are not run.
            resid: The residual stream, e.g. ``capture(tokens, [Site("resid_pre", layer)])``.
            attention_mask: As of the tokens it came from.
            last: Only the logits of the last so many positions; None: of all.
        """
        ...

    def edit(self, *interventions: Any) -> AbstractContextManager[None]:
        """Within the context, logits, capture, generate and every probe see the edits."""
        ...

    def generate(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """Continue a text (returns the continuation) or tokens (returns prompt + new tokens)."""
        ...

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """One weight in TransformerLens' layout, float32 on the CPU: see WEIGHTS."""
        ...


CAPABILITIES = {
    "capture": "residual-stream sites",
    "attention": "q, k, v, z of every head",
    "patterns": "attention patterns, whole",
    "streaming": "pattern statistics without the pattern",
    "edits": "interventions inside the forward pass",
    "continue": "forward passes from a layer on",
    "gradients": "gradients with respect to activations",
    "generate": "text generation",
    "weights": "weights by name",
    "positions": "explicit position ids",
    "remote": "runs on another machine",
}

WEIGHTS = {
    "W_E": "d_vocab d_model",
    "W_pos": "n_ctx d_model (learned positions only)",
    "W_U": "d_model d_vocab",
    "W_Q": "head d_model d_head",
    "W_K": "kv_head d_model d_head",
    "W_V": "kv_head d_model d_head",
    "W_O": "head d_head d_model",
}


def require(model: ModelAdapter, needs: frozenset[str], what: str) -> None:
    """Refuse with the reason when the model's backend lacks something that is needed.

    Args:
        model: The model at hand.
        needs: Names from CAPABILITIES.
        what: Who needs it, e.g. ``"probe attention-sinks"``.

    Raises:
        CapabilityError: Names what is missing and the backends that have it.
    """
    missing = sorted(needs - model.capabilities)
    if missing:
        meanings = "; ".join(f"{name} ({CAPABILITIES[name]})" for name in missing)
        raise CapabilityError(
            f"{what} needs {meanings}; the {model.backend} backend does not have it for "
            f"{model.spec.name} ({model.spec.family}); try another of --backend hf, "
            "transformer-lens, nnsight ('workbench list probes' shows what each probe needs)"
        )
