"""States and targets of the reachability probe, from rows or plain text.

A problem is a state x_0 and a target token y. The model reads BOS, the control u and the state:

    input = BOS + u + x_0,    success: argmax P(. | input) = y

Rows name state and target. From plain text a state is the beginning of each prompt, 8 to 32 tokens
long, and its ground truth is the token that follows there. Other targets belong to a state alone: the
model's 75 best, or tokens drawn uniformly from the vocabulary (uniform in rank is the same).

Paper: Bhargava et al. 2023, arXiv:2310.04444, section 5. Their release concatenates ids as they are;
here BOS, where the prompt has one, stays first.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from probes.reachability_results import ReachabilityConfig
from workbench.context import Context
from workbench.errors import ConfigError, DataError
from workbench.models.base import ModelAdapter, ModelSpec


@dataclass(frozen=True, eq=False)
class State:
    """What the control is put before."""

    bos: Int[Tensor, " n_bos"]
    """One id or none."""
    tokens: Int[Tensor, " pos"]
    index: int

    def rows(self, controls: Int[Tensor, "n k"]) -> Int[Tensor, "n row_pos"]:
        """What the model reads: BOS, each control, the state."""
        n = len(controls)
        return torch.cat([self.bos.expand(n, -1), controls, self.tokens.expand(n, -1)], dim=1)


@dataclass(frozen=True, eq=False)
class Problem:
    """One pair of a state and a target."""

    state: State
    target: int
    index: int

    def generator(self, seed: int, k: int) -> torch.Generator:
        """Random numbers that depend on the pair itself, not on its place among the others."""
        ids = [self.state.bos.tolist(), self.state.tokens.tolist(), self.target, seed, k]
        digest = hashlib.sha256(repr(ids).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def read_states(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: ReachabilityConfig,
    context: Context,
) -> tuple[list[State], list[int], list[int | None]]:
    """The states, each once; the state of each prompt; its ground truth (None: not known).

    Raises:
        DataError: A prompt too short to cut a state from, or too long to put a control before.
    """
    generator, known = context.generator(), _bos_id(model, config)
    states: dict[tuple[int, ...], State] = {}
    which, truths = [], []
    for index, prompt in enumerate(_prompts(tokens, context)):
        n_bos = int(len(prompt) > 0 and known is not None and int(prompt[0]) == known)
        bos, body = prompt[:n_bos], prompt[n_bos:]
        truth = None
        row = context.rows[index] if context.rows else {}
        if "state" in row:
            truth = _row_target(row, model, index)
            if not len(body):
                raise DataError(
                    f"a state must have at least one token besides BOS; that of row {index} has none"
                )
        else:
            body, truth = _cut(body, index, config, generator)
        _check_room(model.spec, n_bos + len(body), index, config)
        key = (n_bos, *body.tolist())
        states.setdefault(key, State(bos, body, len(states)))
        which.append(states[key].index)
        truths.append(truth)
    return list(states.values()), which, truths


def ground_truth_pairs(
    spec: ModelSpec, which: list[int], truths: list[int | None]
) -> list[tuple[int, int]]:
    """(state, target) of every prompt, in order.

    Raises:
        DataError: A row without a target, or one outside the vocabulary.
    """
    pairs = []
    for index, (state, target) in enumerate(zip(which, truths, strict=True)):
        if target is None:
            raise DataError(
                f"targets=ground-truth needs a target in every row; row {index} has a state only; add "
                "target, or set targets=top-75 or targets=uniform"
            )
        if not 0 <= target < spec.d_vocab:
            raise DataError(
                f"target must lie in 0 to {spec.d_vocab - 1}, the vocabulary of {spec.name}; that of "
                f"row {index} is {target}; use this model's tokenizer"
            )
        pairs.append((state, target))
    return pairs


def uniform_pairs(
    n_states: int, n_tokens: int, config: ReachabilityConfig, context: Context
) -> Any:
    """(state, target) with targets drawn without repetition from the tokens that have text.

    Raises:
        ConfigError: More targets than tokens.
    """
    generator = context.generator()
    n_targets = config.targets_per_state
    if n_targets > n_tokens:
        raise ConfigError(
            f"targets_per_state must be at most {n_tokens}, the tokens of this model; got {n_targets}"
        )
    return [
        (state, int(target))
        for state in range(n_states)
        for target in torch.randperm(n_tokens, generator=generator)[:n_targets]
    ]


def n_usable_tokens(model: ModelAdapter) -> int:
    """Ids that have a text: embeddings may be padded beyond the tokenizer's vocabulary."""
    known = model.spec.d_vocab if model.tokenizer is None else len(model.tokenizer)
    return min(model.spec.d_vocab, known)


def _bos_id(model: ModelAdapter, config: ReachabilityConfig) -> int | None:
    if config.bos_id is not None:
        return config.bos_id
    found: int | None = getattr(model.tokenizer, "bos_token_id", None)
    return found


def _prompts(tokens: Int[Tensor, "batch pos"], context: Context) -> list[Tensor]:
    mask = context.attention_mask
    if mask is None:
        return list(tokens)
    return [row[kept.bool()] for row, kept in zip(tokens, mask, strict=True)]


def _row_target(row: dict[str, Any], model: ModelAdapter, index: int) -> int | None:
    target = row.get("target")
    if target is None or (isinstance(target, int) and not isinstance(target, bool)):
        return target
    if not isinstance(target, str):
        raise DataError(
            f"target must be a text of one token or an id; row {index} has {type(target).__name__}"
        )
    if model.tokenizer is None:
        raise DataError(
            f"{model.spec.name} has no tokenizer, so targets must be ids; row {index} has {target!r}"
        )
    ids = model.tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise DataError(
            f"target must be one token; {target!r} in row {index} is {len(ids)} ({ids}); choose another "
            "or give the id (a space in front often belongs to the token)"
        )
    return int(ids[0])


def _cut(
    body: Int[Tensor, " pos"], index: int, config: ReachabilityConfig, generator: torch.Generator
) -> tuple[Tensor, int | None]:
    """The beginning of a prompt as a state, and the token after it."""
    after = int(config.targets == "ground-truth")
    longest = min(config.state_max, len(body) - after)
    if longest < config.state_min:
        raise DataError(
            f"a prompt must have at least {config.state_min + after} tokens without BOS to cut a state "
            f"from it; prompt {index} has {len(body)}; leave it out (--n-pos does) or lower state_min"
        )
    length = int(torch.randint(config.state_min, longest + 1, (1,), generator=generator))
    return body[:length], int(body[length]) if after else None


def _check_room(spec: ModelSpec, length: int, index: int, config: ReachabilityConfig) -> None:
    if length + config.k_max > spec.n_ctx:
        raise DataError(
            f"BOS, control and state must fit in n_ctx = {spec.n_ctx} of {spec.name}; the state of prompt "
            f"{index} has {length} tokens with its BOS and the control up to {config.k_max}; shorten "
            "the state or lower k_max"
        )
