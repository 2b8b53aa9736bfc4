"""Numbers of an evaluation: pure functions of scores and answers.

Reported accuracy hides three things (card zerotuning section 6): answers that cannot be read count as
wrong, so a change of format looks like a change of knowledge. Hence ``accuracy`` of what was generated
never stands without ``invalid_rate`` and without ``label_accuracy``, the argmax over the labels alone.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
N_BINS = 10
N_RESAMPLES = 2000


@dataclass(frozen=True)
class Scored:
    """What one model said to every question."""

    scores: tuple[tuple[float, ...], ...]
    """Log-probability of each label, by question."""
    answers: tuple[int, ...]
    parsed: tuple[int, ...]
    """The label that was generated, by question; -1: it could not be read."""
    entropy: tuple[float, ...]
    """Of the next token where the answer begins, in nats."""

    @property
    def correct(self) -> Numbers:
        """1 where the generated answer is right."""
        return np.array([a == b for a, b in zip(self.parsed, self.answers, strict=True)], float)

    @property
    def label_correct(self) -> Numbers:
        """1 where the right label has the largest score; a tie is wrong."""
        return (self.margins > 0).astype(float)

    @property
    def margins(self) -> Numbers:
        """Score of the right label over the best of the others, in nats."""
        pairs = zip(self.scores, self.answers, strict=True)
        return np.array([_margin(scores, answer) for scores, answer in pairs])

    def metrics(self) -> dict[str, float]:
        """The headline numbers."""
        return {
            "accuracy": float(self.correct.mean()),
            "label_accuracy": float(self.label_correct.mean()),
            "invalid_rate": float(np.mean([label < 0 for label in self.parsed])),
            "margin": float(self.margins.mean()),
            "calibration_error": calibration_error(self),
            "entropy": float(np.mean(self.entropy)),
            "n": len(self.answers),
        }


def _margin(scores: tuple[float, ...], answer: int) -> float:
    return scores[answer] - max(score for index, score in enumerate(scores) if index != answer)


def calibration_error(scored: Scored) -> float:
    """Expected calibration error of the softmax over labels, in ``N_BINS`` equal bins.

    The mean over questions of |confidence - accuracy| of their bin (Guo et al. 2017, section 3).
    """
    confidence, right = [], []
    for scores, answer in zip(scored.scores, scored.answers, strict=True):
        weights = np.exp(np.array(scores) - max(scores))
        confidence.append(weights.max() / weights.sum())
        right.append(int(weights.argmax()) == answer)
    bins = np.minimum((np.array(confidence) * N_BINS).astype(int), N_BINS - 1)
    gap = 0.0
    for index in np.unique(bins):
        inside = bins == index
        gap += inside.mean() * abs(
            np.mean(np.array(confidence)[inside]) - np.mean(np.array(right)[inside])
        )
    return float(gap)


@dataclass(frozen=True)
class Difference:
    """A change between two models on the same questions."""

    value: float
    low: float
    high: float
    """95 % interval of a bootstrap over questions."""
    p: float
    """Two-sided exact McNemar test (a sign test, of margins): as many gained as lost."""
    gained: int
    lost: int


def difference(before: Numbers, after: Numbers, seed: int = 0) -> Difference:
    """Compare two models question by question: right (1) and wrong (0), or margins."""
    change = after - before
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(change), (N_RESAMPLES, len(change)))
    low, high = np.quantile(change[picks].mean(axis=1), [0.025, 0.975])
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return Difference(
        float(change.mean()), float(low), float(high), mcnemar(gained, lost), gained, lost
    )


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test; 1 when nothing changed."""
    from scipy.stats import binomtest

    if gained + lost == 0:
        return 1.0
    return float(binomtest(gained, gained + lost, 0.5).pvalue)
