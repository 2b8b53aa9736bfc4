"""The single proofs of ``validate``: each measures one difference that must stay below a bound."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from workbench.attention.statistics import ColumnMean, RowEntropy, SinkMass
from workbench.attention.streaming import small_tiles
from workbench.attention.whole import statistics_of_pattern
from workbench.errors import CapabilityError
from workbench.interventions.add_vector import AddVector
from workbench.interventions.zero_heads import ZeroHeads
from workbench.interventions.zerotuning import ZeroTuning, scale_first_column
from workbench.models.base import ModelAdapter, Site
from workbench.models.validation_subject import Measured, Subject, difference, worst_of

_STATISTICS = {"received": ColumnMean(), "entropy": RowEntropy(), "sink": SinkMass((0, 1))}


def _needs_attention(subject: Subject) -> None:
    if not subject.model.spec.n_heads:
        raise CapabilityError(f"{subject.model.spec.family} has no attention")


def rows_sum_to_one(subject: Subject) -> Measured:
    """Every row of the pattern is a distribution; learned sinks take their share."""
    sites = [Site("pattern", layer) for layer in subject.layers]
    patterns = subject.capture(*sites)
    sums = {site: patterns[site].sum(dim=-1) for site in sites}
    sinks = _learned_sinks(subject.model)
    if not sinks:
        worst = worst_of(float((total - 1).abs().max()) for total in sums.values())
        return Measured(worst, subject.bound, f"layers {subject.layers}")
    over = worst_of(float(total.max()) for total in sums.values()) - 1
    if not over <= subject.bound:
        return Measured(over, subject.bound, "rows beside a learned sink sum to more than 1")
    scores = subject.capture(*(Site("attn_scores", layer) for layer in subject.layers))
    off = []
    for layer in subject.layers:
        sink = sinks[layer][None, :, None]
        normaliser = torch.logaddexp(scores[Site("attn_scores", layer)].logsumexp(dim=-1), sink)
        share = torch.exp(sink - normaliser)
        off.append(float((sums[Site("pattern", layer)] + share - 1).abs().max()))
    return Measured(worst_of(off), subject.bound, "with the learned sink's share")


def _learned_sinks(model: Any) -> list[Tensor]:
    inner = getattr(model, "model", None)
    named = inner.named_parameters() if isinstance(inner, torch.nn.Module) else ()
    return [parameter.float().cpu() for name, parameter in named if name.endswith(".sinks")]


def hooked_equals_unhooked(subject: Subject) -> Measured:
    """Reading everything does not move what the unembedding is given."""
    last = Site("ln_final")
    alone = subject.capture(last)[last]
    sites = [last]
    for layer in range(subject.model.spec.n_layers):
        sites += [Site("resid_pre", layer), Site("mlp_out", layer)]
        if "attention" in subject.model.capabilities:
            sites += [Site(name, layer) for name in ("q", "k", "v", "z")]
        if "patterns" in subject.model.capabilities:
            sites.append(Site("pattern", layer))
    together = subject.capture(*sites)[last]
    return Measured(difference(together, alone), subject.bound, f"{len(sites)} sites read at once")


def stock_logits(subject: Subject) -> Measured:
    """The adapter's logits are those of the library's own model.

    Raises:
        CapabilityError: The adapter holds no model of a library.
    """
    inner = getattr(subject.model, "model", None)
    if not isinstance(inner, torch.nn.Module):
        raise CapabilityError("there is no library model inside")
    device = next(inner.parameters()).device
    with torch.no_grad():
        wanted = inner(subject.tokens.to(device)).logits.float().cpu()
    got = subject.model.logits(subject.tokens)
    return Measured(difference(got, wanted), subject.bound, "nothing read, nothing edited")


def no_op_is_bitwise(subject: Subject) -> Measured:
    """An edit that changes nothing leaves every bit as it is."""
    spec = subject.model.spec
    nothing: Any = ZeroTuning(1.0) if spec.n_heads else _steer(subject, 0.0)
    before = subject.model.logits(subject.tokens)
    with subject.model.edit(nothing):
        after = subject.model.logits(subject.tokens)
    return Measured(float((after - before).abs().max()), 0.0, f"{nothing.name}, bit for bit")


def edit_changes_logits(subject: Subject) -> Measured:
    """An edit reaches the output, and is gone afterwards."""
    edit = _usable_edit(subject)
    before = subject.model.logits(subject.tokens)
    with subject.model.edit(edit):
        edited = subject.model.logits(subject.tokens)
    after = subject.model.logits(subject.tokens)
    if not torch.equal(before, after):
        return Measured(0.0, subject.bound, f"{edit.name} is still there after its context", True)
    moved = float((edited - before).abs().max())
    return Measured(moved, subject.bound, f"{edit.name}: the logits must move", above=True)


def edit_acts_where_it_says(subject: Subject) -> Measured:
    """A vector added at one layer is found there, whole, and not one layer earlier."""
    layer = subject.model.spec.n_layers - 1
    edit = _steer(subject, 1.0, layer)
    sites = [Site("resid_pre", each) for each in range(layer + 1)]
    before = subject.capture(*sites)
    with subject.model.edit(edit):
        after = subject.capture(*sites)
    off = [difference(after[site], before[site]) for site in sites[:-1]]
    off.append(difference(after[sites[-1]], before[sites[-1]] + edit.vector))
    return Measured(worst_of(off), subject.bound, f"resid_pre of layers 0 to {layer}")


def heads_are_zeroed(subject: Subject) -> Measured:
    """A silenced head's z is zero where it is read."""
    _needs_attention(subject)
    head = subject.model.spec.n_heads - 1
    with subject.model.edit(ZeroHeads(((0, head),))):
        z = subject.capture(Site("z", 0))[Site("z", 0)]
    others = float(z[:, :, :head].abs().max()) if head else 1.0
    left = float(z[:, :, head].abs().max())
    detail = f"z of L0H{head}"
    return Measured(left if others > 0 else float("inf"), 0.0, detail)


def pattern_edit_is_exact(subject: Subject) -> Measured:
    """ZeroTuning's pattern is the definition's, from the unedited pattern."""
    _needs_attention(subject)
    site = Site("pattern", 0)
    before = subject.capture(site)[site]
    with subject.model.edit(ZeroTuning(2.0)):
        after = subject.capture(site)[site]
    first = torch.zeros(before.shape[0], dtype=torch.long)
    wanted = scale_first_column(before, first, torch.tensor(2.0))
    return Measured(difference(after, wanted), subject.bound, "zerotuning, gamma 2, layer 0")


def streaming_equals_whole(subject: Subject) -> Measured:
    """Statistics collected on the way are those of the whole pattern, wherever it is cut."""
    off: list[float] = []
    n_rows = subject.tokens.shape[1] // 3 + 1
    for layer in subject.layers:
        site = Site("pattern", layer)
        wanted = statistics_of_pattern(subject.capture(site)[site], _STATISTICS)
        for cut in (nullcontext(), small_tiles(n_rows)):
            with cut:
                streamed = subject.capture(site, reduce={"pattern": _STATISTICS})[site]
            off += [difference(streamed[key], wanted[key]) for key in wanted]
    detail = f"{', '.join(_STATISTICS)}; whole and in tiles of {n_rows} rows"
    return Measured(worst_of(off), subject.bound, detail)


def residual_adds_up(subject: Subject) -> Measured:
    """resid_post = resid_pre + attn_out + mlp_out, and the next block starts there."""
    spec = subject.model.spec
    names = ["resid_pre", "mlp_out", "resid_post"] + (["attn_out"] if spec.n_heads else [])
    sites = [Site(name, layer) for layer in range(spec.n_layers) for name in names]
    found = subject.capture(*sites)
    off = []
    for layer in range(spec.n_layers):
        total = sum(found[Site(name, layer)] for name in names if name != "resid_post")
        off.append(difference(found[Site("resid_post", layer)], total))
        if layer:
            here, there = found[Site("resid_pre", layer)], found[Site("resid_post", layer - 1)]
            off.append(difference(here, there))
    return Measured(worst_of(off), subject.bound, f"{spec.n_layers} layers")


def padding_changes_nothing(side: str) -> Callable[[Subject], Measured]:
    """Logits and residual stream of a padded prompt are those of the prompt alone."""

    def check(subject: Subject) -> Measured:
        """The largest difference of either, relative; the second prompt is cut to half its length."""
        n_pos = subject.tokens.shape[1]
        short = n_pos // 2
        tokens, mask = subject.tokens[:2].clone(), torch.ones_like(subject.tokens[:2])
        pad = slice(short, None) if side == "right" else slice(0, n_pos - short)
        real = slice(0, short) if side == "right" else slice(n_pos - short, None)
        tokens[1, real] = subject.tokens[1, :short]
        tokens[1, pad], mask[1, pad] = 0, 0
        last = Site("resid_post", subject.model.spec.n_layers - 1)
        alone = subject.tokens[1:2, :short]
        padded = subject.model.logits(tokens, mask)[1:2, real]
        moved = difference(padded, subject.model.logits(alone))
        stream = subject.model.capture(tokens, [last], attention_mask=mask)[last][1:2, real]
        wanted = subject.model.capture(alone, [last])[last]
        worst = worst_of([moved, difference(stream, wanted)])
        return Measured(worst, subject.bound, f"{n_pos - short} padding tokens on the {side}")

    return check


def batch_equals_alone(subject: Subject) -> Measured:
    """A prompt's numbers do not depend on its neighbours."""
    together = subject.model.logits(subject.tokens)
    alone = torch.cat([subject.model.logits(row[None]) for row in subject.tokens])
    return Measured(difference(together, alone), subject.bound, f"{len(alone)} prompts")


def cached_equals_uncached(subject: Subject) -> Measured:
    """Greedy tokens made with a KV cache are the best ones of a pass without, edit active.

    The value is how far the chosen token's logit lies below the best one in the pass without a
    cache, so that a tie is not a failure.
    """
    n_new = min(8, subject.model.spec.n_ctx - subject.tokens.shape[1])
    # The edit must be strong enough to choose other tokens, or losing it would not show.
    edits = (_usable_edit(subject), _strong_steering(subject))
    gaps = []
    with subject.model.edit(*edits):
        for row in subject.tokens:
            made = subject.model.generate(row[None], max_new_tokens=n_new, do_sample=False)
            logits = subject.model.logits(made)[0, len(row) - 1 : -1]
            chosen = logits.gather(-1, made[0, len(row) :, None])[:, 0]
            best = logits.amax(dim=-1)
            gap = (best - chosen) / logits.abs().amax(dim=-1).clamp(min=1.0)
            gaps.append(float(gap.max()))
    detail = f"{n_new} tokens a prompt under {' and '.join(edit.name for edit in edits)}"
    return Measured(worst_of(gaps), subject.bound, detail)


_COMPARED = ("resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern")


def backend_agrees(other: ModelAdapter) -> Callable[[Subject], Measured]:
    """Another backend finds the same numbers at the same sites."""

    def check(subject: Subject) -> Measured:
        """The largest relative difference over logits and sites; what either refuses is left out."""
        tokens, model = subject.tokens, subject.model
        off = {"logits": difference(other.logits(tokens), model.logits(tokens))}
        refused = set()
        for layer in subject.layers:
            for name in _COMPARED:
                site = Site(name, layer)
                try:
                    wanted = model.capture(tokens, [site])[site]
                    got = other.capture(tokens, [site])[site]
                except CapabilityError:
                    refused.add(name)
                    continue
                off[str(site)] = difference(got, wanted)
        left = f"; not in both: {', '.join(sorted(refused))}" if refused else ""
        worst = worst_of(off.values())
        where = next((name for name, value in off.items() if value == worst), "NaN")
        return Measured(worst, subject.bound, f"{len(off)} sites, worst {where}{left}")

    return check


def _steer(subject: Subject, scale: float, layer: int = 0) -> AddVector:
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(subject.model.spec.d_model, generator=generator)
    return AddVector(f"L{layer}.resid_pre", vector, scale=scale)


def _strong_steering(subject: Subject) -> AddVector:
    """A vector about as long as the residual stream into the last layer."""
    layer = subject.model.spec.n_layers - 1
    site = Site("resid_pre", layer)
    size = float(subject.capture(site)[site].norm(dim=-1).median())
    return _steer(subject, 2.0 * size / subject.model.spec.d_model**0.5, layer)


def _usable_edit(subject: Subject) -> Any:
    """ZeroTuning where the backend can carry it out, else a steering vector."""
    if subject.model.spec.n_heads:
        tuning = ZeroTuning(3.0)
        try:
            with subject.model.edit(tuning):
                return tuning
        except CapabilityError:
            pass
    return _steer(subject, 3.0)
