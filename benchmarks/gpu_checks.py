"""What ``gpu.py`` must find before it times anything: sinks of eager's maps, and ways of one edit that agree."""

from collections import defaultdict
from typing import Any

import torch
from gpu_methods import EAGER, KERNEL, STOCK, Subject, Way, readers, ways
from torch import Tensor

from workbench.attention.column_kernel import why_not_here
from workbench.models.base import Site

N_POS = 300
"""Tokens of the prompt whose sinks are compared: more than two tiles of 128 rows."""
SINKS_APART = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (0.01, 0.2),
    torch.float16: (0.002, 0.03),
}
"""How far a layer's sinks may lie from eager's, as a share of their norm: in the first layer and in the others,
whose streams differ by the rounding of two kernels. In 32 layers of width 256 on a CPU bfloat16 was 0.002 off in
the first and 0.06 at most, float16 0.0002 and 0.006; sinks that count their rows wrongly are 0.3 off and more."""
EDIT_POS, EDIT_NEW = 16, 3
GAMMA, KEY_GAMMA = 50.0, 3.0
"""Large, so that what the edit does stands far above the rounding of half precision."""
EDITS_APART = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""How far logits of one edit may lie apart, as a share of what the edit does to them."""
LEAST_EFFECT = 0.02
"""What an edit must do to the logits, as a share of their norm, to be seen at all."""


def check_sinks(subject: Subject) -> None:
    """Compare ours with the column means of eager attention's maps, layer by layer.

    Raises:
        SystemExit: They are not the same.
    """
    n_pos = min(N_POS, subject.wrapped.spec.n_ctx)
    tokens = subject.tokens(1, n_pos)
    all_readers = readers(subject, [])
    maps = all_readers.pop(EAGER)(tokens).attentions
    if why := why_not_here(subject.device):
        del all_readers[KERNEL]
        print(f"{KERNEL}: not run; it needs {why}", flush=True)
    n_queries = torch.arange(n_pos, 0, -1)
    worst: dict[str, float] = {}
    for name, read in all_readers.items():
        if not name.startswith("workbench"):
            continue
        captured = read(tokens)
        for layer, pattern in enumerate(maps):
            wanted = pattern.float().sum(dim=-2).cpu() / n_queries
            apart = distance(captured[Site("pattern", layer)], wanted, wanted)
            worst[name] = max(worst.get(name, 0.0), apart)
            if not apart <= SINKS_APART[subject.dtype][layer > 0]:
                raise SystemExit(
                    f"sinks must be those of eager attention's maps; {name} is {apart:.2g} of their norm off in "
                    f"layer {layer}; nothing was measured"
                )
    for name, apart in worst.items():
        print(f"{name}: at T = {n_pos} at most {apart:.2g} of their norm from eager's", flush=True)


def check_edits(subject: Subject) -> dict[str, str]:
    """Compare the logits of ways that make one edit, at the prompt and at decoded tokens.

    Returns:
        The ways that cannot be run here, and why.

    Raises:
        SystemExit: Two ways of one edit disagree, or an edit does nothing.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    not_run: dict[str, str] = {}
    for way in ways(subject, GAMMA, KEY_GAMMA):
        try:
            found[way.edit][way.peer] = forced_logits(subject, way)
        except Exception as error:  # a way that fails is a row of the table
            not_run[way.peer] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    stock = found.pop("no edit", {}).get(STOCK)
    if stock is None:
        raise SystemExit(f"{STOCK} must run to be compared with; {not_run[STOCK]}")
    for edit, by_peer in found.items():
        reference = next((peer for peer in by_peer if not peer.startswith("workbench")), None)
        if reference is None:
            raise SystemExit(f"{edit} must be made by eager attention to be checked; {not_run}")
        wanted = by_peer.pop(reference)
        if not distance(wanted, stock, stock) >= LEAST_EFFECT:
            raise SystemExit(f"{edit} must change the logits; it does not; nothing was measured")
        for peer, logits in by_peer.items():
            apart = distance(logits, wanted, wanted - stock)
            print(f"{peer}: {apart:.2g} of the edit's effect from {reference}", flush=True)
            if not apart <= EDITS_APART[subject.dtype]:
                raise SystemExit(
                    f"{peer} must make the edit of {reference}; it is {apart:.2g} of the edit's effect off; "
                    "nothing was measured"
                )
    return not_run


def distance(x: Tensor, y: Tensor, scale: Tensor) -> float:
    """Norm of a difference as a share of another norm."""
    return float((x - y).norm() / scale.norm())


def forced_logits(subject: Subject, way: Way) -> Tensor:
    """Last logits of every pass, float32, on the CPU; every way is made to go on with the same tokens."""
    passes: list[Tensor] = []

    def note(module: Any, args: Any, logits: Tensor) -> None:
        passes.append(logits[:, -1].float().cpu())

    handle = way.unembedding.register_forward_hook(note)
    try:
        way.run(subject.tokens(2, EDIT_POS), EDIT_NEW, logits_processor=[_next_in_turn])
    finally:
        handle.remove()
    return torch.stack(passes)


def _next_in_turn(tokens: Tensor, scores: Tensor) -> Tensor:
    """Scores that leave greedy decoding one choice, which does not depend on the model."""
    forced = torch.full_like(scores, -torch.inf)
    forced[:, tokens.shape[1] % scores.shape[1]] = 0.0
    return forced
