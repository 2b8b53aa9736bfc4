"""Headline numbers and table of an information-flow result."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.information_flow_cross import pair_mask
from probes.information_flow_tokens import KEEP_SETS, conditional, relative_reduction


class FlowNumbers:
    """What follows from the arrays of ``information_flow.InformationFlowResult``."""

    item_of_pos: Any
    representative: Any
    keep_score: Any
    keep_set_correct: Any
    keep_set_score: Any
    flow: Any
    correct: Any
    correct_patched: Any
    predicted_redundant: Any
    route_edges: Any
    config: Any

    def item_mask(self) -> Bool[Tensor, "prompt item pos"]:
        """The tokens of every item."""
        item = torch.arange(self.flow.shape[1])
        found: Tensor = self.item_of_pos[:, None] == item[:, None]
        return found

    def exists(self) -> Bool[Tensor, "prompt item"]:
        """Which items a prompt has."""
        return self.item_mask().any(dim=-1)

    def n_tokens(self) -> Float[Tensor, "prompt item"]:
        """Tokens of every item."""
        return self.item_mask().sum(dim=-1).float()

    def n_representative(self) -> Float[Tensor, "prompt item"]:
        """Representative tokens of every item."""
        return (self.item_mask() & self.representative[:, None]).sum(dim=-1).float()

    def in_company(self) -> Bool[Tensor, "prompt item"]:
        """Items that have another item in their prompt."""
        exists = self.exists()
        return exists & (exists.sum(dim=1, keepdim=True) > 1)

    def leakage_rate(self, *, patched: bool = False) -> float | None:
        """Share of items in company that read as another item; None: there are none."""
        company = self.in_company()
        correct = self.correct_patched if patched else self.correct
        if not bool(company.any()):
            return None
        return (~correct[company]).double().mean().item()

    def last_is_best(self) -> Bool[Tensor, " item"]:
        """Of the items of several tokens: whether the last one scores highest."""
        own, several = self.item_mask(), self.n_tokens() > 1
        score = self.keep_score[:, None].masked_fill(~own, -torch.inf)
        n_pos = own.shape[-1]
        last = n_pos - 1 - own.flip(-1).float().argmax(dim=-1)
        return (score.argmax(dim=-1) == last)[several]

    def metrics(self) -> dict[str, float]:
        """The headline numbers; those without a single case are left out."""
        exists, count = self.exists(), self.n_representative()
        found = {
            "representative_rate": (count[exists] > 0).double().mean().item(),
            **self._redundancy(),
            **self._leakage(),
            **self._removal(),
        }
        if self.predicted_redundant is not None:
            found |= self._classifier()
        if self.route_edges is not None:
            found["n_route_edges"] = float(len(self.route_edges))
        found["n_items"] = float(exists.sum())
        found["n_prompts"] = float(len(exists))
        return found

    def _redundancy(self) -> dict[str, float]:
        several = self.n_tokens() > 1
        if not bool(several.any()):
            return {}
        tokens = self.n_tokens()[several].sum().item()
        carrying = self.n_representative()[several].sum().item()
        return {
            "redundant_rate": 1.0 - carrying / tokens,
            "last_token_rate": self.last_is_best().double().mean().item(),
        }

    def _leakage(self) -> dict[str, float]:
        before, after = self.leakage_rate(), self.leakage_rate(patched=True)
        if before is None or after is None:
            return {}
        pairs = pair_mask(self.exists())
        found = {
            "leakage_rate": before,
            "leakage_rate_patched": after,
            "mean_flow": self.flow[pairs].double().mean().item(),
        }
        if before > 0:
            found["leakage_reduction"] = relative_reduction(before, after)
        return found

    def _removal(self) -> dict[str, float]:
        """What removing the redundant tokens costs."""
        company = self.in_company()
        if not bool(company.any()) or self.config.readout == "prompt":
            # Read over the whole prompt, all its items read alike.
            return {}
        names = ("full", "removed")
        before, after = (self.keep_set_correct[..., KEEP_SETS.index(name)] for name in names)
        return conditional(before[company], after[company])

    def _classifier(self) -> dict[str, float]:
        several = (self.item_mask() & (self.n_tokens() > 1)[..., None]).any(dim=1)
        truth = ~self.representative[several]
        said = self.predicted_redundant[several]
        found = {
            "classifier_accuracy": (truth == said).double().mean().item(),
            "classifier_base_rate": truth.double().mean().item(),
        }
        if bool(said.any()):
            found["classifier_precision"] = truth[said].double().mean().item()
        return found

    def table(self) -> dict[str, list[Any]]:
        """One row an item."""
        exists = self.exists()
        prompt, item = exists.nonzero(as_tuple=True)
        score = self.keep_set_score[..., KEEP_SETS.index("item")]
        best = self.keep_score[:, None].masked_fill(~self.item_mask(), -torch.inf).amax(dim=-1)
        return {
            "prompt": prompt.tolist(),
            "item": item.tolist(),
            "n_tokens": self.n_tokens()[exists].int().tolist(),
            "n_representative": self.n_representative()[exists].int().tolist(),
            "item_score": score[exists].tolist(),
            "best_token_score": best[exists].tolist(),
            "flow_in": self.flow.sum(dim=2)[exists].tolist(),
            "flow_out": self.flow.sum(dim=1)[exists].tolist(),
            "leaks": (~self.correct[exists]).int().tolist(),
            "leaks_patched": (~self.correct_patched[exists]).int().tolist(),
        }
