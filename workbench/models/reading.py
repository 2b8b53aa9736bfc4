"""What is done with an activation where a backend's hook shows it: kept whole or reduced."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention.interface import reduced
from workbench.attention.streaming import PatternStatistic
from workbench.attention.whole import statistics_of_pattern
from workbench.errors import ConfigError
from workbench.models.base import ModelSpec, Reducers, Site, reduction_for
from workbench.models.checks import check_layer
from workbench.models.inputs import Inputs


def keeper(
    site: Site, reduce: Any, inputs: Inputs, captured: dict[Site, Any]
) -> Callable[[Tensor], None]:
    """What is done with the activation at a site: kept, or reduced where it is."""

    def keep(x: Tensor) -> None:
        """Keep one activation, of the shape that ``base.LAYER_SITES`` gives for the site."""
        if site.name == "attn_scores":
            hidden = x < torch.finfo(x.dtype).min / 2
            captured[site] = reduced(x.float().masked_fill(hidden, -torch.inf), reduce)
        elif site.name != "pattern":
            # A copy: some architectures add to the activation in place afterwards.
            captured[site] = reduced(x.clone(), reduce)
        elif isinstance(reduce, PatternStatistic | Mapping):
            several = reduce if isinstance(reduce, Mapping) else {"": reduce}
            row_valid = inputs.row_valid(x.device)
            found = statistics_of_pattern(rows_that_see(x, inputs), several, row_valid)
            kept = {name: found[name].cpu() for name in several}
            captured[site] = kept if isinstance(reduce, Mapping) else kept[""]
        else:
            captured[site] = reduced(rows_that_see(x, inputs), reduce)

    return keep


def rows_that_see(pattern: Tensor, inputs: Inputs) -> Tensor:
    """The pattern with rows of left padding at 0: they see nothing, whatever softmax made of it."""
    first = inputs.first_key()
    if first is None:
        return pattern
    sees = torch.arange(pattern.shape[2]) >= first[:, None]
    return pattern * sees[:, None, :, None].to(pattern)


def reductions(spec: ModelSpec, sites: Sequence[Site], reduce: Reducers) -> dict[Site, Any]:
    """The reduction of every site (None: whole).

    Raises:
        ConfigError: No such layer, or a pattern statistic for another site.
    """
    reads = {}
    for site in sites:
        check_layer(spec, site)
        reads[site] = reduction_for(site, reduce)
        if isinstance(reads[site], PatternStatistic | Mapping) and site.name != "pattern":
            raise ConfigError(
                f"a pattern statistic reads the site pattern only; got {site}; give "
                "reduce={'pattern': ...}"
            )
    return reads
