"""Text-to-image pipelines of diffusers, given their prompt's encoding, and a judge of images.

The pipeline must take ``prompt_embeds`` of one text encoder and have ``encode_prompt`` (Stable
Diffusion 1 and 2 and their relatives). diffusers is the optional extra ``diffusion``; it is imported
here only, and only when a pipeline is loaded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import CapabilityError, DataError, ModelError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the red, green and blue channel in CLIP's training images, on a scale of 0 to 1."""


@dataclass(frozen=True)
class Drawing:
    """How images are made; defaults are Stable Diffusion's usual ones."""

    steps: int = 20
    guidance: float = 7.5
    """Weight of the prompt against the empty prompt; 1 or less: none."""
    size: int | None = None
    """Height and width in pixels; None: the pipeline's own."""
    seed: int = 42
    at_once: int = 4
    """Images of one batch."""


class TextToImage:
    """A text-to-image pipeline whose prompt encoding can be changed before it draws."""

    def __init__(self, pipeline: Any) -> None:
        """Take over a loaded pipeline.

        Args:
            pipeline: Of diffusers.

        Raises:
            CapabilityError: It has no single text encoder that it can be given the output of.
        """
        parts = ("tokenizer", "text_encoder", "encode_prompt")
        several = getattr(pipeline, "text_encoder_2", None) is not None
        missing = [name for name in parts if not hasattr(pipeline, name)]
        if missing or several:
            found = f"lacks {', '.join(missing)}" if missing else "has several text encoders"
            raise CapabilityError(
                "a pipeline must have one text encoder and take prompt_embeds; "
                f"{type(pipeline).__name__} {found}; use a Stable Diffusion 1 or 2"
            )
        self.pipeline = pipeline
        self.tokenizer = pipeline.tokenizer
        pipeline.set_progress_bar_config(disable=True)

    @staticmethod
    def load(folder: str, device: str = "cpu") -> "TextToImage":
        """Load a pipeline from its folder, safetensors only, in float32.

        Raises:
            ModelError: diffusers is missing, or the folder is no pipeline.
        """
        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise ModelError(
                "a text-to-image pipeline needs diffusers; it is not installed; install it with pip "
                "install 'interpretability-workbench[diffusion]'"
            ) from error
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                folder, use_safetensors=True, torch_dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ModelError(
                f"{folder} must be the folder of a diffusers pipeline with safetensors ({reason})"
            ) from error
        return TextToImage(pipeline.to(device))

    @property
    def n_pos(self) -> int:
        """Tokens of every encoding: prompts are padded to it."""
        return int(self.tokenizer.model_max_length)

    def tokens(self, text: str) -> Int[Tensor, " pos"]:
        """The prompt's tokens with the pads behind them.

        Raises:
            DataError: The prompt is too long; the pipeline would cut it without a word.
        """
        ids = self.tokenizer(text)["input_ids"]
        if len(ids) > self.n_pos:
            raise DataError(
                f"a prompt must have at most {self.n_pos} tokens for this pipeline; got {len(ids)}; "
                "shorten it"
            )
        padded = self.tokenizer(text, padding="max_length", max_length=self.n_pos)
        return torch.tensor(padded["input_ids"])

    def encode(self, text: str) -> Float[Tensor, "pos d_model"]:
        """What the image model is given of a prompt; "" gives the empty prompt's."""
        with torch.no_grad():
            found = self.pipeline.encode_prompt(text, self.pipeline.device, 1, False)[0]
        encoding: Tensor = found[0].float().cpu()
        return encoding

    def encode_tokens(self, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "pos d_model"]:
        """What the text encoder makes of tokens: for prompts that no text has."""
        with torch.no_grad():
            out = self.pipeline.text_encoder(tokens[None].to(self.pipeline.device))
        encoding: Tensor = out.last_hidden_state[0].float().cpu()
        return encoding

    def draw(
        self, encodings: Float[Tensor, "image pos d_model"], drawing: Drawing
    ) -> Float[Tensor, "image 3 height width"]:
        """Draw an image of every encoding from the same noise; values in [0, 1]."""
        pipeline, images = self.pipeline, []
        dtype, device = pipeline.text_encoder.dtype, pipeline.device
        empty = self.encode("").to(device, dtype)
        for part in encodings.split(drawing.at_once):
            noise = [torch.Generator().manual_seed(drawing.seed) for _ in part]
            out = pipeline(
                prompt_embeds=part.to(device, dtype),
                negative_prompt_embeds=empty.expand(len(part), -1, -1),
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance,
                height=drawing.size,
                width=drawing.size,
                generator=noise,
                output_type="pt",
            )
            images.append(out.images.float().cpu())
        return torch.cat(images)


class ClipJudge:
    """CLIP similarity: cosine of an image's and a text's projected features."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take over a loaded CLIP.

        Args:
            model: A ``CLIPModel`` of transformers.
            tokenizer: Its tokenizer.
        """
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @staticmethod
    def load(folder: str) -> "ClipJudge":
        """Load CLIP and its tokenizer from a folder, safetensors only.

        Raises:
            ModelError: The folder holds no CLIP.
        """
        from transformers import AutoTokenizer, CLIPModel

        try:
            model = CLIPModel.from_pretrained(folder, use_safetensors=True)
            return ClipJudge(model, AutoTokenizer.from_pretrained(folder))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ModelError(f"{folder} must be the folder of a CLIP ({reason})") from error

    def __call__(
        self, images: Float[Tensor, "image 3 height width"], texts: list[str]
    ) -> Float[Tensor, "image text"]:
        """Cosine of every image with every text, in [-1, 1]."""
        size = self.model.config.vision_config.image_size
        shown = torch.nn.functional.interpolate(
            images, (size, size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0.0, 1.0)
        mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            out = self.model(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                pixel_values=(shown - mean) / std,
            )
        image, text = (
            x / x.norm(dim=-1, keepdim=True) for x in (out.image_embeds, out.text_embeds)
        )
        return image @ text.T
