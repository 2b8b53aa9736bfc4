"""Reading a model that runs elsewhere, through nnsight: values come back whole and are reduced here.

nnsight sends the *source* of a traced block to the machine that holds the model, with the names it
uses. Nothing of the workbench is installed there, so the blocks here use plain lists and texts only,
and what is done with a value is done after it has come back. What comes back for attention is q, k,
v and the mask, never a pattern of ``pos x pos`` a head: the pattern is made here, whatever kernel
the other machine runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.attention.inputs import AttentionInputs
from workbench.attention.streaming import attention_scores
from workbench.errors import CapabilityError

Ask = tuple[str, str, str]
"""A module's path, ``input``, ``output`` or ``call``, and the name of the call within it."""


def refuse_without_key() -> None:
    """Raise ``CapabilityError`` where no key for remote execution is set."""
    from nnsight import CONFIG

    if not CONFIG.API.APIKEY:
        raise CapabilityError(
            "remote execution on NDIF needs an API key and a network; no key is set; put it into "
            "NDIF_API_KEY (https://login.ndif.us gives one), or run locally with remote=False"
        )


def fetch(
    lm: Any, arguments: Mapping[str, Any], asks: Sequence[Ask], last: int | None, remote: Any
) -> tuple[list[Any], Tensor | None]:
    """One forward pass over there; the values asked for, in order, and the logits.

    Args:
        lm: The nnsight model.
        arguments: Of the forward pass.
        asks: In the order in which the model makes the values, none twice.
        last: Logits of the last so many positions; 0: none come back.
        remote: As nnsight takes it: True, the address of a server, or ``local``.
    """
    wants = last != 0
    start = 0 if last is None else -last
    with lm.trace(**arguments, remote=remote):
        found = []
        for path, kind, node in asks:
            envoy = lm.get(path)
            if kind == "call":
                args, more = envoy.source.node(node).inputs
                value = [*args[1:5], more.get("scaling"), more.get("softcap"), more.get("s_aux")]
            elif kind == "input":
                value = [envoy.input.clone()]
            else:
                whole = envoy.output
                value = [(whole[0] if isinstance(whole, tuple) else whole).clone()]
            found.append(value)
        if wants:
            found.append([lm.output.logits[:, start:]])
        found = found.save()  # type: ignore[attr-defined]
    values = list(found)
    return values, values.pop()[0].detach().float().cpu() if wants else None


def fetch_parameters(lm: Any, path: str, names: Sequence[str], remote: Any) -> dict[str, Tensor]:
    """Some parameters of one module, by a forward pass of one token."""
    names = list(names)
    with lm.trace(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False, remote=remote):
        home = lm.get(path)._module
        found = {name: home.get_parameter(name).detach().cpu() for name in names}
        found = found.save()  # type: ignore[attr-defined]
    return dict(found)


@contextmanager
def filled(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, an empty module holds these parameters."""
    empty = {}
    for name, tensor in parameters.items():
        path, _, own = name.rpartition(".")
        part = module.get_submodule(path)
        empty[name] = part, own, part._parameters[own]
        part._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        for part, own, parameter in empty.values():
            part._parameters[own] = parameter


def scores_of(call: Sequence[Any]) -> Tensor:
    """``attn_scores`` from what the attention function was given."""
    return attention_scores(_inputs_of(call))


def pattern_of(call: Sequence[Any]) -> Tensor:
    """The pattern from what the attention function was given; rows that see nothing are 0."""
    inputs = _inputs_of(call)
    scores = attention_scores(inputs)
    if inputs.sinks is None:
        return scores.softmax(dim=-1).nan_to_num(0.0)
    sinks = inputs.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def _inputs_of(call: Sequence[Any]) -> AttentionInputs:
    query, key, value, mask, scaling, softcap, sinks = call
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return AttentionInputs(query, key, value, mask, scaling, softcap=softcap, sinks=sinks)
