"""What a language model is watched for while it trains: loss, sinks, succession.

val_loss     mean loss in nats on held-out natural text, position 0 excluded
sink_rate    share of (prompt, layer, head) with alpha_0 > 0.3 on 64 tokens of that text, where
alpha_0 = 1/T * sum over q of A[q, 0]
succession   of the best head, share of pairs (item, next item) for which the effective OV
circuit MLP0(ln_2(W_E)) W_V W_O W_U ranks the next item first among the targets
of its task (Gould et al. 2023, "Successor Heads", arXiv:2312.09230)
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toy_tasks.language_series import CYCLIC, SERIES
from workbench.errors import DataError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast


def held_out_rows(
    tokens: Int[Tensor, " held_out"], bos: int, n_rows: int, n_pos: int
) -> Int[Tensor, "row pos"]:
    """Return evenly spread windows of held-out text, BOS first.

    Raises:
        DataError: Less text than one window.
    """
    if len(tokens) < n_pos:
        raise DataError(
            f"held-out text must have {n_pos} tokens; got {len(tokens)}. Give more text."
        )
    starts = torch.linspace(0, len(tokens) - n_pos + 1, n_rows).long().tolist()
    windows = torch.stack([tokens[start : start + n_pos - 1] for start in starts])
    return torch.cat([torch.full((n_rows, 1), bos), windows], dim=1)


def language_loss(model: "GPT2LMHeadModel", tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Return the mean loss, in nats, of predicting positions 1, 2, ..."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def first_token_attention(
    model: "GPT2LMHeadModel", tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch layer head"]:
    """Return alpha_0, the mean attention that position 0 receives from all positions."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # sdpa never forms the patterns
    patterns = model(tokens, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack([pattern[..., 0].mean(dim=-1) for pattern in patterns], dim=1)


def series_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[str, list[int]]:
    """Return the token of every item, written after a space.

    Raises:
        DataError: An item is several tokens.
    """
    encoded = {
        name: [tokenizer(f" {item}", add_special_tokens=False).input_ids for item in items]
        for name, items in SERIES.items()
    }
    split = [
        SERIES[name][row]
        for name, rows in encoded.items()
        for row, ids in enumerate(rows)
        if len(ids) != 1
    ]
    if split:
        raise DataError(
            f"every item must be one token; {split[0]!r} is not. Raise d_vocab or give more text."
        )
    return {name: [ids[0] for ids in rows] for name, rows in encoded.items()}


@torch.no_grad()
def succession_score(
    model: "GPT2LMHeadModel", series: dict[str, list[int]]
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "task layer head"]]:
    """Return the share of pairs each head's effective OV circuit gets right, pooled and by task."""
    block, W_E = model.transformer.h[0], model.transformer.wte.weight
    right, n_pairs = [], []
    for name, ids in series.items():
        sources, targets = (ids, ids[1:] + ids[:1]) if name in CYCLIC else (ids[:-1], ids[1:])
        resid = block.mlp(block.ln_2(W_E[sources]))
        logits = torch.einsum(
            "sd,lhde,te->lhst", resid, ov_circuits(model), model.lm_head.weight[targets]
        )
        right.append((logits.argmax(dim=-1) == torch.arange(len(targets))).sum(dim=-1))
        n_pairs.append(len(sources))
    hits = torch.stack(right).float()
    return hits.sum(dim=0) / sum(n_pairs), hits / torch.tensor(n_pairs)[:, None, None]


def ov_circuits(model: "GPT2LMHeadModel") -> Float[Tensor, "layer head d_model d_model"]:
    """Return the map W_V W_O of every head, rows in and columns out."""
    n_heads, d_model = model.config.n_head, model.config.n_embd
    circuits = []
    for block in model.transformer.h:
        W_V = block.attn.c_attn.weight[:, 2 * d_model :].unflatten(1, (n_heads, -1))
        W_O = block.attn.c_proj.weight.unflatten(0, (n_heads, -1))
        circuits.append(torch.einsum("dhk,hke->hde", W_V, W_O))
    return torch.stack(circuits)


@torch.no_grad()
def measured_figures(
    model: "GPT2LMHeadModel", rows: Int[Tensor, "row pos"], series: dict[str, list[int]]
) -> dict[str, float]:
    """Return what is noted at every checkpoint."""
    model.eval()
    pooled, by_task = succession_score(model, series)
    best = int(pooled.argmax())
    figures = {
        "val_loss": language_loss(model, rows).item(),
        "sink_rate": (first_token_attention(model, rows[:, :64]) > 0.3).float().mean().item(),
        "succession": pooled.max().item(),
        "succession_layer": float(best // pooled.shape[1]),
        "succession_head": float(best % pooled.shape[1]),
        "succession_by_task": by_task.flatten(1)[:, best].mean().item(),
    }
    model.train()
    return figures
