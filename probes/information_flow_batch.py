"""One run of information-flow: its settings, what is the same for all batches, and one batch.

Paper: Kaplan et al. 2025, arXiv:2504.01137; see ``information_flow``.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.information_flow_cross import (
    encode_alone,
    entering,
    measure_cross,
    measure_direct,
    measure_left,
    read_alone,
)
from probes.information_flow_encoding import (
    END,
    Encoded,
    PadEncodings,
    common_direction,
    site_before,
)
from probes.information_flow_items import NO_ITEM, Padding, Places, find_items
from probes.information_flow_routes import prompt_routes, read_blocks
from probes.information_flow_tokens import item_tokens, measure_tokens
from workbench.context import Batch, Context
from workbench.errors import ConfigError, DataError
from workbench.models.base import ModelAdapter, require
from workbench.models.encoders import ENCODERS
from workbench.settings import check_settings, setting


@dataclass(frozen=True)
class InformationFlowConfig:
    """Defaults are the paper's where it has them."""

    layer: int | None = setting(
        None,
        "the block before which positions are replaced, n_layers: at the end; none: the end of a text "
        "encoder, the middle of a language model",
        low=0,
        unit="blocks",
    )
    tau: float = setting(
        0.8,
        "a token is representative from this share of its item's score on",
        low=0.0,
        high=1.0,
    )
    readout: str = setting(
        "item",
        "read an item at its own positions, or over the whole prompt",
        choices=("item", "prompt"),
    )
    common: str = setting(
        "taken-out",
        "the direction that random tokens share beside pads: taken out of every reading, or left in",
        choices=("taken-out", "left-in"),
    )
    pad: int | None = setting(
        None, "the token id that pads; none: the tokenizer's pad, else its end of text", low=0
    )
    pad_to: int | None = setting(
        None,
        "lengthen prompts with pads that are read like tokens, as image models do; none: leave them",
        low=1,
        unit="tokens",
    )
    sweep: bool = setting(True, "localise by layer where flow between items enters")
    knockout: bool = setting(False, "measure the flow along attention from item to item alone")
    routes: bool = setting(False, "draw the graph of the edges that carry most into the items")
    route_threshold: float = setting(
        0.05, "the share of a node that an edge of the graph must carry", low=0.0, high=1.0
    )
    classifier_folds: int = setting(
        0,
        "predict from a token's vector whether it is redundant, cross-validated in so many folds of "
        "prompts; 0: do not",
        low=0,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.classifier_folds == 1:
            raise ConfigError(
                "classifier_folds must be 0 (no classifier) or at least 2; got 1; set e.g. 5"
            )


@dataclass(frozen=True)
class Job:
    """What is the same for all batches."""

    config: InformationFlowConfig
    layer: int
    places: Places
    lengths: Int[Tensor, " prompt"]
    padding: Padding
    pads: PadEncodings
    common: Float[Tensor, " d_model"] | None


def prepare(
    model: ModelAdapter, tokens: Tensor, config: InformationFlowConfig, context: Context
) -> Job:
    """Check everything that can be checked before the first forward pass.

    Raises:
        ConfigError: A layer or a length that the model does not have.
        CapabilityError: Knockout or routes on a model without attention.
        DataError: Items that cannot be found, or too few prompts for the classifier.
    """
    n_layers, mask = model.spec.n_layers, context.attention_mask
    default = n_layers if model.spec.family in ENCODERS else n_layers // 2
    layer = default if config.layer is None else config.layer
    if layer > n_layers:
        raise ConfigError(
            f"layer must be at most {n_layers}, the end of {model.spec.name}; got {layer}"
        )
    extra = {"attention"} if config.knockout else set()
    extra |= {"attention", "patterns", "weights"} if config.routes else set()
    require(model, frozenset(extra), "knockout or routes of information-flow")
    if len(tokens) < config.classifier_folds:
        raise DataError(
            f"classifier_folds={config.classifier_folds} needs at least as many prompts; got "
            f"{len(tokens)}; give more, or set classifier_folds=0"
        )
    full = torch.full((len(tokens),), tokens.shape[1])
    lengths = full if mask is None else mask.sum(dim=1)
    places = find_items(context.rows, tokens, lengths, model.tokenizer)
    if config.pad_to is not None:
        places = _lengthened(places, int(lengths.max()), config.pad_to, model)
    padding = Padding.of(model.tokenizer, config.pad, model.spec.d_vocab)
    pads, common = PadEncodings(model, padding), None
    if config.common == "taken-out":
        seed = context.seed
        found = context.piece("common", lambda: {"direction": common_direction(pads, seed)})
        common = found["direction"]
    return Job(config, layer, places, lengths, padding, pads, common)


def _lengthened(places: Places, longest: int, size: int, model: ModelAdapter) -> Places:
    if not longest <= size <= model.spec.n_ctx:
        raise ConfigError(
            f"pad_to must lie between {longest}, the longest prompt, and {model.spec.n_ctx}, what "
            f"{model.spec.name} takes; got {size}"
        )
    of_pos = torch.full((len(places.of_pos), size), NO_ITEM)
    width = min(size, places.of_pos.shape[1])
    of_pos[:, :width] = places.of_pos[:, :width]
    return Places(of_pos, places.most)


def unpadded(context: Context) -> Context:
    """The same run of prompts that are all equally long."""
    return replace(context, attention_mask=None)


def measure_batch(
    model: ModelAdapter, batch: Batch, job: Job, rows_at_once: int
) -> dict[str, Tensor]:
    """Everything that is measured on one batch, by the names of the result's arrays."""
    config, padding = job.config, job.padding
    encoded, before = encode_batch(model, batch, job, rows_at_once)
    places = encoded.places
    alone = encode_alone(encoded, padding)
    lengths = job.lengths[batch.start : batch.start + len(batch.tokens)]
    by_token = measure_tokens(encoded, read_alone(encoded, alone.end), lengths, config.tau)
    cross = measure_cross(encoded, padding, alone)
    found = {
        "item_of_pos": places.of_pos,
        "representative": by_token.representative,
        "keep_score": by_token.keep_score,
        "keep_set_score": by_token.keep_set_score,
        "keep_set_correct": by_token.keep_set_correct,
        "flow": cross.flow,
        "leak_score": cross.leak,
        "clean_cosine": cross.clean_cosine,
        "correct": cross.correct,
        "correct_patched": cross.correct_patched,
    }
    if config.sweep:
        found["flow_by_layer"] = entering(measure_left(encoded, padding, cross.flow))
    if config.knockout:
        found["flow_direct"] = measure_direct(encoded)
    if config.routes:
        found |= _routes(model, batch, places, config.route_threshold)
    if config.classifier_folds:
        prompt, pos, _ = item_tokens(places.of_pos)
        found["vectors"] = before[prompt, pos]
    return found


def encode_batch(
    model: ModelAdapter, batch: Batch, job: Job, rows_at_once: int
) -> tuple[Encoded, Float[Tensor, "batch pos d_model"]]:
    """The prompts and the empty prompt beside them; also the stream before the patched block."""
    tokens, mask = batch.tokens, batch.attention_mask
    whole = torch.full((len(tokens),), tokens.shape[1])
    lengths = whole if mask is None else mask.sum(dim=1)
    site = site_before(job.layer, model.spec.n_layers)
    found = model.capture(tokens, [site, END], attention_mask=mask)
    encoded = Encoded(
        model,
        job.layer,
        tokens,
        mask,
        job.places.part(batch.start, len(tokens)),
        job.pads.get(tokens, lengths, site),
        job.pads.get(tokens, lengths, END),
        found[END],
        job.common,
        job.config.readout == "prompt",
        rows_at_once,
    )
    return encoded, found[site]


def _routes(
    model: ModelAdapter, batch: Batch, places: Places, threshold: float
) -> dict[str, Tensor]:
    """The graphs of a batch, prompt by prompt: one prompt's contributions are large enough."""
    edges, importance = [], []
    for row in range(len(batch.tokens)):
        mask = None if batch.attention_mask is None else batch.attention_mask[row : row + 1]
        length = batch.tokens.shape[1] if mask is None else int(mask.sum())
        read = read_blocks(model, batch.tokens[row : row + 1, :length], None)
        roots = places.of_pos[row, :length] != NO_ITEM
        graph, share = prompt_routes(model, read, 0, roots, threshold)
        where = torch.full((len(graph), 1), batch.start + row)
        edges.append(torch.cat([where, graph], dim=1))
        importance.append(share)
    return {"route_edges": torch.cat(edges), "route_importance": torch.cat(importance)}
