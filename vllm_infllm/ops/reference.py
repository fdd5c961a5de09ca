"""The operations in plain torch, one row after another: the readable reference. All arithmetic is float32.

Packing: token by token, [B, D] for each head.
"""

from collections.abc import Callable

import torch

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.residency import EMPTY, PLACES, Residency, Strategy
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Leaving, Row, halves
from vllm_infllm.selection.rules import peak


def check(head_size: int, block_size: int) -> str | None:
    """Every size can be run."""
    return None


def describe() -> str:
    return "reference (torch)"


def write(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    keys, values = halves(cache)
    block, offset = slots // cache.shape[2], slots % cache.shape[2]
    keys[block, :, offset] = key
    values[block, :, offset] = value


def select(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    query: torch.Tensor,
    representatives: torch.Tensor,
) -> torch.Tensor:
    return select_by(lambda far, units: score(far, representatives[units]), blocks, settings, rope, query)


def select_peak(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    query: torch.Tensor,
    keys: torch.Tensor,
    last: int,
) -> torch.Tensor:
    def score_of(far_query: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        return peak(far_query[-last:], keys[units].float(), settings.scale)

    return select_by(score_of, blocks, settings, rope, query)


def select_by(
    score_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    query: torch.Tensor,
) -> torch.Tensor:
    """`select` by another score: of far queries [T, H, D] float32 and host unit ids [U], scores [U]."""
    chosen = torch.full((len(blocks.rows), blocks.num_chosen), -1, dtype=torch.int64, device=query.device)
    for i, row in enumerate(blocks.rows.tolist()):
        units = blocks.units[row[Row.UNITS] : row[Row.UNITS] + row[Row.STORED]]
        initial, sealed = units[: settings.init_blocks], units[settings.init_blocks :]
        if len(sealed) > settings.topk:
            far_query = rope.far(query[_tokens(row)], _positions(row, query), settings.n_local)
            sealed = sealed[top(score_of(far_query, sealed), settings.topk).to(sealed.device)]
        chosen[i, : len(initial) + len(sealed)] = torch.cat([initial, sealed])
    return chosen


def attend(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    query: torch.Tensor,
    cache: torch.Tensor,
    memory: LayerMemory,
    chosen: torch.Tensor,
    slots: torch.Tensor | None,
    output: torch.Tensor,
    mass: torch.Tensor | None,
) -> None:
    block_size = cache.shape[2]
    keys, values = halves(cache)
    for i, row in enumerate(blocks.rows.tolist()):
        start, end, edge = row[Row.START], row[Row.END], row[Row.EDGE]
        tokens = _tokens(row)
        paged = blocks.block_table[row[Row.TABLE], edge // block_size : -(-end // block_size)].long()
        far_query = stored_key = stored_value = None
        count = int((chosen[i] >= 0).sum())
        if end > settings.n_local:
            far_query = rope.far(query[tokens], _positions(row, query), settings.n_local)
        if count:
            *halves_of, ids = (memory.keys, memory.values, chosen) if slots is None else (keys, values, slots)
            stored_key, stored_value = (_by_token(x[ids[i, :count].to(x.device)].to(cache.device)) for x in halves_of)
        output[tokens], received, stored_received = attend_one(
            query[tokens],
            start,
            _by_token(keys[paged])[: end - edge],
            _by_token(values[paged])[: end - edge],
            edge,
            settings.n_local,
            settings.scale,
            rope,
            far_query,
            stored_key,
            stored_value,
        )
        if row[Row.ACCUMULATE]:
            accumulate(memory.received, paged, edge, start, received)
        if mass is not None and stored_received is not None:
            mass[i, :count] = stored_received.sum(0).unflatten(0, (count, block_size)).sum(1)


def seal(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    cache: torch.Tensor,
    memory: LayerMemory,
) -> None:
    keys, values = halves(cache)
    block_size = cache.shape[2]
    for row in blocks.leaving.tolist():
        physical, block, unit = row[Leaving.PHYSICAL], row[Leaving.BLOCK], row[Leaving.UNIT]
        if unit < 0:  # only fills up
            continue
        positions = torch.arange(block * block_size, (block + 1) * block_size, device=cache.device)
        key = rope.unrotate(keys[physical].transpose(0, 1), positions)
        memory.keys[unit] = key.transpose(0, 1)
        memory.values[unit] = values[physical]
        if row[Leaving.IS_UNIT]:
            memory.representatives[unit] = represent(key, memory.received[physical], settings.repr_topk)


def resolve(
    blocks: ExecutionBlocks, settings: LayerSettings, residency: Residency, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    slots, missing = torch.full_like(chosen, -1), torch.full_like(chosen, -1)
    init = settings.init_blocks
    for i, row in enumerate(blocks.rows.tolist()):
        if row[Row.START] == row[Row.END]:
            continue
        table = blocks.block_table[row[Row.TABLE]].long()
        units = [unit for unit in chosen[i].tolist() if unit >= 0]
        available = min(max(row[Row.STORED] - init, 0), residency.unit.shape[1])
        places, new = _place(residency, row[Row.REQUEST], units, init, available)
        slots[i, : len(units)] = table[places]
        missing[i, new] = chosen[i, new]
    return slots, missing


def gather(memory: LayerMemory, missing: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    present = missing >= 0
    units, blocks = missing[present].to(memory.keys.device), slots[present]
    keys, values = halves(cache)
    keys[blocks] = memory.keys[units].to(cache.device)
    values[blocks] = memory.values[units].to(cache.device)


def attended(
    blocks: ExecutionBlocks, settings: LayerSettings, residency: Residency, chosen: torch.Tensor, mass: torch.Tensor
) -> None:
    for i, row in enumerate(blocks.rows.tolist()):
        if row[Row.START] == row[Row.END]:
            continue
        units, kept = residency.unit[row[Row.REQUEST]], residency.mass[row[Row.REQUEST]]
        kept *= residency.decay
        places = (units[:, None] == chosen[i, settings.init_blocks :]) & (units[:, None] != EMPTY)
        slot, place = places.nonzero(as_tuple=True)
        kept[slot] += mass[i, settings.init_blocks :][place]


def unpack(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return keys, values


# ---- the operations on one execution block: T queries ----------------------------------------------------------------


def score(far_queries: torch.Tensor, representatives: torch.Tensor) -> torch.Tensor:
    """Score of each unit [U]: sum over heads of < mean far query , representative >.

    far_queries [T, H, D] float32; representatives [U, H, D].
    """
    return torch.einsum("hd,uhd->u", far_queries.mean(0), representatives.float())


def top(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """The topk units with the highest scores [U], ascending [min(topk, U)] int64; on equal scores the lower unit."""
    best = torch.sort(scores, descending=True, stable=True).indices[:topk]
    return best.sort().values


def attend_one(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One softmax over the local, initial, remainder and retrieved tokens of an execution block.

    Args:
        query: [T, H, D], rotated to positions start .. start + T - 1.
        paged_key, paged_value: [N, KH, D] tokens paged_start .. start + T - 1 of the paged cache, keys rotated.
        far_query: [T, H, D] rotated to the far position; None while every token is inside the window.
        stored_key, stored_value: [M, KH, D] tokens of the stored blocks attended to, keys un-rotated.

    Returns:
        output [T, H, D] float32; the attention that each paged token received from queries that had it in their window
        [H, N] float32; the attention that each stored token received [H, M] float32.
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
    stored_received = None
    if stored_key is not None:
        stored_received = torch.empty((num_heads, len(stored_key)), dtype=torch.float32, device=query.device)
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
    return output, received, stored_received


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


def _place(
    residency: Residency, request: int, chosen: list[int], init: int, available: int
) -> tuple[list[int], list[int]]:
    """Blocks of the request, by number, that hold the chosen units; places of those that come in now."""
    unit, arrived, used, mass = (
        x[request] for x in (residency.unit, residency.arrived, residency.used, residency.mass)
    )
    residency.clock[request] += 1
    now, wanted = int(residency.clock[request]), chosen[init:]
    resident, slots, new = unit[:available].tolist(), [], []
    rank = {Strategy.LRU: used, Strategy.FIFO: torch.zeros_like(used), Strategy.LRU_S: mass}[residency.strategy]
    counts = residency.counts[request]
    for place, wanted_unit in enumerate(wanted, init):
        if wanted_unit not in resident:
            new.append(place)
            if EMPTY in resident:
                slot = resident.index(EMPTY)
            else:
                candidates = (slot for slot in range(available) if resident[slot] not in wanted)
                slot = min(candidates, key=lambda slot: (float(rank[slot]), int(arrived[slot])))
                counts[2] += 1
            resident[slot] = wanted_unit
            unit[slot], arrived[slot], mass[slot] = wanted_unit, now * PLACES + place, 0.0
        slots.append(resident.index(wanted_unit))
    used[slots] = now
    counts[0] += len(wanted) - len(new)
    counts[1] += len(new)
    return [*range(min(init, len(chosen))), *(init + slot for slot in slots)], new


def _tokens(row: list[int]) -> slice:
    """The row's tokens in the batch."""
    return slice(row[Row.OFFSET], row[Row.OFFSET] + row[Row.END] - row[Row.START])


def _positions(row: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.arange(row[Row.START], row[Row.END], device=like.device)


def _by_token(blocks: torch.Tensor) -> torch.Tensor:
    """[N, KH, B, D] of blocks to [N * B, KH, D] of tokens."""
    return blocks.transpose(1, 2).flatten(0, 1)


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
