"""One attention layer and a decoder, as pairwise logits: loss, gradient and update in closed form.

Z[m, l] is how much query m attends to token l, Y[l, n] how much token l speaks for next token n;
both are free matrices. With N[l] the count of token l in a sequence of query m and next token n,

    a[l] = N[l] exp(Z[m, l]) / sum over l' of the same     attention, the query not among its keys
    f = a / |a|                                            normalised
    alpha = softmax(Y^T f),  loss = -ln alpha[n]

and with e_n one-hot the gradients of -loss are

    dY = f (e_n - alpha)^T
    dZ[m, l] = a[l] / |a| * (g[l] - f[l] sum over l' of f[l'] g[l']),   g = Y (e_n - alpha)

because X^T diag(b) X of the paper is diag(a) when positions with the same token have the same
weight b. That costs O(batch x token) for attention, where one-hot sequences cost
O(batch x pos x token^2). Rows of dY and dZ sum to 0. The first axis is that of runs: each has its
own weights and learning rates.

Paper: Tian et al. 2023, "Scan and Snap", arXiv:2305.16380.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from toy_tasks.scan_snap_data import Batch, ClassLaw, ScanSnapConfig
from toy_tasks.training import batch_generator

INIT_STREAM = 1_000_000_006
"""The step whose randomness makes the first weights; no run has so many steps."""
ADAM_BETA2, ADAM_EPSILON = 0.999, 1e-8
"""Those of torch; the paper does not name its own."""


class Weights(NamedTuple):
    """The two matrices, or their gradients, or their momentum."""

    Y: Float[Tensor, "run token next"]
    Z: Float[Tensor, "run query token"]


class Attended(NamedTuple):
    """What one forward pass knows."""

    a: Float[Tensor, "run batch token"]
    f: Float[Tensor, "run batch token"]
    log_alpha: Float[Tensor, "run batch next"]


def first_weights(config: ScanSnapConfig, seed: int, dtype: torch.dtype) -> Weights:
    """Make the weights of one run, drawn in float64 so that ``dtype`` does not change the draw."""
    shapes = ((1, config.n_tokens, config.n_tokens), (1, config.n_queries, config.n_tokens))
    generator = batch_generator(seed, INIT_STREAM)
    drawn = []
    for shape in shapes:
        matrix = torch.zeros(shape, dtype=torch.float64)
        bound = config.n_tokens**-0.5
        if config.init == "uniform":
            matrix.uniform_(-bound, bound, generator=generator)
        elif config.init == "normal":
            matrix.normal_(0.0, bound / 3**0.5, generator=generator)
        drawn.append(matrix.to(dtype))
    return Weights(*drawn)


def attention(
    z: Float[Tensor, "... token"], frequency: Float[Tensor, "... token"]
) -> Float[Tensor, "... token"]:
    """Share of attention by token, where ``frequency`` is a count or a probability."""
    # ln 0 = -inf takes absent tokens out, also when their z is the largest.
    return (z + frequency.log()).softmax(dim=-1)


def forward(weights: Weights, batch: Batch) -> Attended:
    """Attend, normalise, decode."""
    z = weights.Z.gather(1, batch.query[..., None].expand(-1, -1, weights.Z.shape[2]))
    a = attention(z, batch.counts)
    f = a / a.norm(dim=-1, keepdim=True)
    return Attended(a, f, (f @ weights.Y).log_softmax(dim=-1))


def mean_loss(attended: Attended, batch: Batch) -> Float[Tensor, " run"]:
    """Mean cross-entropy of each run, in nats."""
    return -attended.log_alpha.gather(2, batch.target[..., None]).mean(dim=(1, 2))


def ascent(weights: Weights, batch: Batch, attended: Attended) -> Weights:
    """Gradients of minus the mean loss; see the module's docstring."""
    a, f, log_alpha = attended
    batch_size = batch.query.shape[1]
    error = -log_alpha.exp()
    error.scatter_add_(2, batch.target[..., None], torch.ones_like(error[..., :1]))
    g = error @ weights.Y.mT
    by_row = a / a.norm(dim=-1, keepdim=True) * (g - f * (f * g).sum(dim=-1, keepdim=True))
    is_query = torch.nn.functional.one_hot(batch.query, weights.Z.shape[1]).to(f.dtype)
    return Weights(f.mT @ error / batch_size, is_query.mT @ by_row / batch_size)


class Moments(NamedTuple):
    """What the method of ascent remembers of the gradients before."""

    first: Weights
    """The velocity of sgd; the mean of adam."""
    second: Weights | None
    """The mean of squares of adam."""


@dataclass(frozen=True)
class Ascent:
    """How gradients change weights: torch's own SGD with momentum, or Adam."""

    optimizer: str
    rates: tuple[Float[Tensor, " run"], Float[Tensor, " run"]]
    """Of Y and of Z."""
    momentum: float
    """Beta1, for adam."""

    def start(self, weights: Weights) -> Moments:
        """Remember nothing."""
        zeros = [Weights(*(torch.zeros_like(weight) for weight in weights)) for _ in range(2)]
        return Moments(zeros[0], zeros[1] if self.optimizer == "adam" else None)

    def step(self, weights: Weights, moments: Moments, gradient: Weights, done: int) -> None:
        """Make one step in place, after ``done`` others."""
        if moments.second is None:
            update(weights, moments.first, gradient, self.rates, self.momentum)
            return
        first, second = moments.first, moments.second
        rows = zip(weights, first, second, gradient, self.rates, strict=True)
        for weight, mean, square, slope, rate in rows:
            mean.lerp_(slope, 1 - self.momentum)
            square.lerp_(slope.square(), 1 - ADAM_BETA2)
            spread = (square / (1 - ADAM_BETA2 ** (done + 1))).sqrt() + ADAM_EPSILON
            weight.add_(mean / spread * (rate / (1 - self.momentum ** (done + 1)))[:, None, None])


def update(
    weights: Weights,
    velocity: Weights,
    gradient: Weights,
    rates: tuple[Float[Tensor, " run"], Float[Tensor, " run"]],
    momentum: float,
) -> None:
    """Make one step of SGD in place; ``rates`` are those of Y and of Z."""
    for weight, speed, slope, rate in zip(weights, velocity, gradient, rates, strict=True):
        speed.mul_(momentum).add_(slope)
        weight.add_(speed * rate[:, None, None])


def class_attention(
    Z: Float[Tensor, "run query token"], law: ClassLaw
) -> Float[Tensor, "run class token"]:
    """c_n, the attention in infinitely long sequences of each class."""
    return attention(Z[:, law.query], law.prob.to(Z.dtype))


def distinct_entropy(
    c: Float[Tensor, "... class token"], law: ClassLaw
) -> Float[Tensor, "... class"]:
    """Entropy in nats of attention among the distinct tokens of each class."""
    share = c * law.is_distinct
    share = share / share.sum(dim=-1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(dim=-1)


def common_mass(c: Float[Tensor, "... class token"], law: ClassLaw) -> Float[Tensor, "... class"]:
    """Share of each class's attention on common tokens."""
    return (c * law.is_common).sum(dim=-1)
