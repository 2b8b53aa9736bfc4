"""Controls, states and targets as text, and whether the text does what the ids do."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probes.reachability_problems import Problem
from workbench.models.base import ModelAdapter


def describe_pairs(
    model: ModelAdapter, problems: Sequence[Problem], prompts: Sequence[Int[Tensor, " _"]]
) -> dict[str, tuple[str, ...]]:
    """Text of every pair; ids in brackets where the model has no tokenizer."""
    return {
        "state_text": tuple(_text(model, problem.state.tokens.tolist()) for problem in problems),
        "target_text": tuple(_text(model, [problem.target]) for problem in problems),
        "prompt_text": tuple(_text(model, prompt.tolist()) for prompt in prompts),
    }


def _text(model: ModelAdapter, ids: list[int]) -> str:
    if model.tokenizer is None:
        return " ".join(f"[{token}]" for token in ids)
    return str(model.tokenizer.decode(ids))


def reached_as_text(
    model: ModelAdapter,
    problems: Sequence[Problem],
    k: Int[Tensor, " pair"],
    prompts: Sequence[Int[Tensor, " _"]],
) -> Bool[Tensor, " pair"]:
    """Whether the target is still reached when control and state are written out and read again.

    Searches work on ids, and most strings of ids are not what a tokenizer makes of their text. Without
    a tokenizer there is no text, so ids count.
    """
    reached = k >= 0
    if model.tokenizer is None:
        return reached
    again = reached.clone()
    for i in reached.nonzero().flatten().tolist():
        problem, prompt = problems[i], prompts[i]
        ids = torch.cat([prompt, problem.state.tokens]).tolist()
        read = model.tokenizer(model.tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
        if read != ids:
            again[i] = _wins(model, problem, read)
    return again


def _wins(model: ModelAdapter, problem: Problem, ids: list[int]) -> bool:
    row = torch.cat([problem.state.bos, torch.tensor(ids, dtype=torch.long)])[None]
    if not ids or row.shape[1] > model.spec.n_ctx:
        return False
    return int(model.logits(row, last=1)[0, -1].argmax()) == problem.target
