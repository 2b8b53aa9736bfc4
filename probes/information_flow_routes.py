"""Routes: which edges of the forward pass carry most of what reaches the items.

Every vector that is added up to a node y is a contribution to it. Its importance is how much of y it
is near to, in the L1 norm, clipped at 0 and divided by the sum over all contributions to y:

    proximity(f, y) = max(|y|_1 - |y - f|_1, 0)

Attention adds x_i + sum over heads h and keys j of A_h[i, j] v_j W_O^h to make mid_i; the MLP adds
mid_i + mlp_i to make the next x_i. A graph is grown from the items' positions at the top downwards:
an edge that carries at least the threshold's share is drawn, and where it leads is followed further.

Paper: Ferrando and Voita 2024, "Information Flow Routes", arXiv:2403.00824; written from the idea.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import CapabilityError
from workbench.models.base import ModelAdapter, Site

RESIDUAL, MLP = -1, -2
"""In the column ``head`` of an edge: along the residual stream past attention, or through the MLP."""

COLUMNS = ("prompt", "layer", "head", "from", "to")

PARTS = ("resid_pre", "attn_out", "resid_post", "pattern", "v")


def proximity(
    part: Float[Tensor, "... d_model"], whole: Float[Tensor, "... d_model"]
) -> Float[Tensor, "..."]:
    """How much of ``whole`` a part is near to, in the L1 norm; at least 0."""
    near = whole.abs().sum(dim=-1) - (whole - part).abs().sum(dim=-1)
    return near.clamp(min=0.0)


def attention_importance(
    pattern: Float[Tensor, "head k_pos"],
    written: Float[Tensor, "head k_pos d_model"],
    before: Float[Tensor, " d_model"],
    after: Float[Tensor, " d_model"],
) -> tuple[Float[Tensor, "head k_pos"], Float[Tensor, ""]]:
    """Importance of every edge into one position, and of the residual stream; they sum to 1.

    Args:
        pattern: The query's attention.
        written: v_j W_O of every head and key.
        before: The residual stream before attention.
        after: The residual stream after it.
    """
    edges = proximity(pattern[..., None] * written, after)
    stream = proximity(before, after)
    total = (edges.sum() + stream).clamp(min=1e-12)
    return edges / total, stream / total


def read_blocks(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None,
) -> dict[Site, Tensor]:
    """Everything that blocks add up."""
    names = [*PARTS, "mlp_out"] if model.spec.d_mlp else list(PARTS)
    sites = [Site(name, layer) for layer in range(model.spec.n_layers) for name in names]
    found: dict[Site, Tensor] = model.capture(tokens, sites, attention_mask=attention_mask)
    return found


def prompt_routes(
    model: ModelAdapter,
    found: dict[Site, Tensor],
    row: int,
    roots: Bool[Tensor, " pos"],
    threshold: float,
) -> tuple[Int[Tensor, "edge 4"], Float[Tensor, " edge"]]:
    """The pruned graph of one prompt: (layer, head, from, to) of every edge and its importance.

    Args:
        model: The model.
        found: From ``read_blocks``.
        row: The prompt.
        roots: The positions at the top that it starts from, over the prompt's own length.
        threshold: Share that an edge must carry.

    Raises:
        CapabilityError: Attention does not add A v W_O here; see ``_written``.
    """
    active = roots.clone()
    edges: list[tuple[int, int, int, int]] = []
    importance: list[float] = []
    for layer in reversed(range(model.spec.n_layers)):
        part = _parts(found, layer, row, len(roots))
        written = _written(model, layer, part)
        following = torch.zeros_like(active)
        for pos in active.nonzero()[:, 0].tolist():
            if not _through_mlp(part, layer, pos, threshold, (edges, importance)):
                continue
            into = attention_importance(
                part["pattern"][:, pos], written, part["resid_pre"][pos], _mid(part)[pos]
            )
            for head, key in (into[0] >= threshold).nonzero().tolist():
                edges.append((layer, head, key, pos))
                importance.append(float(into[0][head, key]))
                following[key] = True
            if float(into[1]) >= threshold:
                edges.append((layer, RESIDUAL, pos, pos))
                importance.append(float(into[1]))
                following[pos] = True
        active = following
    return torch.tensor(edges).view(-1, 4).long(), torch.tensor(importance)


def _parts(found: dict[Site, Tensor], layer: int, row: int, n_pos: int) -> dict[str, Tensor]:
    """One prompt's activations in one block, without padding behind it."""
    sites = {name: Site(name, layer) for name in (*PARTS, "mlp_out")}
    whole = {name: found[site][row] for name, site in sites.items() if site in found}
    part = {name: x[:n_pos] for name, x in whole.items() if name != "pattern"}
    return part | {"pattern": whole["pattern"][:, :n_pos, :n_pos]}


def _mid(part: dict[str, Tensor]) -> Float[Tensor, "pos d_model"]:
    # Where attention and MLP are parallel the order of the sum is a convention.
    return part["resid_pre"] + part["attn_out"]


def _through_mlp(
    part: dict[str, Tensor],
    layer: int,
    pos: int,
    threshold: float,
    graph: tuple[list[tuple[int, int, int, int]], list[float]],
) -> bool:
    """Note the MLP's edge where it counts; whether the stream before it is to be followed."""
    mid, after = _mid(part)[pos], part["resid_post"][pos]
    near = torch.stack([proximity(mid, after), proximity(after - mid, after)])
    share = near / near.sum().clamp(min=1e-12)
    if float(share[1]) >= threshold:
        graph[0].append((layer, MLP, pos, pos))
        graph[1].append(float(share[1]))
    # The MLP reads the same stream, so either way leads to it.
    return bool((share >= threshold).any())


def _written(
    model: ModelAdapter, layer: int, part: dict[str, Tensor]
) -> Float[Tensor, "head k_pos d_model"]:
    """v_j W_O of every head, proved to make up what attention adds.

    Raises:
        CapabilityError: The sum is another: a norm after attention, scaled or gated values.
    """
    value = part["v"].repeat_interleave(model.spec.n_heads // model.spec.n_kv_heads, dim=1)
    written = torch.einsum("khd,hdm->hkm", value, model.weight("W_O", layer))
    rest = part["attn_out"] - torch.einsum("hqk,hkm->qm", part["pattern"], written)
    # A bias of the output projection is the same at every position.
    spread = (rest - rest.mean(dim=0)).abs().max()
    missing = part["resid_post"] - _mid(part) - part.get("mlp_out", torch.zeros(()))
    wrong = max(float(spread), float(missing.abs().max()))
    # In half precision the sum that the model rounded is further from ours.
    tolerance = max(1e-3, 2 * torch.finfo(getattr(torch, model.dtype)).eps)
    if wrong > tolerance * float(part["resid_post"].abs().max()):
        raise CapabilityError(
            "routes need attention that adds A v W_O to the residual stream; in layer "
            f"{layer} of {model.spec.name} ({model.spec.family}) it adds something else, such as that "
            "after a norm; set routes=false"
        )
    return written
