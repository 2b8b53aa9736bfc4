"""Places in the forward pass where an nnsight trace halts to read or change something.

nnsight serves values in the order in which the model makes them, and only once each; so everything
that is read or changed is sorted along the forward pass first. Module inputs and outputs come from
the family table. q, k and v after rotary embedding, and the pattern, come from inside the attention
module's ``forward``, at the call of its attention function (nnsight's ``source``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.attention.inputs import AttentionInputs
from workbench.attention.streaming import attention_scores
from workbench.errors import CapabilityError
from workbench.models.base import ATTENTION_SITES, ModelSpec, Site
from workbench.models.checks import check_editable, check_place
from workbench.models.families import Family
from workbench.models.nnsight_remote import Ask, pattern_of, scores_of

_RANKS = {
    "resid_pre": 0,
    "q": 1,
    "k": 1,
    "v": 1,
    "attn_scores": 1,
    "pattern": 2,
    "z": 3,
    "attn_out": 5,
    "resid_mid": 6,
    "mlp_out": 7,
    "resid_post": 8,
}
_MODULE_PATTERN_RANK = 6
"""The attention module's second output comes after what it adds to the stream (Bloom)."""

_CALLS = ("attention_interface_1", "self__attn_0")
"""How ``source`` names the call of the attention function: through transformers'
AttentionInterface (0 is the assignment before it), or GPT-J's and GPT-Neo's own method."""

_PATTERN_AS_OUTPUT = ("bloom", "falcon")
"""Attention computed in line; the module returns the pattern second."""


@dataclass
class Stop:
    """One place: what is done to it, then what is read from it."""

    site: Site
    rank: tuple[int, int]
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]
    changes: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    keeps: list[Callable[[Tensor], None]] = field(default_factory=list)

    def run(self) -> None:
        """Within a trace: read, change, keep."""
        x = self.read()
        for change in self.changes:
            x = change(x)
        if self.changes:
            self.write(x)
        for keep in self.keeps:
            keep(x)


class Places:
    """Makes stops for one nnsight model."""

    def __init__(self, envoy: Any, family: Family, spec: ModelSpec, kernel: str) -> None:
        """Remember where things are.

        Args:
            envoy: The nnsight model.
            family: Module paths of its architecture.
            spec: Its sizes.
            kernel: Its attention implementation.
        """
        self.envoy, self.family, self.spec, self.kernel = envoy, family, spec, kernel
        self.batch = 1

    def has_call(self) -> bool:
        """Whether q, k and v can be read at the call of the attention function."""
        return self._call_name(0) is not None

    def has_pattern(self) -> bool:
        """Whether the pattern is made where it can be read."""
        if self.spec.n_heads == 0 or self.kernel != "eager":
            return False
        return self.has_call() or self.spec.family in _PATTERN_AS_OUTPUT

    def rank(self, site: Site) -> tuple[int, int]:
        """Where a site stands along the forward pass."""
        if site.layer is None:
            return (-1, 0) if site.name == "embed" else (self.spec.n_layers, 0)
        return site.layer, _RANKS[site.name]

    def stop(self, site: Site) -> Stop:
        """The stop of a site.

        Raises:
            CapabilityError: It cannot be read on this architecture; says who can.
        """
        rank = self.rank(site)
        if site.layer is None:
            return self._of_module(site, rank)
        check_place(self.spec, self.family, site)
        if site.name in ("q", "k", "v", "attn_scores"):
            return self._of_call_inputs(site, rank)
        if site.name == "pattern":
            return self._of_pattern(site, rank)
        return self._of_module(site, rank)

    def ask(self, site: Site) -> Ask:
        """What to ask a machine elsewhere for, so that ``answer`` makes the site of it.

        Raises:
            CapabilityError: It cannot be read on this architecture.
        """
        if site.name != "pattern":  # it is made here, whatever kernel runs there
            self.stop(site)  # refuses what cannot be read at all
        if site.name in ATTENTION_SITES - {"z"}:
            name = self._call_name(site.layer or 0)
            if name != _CALLS[0]:
                raise CapabilityError(
                    f"{site} elsewhere needs attention through transformers' AttentionInterface; "
                    f"{self.spec.family} has its own; load the model here"
                )
            return self._attention_path(site.layer or 0), "call", name
        path, before = self._path(site)
        return path, "input" if before else "output", ""

    def answer(self, site: Site, value: Sequence[Any]) -> Tensor:
        """A site from what came back for its ``ask``."""
        if site.name == "pattern":
            return pattern_of(value)
        if site.name == "attn_scores":
            return scores_of(value)
        if site.name in ("q", "k", "v"):
            heads: Tensor = value["qkv".index(site.name)]
            return heads.transpose(1, 2)
        return self._shaped(site, value[0])

    def refuse_edit(self, site: Site) -> None:
        """Refuse a change at a site where it would not reach the output.

        Raises:
            CapabilityError: With the reason.
        """
        if site.name != "pattern":
            check_editable(site)
        if site.name == "pattern" and self.spec.n_heads and not self.has_call():
            raise CapabilityError(
                f"an attention edit must change the pattern before it is used; {self.spec.family} mixes "
                "pattern and values in line, where nnsight cannot; use --backend transformer-lens"
            )
        self.stop(site)

    def _of_module(self, site: Site, rank: tuple[int, int]) -> Stop:
        path, before = self._path(site)
        envoy = self.envoy.get(path)

        def read() -> Tensor:
            if before:
                value: Tensor = envoy.input
                return self._shaped(site, value)
            value = envoy.output
            return self._shaped(site, value[0] if isinstance(value, tuple) else value)

        def write(x: Tensor) -> None:
            if before:
                envoy.input = x.reshape(envoy.input.shape)
                return
            old = envoy.output
            whole = isinstance(old, Tensor)
            envoy.output = x.reshape(old.shape) if whole else (x, *old[1:])

        return Stop(site, rank, read, write)

    def _path(self, site: Site) -> tuple[str, bool]:
        """The module at a site, and whether the site is its input."""
        family = self.family
        if site.name == "embed":
            return self._embedding(), False
        if site.layer is None:
            return family.ln_final, False
        block = f"{family.blocks}.{site.layer}"
        if site.name in ("resid_pre", "resid_post"):
            return block, site.name == "resid_pre"
        inner = {
            "resid_mid": family.mid,
            "z": family.w_o,
            "attn_out": family.attn_out,
            "mlp_out": family.mlp_out,
        }[site.name]
        return f"{block}.{inner}", site.name in ("resid_mid", "z")

    def _embedding(self) -> str:
        module = self.envoy._module
        wanted = module.get_input_embeddings()
        return next(name for name, part in module.named_modules() if part is wanted)

    def _shaped(self, site: Site, x: Tensor) -> Tensor:
        if x.dim() == 2:  # OPT's MLP has batch and positions in one axis
            x = x.view(self.batch, -1, x.shape[-1])
        return x.unflatten(-1, (self.spec.n_heads, -1)) if site.name == "z" else x

    # Inside the attention module

    def _attention_path(self, layer: int) -> str:
        inner = "attn.attention" if self.spec.family == "gpt_neo" else self.family.attn
        return f"{self.family.blocks}.{layer}.{inner}"

    def _attention(self, layer: int) -> Any:
        return self.envoy.get(self._attention_path(layer))

    def _call_name(self, layer: int) -> str | None:
        if self.spec.n_heads == 0 or self.spec.family in _PATTERN_AS_OUTPUT:
            return None
        names = self._attention(layer).source.names
        return next((name for name in _CALLS if name in names), None)

    def _call(self, site: Site) -> tuple[Any, int]:
        """The attention call, and where q stands among its arguments."""
        layer = site.layer or 0
        name = self._call_name(layer)
        if name is None:
            raise CapabilityError(
                f"{site} must be handed to an attention function; {self.spec.family} computes attention in "
                "line, where nnsight cannot look; use --backend transformer-lens"
            )
        return self._attention(layer).source.node(name), int(name == _CALLS[0])

    def _of_call_inputs(self, site: Site, rank: tuple[int, int]) -> Stop:
        call, first = self._call(site)
        if site.name == "attn_scores" and first == 0:
            raise CapabilityError(
                f"{site} is made inside {self.spec.family}'s own attention method, where nnsight cannot "
                "look; no backend shows it; read q, k and pattern"
            )

        def read() -> Tensor:
            args, kwargs = call.inputs
            if site.name == "attn_scores":
                return attention_scores(_attention_inputs(args, kwargs))
            which = first + ("q", "k", "v").index(site.name)
            heads: Tensor = args[which]
            return heads.transpose(1, 2)

        return Stop(site, rank, read, _read_only)

    def _of_pattern(self, site: Site, rank: tuple[int, int]) -> Stop:
        if self.kernel != "eager":
            raise CapabilityError(
                f"{site} is made by eager attention only; this model runs {self.kernel}; load it with "
                "attn_implementation='eager'"
            )
        if self.spec.family in _PATTERN_AS_OUTPUT:
            attention = self._attention(site.layer or 0)
            late = (rank[0], _MODULE_PATTERN_RANK)
            return Stop(site, late, lambda: attention.output[1], _read_only)
        call, first = self._call(site)
        held: dict[str, Tensor] = {}

        def read() -> Tensor:
            held["v"] = call.inputs[0][first + 2]
            weights: Tensor = call.output[1]
            return weights

        def write(pattern: Tensor) -> None:
            value = held["v"].repeat_interleave(pattern.shape[1] // held["v"].shape[1], dim=1)
            mixed = torch.matmul(pattern.to(value.dtype), value)
            call.output = (mixed.transpose(1, 2) if first else mixed, pattern)

        return Stop(site, rank, read, write)


def _attention_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionInputs:
    _, query, key, value, mask = args[:5]
    scaling = kwargs.get("scaling")
    return AttentionInputs(
        query,
        key,
        value,
        mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )


def _read_only(x: Tensor) -> None:
    raise AssertionError("this place is only read")
