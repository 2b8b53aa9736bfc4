"""State-space mode: which way the tokens of a Mamba move, read from its weights.

With M = S_C^T S_B (d_in x d_in) the theory has tokens converge to 0 where all eigenvalues of M are
negative and diverge where one is positive. Its non-zero eigenvalues are those of S_B S_C^T, which
is d_state x d_state (16 x 16). M is not symmetric: the inertia of (M + M^T)/2 is counted as well, in
a basis of the rows of S_B and S_C.

On a real checkpoint this is a diagnosis, not a prediction: the theory has no convolution, gate,
norm, skip or time-step bias, and one decay a channel.

Paper: Vo et al. 2025, arXiv:2410.03292. Card: ssm_token_dynamics section 4.
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from workbench.context import Context
from workbench.errors import CapabilityError
from workbench.models.base import ModelAdapter

TOLERANCE = 1e-6
"""Real parts smaller than this share of the largest |eigenvalue| count as zero."""

# Mathematics


def short_eigenvalues(
    s_b: Float[Tensor, "*group d_state d_in"], s_c: Float[Tensor, "*group d_state d_in"]
) -> Complex[Tensor, "*group d_state"]:
    """Eigenvalues of S_B S_C^T: those of S_C^T S_B that may differ from 0."""
    product = s_b.double() @ s_c.double().transpose(-1, -2)
    return torch.linalg.eigvals(product)


def count_signs(x: Float[Tensor, " value"], scale: float) -> tuple[int, int]:
    """How many are positive and how many negative, beyond rounding."""
    bound = TOLERANCE * scale
    return int((x > bound).sum()), int((x < -bound).sum())


def regime_of(n_positive: int, n_negative: int) -> int:
    """-1 convergent (only negative), 1 divergent (only positive), 0 mixed (or none)."""
    return int(n_positive > 0) - int(n_negative > 0)


def symmetric_eigenvalues(
    s_b: Float[Tensor, "d_state d_in"], s_c: Float[Tensor, "d_state d_in"]
) -> Float[Tensor, " value"]:
    """Those of (M + M^T)/2, M = S_C^T S_B, in a basis Q of the rows of S_C and S_B; 2 d_state at most.

    Q is orthonormal and spans all that M reads and writes; outside it M is 0.
    """
    s_b, s_c = s_b.double(), s_c.double()
    basis, _ = torch.linalg.qr(torch.cat([s_c, s_b]).T)
    small = (s_c @ basis).T @ (s_b @ basis)
    return torch.linalg.eigvalsh((small + small.T) / 2)


def layer_numbers(
    s_b: Float[Tensor, "group d_state d_in"],
    s_c: Float[Tensor, "group d_state d_in"],
    s_delta: Float[Tensor, "channel d_in"],
    decay: Float[Tensor, "channel decay_state"],
) -> dict[str, Tensor]:
    """What is reported of one layer."""
    values = short_eigenvalues(s_b, s_c).flatten()
    values = values[values.real.argsort()]
    n_positive, n_negative = count_signs(values.real, values.abs().max().item())
    symmetric = torch.cat([symmetric_eigenvalues(b, c) for b, c in zip(s_b, s_c, strict=True)])
    inertia = count_signs(symmetric, symmetric.abs().max().item())
    return {
        "eigenvalues": torch.view_as_real(values).float(),
        "n_positive": torch.tensor(n_positive),
        "n_negative": torch.tensor(n_negative),
        "regime": torch.tensor(regime_of(n_positive, n_negative)),
        "symmetric_positive": torch.tensor(inertia[0]),
        "symmetric_negative": torch.tensor(inertia[1]),
        "delta_norm": s_delta.norm().float(),
        "decay": torch.stack([decay.min(), decay.mean(), decay.max()]).float(),
    }


# Measurement


def measure_state_space(model: ModelAdapter, context: Context) -> dict[str, Tensor]:
    """Read every layer's matrices and count their signs; no forward pass.

    Raises:
        CapabilityError: The model has no selective state-space layers, or its backend does not
            give their weights.
    """
    refuse_attention(model)
    n_layers, rows = model.spec.n_layers, []
    for layer in range(n_layers):
        rows.append(context.piece(f"layer-{layer}", lambda layer=layer: _layer(model, layer)))
        context.progress(layer + 1, n_layers)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def refuse_attention(model: ModelAdapter) -> None:
    """Refuse a model that attends: its weights have no S_B and S_C."""
    if model.spec.n_heads:
        raise CapabilityError(
            "mode=state-space needs a model of selective state-space layers (mamba, mamba2); "
            f"{model.spec.name} ({model.spec.family}) is an attention model; set mode=walk"
        )


def _layer(model: ModelAdapter, layer: int) -> dict[str, Tensor]:
    names = ("S_B", "S_C", "S_Delta", "decay")
    try:
        return layer_numbers(*(model.weight(name, layer) for name in names))
    except CapabilityError as error:
        raise CapabilityError(
            f"mode=state-space needs {', '.join(names)} of every layer; {model.spec.name} "
            f"({model.spec.family}) on the {model.backend} backend does not give them; use a "
            "mamba or mamba2 checkpoint on --backend hf"
        ) from error
