"""The decoding path: context vectors of successive generated tokens.

c_T is the residual stream behind the final norm at the position that predicts token T. Proximity is
the correlation over the vocabulary of cos(c_T, W_U[:, t]) with log p(t); with the dot product in
place of the cosine it would be 1 in a model without output bias. Tokens are chosen greedily by
forward passes without a cache, so every backend can; the end of text does not stop them.

Paper: Singh 2023, arXiv:2308.10874. Card: embedding_walk section 3.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.token_dynamics_lens import KeepNormed
from probes.token_dynamics_walk import cosine, straightness, turning, valid_positions
from workbench.context import Batch, Context
from workbench.errors import DataError
from workbench.models.base import ModelAdapter

# Mathematics


def context_path(path: Float[Tensor, "new batch d_model"]) -> dict[str, Tensor]:
    """Lengths, angles and straightness of a path of context vectors."""
    return {
        "decoding_step": path.diff(dim=0).norm(dim=-1).T,
        "decoding_turning": turning(path),
        "decoding_straightness": straightness(path),
    }


def proximity(
    vector: Float[Tensor, "batch d_model"],
    log_p: Float[Tensor, "batch d_vocab"],
    unembedding: Float[Tensor, "d_model d_vocab"],
) -> Float[Tensor, " batch"]:
    """Correlation over the vocabulary of cos(c, W_U[:, t]) and log p(t)."""
    return correlation(vector @ unembedding / unembedding.norm(dim=0).clamp(min=1e-12), log_p)


def correlation(
    x: Float[Tensor, "row column"], y: Float[Tensor, "row column"]
) -> Float[Tensor, " row"]:
    """Pearson correlation of two rows."""
    return cosine(x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True))


# Measurement


def prompt_lengths(tokens: Int[Tensor, "batch pos"], context: Context) -> list[int]:
    """Real tokens of every prompt."""
    if context.attention_mask is None:
        return [tokens.shape[1]] * len(tokens)
    return [int(length) for length in context.attention_mask.sum(dim=1)]


def check_room(model: ModelAdapter, lengths: list[int], n_new: int) -> None:
    """Refuse prompts whose continuation does not fit.

    Raises:
        DataError: Prompt and generated tokens exceed the model's context.
    """
    if max(lengths) + n_new > model.spec.n_ctx:
        raise DataError(
            f"prompt and generated tokens must fit in n_ctx = {model.spec.n_ctx} of "
            f"{model.spec.name}; got {max(lengths)} + {n_new}; lower new_tokens (0: no decoding "
            "path) or use shorter prompts"
        )


def measure_decoding(
    model: ModelAdapter,
    batch: Batch,
    n_new: int,
    unembedding: Float[Tensor, "d_model d_vocab"],
) -> dict[str, Tensor]:
    """Continue every prompt greedily and follow its context vectors."""
    lengths = valid_positions(batch.tokens, batch.attention_mask).sum(dim=1)
    whole = torch.nn.functional.pad(batch.tokens, (0, n_new))
    path, near, chosen = [], [], []
    for step in range(n_new):
        vector, log_p = _predict(model, whole, lengths + step)
        token = log_p.argmax(dim=-1)
        whole[torch.arange(len(whole)), lengths + step] = token
        path.append(vector)
        near.append(proximity(vector, log_p, unembedding))
        chosen.append(cosine(vector, unembedding.T[token]))
    angles = {"proximity": torch.stack(near, dim=1), "chosen_cosine": torch.stack(chosen, dim=1)}
    return context_path(torch.stack(path)) | angles


def _predict(
    model: ModelAdapter, whole: Int[Tensor, "batch pos"], ends: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, "batch d_vocab"]]:
    """Context vector and log-probabilities behind the first ``ends`` tokens of each prompt."""
    tokens = whole[:, : int(ends.max())]
    real = torch.arange(tokens.shape[1]) < ends[:, None]
    normed = KeepNormed()
    with model.edit(normed):
        logits = model.logits(tokens, None if bool(real.all()) else real.long())
    rows = torch.arange(len(tokens))
    return normed.seen[-1][rows, ends - 1], logits[rows, ends - 1].log_softmax(dim=-1)
