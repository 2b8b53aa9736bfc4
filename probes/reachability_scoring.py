"""Next-token losses of many prompts, and the gradient that proposes tokens.

Only the last position's logits are made. As many rows as the memory budget allows go through one
forward pass; when even they do not fit, half as many do from then on. Numbers do not depend on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.reachability_entry import SharedPrefix
from workbench.errors import CapabilityError, ConfigError, EngineError
from workbench.models.base import ModelAdapter, ModelSpec, Site, require


@dataclass(frozen=True)
class Scores:
    """Of some rows, for one target each or several for all."""

    loss: Float[Tensor, "*n_targets"]
    """-ln P(target | row), nats."""
    winner: Int[Tensor, " n"]
    """The argmax; -1 where two tokens tie for it, so that a tied target is not reached."""


def bytes_per_row(spec: ModelSpec, n_pos: int) -> int:
    """Working memory that one row of a forward pass needs, float32, roughly and not too little."""
    per_token = 16 * spec.d_model + 4 * spec.d_mlp + 4 * spec.n_heads * n_pos
    return 4 * (n_pos * per_token + 4 * spec.d_vocab)


class Scorer:
    """Scores rows of token ids with a model, as many at once as fit."""

    def __init__(
        self, model: ModelAdapter, budget_bytes: int, most_rows: int | None = None
    ) -> None:
        """Take the budget of one forward pass; ``most_rows`` is the user's own limit."""
        self.model = model
        self._budget = budget_bytes
        self._most_rows = most_rows
        self._shared = SharedPrefix(model)
        self.n_scored = 0
        """Rows scored so far."""

    def rows_at_once(self, n_pos: int) -> int:
        """Rows of ``n_pos`` tokens that one forward pass is given."""
        fitting = max(1, self._budget // bytes_per_row(self.model.spec, n_pos))
        return fitting if self._most_rows is None else min(fitting, self._most_rows)

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
        self._budget = (n_rows // 2) * bytes_per_row(self.model.spec, n_pos)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator or the CPU's allocator said that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "not enough memory" in text or "allocate memory" in text


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
