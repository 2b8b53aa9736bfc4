"""Tokens of a selective state-space model in continuous depth: simulator and closed-form limits.

With M = S_C^T S_B, Delta_d(x) = softplus((S_Delta x)_d) and decay a_d > 0, token l moves by

    dx_ld/dt = sum over j <= l of (x_l^T M x_j) exp(-a_d sum over k = j+1..l of Delta_d(x_k))
               Delta_d(x_j) x_jd

In one dimension mu = M decides: below 0 all tokens fall to 0 like 1/sqrt(t); above 0 they diverge,
like powers of ln t when every s x_l is negative ("slow"), in finite time when one is positive ("fast").

Paper: Vo et al. 2025, arXiv:2410.03292. Card: ssm_token_dynamics sections 1-3 (the equation is
derived there from the recurrence; limits beyond the paper's rates are derived there, too).
Time runs in u = ln(1 + t): rates fall like 1/t, so steps grow with t. Float64; systems side by side.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from workbench.errors import DataError, EngineError

BLOW_UP = 1e8
"""A system with a coordinate beyond this stops."""
BLOW_UP_RATE = 1e12
"""|dx/dt| / |x| there: mu |s| x^3 = 1e24 mu |s| on the way to infinity; at most about mu / (2 s^2) a
token in slow divergence, which may pass BLOW_UP too when |s| is small."""
REGIMES = ("convergent", "slow divergent", "fast divergent", "constant")
MAX_STEPS = 200_000

# Systems


@dataclass(frozen=True)
class Systems:
    """Several systems of the same size, float64."""

    m: Float[Tensor, "system dim dim"]
    """S_C^T S_B."""
    s_delta: Float[Tensor, "system dim dim"]
    decay: Float[Tensor, "system dim"]
    """a_d, above 0."""

    def __post_init__(self) -> None:
        if not bool((self.decay > 0).all()):
            raise DataError(
                f"decay must be above 0, or the state never fades; got {self.decay.min().item()}; "
                "give a = exp(A_log)"
            )

    def part(self, rows: Int[Tensor, " part"]) -> "Systems":
        """Some of them."""
        return Systems(self.m[rows], self.s_delta[rows], self.decay[rows])


def one_dimensional(
    mu: Float[Tensor, " system"], s: Float[Tensor, " system"], a: Float[Tensor, " system"]
) -> Systems:
    """Systems with scalar tokens."""
    return Systems(mu.double()[:, None, None], s.double()[:, None, None], a.double()[:, None])


def velocity(
    systems: Systems, x: Float[Tensor, "system token dim"]
) -> Float[Tensor, "system token dim"]:
    """The right-hand side, by the recurrence h_l = exp(-a Delta_l) h_{l-1} + Delta_l x_l x_l^T."""
    delta = softplus(x @ systems.s_delta.transpose(1, 2))
    fade = torch.exp(-systems.decay[:, None] * delta)
    query = x @ systems.m
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[2])
    moved = []
    for token in range(x.shape[1]):
        now = x[:, token]
        written = (delta[:, token] * now)[..., None] * now[:, None]
        state = fade[:, token, :, None] * state + written
        moved.append((state @ query[:, token, :, None])[..., 0])
    return torch.stack(moved, dim=1)


# Integration: Dormand-Prince 5(4), one step size a system

_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class Trajectory:
    """Where the tokens were at some times."""

    time: Float[Tensor, " time"]
    x: Float[Tensor, "system time token dim"]
    """NaN from the stop on."""
    stop_time: Float[Tensor, " system"]
    """When a coordinate passed BLOW_UP; infinite: never."""
    stop_rate: Float[Tensor, " system"]
    """Largest |dx/dt| / |x| then; 0: never."""


def log_times(t_end: float, n_times: int = 61) -> Float[Tensor, " time"]:
    """0 and times up to ``t_end`` whose ln(1 + t) are equally far apart."""
    return torch.linspace(0, math.log1p(t_end), n_times, dtype=torch.float64).expm1()


def simulate(
    systems: Systems,
    start: Float[Tensor, "system token dim"],
    time: Float[Tensor, " time"],
    *,
    tolerance: float = 1e-8,
) -> Trajectory:
    """Integrate all systems side by side; each has steps of its own.

    Args:
        systems: Their matrices.
        start: The tokens at time 0.
        time: Ascending, from 0; what is recorded.
        tolerance: Of one step, relative to the largest coordinate of the system, and absolute
            relative to its start.

    Raises:
        EngineError: The steps became too many: stiff, or a tolerance out of reach.
    """
    run = _Run.start(systems, start.double(), tolerance)
    seen = [run.x.clone()]
    for goal in time[1:].double().log1p().tolist():
        run.advance(goal)
        seen.append(run.x.masked_fill(run.stopped[:, None, None], torch.nan))
    return Trajectory(time.double(), torch.stack(seen, dim=1), run.stop_time, run.stop_rate)


@dataclass
class _Run:
    """The state of an integration."""

    systems: Systems
    x: Tensor
    u: Tensor
    step: Tensor
    floor: Tensor
    stopped: Bool[Tensor, " system"]
    stop_time: Tensor
    stop_rate: Tensor
    tolerance: float

    @staticmethod
    def start(systems: Systems, x: Tensor, tolerance: float) -> "_Run":
        n = len(x)
        floor = 1e-6 * x.abs().amax(dim=(1, 2)).clamp(min=1e-12)
        never = torch.full((n,), torch.inf, dtype=torch.float64)
        small = torch.full((n,), 1e-4, dtype=torch.float64)
        no = torch.zeros(n, dtype=torch.bool)
        zero = torch.zeros_like(small)
        return _Run(systems, x.clone(), zero, small, floor, no, never, zero.clone(), tolerance)

    def advance(self, goal: float) -> None:
        """Bring every system that still runs to ``u = goal``."""
        for _ in range(MAX_STEPS):
            left = goal - self.u
            running = ~self.stopped & (left > 0)
            if not bool(running.any()):
                return
            self._try_step(running, torch.minimum(self.step, left))
        raise EngineError(
            f"an integration must end within {MAX_STEPS} steps a recorded time; it did not; raise "
            "tolerance or end earlier"
        )

    def _try_step(self, running: Bool[Tensor, " system"], h: Float[Tensor, " system"]) -> None:
        rows = running.nonzero()[:, 0]
        part = self.systems.part(rows)
        x, u, h = self.x[rows], self.u[rows], h[rows]
        moved, error = _dormand_prince(part, x, u, h)
        size = torch.maximum(x.abs(), moved.abs()).amax(dim=(1, 2))
        scale = self.tolerance * (size + self.floor[rows])
        ratio = (error.abs().amax(dim=(1, 2)) / scale).nan_to_num(nan=1e6, posinf=1e6)
        good = ratio <= 1
        taken = rows[good]
        self.x[taken], self.u[taken] = moved[good], u[good] + h[good]
        grown = h * (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0)
        # A step that was cut at a recorded time says nothing against the longer one.
        planned = torch.where(h < self.step[rows], self.step[rows], 0.0)
        self.step[rows] = torch.where(good, torch.maximum(grown, planned), grown)
        self._stop(taken)

    def _stop(self, taken: Int[Tensor, " taken"]) -> None:
        gone = taken[(self.x[taken].abs() > BLOW_UP).any(dim=2).any(dim=1)]
        if not len(gone):
            return
        self.stopped[gone] = True
        self.stop_time[gone] = self.u[gone].expm1()
        part = self.systems.part(gone)
        rate = (velocity(part, self.x[gone]) / self.x[gone]).abs().amax(dim=(1, 2))
        self.stop_rate[gone] = rate.nan_to_num(nan=torch.inf)


def _dormand_prince(
    systems: Systems, x: Tensor, u: Float[Tensor, " system"], h: Float[Tensor, " system"]
) -> tuple[Tensor, Tensor]:
    """One step in u = ln(1 + t), dx/du = (1 + t) dx/dt: the new x and its estimated error."""
    h3 = h[:, None, None]

    def slope(x: Tensor, u: Tensor) -> Tensor:
        return torch.exp(u)[:, None, None] * velocity(systems, x)

    slopes = [slope(x, u)]
    for row, c in zip(_A, _C, strict=True):
        moved = x + h3 * sum(weight * k for weight, k in zip(row, slopes, strict=True))
        slopes.append(slope(moved, u + c * h))
    error = h3 * sum(weight * k for weight, k in zip(_ERROR, slopes, strict=True))
    return moved, error


# Closed forms in one dimension (card section 3)


def convergent_limits(mu: float, a: float) -> tuple[float, float]:
    """sqrt(t) |x_l| for t -> infinity and mu < 0: of the first token, and of every later one."""
    first = 1 / math.sqrt(2 * abs(mu) * math.log(2))
    return first, first * math.sqrt(1 - 2**-a)


def slow_first_token(mu: float, s: float, t: float) -> float:
    """|x_1| at a late time where mu > 0 > s x_1: |s| x = ln(mu |s| t) + 3 ln x, the larger root."""
    x = max(math.log(mu * abs(s) * t), 6.0) / abs(s)
    for _ in range(200):
        x = (math.log(mu * abs(s) * t) + 3 * math.log(x)) / abs(s)
    return x


def blow_up_time(mu: float, s: float, x0: float) -> float:
    """When the first token reaches infinity, mu > 0 < s x0: integral of dx / (mu x^3 softplus(s x)).

    With v = 1/x it is the integral from 0 to 1/|x0| of v / (mu softplus(|s| / v)), which is smooth.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    top = 1 / abs(x0)
    v = 0.5 * top * (nodes + 1)
    rate = np.logaddexp(0.0, abs(s) / v)
    return float(0.5 * top * (weights * v / (mu * rate)).sum())


def predicted_regime(mu: float, s: float, start: Float[Tensor, " token"]) -> str:
    """The theorem's regime of one system in one dimension; zero tokens stay zero."""
    if mu == 0 or not bool(start.any()):
        return "constant"
    if mu < 0:
        return "convergent"
    return "fast divergent" if bool((s * start > 0).any()) else "slow divergent"


def simulated_regime(trajectory: Trajectory, index: int) -> str:
    """What a simulated system did: blew up, grew, shrank, or stayed."""
    if torch.isfinite(trajectory.stop_time[index]):
        fast = bool(trajectory.stop_rate[index] > BLOW_UP_RATE)
        return "fast divergent" if fast else "slow divergent"
    x = trajectory.x[index]
    first, last = (x[i].norm().item() for i in (0, -1))
    if abs(last - first) <= 1e-9 * first:
        return "constant"
    return "slow divergent" if last > first else "convergent"
