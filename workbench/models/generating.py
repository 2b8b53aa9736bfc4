"""Ways of generating under edits: what is refused by name, and what keeps step with transformers' loop."""

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.attention.edits import AttentionEdit, Edit, Intervention
from workbench.errors import ConfigError

_REFUSED = {
    "past_key_values": "a cache that was filled before has keys that the edit has not seen",
    "assistant_model": "drafted tokens are taken back, and with them rows that the edit has seen",
    "prompt_lookup_num_tokens": "drafted tokens are taken back, and with them rows that the edit has seen",
    "assistant_early_exit": "drafted tokens are taken back, and with them rows that the edit has seen",
    "use_mtp": "drafted tokens are taken back, and with them rows that the edit has seen",
    "custom_generate": "the loop is not known here",
}
_RESOLVED = ("num_beams", "use_cache", "prefill_chunk_size", "compile_config", *_REFUSED)


def check_generation(
    interventions: Sequence[Intervention], options: Mapping[str, Any], defaults: Any = None
) -> None:
    """Refuse ways of generating under which an active edit would not be exact.

    Args:
        interventions: Those that are active; without any, everything is transformers' own business.
        options: The arguments of ``generate``.
        defaults: The model's generation config, which holds where an option is not given.

    Raises:
        ConfigError: Names the option.
    """
    if not interventions:
        return
    defaults = options.get("generation_config") or defaults
    given = {}
    for name in _RESOLVED:
        value = options.get(name)
        value = getattr(defaults, name, None) if value is None else value
        if value is not None and value is not False:
            given[name] = value
        elif options.get(name) is False or getattr(defaults, name, None) is False:
            given[name] = False
    for name, reason in _REFUSED.items():
        if given.get(name) not in (None, False):
            raise ConfigError(
                f"an edited model must generate without {name}: {reason}; leave {name} out"
            )
    if getattr(given.get("compile_config"), "fullgraph", False):
        raise ConfigError(
            "an edited model must be compiled with graph breaks, because edits run between them; got "
            "compile_config with fullgraph=True; set fullgraph=False"
        )
    for intervention in interventions:
        # One that is not defined under every way of generating says so.
        check = getattr(intervention, "check_generation", None)
        if check is not None:
            check(given)


@contextmanager
def following_beams(model: Any, edits: Sequence[Edit]) -> Iterator[None]:
    """While transformers generates, edits that remember rows follow when beam search moves them.

    transformers asks a model for ``_reorder_cache`` before it reorders the cache itself; for the
    length of the context the model has one that does both.
    """
    followers = [edit.reorder for edit in edits if isinstance(edit, AttentionEdit) and edit.reorder]
    if not followers:
        yield
        return
    own = getattr(model, "_reorder_cache", None)

    def reorder(cache: Any, beams: Tensor) -> Any:
        for follow in followers:
            follow(beams)
        if own is not None:
            return own(cache, beams)
        cache.reorder_cache(beams)
        return cache

    model._reorder_cache = reorder
    try:
        yield
    finally:
        del model._reorder_cache


class _Uncompiled:
    """How many contexts of all threads want compiled code to be left aside; torch knows one stance."""

    def __init__(self) -> None:
        self.lock, self.depth, self.stance = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self.lock:
            if self.depth == 0:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.depth += 1

    def leave(self) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                self.stance.close()


_uncompiled = _Uncompiled()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models as they were written: compiled code does not see hooks set after it.

    torch leaves hooks out of what it checks before it runs compiled code again, so that an edit by
    hooks would silently not happen.
    """
    # What compiles has been imported before; to import it here would cost seconds and 20 MB.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    _uncompiled.enter()
    try:
        yield
    finally:
        _uncompiled.leave()
