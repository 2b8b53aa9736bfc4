"""Which tokens of a prompt reach the image that a text-to-image pipeline draws.

The prompt's encoding is patched position by position with the empty prompt's and drawn, always from
the same noise:

    h'_i = h_i if i in S else p_i

for S = everything, the prompt's tokens, the pads behind them, each item, each item token alone, and
once for each item with its uncontextualised encoding in its place (the repair). A judge compares every
image with the items' texts; a token is representative when its image scores at least tau times what
the whole item's does and no other item scores higher. Without a judge, ``change`` says how far the image
is from the empty prompt's.

The judge is any function of images [image 3 height width] and texts that returns [image text], such
as ``workbench.models.diffusion.ClipJudge``; the paper has a large vision-language model answer yes or
no. An optional extra: the pipeline needs diffusers.

Paper: Kaplan et al. 2025, arXiv:2504.01137, sections 3 and 4. Card: information_flow section 2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.information_flow_items import Padding, find_items
from probes.information_flow_tokens import representative_tokens
from workbench.models.diffusion import Drawing, TextToImage

Judge = Callable[[Any, list[str]], Any]
"""(images [image 3 height width], texts) -> scores [image text]."""


@dataclass(frozen=True)
class ImageFlow:
    """What the images of one prompt's keep-sets show."""

    names: tuple[str, ...]
    """Of the keep-sets: full, tokens, pads, ``item 0``, ..., ``token 3``, ..., ``repaired 0``, ..."""
    score: Float[Tensor, "keep_set item"]
    """The judge's score of each image for each item's text."""
    change: Float[Tensor, " keep_set"]
    """Root mean square difference of the image from the empty prompt's, values in [0, 1]."""
    representative: Bool[Tensor, " pos"]
    """Tokens whose image alone shows their item; False outside items."""
    images: Float[Tensor, "keep_set 3 height width"]

    def of(self, name: str) -> Float[Tensor, " item"]:
        """Scores of one keep-set by its name."""
        return self.score[self.names.index(name)]


def measure_images(
    pipeline: TextToImage,
    row: Mapping[str, Any],
    judge: Judge,
    *,
    tau: float = 0.8,
    drawing: Drawing | None = None,
) -> ImageFlow:
    """Draw and judge the keep-sets of one prompt.

    Args:
        pipeline: Draws images from encodings.
        row: The prompt as ``text``, and ``items``, texts that occur in it, in order.
        judge: Scores images against the items' texts.
        tau: See the module's docstring.
        drawing: Steps, guidance, size, seed and batch.

    Raises:
        DataError: An item that is not in the prompt, or a prompt that is too long.
    """
    drawing = drawing or Drawing()
    text, items = str(row["text"]), [str(item) for item in row["items"]]
    tokens = pipeline.tokens(text)
    length = torch.tensor([len(pipeline.tokenizer(text)["input_ids"])])
    of_pos = find_items([row], tokens[None], length, pipeline.tokenizer).of_pos[0]
    full, empty = pipeline.encode(text), pipeline.encode("")
    keep = keep_sets(of_pos, int(length), len(items))
    encodings = [torch.where(kept[:, None], full, empty) for kept in keep.values()]
    names = list(keep)
    for item in range(len(items)):
        clean = _alone(pipeline, tokens, of_pos == item)
        encodings.append(torch.where((of_pos == item)[:, None], clean, full))
        names.append(f"repaired {item}")
    drawn = pipeline.draw(torch.stack([*encodings, empty]), drawing)
    images, nothing = drawn[:-1], drawn[-1]
    score = torch.as_tensor(judge(images, items)).float()
    change = (images - nothing).flatten(1).pow(2).mean(dim=1).sqrt()
    representative = _representative(tuple(names), score, of_pos, tau)
    return ImageFlow(tuple(names), score, change, representative, images)


def keep_sets(of_pos: Tensor, length: int, n_items: int) -> dict[str, Bool[Tensor, " pos"]]:
    """The keep-sets by name; ``tokens`` and ``pads`` divide the positions between them."""
    position = torch.arange(len(of_pos))
    sets = {
        "full": position >= 0,
        "tokens": position < length,
        "pads": position >= length,
    }
    sets |= {f"item {item}": of_pos == item for item in range(n_items)}
    sets |= {f"token {pos}": position == pos for pos in (of_pos >= 0).nonzero()[:, 0].tolist()}
    return sets


def _alone(pipeline: TextToImage, tokens: Tensor, own: Tensor) -> Float[Tensor, "pos d_model"]:
    """The uncontextualised encoding: the item at its own positions among pads."""
    padding = Padding.of(pipeline.tokenizer, None, int(tokens.max()) + 1)
    return pipeline.encode_tokens(padding.alone(tokens[None], own[None])[0])


def _representative(
    names: tuple[str, ...], score: Tensor, of_pos: Tensor, tau: float
) -> Bool[Tensor, " pos"]:
    found = torch.zeros(len(of_pos), dtype=torch.bool)
    for pos in (of_pos >= 0).nonzero()[:, 0].tolist():
        item = int(of_pos[pos])
        single = score[names.index(f"token {pos}")]
        whole = score[names.index(f"item {item}"), item]
        others = torch.cat([single[:item], single[item + 1 :], torch.tensor([-torch.inf])])
        args = (single[item][None], whole[None], others.max()[None])
        found[pos] = representative_tokens(*args, tau)[0]
    return found
