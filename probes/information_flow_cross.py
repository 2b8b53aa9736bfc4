"""Cross-item: how much an item receives from another, and what undoes it.

With h_A the end at the positions of item A, and "without B" the same prompt with pads for B's tokens:

    flow[A, B]  = |h_A - h_A(without B)| / |h_A|                        0: nothing arrives
    leak[A, B]  = cos(r_A, proto_B) - cos(r_A(without B), proto_B)      above 0: A grows like B
    direct[A, B] = |h_A - h_A(no query of A sees a key of B)| / |h_A|    without ways round

An item leaks when another item's prototype is nearer to what is read of it than its own. It is
repaired by its uncontextualised representation: its positions before block ``layer`` are those of the
prompt with the item alone, everything else stays.

Where flow enters: let left[d] be the flow from B to A that is left when A's positions before block d
are put back to those of the prompt without B. left[0] is the flow, left[n_layers] is 0, and

    flow_by_layer[d] = left[d] - left[d + 1]

is what enters in block d; over the layers it sums to the flow. Entries can be negative: a block may
also take back what came in before.

Paper: Kaplan et al. 2025, arXiv:2504.01137, section 4. Card: information_flow sections 3 and 6.
Flow as a relative change, ``direct`` and ``left`` are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.information_flow_encoding import END, ROUNDING, Encoded, cosines, site_before
from probes.information_flow_items import Padding
from probes.information_flow_tokens import nearest_is_own
from workbench.interventions.knockout import KnockOut
from workbench.models.base import Site


@dataclass(frozen=True)
class Prototypes:
    """Every item alone in its prompt, at its own positions."""

    read: Float[Tensor, "prompt item d_model"]
    """What is read of it at its own positions: the item's prototype."""
    before: Float[Tensor, "prompt item pos d_model"]
    """The residual stream before the patched block."""
    end: Float[Tensor, "prompt item pos d_model"]


def encode_alone(encoded: Encoded, padding: Padding) -> Prototypes:
    """Encode every item of every prompt with pads for everything else."""
    own = encoded.places.mask()
    batch, n_items, n_pos = own.shape
    everyone = torch.arange(batch)
    site = site_before(encoded.layer, encoded.model.spec.n_layers)
    shape = (batch, n_items, n_pos, encoded.model.spec.d_model)
    before, end = torch.zeros(shape), torch.zeros(shape)
    for item in range(n_items):
        tokens = padding.alone(encoded.tokens, own[:, item])
        found = encoded.run(tokens, everyone, [site, END])
        before[:, item], end[:, item] = found[site], found[END]
    return Prototypes(read_alone(replace(encoded, read_prompt=False), end), before, end)


def read_alone(
    encoded: Encoded, end: Float[Tensor, "prompt item pos d_model"]
) -> Float[Tensor, "prompt item d_model"]:
    """Every item's prototype, read where ``encoded`` says."""
    everyone = torch.arange(len(end))
    read = [encoded.reading(end[:, item], everyone)[:, item] for item in range(end.shape[1])]
    return torch.stack(read, dim=1)


def relative_change(
    end: Float[Tensor, "batch pos d_model"],
    other: Float[Tensor, "batch pos d_model"],
    own: Bool[Tensor, "batch item pos"],
) -> Float[Tensor, "batch item"]:
    """|end - other| / |end| over the positions of every item; 0 for items without any."""
    weight = own.float()
    changed = torch.einsum("bip,bpd->bi", weight, (end - other) ** 2).sqrt()
    whole = torch.einsum("bip,bpd->bi", weight, end**2).sqrt()
    return changed / whole.clamp(min=1e-12)


@dataclass(frozen=True)
class CrossFlow:
    """What items do to each other, for one batch."""

    flow: Float[Tensor, "prompt item item"]
    leak: Float[Tensor, "prompt item item"]
    clean_cosine: Float[Tensor, "prompt item"]
    """cos(h_A, h_A alone) over the item's positions."""
    correct: Bool[Tensor, "prompt item"]
    correct_patched: Bool[Tensor, "prompt item"]


def measure_cross(encoded: Encoded, padding: Padding, alone: Prototypes) -> CrossFlow:
    """Flow matrix, leakage and its repair; items are read at their own positions."""
    # Over the whole prompt all items are read alike: nothing could tell one from another.
    encoded = replace(encoded, read_prompt=False)
    own = encoded.places.mask()
    exists = own.any(dim=-1)
    n_items = own.shape[1]
    everyone = torch.arange(len(own))

    def read(end: Tensor) -> Tensor:
        return cosines(encoded.reading(end, everyone), alone.read)

    plain = read(encoded.end)
    flow, leak = torch.zeros_like(plain), torch.zeros_like(plain)
    for item in range(n_items):
        tokens = padding.without(encoded.tokens, own[:, item])
        # As many prompts as in the plain pass, in the same order: what cannot change does not,
        # bit for bit.
        end = encoded.run(tokens, everyone, [END])[END]
        flow[:, :, item] = relative_change(encoded.end, end, own)
        leak[:, :, item] = (plain - read(end))[:, :, item]
    pairs = pair_mask(exists)
    patched = torch.zeros_like(exists)
    for item in range(n_items):
        end = encoded.patched_end(everyone, ~own[:, item], alone.before[:, item])
        patched[:, item] = nearest_is_own(read(end), exists)[:, item]
    clean = torch.einsum("bip,bipd->bid", own.float(), alone.end)
    mixed = torch.einsum("bip,bpd->bid", own.float(), encoded.end)
    cosine = torch.nn.functional.cosine_similarity(mixed, clean, dim=-1) * exists
    return CrossFlow(flow * pairs, leak * pairs, cosine, nearest_is_own(plain, exists), patched)


def pair_mask(exists: Bool[Tensor, "prompt item"]) -> Bool[Tensor, "prompt item item"]:
    """Ordered pairs of two different items that the prompt has."""
    both = exists[:, :, None] & exists[:, None, :]
    return both & ~torch.eye(exists.shape[1], dtype=torch.bool)


# Where it enters


def measure_left(
    encoded: Encoded, padding: Padding, flow: Float[Tensor, "prompt item item"]
) -> Float[Tensor, "prompt depth"]:
    """Flow that is left when the receiving item is clean up to a depth, mean over a prompt's pairs."""
    n_layers = encoded.model.spec.n_layers
    own = encoded.places.mask()
    pairs = pair_mask(own.any(dim=-1))
    everyone = torch.arange(len(own))
    left = torch.zeros(len(own), n_layers + 1)
    left[:, 0] = flow.sum(dim=(1, 2))
    sites = [Site("resid_pre", layer) for layer in range(1, n_layers)]
    for giver in range(own.shape[1]):
        tokens = padding.without(encoded.tokens, own[:, giver])
        clean = encoded.run(tokens, everyone, [*sites, END])
        for taker in range(own.shape[1]):
            # Where nothing arrives at all, as from later items in a causal model, nothing enters.
            if not bool((flow[:, taker, giver] > 0).any()):
                continue
            for layer, site in enumerate(sites, start=1):
                end = encoded.patched_end(everyone, ~own[:, taker], clean[site], layer)
                changed = torch.einsum("bp,bpd->b", own[:, taker].float(), (end - clean[END]) ** 2)
                whole = torch.einsum("bp,bpd->b", own[:, taker].float(), encoded.end**2)
                share = (changed / whole.clamp(min=1e-24)).sqrt()
                arrives = pairs[:, taker, giver] & (flow[:, taker, giver] > 0)
                left[:, layer] += share * arrives
    return left / pairs.sum(dim=(1, 2)).clamp(min=1)[:, None]


def entering(left: Float[Tensor, "prompt depth"]) -> Float[Tensor, "prompt layer"]:
    """What enters in every block."""
    return left[:, :-1] - left[:, 1:]


# Attention knockout


def measure_direct(encoded: Encoded) -> Float[Tensor, "prompt item item"]:
    """Flow along the edges from one item's keys to another's queries, in all layers and heads."""
    own = encoded.places.mask()
    pairs = pair_mask(own.any(dim=-1))
    direct = torch.zeros(pairs.shape)
    for taker, giver in _both_ways(own.shape[1]):
        blocked = own[:, taker, :, None] & own[:, giver, None, :]
        with encoded.model.edit(KnockOut(blocked)):
            found = encoded.model.capture(
                encoded.tokens, [END], attention_mask=encoded.attention_mask
            )
        direct[:, taker, giver] = relative_change(encoded.end, found[END], own)[:, taker]
    # A layer with an edit runs another kernel: what is below its rounding is no change.
    return direct * (pairs & (direct > ROUNDING))


def _both_ways(n_items: int) -> Iterator[tuple[int, int]]:
    for taker in range(n_items):
        yield from ((taker, giver) for giver in range(n_items) if giver != taker)
