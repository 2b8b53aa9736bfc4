"""Next-token losses of many prompts, and the gradient that proposes tokens.

Only the last position's logits are made, and of the last MLP only what they need. As many rows as the
memory budget allows go through one forward pass, on a CPU no more than its cache can use; when even they
do not fit, half as many do from then on. Numbers do not depend on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.reachability_entry import SharedPrefix
from workbench.errors import CapabilityError, ConfigError, EngineError
from workbench.memory import is_out_of_memory
from workbench.models.base import ModelAdapter, ModelSpec, Site, require
from workbench.models.inputs import device_of
from workbench.models.memory import (
    forward_bytes,
    gradient_bytes,
    tell_over_budget,
)

CACHE_BYTES = 2 << 20
FEWEST_TOKENS = 512
"""On a CPU. Beyond, a pass writes to memory and reads it back, fewer make matrix products slow: the demo
model scored 470 rows a CPU second with 312 tokens a pass, 610 with 1014, 575 with 3315."""


@dataclass(frozen=True)
class Scores:
    """Of some rows, for one target each or several for all."""

    loss: Float[Tensor, "*n_targets"]
    """-ln P(target | row), nats."""
    winner: Int[Tensor, " n"]
    """The argmax; -1 where two tokens tie for it, so that a tied target is not reached."""


def cached_tokens(spec: ModelSpec) -> int:
    """Tokens of a forward pass whose widest activation still lies in a processor's cache."""
    return max(FEWEST_TOKENS, CACHE_BYTES // (4 * max(spec.d_mlp, 3 * spec.d_model)))


class Scorer:
    """Scores rows of token ids with a model, as many at once as fit."""

    def __init__(
        self, model: ModelAdapter, budget_bytes: int, most_rows: int | None = None
    ) -> None:
        """Take the budget of one forward pass; ``most_rows`` is the user's own limit."""
        self.model = model
        self._budget = budget_bytes - self._copied_bytes()
        self._on_cpu = device_of(model).type == "cpu"
        self._most_rows = most_rows
        self._shared = SharedPrefix(model)
        self.n_scored = 0
        """Rows scored so far."""

    def _copied_bytes(self) -> int:
        """Weights are read in float32: of any other kind, the embedding is kept a second time."""
        spec = self.model.spec
        return 0 if self.model.dtype == "float32" else 4 * spec.d_vocab * spec.d_model

    def problems_at_once(self, n_pos: int) -> int:
        """Problems whose gradients one pass may take."""
        needed = gradient_bytes(self.model.spec, n_pos)
        tell_over_budget(needed, self._budget, f"the gradient of a prompt of {n_pos} tokens")
        return max(1, self._budget // needed)

    def rows_at_once(self, n_pos: int) -> int:
        """Rows of ``n_pos`` tokens that one forward pass is given."""
        limits = [self._budget // forward_bytes(self.model.spec, n_pos)]
        if self._on_cpu:
            limits.append(cached_tokens(self.model.spec) // n_pos)
        if self._most_rows is not None:
            limits.append(self._most_rows)
        return max(1, min(limits))

    def score(self, rows: Int[Tensor, "n pos"], targets: Int[Tensor, " n"]) -> Scores:
        """Score each row for its own target."""

        def read(logits: Tensor, at: slice) -> Tensor:
            return _loss(logits, targets[at].to(logits.device)[:, None])

        found = self._scores(rows, read)
        return Scores(found.loss[:, 0], found.winner)

    def sweep(self, rows: Int[Tensor, "n pos"], targets: Int[Tensor, " target"]) -> Scores:
        """Score each row for every target; ``loss [n target]``."""

        def read(logits: Tensor, at: slice) -> Tensor:
            return _loss(logits, targets.to(logits.device).expand(len(logits), -1))

        return self._scores(rows, read)

    def score_groups(self, groups: Sequence[tuple[Tensor, int]]) -> list[Scores]:
        """Score the rows of several problems, those of one length in the same forward passes.

        Args:
            groups: Rows ``[n pos]`` and target of each problem.
        """
        found: dict[int, Scores] = {}
        for n_pos in sorted({rows.shape[1] for rows, _ in groups}):
            members = [i for i, (rows, _) in enumerate(groups) if rows.shape[1] == n_pos]
            sizes = [len(groups[i][0]) for i in members]
            targets = torch.tensor([groups[i][1] for i in members])
            whole = self.score(
                torch.cat([groups[i][0] for i in members]),
                targets.repeat_interleave(torch.tensor(sizes)),
            )
            parts = zip(whole.loss.split(sizes), whole.winner.split(sizes), strict=True)
            found |= {i: Scores(*part) for i, part in zip(members, parts, strict=True)}
        return [found[i] for i in range(len(groups))]

    def _scores(
        self, rows: Int[Tensor, "n pos"], read: Callable[[Tensor, slice], Tensor]
    ) -> Scores:
        losses, winners, start = [], [], 0
        while start < len(rows):
            at = slice(start, start + self.rows_at_once(rows.shape[1]))
            try:
                logits = self._shared.last_logits(rows[at])
                loss, winner = read(logits, at), _winner(logits)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._back_off(len(rows[at]), rows.shape[1])
                continue
            if not bool(loss.isfinite().all()):
                raise EngineError(
                    f"losses must be finite; {self.model.spec.name} gave NaN or infinity; it may have "
                    "overflowed in half precision; try --dtype float32"
                )
            losses.append(loss.cpu())
            winners.append(winner.cpu())
            start += len(loss)
            self.n_scored += len(loss)
        return Scores(torch.cat(losses), torch.cat(winners))

    def _back_off(self, n_rows: int, n_pos: int) -> None:
        """Give the next forward passes half the rows."""
        if n_rows == 1:
            raise ConfigError(
                f"one prompt must fit in memory; one of {n_pos} tokens did not; use a smaller model, "
                "shorter states or a device with more memory"
            )
        # In bytes, so that longer rows get fewer too.
        self._budget = (n_rows // 2) * forward_bytes(self.model.spec, n_pos)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _loss(logits: Tensor, targets: Int[Tensor, "n target"]) -> Float[Tensor, "n target"]:
    return logits.logsumexp(dim=-1, keepdim=True) - logits.gather(1, targets)


def _winner(logits: Float[Tensor, "n d_vocab"]) -> Int[Tensor, " n"]:
    best = logits.max(dim=-1)
    tied = (logits == best.values[:, None]).sum(dim=-1) > 1
    return best.indices.masked_fill(tied, -1)


def token_gradients(
    model: ModelAdapter,
    rows: Int[Tensor, "n pos"],
    targets: Int[Tensor, " n"],
    where: slice,
) -> Float[Tensor, "n place d_vocab"]:
    """First-order change of the loss when a token is put at a place, up to a constant per place.

    The gradient at the entry of block 0 times W_E, which is that with respect to the one-hot token
    up to the embedding's own scale (GCG, Zou et al. 2023, arXiv:2307.15043).

    Args:
        model: Differentiable.
        rows: Prompts of one length.
        targets: One a row.
        where: The places.

    Raises:
        CapabilityError: Embeddings of another width than the residual stream.
    """
    site = Site("resid_pre", 0)
    resid = model.capture(rows, [site])[site].requires_grad_()
    with torch.enable_grad():
        logits = model.continue_from(0, resid, last=1)[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, resid)
    embedding = model.weight("W_E")
    if embedding.shape[1] != gradient.shape[2]:
        raise CapabilityError(
            f"gradient search needs embeddings as wide as the residual stream; those of "
            f"{model.spec.name} are {embedding.shape[1]} wide for {gradient.shape[2]}; set method=greedy"
        )
    return gradient[:, where].to(embedding) @ embedding.T


def require_gradients(model: ModelAdapter, method: str) -> None:
    """Refuse a model that cannot be differentiated, before anything runs.

    Raises:
        CapabilityError: The backend has no gradients, or weights are quantised to integers.
    """
    require(model, frozenset({"gradients"}), f"probe reachability, method={method},")
    network = getattr(model, "model", None)
    if not isinstance(network, torch.nn.Module):
        return
    integer = any(weight.dtype in (torch.int8, torch.uint8) for weight in network.parameters())
    layers = any("quantized" in type(module).__module__ for module in network.modules())
    if integer or layers:
        raise CapabilityError(
            f"method={method} needs gradients; {model.spec.name} has weights in int8, which have none; "
            "load it unquantised with --backend hf --dtype float32 (or bfloat16), or set method=greedy"
        )
