"""Tiny random text encoders with tokenizers of their own, as ``tests.zoo`` has language models."""

from pathlib import Path
from typing import Any

import torch

TEXT = (
    "a the red blue green cat dog bus boat house on by and of with near pool table hot black white "
    "small big star fish sea shore foot ball rain bow sun flower"
)
WORDS = TEXT.split()


def tiny_encoder(kind: str, seed: int = 0, d_vocab: int = 101) -> Any:
    """A CLIPTextModel or T5EncoderModel of two layers with large random weights, in eval mode."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "t5":
            config = transformers.T5Config(
                vocab_size=d_vocab,
                d_model=32,
                d_kv=6,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                initializer_factor=3.0,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
            return transformers.T5EncoderModel(config).eval()
        return transformers.CLIPTextModel(clip_text_config(d_vocab)).eval()


def clip_text_config(d_vocab: int = 101) -> Any:
    """The text tower's config: special tokens 0 (BOS) and 1 (EOS and pad)."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=d_vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=16,
        initializer_factor=5.0,
    )


def tiny_clip() -> Any:
    """A CLIPModel with that text tower and one block for images of 8 x 8, in eval mode."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = CLIPConfig(
        text_config=clip_text_config().to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPModel(config).eval()


def tiny_tokenizer(kind: str) -> Any:
    """A tokenizer of whole words (two-piece compounds like "starfish"), as CLIP's or T5's ends.

    CLIP: ``<bos> text <eos>``, pads are ``<eos>``. T5: ``text <eos>``, pads are ``<pad>``.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    first = ["<bos>", "<eos>"] if kind == "clip" else ["<pad>", "<eos>"]
    names = [*first, "<unk>", *WORDS, *(f"##{word}" for word in WORDS)]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<bos> $A <eos>" if kind == "clip" else "$A <eos>"
    special = [(name, vocabulary[name]) for name in ("<bos>", "<eos>") if name in vocabulary]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    pad = "<eos>" if kind == "clip" else "<pad>"
    bos = {"bos_token": "<bos>"} if kind == "clip" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token=pad, unk_token="<unk>", **bos
    )


def save_encoder(kind: str, folder: Path) -> Path:
    """Write encoder and tokenizer as a folder that ``wb.load`` reads."""
    tokenizer = tiny_tokenizer(kind)
    tiny_encoder(kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
