"""``wb.load`` and ``wb.wrap``: from a name, a folder or somebody's object to a model."""

from typing import TYPE_CHECKING, Any

from workbench.errors import ConfigError, ModelError, UnknownNameError
from workbench.models.base import ModelAdapter
from workbench.models.names import resolve_model

if TYPE_CHECKING:
    from workbench.models.checkpoint import Source

BACKENDS = ("hf", "transformer-lens", "nnsight")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def load(
    name: str,
    backend: str = "hf",
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: Any = None,
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> ModelAdapter:
    """Load a model by hub id, local folder, ``demo`` or ``toy:DIR``.

    Args:
        name: What to load.
        backend: ``hf``, ``transformer-lens`` or ``nnsight``.
        revision: Branch, tag or commit on the hub; of a toy, the step of a checkpoint.
        dtype: ``auto`` keeps the checkpoint's.
        device: ``auto`` takes CUDA where there is one.
        device_map: Passed to transformers, for models larger than one device.
        trust_remote_code: Run code that the checkpoint brings; never on by itself.
        attn_implementation: A stock kernel of transformers; None takes its default.

    Raises:
        ModelError: No weights, pickled weights, remote code, NaN weights, hub unreachable.
        UnknownNameError: A backend that does not exist.
    """
    if backend not in BACKENDS:
        raise UnknownNameError("backend", backend, BACKENDS)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype}")
    from workbench.models.checkpoint import Source
    from workbench.models.toy_folder import is_toy_folder, load_toy

    place = resolve_model(name)
    if is_toy_folder(place):
        _check_toy_options(backend, device_map)
        return load_toy(place, revision, dtype=dtype, device=device)
    source = Source(
        place,
        name,
        revision,
        dtype,
        device,
        device_map,
        trust_remote_code,
        attn_implementation,
    )
    return _load_checkpoint(source, backend)


def _check_toy_options(backend: str, device_map: Any) -> None:
    if backend != "hf":
        raise ModelError(
            f"a toy model has a backend of its own; got {backend}; leave the backend out"
        )
    if device_map is not None:
        raise ModelError("a toy model lives on one device; leave device_map out")


def _load_checkpoint(source: "Source", backend: str) -> ModelAdapter:
    from workbench.models.checkpoint import load_transformers, read_config
    from workbench.models.encoders import ENCODERS, TextEncoder, refuse_encoder

    if backend == "hf":
        from workbench.models.huggingface import HuggingFaceModel

        model, tokenizer, identity = load_transformers(source)
        kind = TextEncoder if model.config.model_type in ENCODERS else HuggingFaceModel
        return kind(model, tokenizer, name=identity.name, revision=identity.revision)
    refuse_encoder(read_config(source).model_type, backend)
    if backend == "transformer-lens":
        from workbench.models.bridge_building import load_bridge

        return load_bridge(source)
    from workbench.models.nnsight_building import load_nnsight

    return load_nnsight(source)


def wrap(model: Any, tokenizer: Any = None) -> ModelAdapter:
    """Take a model somebody already holds: transformers, TransformerBridge, nnsight, a toy.

    Args:
        model: The object; it is not copied, and nothing on it changes for good.
        tokenizer: Needed for texts where the object has none of its own.

    Raises:
        ModelError: Not a kind of object that is known.
    """
    if isinstance(model, ModelAdapter):
        return model
    # By name, so that no library is imported that the object does not come from.
    bases = {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in type(model).__mro__}
    if "transformer_lens.TransformerBridge" in bases:
        from workbench.models.transformer_lens import TransformerLensModel

        return TransformerLensModel(model, tokenizer or getattr(model, "tokenizer", None))
    if bases & {"nnsight.NNsight", "nnsight.TransformersModel", "nnsight.LanguageModel"}:
        from workbench.models.nnsight import NNsightModel

        return NNsightModel(model, tokenizer or getattr(model, "tokenizer", None))
    if "transformers.PreTrainedModel" in bases:
        from workbench.models.encoders import CHECKPOINTS, TextEncoder
        from workbench.models.huggingface import HuggingFaceModel

        _refuse_nan(model)
        if model.config.model_type in CHECKPOINTS:
            return TextEncoder(model, tokenizer)
        return HuggingFaceModel(model, tokenizer)
    if bases & {"toy_tasks.ToyModel", "toy_tasks.ScanSnapModel"}:
        from workbench.models.toy import ToyAdapter

        return ToyAdapter(model)
    raise ModelError(
        "wrap takes a transformers model, a TransformerBridge, an nnsight LanguageModel or a toy; got "
        f"{type(model).__module__}.{type(model).__name__}; load it with transformers first"
    )


def _refuse_nan(model: Any) -> None:
    from workbench.models.weights import check_finite

    bad = check_finite(model)
    if bad is not None:
        raise ModelError(
            f"weights must be finite; {bad} holds NaN or infinity; get an undamaged checkpoint"
        )
