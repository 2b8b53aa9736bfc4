"""Decoding a waypoint: logit lens, tuned lens, and where the final token arrives.

The logit lens gives a waypoint to the model's own final norm and unembedding; the tuned lens first
adds an affine map, h + T_l h (Belrose et al. 2023, arXiv:2303.08112; the files of their package).
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.attention.edits import ActivationEdit, Edit
from workbench.errors import ConfigError, DataError
from workbench.interventions.replace import ReplacePositions
from workbench.models.base import ModelAdapter, ModelSpec, Site

# Mathematics


def kl_divergence(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p || q) in nats, from log-probabilities; never below 0 by rounding."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0)


def arrival(first: Bool[Tensor, "batch pos waypoint"]) -> Int[Tensor, "batch pos"]:
    """The first waypoint from which the final argmax stays first; the last at the latest."""
    stays = first.clone()
    stays[..., -1] = True
    stays = stays.flip(-1).cummin(dim=-1).values.flip(-1)
    return stays.int().argmax(dim=-1)


# A forward pass from a waypoint


@dataclass(frozen=True, eq=False)
class KeepNormed:
    """Changes nothing and keeps what the final norm gave."""

    seen: list[Tensor] = field(default_factory=list)
    name: str = "keep-normed"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit, which looks and passes on."""
        return [ActivationEdit(Site("ln_final"), self._keep)]

    def _keep(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().float().cpu())
        return x


def decode(
    model: ModelAdapter,
    resid: Float[Tensor, "batch pos d_model"],
    attention_mask: Int[Tensor, "batch pos"] | None,
) -> tuple[Float[Tensor, "batch pos d_vocab"], Float[Tensor, "batch pos d_model"]]:
    """Log-probabilities and the normed vector of residual vectors, as the model's own end reads them.

    One block is run and its output replaced, so that norm, unembedding, biases and caps are the
    model's.
    """
    last = model.spec.n_layers - 1
    nothing = torch.zeros(resid.shape[:2], dtype=torch.bool)
    normed = KeepNormed()
    with (
        torch.no_grad(),
        model.edit(ReplacePositions(f"L{last}.resid_post", nothing, resid), normed),
    ):
        logits = model.continue_from(last, resid, attention_mask)
    return logits.float().cpu().log_softmax(dim=-1), normed.seen[-1]


# A tuned lens from its folder


@dataclass(frozen=True, eq=False)
class TunedLens:
    """An affine map a block, added to the residual stream at its entry."""

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]

    def __call__(
        self, resid: Float[Tensor, "batch pos d_model"], layer: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """H + T_l h."""
        return resid + resid @ self.weight[layer].T + self.bias[layer]


_FILES = ("params.safetensors", "params.pt")
_FOLDERS: dict[str, Path] = {}
"""Folder by the name that stands for its content in a config."""


def named_lens(folder: str) -> str:
    """``NAME@HASH`` of a lens' folder, so that a config says what the numbers came from.

    Raises:
        ConfigError: The folder holds no lens.
    """
    if not folder or ("@" in folder and not Path(folder).expanduser().is_dir()):
        return folder
    path = Path(folder).expanduser()
    found = [path / name for name in _FILES if (path / name).is_file()]
    if not found or not (path / "config.json").is_file():
        raise ConfigError(
            f"tuned_lens must be a folder with config.json and {' or '.join(_FILES)}; {folder} has "
            "not; give the folder that the tuned-lens package saved"
        )
    content = (path / "config.json").read_bytes() + found[0].read_bytes()
    name = f"{path.resolve().name}@{hashlib.sha256(content).hexdigest()[:16]}"
    _FOLDERS[name] = path
    return name


def load_lens(name: str, spec: ModelSpec) -> TunedLens | None:
    """The lens that a config names; None for none.

    Raises:
        ConfigError: Its folder is not known in this process.
        DataError: It was made for another model, or is damaged.
    """
    if not name:
        return None
    if name not in _FOLDERS:
        raise ConfigError(f"tuned_lens must be a folder; got {name!r}; give the lens' folder")
    path = _FOLDERS[name]
    sizes = json.loads((path / "config.json").read_text("utf-8"))
    wanted = (spec.n_layers, spec.d_model)
    if (sizes.get("num_hidden_layers"), sizes.get("d_model")) != wanted:
        raise DataError(
            f"the tuned lens must have {wanted[0]} layers of {wanted[1]} numbers for {spec.name}; "
            f"{name} has {sizes.get('num_hidden_layers')} of {sizes.get('d_model')}; take the lens "
            "of this model"
        )
    state = _read_state(path)
    layers = range(spec.n_layers)
    missing = [layer for layer in layers if f"{layer}.weight" not in state]
    if missing:
        raise DataError(
            f"the tuned lens must hold a map for every layer; {name} has none for {missing}; save it again"
        )
    zero = torch.zeros(spec.d_model)
    return TunedLens(
        torch.stack([state[f"{layer}.weight"].float() for layer in layers]),
        torch.stack([state.get(f"{layer}.bias", zero).float() for layer in layers]),
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    if (path / _FILES[0]).is_file():
        from safetensors.torch import load_file

        return load_file(path / _FILES[0])
    state: dict[str, Tensor] = torch.load(path / _FILES[1], map_location="cpu", weights_only=True)
    return state
