"""nnsight models from checkpoints, from loaded models and from names of models elsewhere."""

from dataclasses import replace
from typing import Any

from workbench.models.checkpoint import Source, load_tokenizer, load_transformers, read_config
from workbench.models.nnsight import NNsightModel
from workbench.models.nnsight_remote import refuse_without_key


def load_nnsight(source: Source) -> NNsightModel:
    """Load a checkpoint with transformers (eager attention unless asked) and wrap it."""
    kernel = source.attn_implementation or "eager"
    model, tokenizer, identity = load_transformers(replace(source, attn_implementation=kernel))
    return wrap_module(model, tokenizer, name=identity.name, revision=identity.revision)


def wrap_module(model: Any, tokenizer: Any = None, **about: Any) -> NNsightModel:
    """Put a transformers model behind nnsight, without its pipeline and tokenizer guessing."""
    from nnsight import NNsight

    return NNsightModel(NNsight(model), tokenizer, **about)


def load_remote(
    name: str, revision: str | None = None, *, remote: bool | str = True
) -> NNsightModel:
    """Point at a model that another machine holds: only its sizes and its tokenizer are read here.

    Args:
        name: A hub id, or a folder that both machines see.
        revision: Branch, tag or commit.
        remote: See ``NNsightModel``.

    Raises:
        CapabilityError: No key for NDIF.
        ModelError: Its configuration cannot be read.
    """
    if remote is True:
        refuse_without_key()
    from nnsight import TransformersModel

    source = Source(name, name, revision)
    tokenizer = load_tokenizer(source)
    read_config(source)  # says in one line what transformers would not
    lm = TransformersModel(name, revision=revision, task="text-generation", tokenizer=tokenizer)
    known = revision or getattr(lm._module.config, "_commit_hash", None) or "hosted"
    return NNsightModel(lm, tokenizer, name=name, revision=known, remote=remote)
