"""What the rules keep of a unit, and how they score it. Shapes: see `Rule` in __init__.py.

q is a far query, k an un-rotated key, both of one head.
"""

import torch

# ---- summaries ----------------------------------------------------------------------------------------------------


def representatives(keys: torch.Tensor, received: torch.Tensor, repr_topk: int) -> torch.Tensor:
    """The keys of the tokens that received most attention, for each query head; the paper keeps their mean."""
    heads, (_, kv_heads, head_size) = len(received), keys.shape
    tokens = torch.sort(received, dim=1, descending=True, stable=True).indices[:, :repr_topk]
    of_heads = keys.transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0)  # [H, B, D]
    return of_heads.gather(1, tokens[..., None].expand(-1, -1, head_size)).flatten(0, 1)


def average_key(keys: torch.Tensor, received: torch.Tensor, repr_topk: int) -> torch.Tensor:
    """The mean of all keys, for each kv head."""
    return keys.mean(0)


def least_and_greatest(keys: torch.Tensor, received: torch.Tensor, repr_topk: int) -> torch.Tensor:
    """The box that holds all keys, for each kv head: its least and its greatest corner."""
    return torch.cat([keys.amin(0), keys.amax(0)])


# ---- scores -------------------------------------------------------------------------------------------------------


def best(query: torch.Tensor, summaries: torch.Tensor, scale: float) -> torch.Tensor:
    """Sum over heads of the largest < mean q, representative >: one fitting token is enough."""
    products = torch.einsum("hd,uhrd->uhr", query.mean(0), _by_head(query, summaries))
    return products.amax(2).sum(1)


def average(query: torch.Tensor, summaries: torch.Tensor, scale: float) -> torch.Tensor:
    """Sum over heads of < mean q, mean k >."""
    return torch.einsum("kgd,ukd->u", _grouped(query, summaries.shape[1]), summaries)


def bounds(query: torch.Tensor, summaries: torch.Tensor, scale: float) -> torch.Tensor:
    """Sum over heads of the largest < mean q, k > that a key inside the box could have (as in Quest, 2406.10774)."""
    kv_heads = summaries.shape[1] // 2
    mean, (least, greatest) = _grouped(query, kv_heads), summaries.unflatten(1, (2, kv_heads)).unbind(1)
    up, down = mean.clamp(min=0), mean.clamp(max=0)
    return torch.einsum("kgd,ukd->u", up, greatest) + torch.einsum("kgd,ukd->u", down, least)


def zscore(query: torch.Tensor, summaries: torch.Tensor, scale: float) -> torch.Tensor:
    """The paper's score with each head's scores normalised over the units, so that none outweighs the others."""
    scores = torch.einsum("hd,uhd->hu", query.mean(0), _by_head(query, summaries).mean(2))
    centred = scores - scores.mean(1, keepdim=True)
    return (centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)).sum(0)


def peak(query: torch.Tensor, summaries: torch.Tensor, scale: float) -> torch.Tensor:
    """The largest share of attention that any head of any query gives to the unit's representatives.

    Shares are a softmax over the representatives of all units. A head that looks for one thing in the text has a high
    peak at it; summed over heads, as the paper does it, it drowns in those that look for nothing.
    """
    of_heads = _by_head(query, summaries)
    units, _, number, _ = of_heads.shape
    highest = summaries.new_full((units,), -torch.inf)
    for head in range(query.shape[1]):  # one at a time: [T, U, repr_topk] is large
        logits = query[:, head] @ of_heads[:, head].flatten(0, 1).T * scale
        shares = logits.softmax(1).unflatten(1, (units, number)).sum(2)
        highest = torch.maximum(highest, shares.amax(0))
    return highest


def _by_head(query: torch.Tensor, summaries: torch.Tensor) -> torch.Tensor:
    """[U, H * repr_topk, D] as [U, H, repr_topk, D]."""
    return summaries.unflatten(1, (query.shape[1], -1))


def _grouped(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Mean queries [H, D] as [KH, H / KH, D]."""
    return query.mean(0).unflatten(0, (kv_heads, -1))
