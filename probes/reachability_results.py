"""Settings and result of the reachability probe."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import ConfigError
from workbench.settings import check_settings, setting

METHODS = ("back-off", "greedy", "gradient", "brute-force")
TARGETS = ("ground-truth", "top-75", "uniform")
GREEDY_UNTIL = 3
"""Back-off: the longest control that greedy back-generation looks for."""


@dataclass(frozen=True)
class ReachabilityConfig:
    """Defaults are the paper's."""

    k_max: int = setting(10, "the longest control that is looked for", low=1, unit="tokens")
    method: str = setting(
        "back-off",
        "greedy back-generation to k = 3, gradient search beyond; or one of the two alone; or all "
        "controls (tiny vocabularies)",
        choices=METHODS,
    )
    candidates: int = setting(
        128, "gradient search: tokens a position with the best gradient", low=1, unit="tokens"
    )
    iterations: int = setting(34, "gradient search: steps for each length of control", low=1)
    batch: int = setting(
        768, "gradient search: proposals a step, each with one token changed", low=1
    )
    targets: str = setting(
        "ground-truth",
        "the text's next token; the model's 75 best; or uniform over the vocabulary",
        choices=TARGETS,
    )
    targets_per_state: int = setting(1, "targets=uniform: how many for each state", low=1)
    state_min: int = setting(8, "plain text: the shortest state", low=1, unit="tokens")
    state_max: int = setting(32, "plain text: the longest state", low=1, unit="tokens")
    shortlist: int | None = setting(
        None,
        "greedy: only so many tokens with the best gradient are tried; none: the whole vocabulary",
        low=1,
        unit="tokens",
    )
    bos_id: int | None = setting(
        None, "id of BOS where the model has no tokenizer to say so; controls come after it", low=0
    )
    memory_mb: int = setting(
        128, "budget of one forward pass; the number of rows follows from it", low=1, unit="MB"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.state_max < self.state_min:
            raise ConfigError(
                f"state_max must be at least state_min = {self.state_min}; got {self.state_max}"
            )

    def stages(self) -> tuple[tuple[int, str], ...]:
        """The lengths that are tried, in order, each with its search.

        Back-off: 1, 2, 3 greedily, then 4, 6, 8, ... by gradient; ``k_max`` is always among them.
        """
        if self.method in ("greedy", "brute-force"):
            return tuple((k, self.method) for k in range(1, self.k_max + 1))
        beyond = {*range(GREEDY_UNTIL + 1, self.k_max + 1, 2), self.k_max} - {1, 2, GREEDY_UNTIL}
        first = "greedy" if self.method == "back-off" else "gradient"
        short = [(k, first) for k in range(1, min(GREEDY_UNTIL, self.k_max) + 1)]
        return (*short, *((k, "gradient") for k in sorted(beyond)))

    def needs_gradients(self) -> bool:
        """Whether any stage differentiates the model."""
        return self.shortlist is not None or any(how == "gradient" for _, how in self.stages())


@dataclass(frozen=True)
class ReachabilityResult:
    """What was reached, with which control, and what the bound says."""

    k: Int[Tensor, " pair"]
    """Length of the shortest control found; 0: the target is the argmax already; -1: none found."""
    prompts: Int[Tensor, "pair k_max"]
    """The control's ids in order, between BOS and state; -1 past its end and where none was found."""
    epsilon: Float[Tensor, " length"]
    """Share of pairs not reached by a control of at most 0, 1, ..., k_max tokens."""
    epsilon_low: Float[Tensor, " length"]
    """Lower end of the 95 % interval, states resampled."""
    epsilon_high: Float[Tensor, " length"]
    """Upper end."""
    bound_excluded: Bool[Tensor, " pair"]
    """Proved: no control of at most k_max tokens makes the target the argmax."""
    target_id: Int[Tensor, " pair"]
    state_index: Int[Tensor, " pair"]
    """Pairs with the same number have the same state."""
    state_length: Int[Tensor, " pair"]
    """Tokens of the state, without BOS."""
    base_rank: Int[Tensor, " pair"]
    """Tokens that score at least as high as the target without a control, the target left out."""
    base_loss: Float[Tensor, " pair"]
    """-ln P(target | state), nats."""
    best_loss: Float[Tensor, " pair"]
    """The same with the control that was found, else with the best that was seen."""
    reached_as_text: Bool[Tensor, " pair"]
    """The target is reached, too, when control and state are written out and read again."""
    head_orthogonal: Float[Tensor, "pair head"] | None = None
    """Layer 0: part of the head's output that the found control turned away from its own."""
    head_limit: Float[Tensor, "pair head"] | None = None
    """What that part cannot exceed with a control of that length."""
    head_min_k: Int[Tensor, "pair head"] | None = None
    """Fewest tokens before the head could write what it writes when it reads the target alone; -1:
    no number suffices."""
    config: ReachabilityConfig = field(default_factory=ReachabilityConfig)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """``state_text``, ``target_text``, ``prompt_text``: one a pair."""

    def reached(self) -> Bool[Tensor, " pair"]:
        """Whether a control (or none) was found."""
        return self.k >= 0

    def head_excluded(self) -> Bool[Tensor, "pair head"] | None:
        """Heads that cannot write the target's value with k_max tokens of control."""
        if self.head_min_k is None:
            return None
        return (self.head_min_k < 0) | (self.head_min_k > self.config.k_max)

    def metrics(self) -> dict[str, float]:
        """Shares of pairs; ``mean_k`` is over the reached and left out where none was."""
        reached = self.reached()
        found = {
            "reached": reached.float().mean().item(),
            "reached_base": (self.k == 0).float().mean().item(),
            "excluded_by_bound": self.bound_excluded.float().mean().item(),
            "n_pairs": float(len(self.k)),
            "n_states": float(len(self.state_index.unique())),
        }
        if bool(reached.any()):
            found["mean_k"] = self.k[reached].float().mean().item()
            found["reached_as_text"] = self.reached_as_text.float().mean().item()
        excluded = self.head_excluded()
        if excluded is not None:
            found["heads_excluded"] = excluded.float().mean().item()
        return found

    def table(self) -> dict[str, list[object]]:
        """One row a pair: what was steered, whereto, by which control."""
        n_pairs = len(self.k)
        columns: dict[str, list[object]] = {
            name.removesuffix("_text"): list(self.labels.get(name, ("",) * n_pairs))
            for name in ("prompt_text", "state_text", "target_text")
        }
        numbers = {
            "k": self.k,
            "rank_without": self.base_rank,
            "loss_without": self.base_loss,
            "loss_with": self.best_loss,
            "reached_as_text": self.reached_as_text,
            "excluded_by_bound": self.bound_excluded,
        }
        columns |= {name: values.tolist() for name, values in numbers.items()}
        columns["prompt_ids"] = [
            " ".join(str(token) for token in row if token >= 0) for row in self.prompts.tolist()
        ]
        return columns


def padded_prompts(prompts: list[Int[Tensor, " _"]], k_max: int) -> Int[Tensor, "pair k_max"]:
    """Controls side by side, -1 past their ends."""
    rows = torch.full((len(prompts), k_max), -1, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows
