"""Text encoders on the ``hf`` backend: CLIP's text tower and T5's encoder.

They have the residual stream, attention and edits of a language model, but predict no tokens: there
are no logits and nothing is generated. CLIP's text tower is causal; T5's encoder sees both ways and
has a relative position bias instead of position embeddings.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NoReturn

from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import CapabilityError, ModelError
from workbench.models.base import Captured, ModelSpec, Reducers, Site
from workbench.models.huggingface import HuggingFaceModel

ENCODERS = {"clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
"""Model type of transformers -> the class that holds the encoder alone."""

CHECKPOINTS = {"clip": "clip_text_model", **{kind: kind for kind in ENCODERS}}
"""Model type of a checkpoint (CLIP's holds an image tower too) -> that of its text encoder."""


class TextEncoder:
    """A text encoder of transformers; see ``workbench.models.base.ModelAdapter``."""

    backend = "hf"

    def __init__(
        self, model: Any, tokenizer: Any = None, *, name: str = "", revision: str = ""
    ) -> None:
        """Take over a loaded encoder: eval mode, weights frozen.

        Args:
            model: A ``CLIPTextModel``, ``CLIPTextModelWithProjection`` or ``T5EncoderModel``.
            tokenizer: Its tokenizer, if texts are to be read.
            name: What people call it.
            revision: Hub commit or hash of the weights.

        Raises:
            ModelError: Another model of the same type, e.g. a T5 with its decoder.
        """
        alone = model.base_model
        kind = alone.config.model_type
        if type(alone).__name__ != ENCODERS.get(kind):
            raise ModelError(
                f"a text encoder must be one of {', '.join(ENCODERS.values())}; got "
                f"{type(model).__name__}; load the encoder alone from the same folder"
            )
        if kind == "t5":
            # It names one embedding and runs another, which shares the weight: let both be the one.
            alone.set_input_embeddings(alone.encoder.embed_tokens)
        self._hooked = HuggingFaceModel(alone, tokenizer, name=name, revision=revision)
        self.model = alone
        self.tokenizer = tokenizer
        spec = self._hooked.spec
        self.spec: ModelSpec = replace(spec, d_mlp=getattr(alone.config, "d_ff", spec.d_mlp))

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do: neither logits nor generation."""
        return self._hooked.capabilities - {"generate", "continue", "gradients"}

    @property
    def dtype(self) -> str:
        """The dtype of the weights, e.g. ``float32``."""
        return self._hooked.dtype

    @property
    def attention(self) -> str:
        """The stock attention implementation (``sdpa``, ``eager``)."""
        return self._hooked.attention

    @property
    def interventions(self) -> tuple[Any, ...]:
        """The interventions that are active now."""
        return self._hooked.interventions

    def capture(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[Site | str],
        reduce: Reducers = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> Captured:
        """Run one forward pass and return the activation at each site; see ``ModelAdapter``."""
        return self._hooked.capture(tokens, sites, reduce, attention_mask, position_ids)

    def edit(self, *interventions: Any) -> AbstractContextManager[None]:
        """Within the context, capture and every probe see the edits."""
        return self._hooked.edit(*interventions)

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """One weight in TransformerLens' layout, float32 on the CPU; see ``base.WEIGHTS``.

        Raises:
            CapabilityError: W_U: there is none.
        """
        if name == "W_U":
            self._refuse("an unembedding W_U")
        return self._hooked.weight(name, layer)

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Tensor:
        """Refuse: an encoder predicts no tokens.

        Raises:
            CapabilityError: Always.
        """
        self._refuse("logits")

    def continue_from(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Tensor:
        """Refuse: it would end in logits.

        Raises:
            CapabilityError: Always.
        """
        self._refuse("logits")

    def generate(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """Refuse: an encoder predicts no tokens.

        Raises:
            CapabilityError: Always.
        """
        self._refuse("generation")

    def _refuse(self, what: str) -> NoReturn:
        raise CapabilityError(
            f"{what} needs a language model; {self.spec.name} ({self.spec.family}) is a text encoder; "
            "capture its sites, or use a causal language model"
        )


def refuse_encoder(model_type: str, backend: str) -> None:
    """Refuse a text encoder on a backend that needs logits.

    Raises:
        CapabilityError: It is one.
    """
    if model_type in CHECKPOINTS:
        raise CapabilityError(
            f"the {backend} backend needs a causal language model; {model_type} is a text encoder; use "
            "--backend hf"
        )


def encoder_class(model_type: str) -> Any:
    """The transformers class that loads a checkpoint's text encoder alone; None: it holds none.

    Args:
        model_type: That of the checkpoint's config.
    """
    import transformers

    kind = CHECKPOINTS.get(model_type)
    return None if kind is None else getattr(transformers, ENCODERS[kind])
