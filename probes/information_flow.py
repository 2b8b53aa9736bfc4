"""Information flow: which tokens carry an item of a prompt, and what items receive from each other.

An item is a run of tokens that names one thing. Token-wise, all positions but a keep-set S are
replaced by the encoding p of the empty prompt at the same positions,

    h'_i = h_i if i in S else p_i,

before block ``layer``, the rest of the model runs, and what is read of the item at the end is compared
with the item's encoding alone: the cosine is the keep-set's score. A token that alone scores nearly as
the whole item is representative, the others are redundant. Cross-item, a prompt is compared with
itself without another item, and an item that reads as another leaks; it is repaired by putting its
uncontextualised representation in its place. The formulas are in ``information_flow_tokens``,
``_cross`` and ``_routes``.

Paper: Kaplan et al. 2025, "Follow the Flow", arXiv:2504.01137. They generate an image from the
patched encoding and have a vision-language model judge it; here the reading is a cosine, so that no
judge is needed (``information_flow_images`` has images). Their released code re-encodes the empty
prompt for every keep-set and patches position by position; here it is encoded once a length, and
keep-sets run as one batch.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.information_flow_batch import (
    InformationFlowConfig,
    measure_batch,
    prepare,
    unpadded,
)
from probes.information_flow_routes import COLUMNS
from probes.information_flow_summary import FlowNumbers
from probes.information_flow_tokens import KEEP_SETS, item_tokens, predict_redundant
from workbench.context import Context
from workbench.encoding import token_labels
from workbench.errors import DataError
from workbench.models.base import ModelAdapter
from workbench.registry import probe

# Result (its settings are in ``information_flow_batch``)


@dataclass(frozen=True)
class InformationFlowResult(FlowNumbers):
    """What keep-sets and comparisons of prompts show; entries of items that are not there are 0."""

    item_of_pos: Int[Tensor, "prompt pos"]
    """Index of the item that a token belongs to, -1 for none."""
    representative: Bool[Tensor, "prompt pos"]
    """Tokens that carry their item alone; False outside items."""
    keep_score: Float[Tensor, "prompt pos"]
    """Score of the keep-set of this token alone, in [-1, 1]; 0 outside items."""
    keep_set_score: Float[Tensor, "prompt item keep_set"]
    """Score of the item under the keep-sets of ``labels``."""
    keep_set_correct: Bool[Tensor, "prompt item keep_set"]
    """Whether the item's own prototype is the nearest of the prompt's."""
    flow: Float[Tensor, "prompt item item"]
    """Relative change of the row item when the column item is taken away, 0 or more."""
    leak_score: Float[Tensor, "prompt item item"]
    """How much nearer the column item brings the row item to itself, a difference of cosines."""
    clean_cosine: Float[Tensor, "prompt item"]
    """Cosine of an item's end in the prompt with its end alone."""
    correct: Bool[Tensor, "prompt item"]
    """Whether an item in its prompt reads as itself; False: it leaks (or is not there)."""
    correct_patched: Bool[Tensor, "prompt item"]
    """The same after its uncontextualised representation is put in its place."""
    flow_by_layer: Float[Tensor, "prompt layer"] | None = None
    """Flow that enters in each block, mean over the prompt's ordered pairs of items."""
    flow_direct: Float[Tensor, "prompt item item"] | None = None
    """Relative change of the row item when its queries cannot see the column item's keys."""
    route_edges: Int[Tensor, "edge 5"] | None = None
    """prompt, layer, head (-1: residual, -2: MLP), from and to position."""
    route_importance: Float[Tensor, " edge"] | None = None
    """Share of the node that the edge carries, in [0, 1]."""
    predicted_redundant: Bool[Tensor, "prompt pos"] | None = None
    """The classifier's held-out prediction, for tokens of items of several tokens."""
    config: InformationFlowConfig = field(default_factory=InformationFlowConfig)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """``keep_set``: see ``information_flow_tokens``; ``column`` of ``route_edges``."""


# Measurement


@probe(
    "information-flow",
    config=InformationFlowConfig,
    result=InformationFlowResult,
    paper="arXiv:2504.01137",
    needs={"capture", "edits"},
)
def measure_information_flow(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: InformationFlowConfig,
    context: Context | None = None,
) -> InformationFlowResult:
    """Find the tokens that carry each item, and what items receive from each other."""
    context = context or Context()
    job = prepare(model, tokens, config, context)
    if config.pad_to is not None:
        tokens = job.padding.lengthened(tokens, job.lengths, config.pad_to)
        context = unpadded(context)
    rows_at_once = context.batch_size or max(len(tokens), 16)
    parts = context.each_batch(tokens, lambda batch: measure_batch(model, batch, job, rows_at_once))
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    vectors = whole.pop("vectors", None)
    if vectors is not None:
        whole["predicted_redundant"] = _classify(vectors, whole, config.classifier_folds)
    labels = {"keep_set": KEEP_SETS, "column": COLUMNS, **token_labels(model.tokenizer, tokens)}
    return InformationFlowResult(**whole, config=config, labels=labels)


def _classify(
    vectors: Float[Tensor, "row d_model"], whole: dict[str, Tensor], n_folds: int
) -> Bool[Tensor, "prompt pos"]:
    """Held-out predictions for the tokens of items of several tokens."""
    prompt, pos, item = item_tokens(whole["item_of_pos"])
    size = (whole["item_of_pos"][prompt] == item[:, None]).sum(dim=1)
    several = size > 1
    if not bool(several.any()):
        raise DataError(
            "the redundancy classifier needs items of several tokens; every item has one; give longer "
            "names, or set classifier_folds=0"
        )
    prompt, pos = prompt[several], pos[several]
    redundant = ~whole["representative"][prompt, pos]
    predicted = torch.zeros(whole["item_of_pos"].shape, dtype=torch.bool)
    predicted[prompt, pos] = predict_redundant(vectors[several], redundant, prompt, n_folds)
    return predicted
