"""What theory predicts of the sink: the flow of a simplified model, and its closed forms.

Simplified model. At a non-trigger token v, attention mixes the value beta of <s> (weight
exp(alpha_v), alpha_v the sink logit of v) with what the other tokens say, z = sum_i W_i xi_i of
whole weight W = sum_i W_i; the MLP already knows the bigram law p_v; pi_v is how often v occurs:

    logits_v = (exp(alpha_v) beta + z) / (exp(alpha_v) + W) + log p_v
    loss     = sum_v pi_v KL(p_v || softmax(logits_v))

so that anything attention adds, apart from a constant over the vocabulary, does harm. Under gradient
flow, dalpha/dt = -dloss/dalpha and dbeta/dt = -dloss/dbeta:

    beta held at a constant      alpha_v -> 1/2 ln t + 1/2 ln(2 pi_v Var_{p_v}(z))
    alpha held, equal over v     mean(beta) is conserved, beta -> c 1 - exp(-alpha) z
    both free                    still where all alpha_v are equal and beta = c 1 - exp(-alpha) z

The joint flow stops at a finite alpha: a logit that grows like 1/2 ln t needs a value that is held
back. ``integrate`` follows the flow on a grid that is even in ln t.

Residual norm. What is left to gain by a larger norm m of <s> falls off as ln t / (m^3 t). Plain
gradient flow obeys it and flattens, m^4 = m_0^4 + 2 lr (ln^2 t - ln^2 t_0); Adam divides the gradient
by its own size and goes on by lr a step (``grow_residual``).

Paper: Guo et al. 2024, "Active-Dormant Attention Heads", arXiv:2410.13835; the constant of the
first line and m(t) are worked out here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

GAMMA = 1.0 - 1.0 / math.sqrt(2.0)
"""Makes the integrator's two stages L-stable: the value relaxes ever faster than ln t passes."""
RESIDUAL_OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda weights, lr: torch.optim.SGD(weights, lr=lr),
    "adam": lambda weights, lr: torch.optim.Adam(weights, lr=lr, betas=(0.9, 0.99)),
}


@dataclass(frozen=True)
class SimplifiedModel:
    """What is given: the law, and what attention to the other tokens adds."""

    frequency: Float[Tensor, " token"]
    """pi, sums to 1; float64."""
    law: Float[Tensor, "token vocab"]
    """p, rows sum to 1; float64."""
    context: Float[Tensor, " vocab"]
    """z; float64."""
    weight: float = 1.0
    """W."""

    def log_probs(
        self, alpha: Float[Tensor, " token"], beta: Float[Tensor, " vocab"]
    ) -> Float[Tensor, "token vocab"]:
        """What the model predicts after each token."""
        sink = alpha.exp()[:, None]
        added = (sink * beta + self.context) / (sink + self.weight)
        return (added + self.law.log()).log_softmax(dim=-1)

    def loss(self, alpha: Float[Tensor, " token"], beta: Float[Tensor, " vocab"]) -> Tensor:
        """Excess risk, in nats."""
        divergence = (self.law * (self.law.log() - self.log_probs(alpha, beta))).sum(dim=-1)
        return (self.frequency * divergence).sum()

    def variance(self) -> Float[Tensor, " token"]:
        """Var_{p_v}(z): how much harm attention to the other tokens does."""
        mean = self.law @ self.context
        return self.law @ self.context.square() - mean.square()


@dataclass(frozen=True)
class State:
    """Sink logits and value, at one time or along a flow."""

    alpha: Float[Tensor, "*time token"]
    beta: Float[Tensor, "*time vocab"]


def log_times(first: float, last: float, n_steps: int) -> Float[Tensor, " time"]:
    """Time 0, then ``n_steps`` times that are even in ln t."""
    grid = torch.logspace(math.log10(first), math.log10(last), n_steps, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), grid])


def integrate(
    model: SimplifiedModel,
    start: State,
    times: Float[Tensor, " time"],
    *,
    hold: str = "neither",
) -> State:
    """Follow the gradient flow through ``times``, from the first on.

    Every step is a Rosenbrock step of second order (ROS2) with the Fisher information in the place
    of the Hessian, which costs no order: stable however long the step is, and true to mean(beta).

    Args:
        model: Whose loss is descended.
        start: Where the flow is at the first time.
        times: Increasing.
        hold: What stays as it is: "alpha", "beta" or "neither".
    """
    n = len(start.alpha)
    moves = torch.ones(n + len(start.beta), dtype=start.beta.dtype)
    moves[:n] *= hold != "alpha"
    moves[n:] *= hold != "beta"
    y = torch.cat([start.alpha, start.beta])
    path, identity = [y], torch.eye(len(y), dtype=y.dtype)
    for step in times.diff().tolist():
        slope, fisher = _slope_and_fisher(model, y[:n], y[n:])
        matrix = identity + GAMMA * step * moves[:, None] * fisher
        first = torch.linalg.solve(matrix, -moves * slope)
        ahead = y + step * first
        slope, _ = _slope_and_fisher(model, ahead[:n], ahead[n:])
        second = torch.linalg.solve(matrix, -moves * slope - 2 * first)
        y = y + step * moves * (1.5 * first + 0.5 * second)
        path.append(y)
    whole = torch.stack(path)
    return State(whole[:, :n], whole[:, n:])


def _slope_and_fisher(
    model: SimplifiedModel, alpha: Float[Tensor, " token"], beta: Float[Tensor, " vocab"]
) -> tuple[Float[Tensor, " both"], Float[Tensor, "both both"]]:
    """Gradient of the loss in (alpha, beta), and the Fisher information of its predictions."""
    q = model.log_probs(alpha, beta).exp()
    sink = alpha.exp() / (alpha.exp() + model.weight)
    # d logits_v / d alpha_v; d logits_v / d beta is sink_v.
    by_alpha = (sink * (1 - sink))[:, None] * (beta - model.context / model.weight)
    excess = model.frequency[:, None] * (q - model.law)
    slope = torch.cat([(excess * by_alpha).sum(dim=-1), sink @ excess])
    centred = q * (by_alpha - (q * by_alpha).sum(dim=-1, keepdim=True))
    pi = model.frequency
    own = torch.diag(pi * (centred * by_alpha).sum(dim=-1))
    cross = (pi * sink)[:, None] * centred
    weighted = (pi * sink.square())[:, None] * q
    value = torch.diag(weighted.sum(dim=0)) - weighted.T @ q
    return slope, torch.cat([torch.cat([own, cross], 1), torch.cat([cross.T, value], 1)])


# Closed forms


def growing_logit(
    model: SimplifiedModel, times: Float[Tensor, " time"]
) -> Float[Tensor, "time token"]:
    """Sink logits at late times, beta held at a constant: 1/2 ln(2 pi Var_p(z) t)."""
    return 0.5 * (2 * model.frequency * model.variance() * times[:, None]).log()


def stationary_value(model: SimplifiedModel, alpha: float, mean: float) -> Float[Tensor, " vocab"]:
    """The value at rest while every alpha_v is ``alpha``: c 1 - exp(-alpha) z, of the given mean."""
    drained = -math.exp(-alpha) * model.context
    return drained - drained.mean() + mean


def residual_of_flow(
    times: Float[Tensor, " time"], lr: float, first: float = 1.0
) -> Float[Tensor, " time"]:
    """m(t) of gradient flow from m = ``first`` at the first of ``times`` (at least 1)."""
    return (first**4 + 2 * lr * (times.log().square() - times[0].log().square())) ** 0.25


def grow_residual(
    optimizer: str, n_steps: int, *, lr: float, first: float = 1.0
) -> Float[Tensor, " step"]:
    """Norm m before and after every update by the gradient -ln t / (m^3 t), t = 2, 3, ...

    Args:
        optimizer: "sgd" (without momentum) or "adam".
        n_steps: Updates.
        lr: Learning rate.
        first: m before them; there is no gradient at t = 1.
    """
    m = torch.tensor(first, dtype=torch.float64, requires_grad=True)
    descent = RESIDUAL_OPTIMIZERS[optimizer]([m], lr)
    norms = [first]
    for t in range(2, n_steps + 2):
        m.grad = -math.log(t) / (m.detach() ** 3 * t)
        descent.step()
        norms.append(m.item())
    return torch.tensor(norms, dtype=torch.float64)
