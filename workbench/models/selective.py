"""Two refinements of selective state-space layers, as modules to put on a Mamba.

``exclude_regime(model, "positive")`` rewrites x_proj so that M = S_C^T S_B has exactly d_state
eigenvalues of the chosen sign: with P1 the strictly upper triangle of the B rows and ones on the
diagonal, lam from the first column of the C rows,

    S_C = P1,  S_B = diag(lam) P1,  M = P1^T diag(lam) P1;  lam = +-(softplus(.) + 0.7)

``reorder_by_importance(model)`` puts a soft sort in front of the scan of the first layer: score_l =
k . (S_Delta x_l + bias), k learned; tokens with a high score come last, where they count most.

Paper: Vo et al. 2025, arXiv:2410.03292. Card: ssm_token_dynamics sections 5 and 6, after the
authors' parametrisations. Departures: here a gate multiplies the scan's output, so it is sorted with
its token; hard sorting breaks ties by position.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus
from torch.nn.utils import parametrize

from workbench.errors import CapabilityError, ConfigError, DataError

SIGNS = ("positive", "negative", "mixed")
MARGIN = 0.7
"""Least |lam| of the signed forms; the mixed form has none, as in the authors' code."""

# Excluding a regime


class PrescribedSigns(nn.Module):
    """A parametrisation of x_proj.weight whose eigenvalues have prescribed signs."""

    def __init__(self, d_state: int, sign: str) -> None:
        """Prescribe.

        Args:
            d_state: Rows of S_B and of S_C.
            sign: One of SIGNS; mixed: the first half positive.
        """
        super().__init__()
        if sign not in SIGNS:
            raise ConfigError(f"sign must be one of {', '.join(SIGNS)}; got {sign}")
        self.d_state, self.sign = d_state, sign

    def forward(self, raw: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """The weight that the layer uses, from the one that is learned."""
        rank, n = raw.shape[0] - 2 * self.d_state, self.d_state
        triangle = raw[rank : rank + n].triu(1) + torch.eye(n, raw.shape[1]).to(raw)
        lam = softplus(raw[rank + n :, 0])
        if self.sign == "mixed":
            lam = torch.where(torch.arange(n, device=raw.device) < n // 2, lam, -lam)
        else:
            lam = (lam + MARGIN) * (1 if self.sign == "positive" else -1)
        return torch.cat([raw[:rank], lam[:, None] * triangle, triangle])


def mixers_of(model: nn.Module) -> list[Any]:
    """The Mamba-1 mixers of a model, in order.

    Raises:
        CapabilityError: It has none.
    """
    found = [module for module in model.modules() if hasattr(module, "x_proj")]
    if not found:
        raise CapabilityError(
            f"the refinements need Mamba-1 layers, which keep B and C in x_proj; {type(model).__name__} "
            "has none; use a mamba model"
        )
    return found


def exclude_regime(model: nn.Module, sign: str = "positive") -> None:
    """Give every layer's S_C^T S_B eigenvalues of one sign (or half and half), now and in training.

    ``torch.nn.utils.parametrize.remove_parametrizations(mixer.x_proj, "weight")`` takes it off and
    keeps the weights that it gave.

    Raises:
        CapabilityError: Layers narrower than their state.
    """
    for mixer in mixers_of(model):
        form = PrescribedSigns(mixer.ssm_state_size, sign)
        if mixer.x_proj.in_features < mixer.ssm_state_size:
            raise CapabilityError(
                f"d_in must be at least d_state; got {mixer.x_proj.in_features} and "
                f"{mixer.ssm_state_size}; P1 would not have full rank"
            )
        weight = mixer.x_proj.weight
        trained = weight.requires_grad
        parametrize.register_parametrization(mixer.x_proj, "weight", form)
        mixer.x_proj.parametrizations.weight.original.requires_grad_(trained)


# Reordering by importance


def soft_sort(
    scores: Float[Tensor, "batch pos"], tau: float = 1.0, *, hard: bool = False
) -> Float[Tensor, "batch rank pos"]:
    """A relaxed permutation that sorts scores, largest first: rows sum to 1.

    P[k, l] = softmax over l of -|sorted[k] - s_l| / tau (Prillo and Eisenschlos 2020).

    Args:
        scores: What is sorted.
        tau: Temperature; towards 0 it becomes the permutation.
        hard: The permutation itself, with the gradient of the soft one.

    Raises:
        ConfigError: ``tau`` is not above 0.
    """
    if not tau > 0:
        raise ConfigError(f"tau must be above 0; got {tau}")
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, order)
    soft = torch.softmax(-(ranked[..., None] - scores[:, None]).abs() / tau, dim=-1)
    if not hard:
        return soft
    return one_hot(order, scores.shape[-1]).to(soft) + (soft - soft.detach())


class ImportanceOrder(nn.Module):
    """score_l = k . Delta_l, and the soft permutation that puts high scores last."""

    def __init__(self, d_inner: int, tau: float = 1.0, *, hard: bool = False) -> None:
        """Start with a random k.

        Args:
            d_inner: Channels of the time step.
            tau: Temperature of the sort.
            hard: Sort hard; the gradient stays soft.
        """
        super().__init__()
        self.score = nn.Linear(d_inner, 1, bias=False)
        self.tau, self.hard = tau, hard

    def forward(self, delta: Float[Tensor, "batch pos d_inner"]) -> Float[Tensor, "batch pos pos"]:
        """From the time steps before softplus to the order."""
        return soft_sort(-self.score(delta)[..., 0], self.tau, hard=self.hard)


def selective_scan(
    x: Float[Tensor, "batch pos channel"],
    delta: Float[Tensor, "batch pos channel"],
    decay: Float[Tensor, "channel state"],
    b: Float[Tensor, "batch pos state"],
    c: Float[Tensor, "batch pos state"],
) -> Float[Tensor, "batch pos channel"]:
    """h_l = exp(-a Delta_l) h_{l-1} + Delta_l B_l x_l,  y_l = C_l . h_l."""
    state = x.new_zeros(x.shape[0], x.shape[2], decay.shape[1])
    seen = []
    for pos in range(x.shape[1]):
        step = delta[:, pos, :, None]
        state = torch.exp(-step * decay) * state + step * x[:, pos, :, None] * b[:, pos, None]
        seen.append((state * c[:, pos, None]).sum(dim=-1))
    return torch.stack(seen, dim=1)


def scan_of(
    mixer: Any, x: Float[Tensor, "batch pos channel"]
) -> Float[Tensor, "batch pos channel"]:
    """The scan of a mixer's own B, C, Delta and decay, without skip."""
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    delta, b, c = mixer.x_proj(x).split(sizes, dim=-1)
    return selective_scan(x, softplus(mixer.dt_proj(delta)), torch.exp(mixer.A_log.float()), b, c)


def time_steps(mixer: Any, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
    """S_Delta x + bias, before softplus."""
    return mixer.dt_proj(mixer.x_proj(x)[..., : mixer.time_step_rank])


class ReorderedMixer(nn.Module):
    """A Mamba-1 mixer of transformers whose tokens are sorted before the scan.

    Its outputs stand in sorted order, so a causal model becomes one that reads whole sequences.
    """

    def __init__(self, mixer: Any, tau: float = 1.0, *, hard: bool = False) -> None:
        """Wrap a mixer; its weights stay its own."""
        super().__init__()
        self.mixer = mixer
        self.order: nn.Module | None = ImportanceOrder(mixer.intermediate_size, tau, hard=hard)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Float[Tensor, "batch pos d_model"]:
        """As the mixer, on sorted tokens; without an order it is the mixer.

        Raises:
            CapabilityError: With a cache: the order needs the whole sequence.
            DataError: With padding: it would be sorted in.
        """
        if cache_params is not None:
            raise CapabilityError(
                "a reordered layer needs whole sequences; it was given a cache; pass use_cache=False"
            )
        if attention_mask is not None and not bool(attention_mask.all()):
            raise DataError(
                "a reordered layer needs prompts without padding, which would be sorted in; pass "
                "prompts of equal length"
            )
        mixer = self.mixer
        x, gate = mixer.in_proj(hidden_states).chunk(2, dim=-1)
        x = mixer.act(mixer.conv1d(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        if self.order is not None:
            permutation = self.order(time_steps(mixer, x))
            x, gate = permutation @ x, permutation @ gate
        scanned = scan_of(mixer, x) + mixer.D * x
        return mixer.out_proj(scanned * mixer.act(gate))


def reorder_by_importance(
    model: nn.Module, layers: tuple[int, ...] = (0,), tau: float = 1.0, *, hard: bool = False
) -> None:
    """Put the reordering on some layers of a transformers Mamba; the first, as in the paper.

    The model then takes whole sequences without cache (``config.use_cache`` is set to False).

    Raises:
        ConfigError: No such layer.
    """
    blocks = [module for module in model.modules() if hasattr(module, "mixer")]
    mixers_of(model)
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ConfigError(f"layers must be below {len(blocks)}; got {layer}")
        block: Any = blocks[layer]
        block.mixer = ReorderedMixer(block.mixer, tau, hard=hard).to(block.mixer.D.device)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False
