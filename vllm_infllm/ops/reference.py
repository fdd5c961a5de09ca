"""The operations in plain torch: the readable reference.

Shapes: T queries, H query heads, KH key/value heads, G = H / KH, D head size, B tokens a block.
All arithmetic is float32.
"""

import torch

from vllm_infllm.attention.rope import RotaryTable


def write(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Write key, value [N, KH, D] to slots [N] of the paged cache [num_blocks, KH, B, 2D]: keys, then values."""
    block_size, head_size = cache.shape[2], key.shape[2]
    block, offset = slots // block_size, slots % block_size
    cache[block, :, offset, :head_size] = key
    cache[block, :, offset, head_size:] = value


def read(cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [N, KH, D] float32 of the tokens of `blocks` [N / B] of the paged cache."""
    tokens = cache[blocks].transpose(1, 2).flatten(0, 1).float()
    key, value = tokens.chunk(2, dim=-1)
    return key, value


def score(far_queries: torch.Tensor, representatives: torch.Tensor) -> torch.Tensor:
    """Score of each unit [U]: sum over heads of < mean far query , representative >.

    far_queries [T, H, D] float32; representatives [U, H, D].
    """
    return torch.einsum("hd,uhd->u", far_queries.mean(0), representatives.float())


def select(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """The topk units with the highest scores [U], ascending [min(topk, U)] int64; on equal scores the lower unit."""
    best = torch.sort(scores, descending=True, stable=True).indices[:topk]
    return best.sort().values


def attend(
    query: torch.Tensor,
    start: int,
    paged_key: torch.Tensor,
    paged_value: torch.Tensor,
    paged_start: int,
    n_local: int,
    scale: float,
    rope: RotaryTable,
    far_query: torch.Tensor | None = None,
    stored_key: torch.Tensor | None = None,
    stored_value: torch.Tensor | None = None,
    stored_received: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the local, initial, remainder and retrieved tokens of an execution block.

    Args:
        query: [T, H, D], rotated to positions start .. start + T - 1.
        paged_key, paged_value: [N, KH, D] tokens paged_start .. start + T - 1 of the paged cache, keys rotated.
        far_query: [T, H, D] rotated to the far position; None while every token is inside the window.
        stored_key, stored_value: [M, KH, D] tokens of the stored blocks attended to, keys un-rotated.
        stored_received: [H, M] float32, written if given: the attention that each of those tokens received.

    Returns:
        output [T, H, D] float32, and the attention that each paged token received from queries that had it in
        their window, [H, N] float32.
    """
    num_queries, num_heads, _ = query.shape
    num_paged, kv_heads, head_size = paged_key.shape
    end = start + num_queries
    query_pos = torch.arange(start, end, device=query.device)[:, None]
    key_pos = torch.arange(paged_start, end, device=query.device)
    # Tokens that have left a window but whose block is not stored yet: the remainder, and initial tokens at first.
    num_edge = max(0, end - n_local - paged_start)
    left_window = query_pos - key_pos[:num_edge] >= n_local  # [T, edge]
    future = key_pos[start - paged_start :] > query_pos  # [T, T]
    edge_key = rope.unrotate(paged_key[:num_edge], key_pos[:num_edge])

    output = torch.empty((num_queries, num_heads, head_size), dtype=torch.float32, device=query.device)
    received = torch.empty((num_heads, num_paged), dtype=torch.float32, device=query.device)
    group = num_heads // kv_heads
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        local = _scores(query[:, heads], paged_key[:, head], scale)
        local[..., :num_edge].masked_fill_(left_window, float("-inf"))
        local[..., start - paged_start :].masked_fill_(future, float("-inf"))
        parts, values = [local], [paged_value[:, head]]
        if far_query is not None and num_edge:
            edge = _scores(far_query[:, heads], edge_key[:, head], scale)
            parts.append(edge.masked_fill_(~left_window, float("-inf")))
            values.append(paged_value[:num_edge, head])
        if far_query is not None and stored_key is not None and stored_value is not None:
            parts.append(_scores(far_query[:, heads], stored_key[:, head], scale))
            values.append(stored_value[:, head])
        weight = 1 / _exp_in_place(parts)  # [G, T, 1]
        attended = sum(p.flatten(0, 1) @ v.float() for p, v in zip(parts, values, strict=True))  # [G * T, D]
        output[:, heads] = (attended.view(group, num_queries, -1) * weight).transpose(0, 1)
        received[heads] = (weight.mT @ local).squeeze(1)
        if stored_received is not None:
            stored_received[heads] = (weight.mT @ parts[-1]).squeeze(1)
    return output, received


def accumulate(received: torch.Tensor, blocks: torch.Tensor, paged_start: int, start: int, new: torch.Tensor) -> None:
    """Add `new` [H, N], for tokens paged_start .. , to `received` [num_blocks, H, B] of `blocks`.

    Tokens from `start` on are new: what their slots held belongs to an earlier owner of the block.
    paged_start is the first token of blocks[0].
    """
    block_size = received.shape[2]
    total = received[blocks].transpose(0, 1).flatten(1)  # [H, blocks * B]
    total[:, start - paged_start :] = 0
    total[:, : new.shape[1]] += new
    received[blocks] = total.unflatten(1, (len(blocks), block_size)).transpose(0, 1)


def represent(key: torch.Tensor, received: torch.Tensor, repr_topk: int) -> torch.Tensor:
    """Representative [H, D] of a unit: per query head the mean of its repr_topk most attended un-rotated keys.

    key [B, KH, D]; received [H, B]; on equal attention the earlier token.
    """
    num_heads, (_, kv_heads, head_size) = received.shape[0], key.shape
    tokens = torch.sort(received, dim=1, descending=True, stable=True).indices[:, :repr_topk]
    per_head = key.transpose(0, 1).repeat_interleave(num_heads // kv_heads, dim=0)  # [H, B, D]
    return per_head.gather(1, tokens[..., None].expand(-1, -1, head_size)).mean(1)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled dot products [G, T, N] of query [T, G, D] with key [N, D]."""
    num_queries, group, head_size = query.shape
    grouped = (query.float() * scale).transpose(0, 1).reshape(-1, head_size)
    return (grouped @ key.float().T).view(group, num_queries, -1)


def _exp_in_place(parts: list[torch.Tensor]) -> torch.Tensor:
    """Exponentiate score parts [G, T, any], less their common maximum; returns their common sum [G, T, 1]."""
    highest = torch.stack([part.amax(-1, keepdim=True) for part in parts]).amax(0)
    for part in parts:
        part.sub_(highest).exp_()
    return torch.stack([part.sum(-1, keepdim=True) for part in parts]).sum(0)
