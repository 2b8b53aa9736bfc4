"""Everything that is read of a model and done to it, on a pretended device and on two: the numbers of the CPU.

python -m tests.other_devices llama sdpa
"""

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import workbench as wb
from tests.pretended import Pretending, put
from tests.zoo import padded, random_tokens, tiny_model
from workbench.attention import statistics
from workbench.attention.rows import PatternRows
from workbench.interventions.damped_mass import DampedMass
from workbench.interventions.knockout import KnockOut
from workbench.interventions.mean_heads import MeanHeads
from workbench.interventions.move_to_first import MoveToFirst
from workbench.interventions.replace import ReplacePositions
from workbench.interventions.scale_keys import ScaleKeys
from workbench.interventions.uniform import UniformAttention

N_POS = 20
SITES = "L0.pattern L1.attn_scores L0.q L1.k L1.v L1.z L0.resid_pre L1.resid_post L1.mlp_out embed ln_final"
SOME = ((0, 1), (1, 2))


def seeded(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2))


STATISTICS = {
    "mean": statistics.ColumnMean(),
    "mass": statistics.SinkMass((0, 3)),
    "gap": statistics.SinkLogitGap(),
    "entropy": statistics.RowEntropy(),
    "rows": PatternRows(torch.tensor([[3, 14], [5, 19]])),
    "damped": DampedMass(wb.ACT(alpha=1.5)),
    "damped by all": DampedMass(wb.ACT(alpha=1.5, mode="full")),
}
EDITS: dict[str, Any] = {
    "score": wb.ZeroTuning(2.0),
    "score, in tiles": wb.ZeroTuning(0.01),
    "score by head": wb.ZeroTuning((2.0, 3.0), SOME),
    "key": wb.ZeroTuning(1.2, mode="key"),
    "act": wb.ACT(alpha=1.5),
    "act of some": wb.ACT(alpha=1.5, heads=SOME),
    "act by all rows": wb.ACT(alpha=1.5, mode="full"),
    "knockout": KnockOut(seeded(1, N_POS, N_POS) > 1.0, SOME),
    "first": MoveToFirst(SOME),
    "keys": ScaleKeys((0, 3), 2.0),
    "keys, in tiles": ScaleKeys((2,), 0.01, SOME),
    "uniform": UniformAttention(SOME),
    "uniform without first": UniformAttention(skip_first=True),
    "zero": wb.ZeroHeads(SOME),
    "mean": MeanHeads(SOME, seeded(2, 8)),
    "vector": wb.AddVector("L0.resid_post", seeded(32)),
    "replace": ReplacePositions("L1.resid_pre", seeded(2, N_POS) > 0.0, seeded(2, N_POS, 32)),
}


def spread(model: Any) -> None:
    """Put the second block on another device; accelerate brings its inputs there and back."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    put(model, 0)
    blocks = wb.wrap(model).hooks.blocks
    put(blocks[1], 1)
    add_hook_to_module(blocks[1], AlignDevicesHook("pretended:1", io_same_device=True))


def questions(mask: Tensor | None, tokens: Tensor) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """What is asked of a model, by name."""
    layers = ["L0.pattern", "L1.pattern"]
    yield "logits", lambda model: model.logits(tokens, mask)
    yield "sites", lambda model: model.capture(tokens, SITES.split(), attention_mask=mask)
    reduce = {"pattern": STATISTICS}
    yield "statistics", lambda model: model.capture(tokens, layers, reduce, attention_mask=mask)
    for name, edit in EDITS.items():

        def edited(model: Any, edit: Any = edit) -> Any:
            with model.edit(edit):
                reduce = {"pattern": statistics.ColumnMean()}
                captured = model.capture(tokens, layers, reduce, attention_mask=mask)
                return {"logits": model.logits(tokens, mask), **captured}

        def generated(model: Any, edit: Any = edit) -> Any:
            options = {"do_sample": False, "eos_token_id": None, "attention_mask": mask}
            with model.edit(edit):
                return model.generate(tokens, 3, **options)

        yield name, edited
        if name != "replace":  # it belongs to prompts of one length
            yield f"generated under {name}", generated


def numbers(found: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of an answer, by name."""
    if isinstance(found, Tensor):
        yield prefix, found
        return
    for name, each in found.items():
        yield from numbers(each, f"{prefix} {name}")


def real(x: Tensor, mask: Tensor | None) -> Tensor:
    """What belongs to tokens: rows of padding hold what the kernel makes of nothing."""
    for axis in (1, 2):
        if mask is not None and x.dim() > axis and x.shape[axis] == mask.shape[1]:
            return x.movedim(axis, 1)[mask.bool()]
    return x


def differences(family: str, kernel: str) -> Iterator[str]:
    """What a model on other devices answers that it does not on the CPU."""
    made = tiny_model(family, attn_implementation=kernel)
    cpu = wb.wrap(copy.deepcopy(made))
    whole, parts = copy.deepcopy(made), copy.deepcopy(made)
    put(whole, 0), spread(parts)
    others = {"one device": wb.wrap(whole), "two devices": wb.wrap(parts)}
    tokens = random_tokens(2, N_POS)
    given = {side: padded(tokens, [20, 13], side) for side in ("left", "right")}
    for side, (ids, mask) in {"none": (tokens, None), **given}.items():
        for name, ask in questions(mask, ids):
            if side == "right" and name.startswith("generated"):
                continue
            wanted = dict(numbers(ask(cpu)))
            for where, other in others.items():
                with Pretending():
                    found = dict(numbers(ask(other)))
                for key, x in wanted.items():
                    same = (real(each.float(), mask) for each in (found[key], x))
                    if not torch.allclose(*same, rtol=1e-3, atol=1e-4, equal_nan=True):
                        yield f"{where}, padding {side}: {name}{key}"


if __name__ == "__main__":
    wrong = list(differences(*sys.argv[1:]))
    sys.stdout.write("\n".join(wrong))
    sys.exit(bool(wrong))
