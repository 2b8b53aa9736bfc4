"""What a measurement depends on: everything that can change its numbers, of which its key is the hash."""

import dataclasses
import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from workbench.errors import StoreError
from workbench.provenance import canonical_json
from workbench.registry import Probe
from workbench.requests import Options

if TYPE_CHECKING:
    from workbench.prompts import Prompts


def identity_of(
    probe: Probe, model: Any, config: Any, prompts: "Prompts | None", options: Options
) -> dict[str, Any]:
    """Everything that can change the numbers; its hash is the result's key."""
    from workbench.prompts import columns_hash, tokens_hash
    from workbench.revisions import tokenizer_hash

    spec = model.spec
    return {
        "probe": probe.name,
        "version": probe.version,
        "config": asdict(config),
        "model": spec.name,
        "revision": spec.revision or weights_hash(model),
        "family": spec.family,
        "tokenizer": None if model.tokenizer is None else tokenizer_hash(model.tokenizer),
        "bos": options.bos,
        "padding": "right",
        "dtype": model.dtype,
        "backend": model.backend,
        "attention": model.attention,
        "tokens": None if prompts is None else tokens_hash(prompts),
        "columns": None if prompts is None else columns_hash(prompts),
        "seed": options.seed,
        "interventions": [describe_intervention(item) for item in model.interventions],
    }


def weights_hash(model: Any) -> str:
    """Hash of the weights a model holds in memory, for objects that came without a revision."""
    import torch

    from workbench.models.offload import tensors_at_hand

    digest = hashlib.sha256()
    for name, tensor in tensors_at_hand(model.model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Bytes as they are: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_intervention(intervention: Any) -> dict[str, Any]:
    """An active intervention as JSON data, tensors by their hash.

    Raises:
        StoreError: It is no dataclass, so nobody can tell two of them apart.
    """
    if not dataclasses.is_dataclass(intervention):
        raise StoreError(
            "an intervention must be a dataclass, so that results under it have a key; got "
            f"{type(intervention).__name__}; make it a frozen dataclass"
        )
    described = {"type": type(intervention).__name__}
    for field in dataclasses.fields(intervention):
        value = getattr(intervention, field.name)
        if hasattr(value, "numpy"):
            value = hashlib.sha256(value.detach().cpu().float().numpy().tobytes()).hexdigest()
        described[field.name] = value
    canonical_json(described)
    return described
