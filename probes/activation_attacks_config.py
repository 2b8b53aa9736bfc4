"""Settings of the activation-attacks probe."""

from dataclasses import dataclass

from probes.activation_attacks_optimise import Descent
from workbench.errors import ConfigError
from workbench.settings import check_settings, setting


@dataclass(frozen=True)
class ActivationAttackConfig:
    """Defaults are the paper's as far as they are known; its context is longer."""

    n_attacked: tuple[int, ...] = setting((1, 2, 4, 8), "how many positions are attacked, each a")
    layer: int = setting(0, "the block whose input is perturbed, counted from 0", low=0)
    steps: int = setting(300, "steps of Adam at most, on each problem", low=1)
    lr: float = setting(0.1, "step size of Adam", low=0.0, exclusive=True)
    n_seeds: int = setting(4, "pairs of context and target, the same for all a and t", low=1)
    context: int = setting(64, "length of the context", low=2, unit="tokens")
    t_limit: int | None = setting(
        None,
        "the longest target; none: what n_ctx leaves, at most 1000",
        low=1,
        unit="tokens",
    )
    definition: str = setting(
        "per-token",
        "success is the share of target tokens that are forced, or 1 only when all are",
        choices=("per-token", "all-correct"),
    )
    bits: int = setting(16, "p in chi: bits counted for each number of an activation", low=1)
    positions: str = setting(
        "first",
        "which positions are attacked: first, last, random, or a list of which the first a are used",
    )
    dimensions: tuple[int, ...] = setting(
        (), "the dimensions that may be perturbed, a list; none: all"
    )
    fractions: tuple[float, ...] = setting(
        (), "sweep: shares of the dimensions, a fixed random choice each, at the largest a"
    )
    norm: str = setting("l2", "what bound is about, at each position", choices=("l2", "linf"))
    bound: float | None = setting(
        None, "the largest norm of a perturbation; none: unbounded", low=0.0, exclusive=True
    )
    margin: float = setting(
        0.001,
        "a forced token's logit lies above all others by more than this",
        low=0.0,
        unit="nats",
    )
    targets: str = setting(
        "random",
        "uniform token ids, or what follows the context in the prompts",
        choices=("random", "text"),
    )
    distinct: float = setting(
        0.1,
        "random targets are tokens whose unembedding is farther from every other than this share of "
        "its norm: tokens that training never met cannot be told apart",
        low=0.0,
        high=1.0,
    )
    resolution: float = setting(
        0.05, "bisection of t ends at this share of t, or at 1 token", low=0.0, high=1.0
    )
    token_attack: bool = setting(True, "also attack by replacing the a tokens")
    shortlist: int | None = setting(
        None,
        "tokens tried at each place, chosen by the gradient; none: all of the vocabulary",
        low=1,
    )
    token_limit: int = setting(8, "the longest target of the token attack", low=1, unit="tokens")
    check_generation: bool = setting(
        True, "compare every outcome with greedy generation under the perturbation"
    )
    memory_mb: int = setting(1024, "working memory that the batches may take", low=1, unit="MB")

    def __post_init__(self) -> None:
        check_settings(self)
        _check_counts(self)
        for share in self.fractions:
            if not 0.0 < share <= 1.0:
                raise ConfigError(f"fractions must lie in (0, 1]; got {share}; use e.g. 0.5,1")
        if len(set(self.dimensions)) != len(self.dimensions) or min((0, *self.dimensions)) < 0:
            raise ConfigError(
                f"dimensions must be different and at least 0; got {self.dimensions}; list each once"
            )
        self.listed_positions()

    @property
    def descent(self) -> Descent:
        """The search; it stops at twice the margin that is asked, so that rounding undoes none."""
        return Descent(self.lr, self.steps, 2 * self.margin, self.norm, self.bound)

    def listed_positions(self) -> tuple[int, ...] | None:
        """The positions of a list; None for first, last and random.

        Raises:
            ConfigError: Neither a word nor a list, or a list that is too short or goes too far.
        """
        if self.positions in ("first", "last", "random"):
            return None
        try:
            listed = tuple(int(part) for part in self.positions.split(","))
        except ValueError:
            raise ConfigError(
                "positions must be first, last, random or a list of positions; got "
                f"{self.positions!r}; use e.g. positions=0,5,9"
            ) from None
        right = len(set(listed)) == len(listed) and min(listed) >= 0 and max(listed) < self.context
        if not right or len(listed) < max(self.n_attacked):
            raise ConfigError(
                f"positions must be {max(self.n_attacked)} different positions of the context, 0 ... "
                f"{self.context - 1}; got {self.positions}; list as many as the largest n_attacked"
            )
        return listed


def _check_counts(config: ActivationAttackConfig) -> None:
    counts = config.n_attacked
    if not counts or min(counts) < 1 or list(counts) != sorted(set(counts)):
        raise ConfigError(
            f"n_attacked must be ascending numbers of at least 1; got {counts}; use e.g. 1,2,4"
        )
    if max(counts) > config.context:
        raise ConfigError(
            f"n_attacked must be at most the context, {config.context} tokens; got {max(counts)}; "
            "attack fewer positions or set a longer context"
        )
