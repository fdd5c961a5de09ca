"""What the rules keep of a unit, and how they score it. Shapes: see `Rule` in __init__.py.

q is a far query, k an un-rotated key, both of one head.
"""

from typing import NamedTuple

import torch


class UnitShape(NamedTuple):
    """Sizes of a unit in one layer: query heads, kv heads, tokens, representative tokens."""

    heads: int
    kv_heads: int
    block_size: int
    repr_topk: int


# ---- summaries ----------------------------------------------------------------------------------------------------


def representatives(keys: torch.Tensor, received: torch.Tensor, unit: UnitShape) -> torch.Tensor:
    """The keys of the tokens that received most attention, for each query head; the paper keeps their mean."""
    tokens = torch.sort(received, dim=1, descending=True, stable=True).indices[:, : unit.repr_topk]
    of_heads = keys.transpose(0, 1).repeat_interleave(unit.heads // unit.kv_heads, dim=0)  # [H, B, D]
    return of_heads.gather(1, tokens[..., None].expand(-1, -1, keys.shape[2])).flatten(0, 1)


def average_key(keys: torch.Tensor, received: torch.Tensor, unit: UnitShape) -> torch.Tensor:
    """The mean of all keys, for each kv head."""
    return keys.mean(0)


def least_and_greatest(keys: torch.Tensor, received: torch.Tensor, unit: UnitShape) -> torch.Tensor:
    """The box that holds all keys, for each kv head: its least and its greatest corner."""
    return torch.cat([keys.amin(0), keys.amax(0)])


# ---- scores -------------------------------------------------------------------------------------------------------


def best(query: torch.Tensor, summaries: torch.Tensor, unit: UnitShape, scale: float) -> torch.Tensor:
    """Sum over heads of the largest < mean q, representative >: one fitting token is enough."""
    products = torch.einsum("hd,uhrd->uhr", query.mean(0), summaries.unflatten(1, (unit.heads, -1)))
    return products.amax(2).sum(1)


def average(query: torch.Tensor, summaries: torch.Tensor, unit: UnitShape, scale: float) -> torch.Tensor:
    """Sum over heads of < mean q, mean k >."""
    return torch.einsum("kgd,ukd->u", query.mean(0).unflatten(0, (unit.kv_heads, -1)), summaries)


def bounds(query: torch.Tensor, summaries: torch.Tensor, unit: UnitShape, scale: float) -> torch.Tensor:
    """Sum over heads of the largest < mean q, k > that a key inside the box could have (as in Quest, 2406.10774)."""
    mean = query.mean(0).unflatten(0, (unit.kv_heads, -1))
    least, greatest = summaries.unflatten(1, (2, unit.kv_heads)).unbind(1)
    up, down = mean.clamp(min=0), mean.clamp(max=0)
    return torch.einsum("kgd,ukd->u", up, greatest) + torch.einsum("kgd,ukd->u", down, least)


def zscore(query: torch.Tensor, summaries: torch.Tensor, unit: UnitShape, scale: float) -> torch.Tensor:
    """The paper's score with each head's scores normalised over the units, so that none outweighs the others."""
    scores = torch.einsum("hd,uhd->hu", query.mean(0), summaries.unflatten(1, (unit.heads, -1)).mean(2))
    centred = scores - scores.mean(1, keepdim=True)
    return (centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)).sum(0)


def peak_of_representatives(
    query: torch.Tensor, summaries: torch.Tensor, unit: UnitShape, scale: float
) -> torch.Tensor:
    """`peak`, as if the representatives were the only tokens."""
    return peak(query, summaries.unflatten(1, (unit.heads, -1)), scale)


def peak(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The largest share of attention that any head of any query would give to a unit, if all units were attended to.

    As log-odds, which tell shares near 1 apart. A head that looks for one thing in the text has a high peak where it
    is; summed over heads, as in the paper, it drowns in heads that look for nothing in particular.

    Args:
        keys: [U, G, n, D], n keys of each unit, the same for H / G query heads.

    Returns:
        [U].
    """
    highest = keys.new_full((len(keys),), -torch.inf)
    for queries, of_units in zip(query.chunk(keys.shape[1], dim=1), keys.unbind(1), strict=True):
        logits = torch.einsum("tgd,und->tgun", queries * scale, of_units)
        highest = torch.maximum(highest, _log_odds(logits.logsumexp(3).flatten(0, 1)).amax(0))
    return highest


def _log_odds(logits: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of each p of a softmax over [N, U]; accurate also where p is 1 but for rounding."""
    log_share = logits.log_softmax(1)
    best = logits.argmax(1, keepdim=True)
    others = logits.scatter(1, best, -torch.inf).logsumexp(1, keepdim=True)
    odds = log_share - torch.log1p(-log_share.exp())
    return odds.scatter(1, best, logits.gather(1, best) - others)
