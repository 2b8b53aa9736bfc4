"""Where a TransformerBridge lets one read and change what, found by watching it run once.

The bridge names its hooks alike on every architecture, but not every hook fires, and some fire too
late to matter: where the bridge runs the architecture's own attention, ``hook_pattern`` shows a
copy after the output is made, and ``hook_attn_scores`` shows the pattern again. One short forward
pass tells which hooks fire and in what order; what is read or changed follows from that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import CapabilityError
from workbench.models.base import ATTENTION_SITES, ModelSpec, Site

_NAMES = {
    "embed": ("embed.hook_out",),
    "ln_final": ("ln_final.hook_out",),
    "resid_pre": ("hook_resid_pre",),
    "resid_mid": ("hook_resid_mid",),
    "resid_post": ("hook_resid_post",),
    "attn_out": ("hook_attn_out",),
    "mlp_out": ("hook_mlp_out", "hook_mixer_out"),
    "z": ("attn.hook_z",),
    "v": ("attn.hook_v",),
    "pattern": ("attn.hook_pattern",),
    "attn_scores": ("attn.hook_attn_scores",),
}
"""The bridge's hooks of a site; the first that fires is read."""

_BEFORE_ROTARY = {"q": "attn.hook_q", "k": "attn.hook_k"}
_AFTER_ROTARY = {
    "q": ("attn.hook_rot_q", "attn.hook_q_normed"),
    "k": ("attn.hook_rot_k", "attn.hook_k_normed"),
}


class BridgeHooks:
    """The hooks of one bridge, by our sites."""

    def __init__(self, bridge: Any, spec: ModelSpec) -> None:
        """Look the hook points up; nothing runs yet."""
        self.bridge = bridge
        self.spec = spec
        self.points: dict[str, nn.Module] = dict(bridge.hook_dict)
        self.batch = 1

    @cached_property
    def order(self) -> dict[str, int]:
        """When each hook first fires in a forward pass; absent: never."""
        order: dict[str, int] = {}

        def watch(name: str, point: nn.Module) -> Any:
            def note(*_: Any) -> None:
                order.setdefault(name, len(order))

            return point.register_forward_hook(note)

        handles = [watch(name, point) for name, point in self.points.items()]
        try:
            with torch.no_grad():
                tokens = torch.zeros(1, 2, dtype=torch.long, device=self.device)
                self.bridge(tokens, return_type="logits", use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return order

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        device: torch.device = self.bridge.W_E.device
        return device

    @contextmanager
    def reading(self, site: Site, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Within the context, ``keep`` is given the activation at a site in our layout.

        Raises:
            CapabilityError: The bridge does not show it for this architecture.
        """
        if site.name in ("q", "k"):
            with self._reading_rotated(site, keep):
                yield
            return
        name = self.name_of(site)
        with self._hook(name, lambda x: keep(self._shaped(site, x))):
            yield

    @contextmanager
    def changing(self, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the context, the activation at a site is what ``change`` makes of it.

        Raises:
            CapabilityError: A change there would not reach the output, or there is no such place.
        """
        name = self.name_of(site)
        if site.name == "pattern" and not self.pattern_is_used(site.layer):
            raise CapabilityError(
                f"an attention edit must change the pattern before it is used; for {self.spec.family} the "
                "bridge runs the model's own attention and shows the pattern afterwards; use --backend hf "
                "where it takes the model, else nnsight"
            )

        def on_flat(x: Tensor) -> Tensor:
            return change(self._shaped(site, x)).reshape(x.shape)

        with self._hook(name, on_flat):
            yield

    def name_of(self, site: Site) -> str:
        """The hook that shows a site.

        Raises:
            CapabilityError: None that fires, or only one that shows something else.
        """
        prefix = "" if site.layer is None else f"blocks.{site.layer}."
        for name in _NAMES[site.name]:
            if prefix + name in self.order:
                if site.name == "attn_scores" and not self._scores_are_scores(prefix):
                    break
                return prefix + name
        raise self.refusal(site)

    def shows(self, site: Site) -> bool:
        """Whether a site can be read."""
        try:
            with self.reading(site, lambda x: None):
                return True
        except CapabilityError:
            return False

    def pattern_is_used(self, layer: int | None) -> bool:
        """Whether the values are mixed with what ``hook_pattern`` returns."""
        prefix = f"blocks.{layer}.attn."
        z = self.order.get(prefix + "hook_z", -1)
        return self.order.get(prefix + "hook_pattern", 1 << 30) < z

    def refusal(self, site: Site) -> CapabilityError:
        """Why a site cannot be read here, and who can read it."""
        if site.name in ATTENTION_SITES | {"attn_out"} and self.spec.n_heads == 0:
            return CapabilityError(
                f"{site} needs attention; {self.spec.family} has none; read resid_pre, resid_post or mlp_out"
            )
        if site.name == "resid_mid":
            return CapabilityError(
                f"{site} needs attention before the MLP; in {self.spec.family} here they are parallel or "
                "one; read resid_pre, attn_out and mlp_out"
            )
        return CapabilityError(
            f"{site} must be shown by a hook of the TransformerBridge; for {self.spec.family} none shows it "
            "(it runs the architecture's own attention); use --backend hf where it takes the model, else nnsight"
        )

    def _scores_are_scores(self, prefix: str) -> bool:
        scores = self.order[prefix + "attn.hook_attn_scores"]
        return scores < self.order.get(prefix + "attn.hook_pattern", -1)

    @contextmanager
    def _reading_rotated(self, site: Site, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Read q or k after rotary embedding and norm."""
        prefix = f"blocks.{site.layer}."
        after = [prefix + name for name in _AFTER_ROTARY[site.name] if prefix + name in self.order]
        plain = prefix + _BEFORE_ROTARY[site.name]
        if prefix + _AFTER_ROTARY[site.name][0] in self.order:
            last = max(after, key=lambda name: self.order[name])
            with self._hook(last, lambda x: keep(x.transpose(1, 2))):
                yield
        elif plain not in self.order:
            raise self.refusal(site)
        elif prefix + "attn.hook_sin" in self.order:
            with self._rotating(prefix, plain, keep):
                yield
        elif self.spec.positions == "rotary":
            raise self.refusal(site)
        else:
            scale = self._own_scaling(site)
            with self._hook(plain, lambda x: keep(self._by_head(x) * scale)):
                yield

    @contextmanager
    def _rotating(self, prefix: str, plain: str, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Where the bridge splits a joint projection, it shows q and k before rotary only.

        cos and sin fire after them; the rotation is the one that the bridge itself applies.
        """
        attention: Any = self.bridge.get_submodule(prefix + "attn")
        held: dict[str, Tensor] = {}

        def rotate(sin: Tensor) -> None:
            flat = self._by_head(held["x"]).transpose(1, 2)
            turned, _ = attention._apply_rotary_pos_emb(flat, flat, held["cos"], sin)
            keep(turned.transpose(1, 2))

        with (
            self._hook(plain, lambda x: held.update(x=x)),
            self._hook(prefix + "attn.hook_cos", lambda x: held.update(cos=x)),
            self._hook(prefix + "attn.hook_sin", rotate),
        ):
            yield

    def _own_scaling(self, site: Site) -> float:
        # OPT scales q in its attention, behind the projection that the bridge shows.
        scales = site.name == "q" and self.spec.family == "opt"
        return self.spec.d_head**-0.5 if scales else 1.0

    def _by_head(self, x: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        return x.unflatten(-1, (-1, self.spec.d_head)) if x.dim() == 3 else x

    def _shaped(self, site: Site, x: Tensor) -> Tensor:
        if site.name in ("z", "v"):
            return self._by_head(x)
        if site.name in ATTENTION_SITES:
            return x
        # OPT's MLP has batch and positions in one axis.
        return x if x.dim() == 3 else x.view(self.batch, -1, x.shape[-1])

    @contextmanager
    def batch_noted(self) -> Iterator[None]:
        """Within the context, the batch of each forward pass is known to the other hooks."""

        def note(embedded: Tensor) -> None:
            self.batch = embedded.shape[0]

        with self._hook("embed.hook_out", note):
            yield

    @contextmanager
    def _hook(self, name: str, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        handle = self.points[name].register_forward_hook(lambda _m, _i, output: function(output))
        try:
            yield
        finally:
            handle.remove()
