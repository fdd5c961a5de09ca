"""Attention received by keys from the queries of rows with several tokens, and by chosen blocks from all rows.

A second pass over the scores, key tile by key tile, with the log-sum-exp of the queries: without atomic additions, so
that results are the same in every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_infllm.ops.triton.attend_prefill import SHORTEST
from vllm_infllm.ops.triton.tiles import (
    ACCUMULATE,
    COLUMNS,
    Call,
    block_of,
    blocks_of_row,
    lines,
    paged_key,
    place_of_row,
    scores_of,
    tile_at,
)


@dataclass(frozen=True)
class Shape:
    """Keys and queries of a tile."""

    keys: int
    queries: int
    warps: int
    stages: int


HALF = {64: Shape(128, 64, 8, 3), 128: Shape(128, 64, 8, 3), 256: Shape(64, 32, 4, 3)}
"""By the head size of a tile, in 16 bits."""
FLOAT = {64: Shape(32, 32, 4, 2), 128: Shape(64, 16, 8, 2), 256: Shape(16, 16, 4, 2)}


def accumulate(call: Call, lse: torch.Tensor) -> None:
    """Add to `received` of the tokens in the window of rows with several tokens. lse: as attend_prefill wrote it."""
    shape, blocks = call.shape(HALF, FLOAT), call.blocks
    tile = call.tile(shape.keys)
    tiles = triton.cdiv(call.settings.n_local + blocks.longest, tile) + 1
    received_kernel[(tiles, call.heads, call.rows)](
        call.received,
        lse,
        call.query,
        call.cache,
        blocks.rows,
        blocks.block_table,
        call.query.stride(0),
        call.cache.stride(0),
        blocks.block_table.stride(0),
        call.settings.n_local,
        call.scale,
        **call.heads_constants(),
        tile=tile,
        queries=shape.queries,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def weigh(call: Call, lse: torch.Tensor, weights: torch.Tensor) -> None:
    """Write the attention that chosen blocks received in rows with several tokens to weights [R, H, num_chosen]."""
    shape, blocks = call.shape(HALF, FLOAT), call.blocks
    weigh_kernel[(blocks.num_chosen, call.heads, call.rows)](
        weights,
        lse,
        call.far,
        blocks.rows,
        call.keys,
        call.ids,
        call.keys.stride(0),
        call.keys.stride(1),
        blocks.num_chosen,
        call.scale,
        **call.heads_constants(),
        tile=call.tile(shape.keys),
        queries=shape.queries,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def sum_heads(call: Call, weights: torch.Tensor, mass: torch.Tensor) -> None:
    """Write mass [R, num_chosen], the sum of the weights [R, H, num_chosen]; 0 where no block is chosen."""
    sum_heads_kernel[(call.rows,)](
        mass, weights, call.ids, call.blocks.num_chosen, heads=call.heads, most_chosen=call.most_chosen, num_warps=1
    )


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["rows_ptr", "table_ptr"])
def received_kernel(
    received_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    query_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    table_ptr: tl.tensor,
    query_stride: int,
    block_stride: int,
    table_stride: int,
    n_local: int,
    scale: float,
    group: tl.constexpr,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
    queries: tl.constexpr,
) -> None:
    """Program (tile of keys, query head, row)."""
    head, row = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    offset, start, end, edge = place_of_row(rows_ptr, row)
    begin = (tl.maximum(edge, start - n_local + 1) // tile + tl.program_id(0)) * tile
    accumulate = tl.load(rows_ptr + row * COLUMNS + ACCUMULATE)
    if (end - start < SHORTEST) | (begin >= end) | (accumulate == 0):
        return
    blocks_ptr = blocks_of_row(rows_ptr, row, table_ptr, table_stride)
    physical = block_of(blocks_ptr, begin, end, block_size)
    key_ptr = paged_key(cache_ptr, physical, head // group, begin, block_stride, block_size, head_size)
    key = tile_at(key_ptr, tile, head_size, padded)
    token = begin + tl.arange(0, tile)

    # Tiles of queries that see some of the tokens, [first, stop); those between whole and broken see all of them.
    first = tl.maximum(0, begin - start) // queries
    stop = tl.cdiv(tl.minimum(end, begin + tile - 1 + n_local) - start, queries)
    whole = tl.cdiv(tl.maximum(0, begin + tile - 1 - start), queries)
    broken = tl.maximum(whole, tl.maximum(0, tl.minimum(end, begin + n_local) - start) // queries)
    query_ptr += offset * query_stride + head * head_size
    lse_ptr += offset * heads + head
    received = tl.zeros([tile, queries], tl.float32)
    for i in tl.range(whole, broken):
        asking = i * queries + tl.arange(0, queries)
        received += _attention(
            key, query_ptr, query_stride, lse_ptr, heads, asking, end - start, scale, head_size, padded
        )
    for i in tl.range(first, stop - (broken - whole)):
        asking = tl.where(i < whole, i, i + (broken - whole)) * queries + tl.arange(0, queries)
        distance = (start + asking)[None, :] - token[:, None]
        new = _attention(key, query_ptr, query_stride, lse_ptr, heads, asking, end - start, scale, head_size, padded)
        received += tl.where((distance >= 0) & (distance < n_local), new, 0.0)

    into_ptr = received_ptr + (physical * heads + head) * block_size + begin % block_size + tl.arange(0, tile)
    before = tl.load(into_ptr, token < start, other=0.0)  # later tokens' places belonged to others
    tl.store(into_ptr, before + tl.sum(received, 1), token < end)


@triton.jit(do_not_specialize=["num_chosen"], do_not_specialize_on_alignment=["rows_ptr", "ids_ptr"])
def weigh_kernel(
    weights_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    far_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    unit_stride: int,
    unit_head_stride: int,
    num_chosen: int,
    scale: float,
    group: tl.constexpr,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
    queries: tl.constexpr,
) -> None:
    """Program (place among the chosen, query head, row)."""
    place, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    offset, start, end, _ = place_of_row(rows_ptr, row)
    unit = tl.load(ids_ptr + row * num_chosen + place)
    if (end - start < SHORTEST) | (unit < 0):
        return
    far_ptr += (offset * heads + head) * head_size
    lse_ptr += offset * heads + head
    weight = tl.zeros([tile, queries], tl.float32)
    for i in range(block_size // tile):
        key_ptr = keys_ptr + unit * unit_stride + head // group * unit_head_stride + i * (tile * head_size)
        key = tile_at(key_ptr, tile, head_size, padded)
        for j in tl.range(0, tl.cdiv(end - start, queries)):
            asking = j * queries + tl.arange(0, queries)
            weight += _attention(
                key, far_ptr, heads * head_size, lse_ptr, heads, asking, end - start, scale, head_size, padded
            )
    total = tl.sum(tl.sum(weight, 1), 0)
    tl.store(weights_ptr + (row.to(tl.int64) * heads + head) * num_chosen + place, total)


@triton.jit(do_not_specialize=["num_chosen"], do_not_specialize_on_alignment=["ids_ptr", "mass_ptr"])
def sum_heads_kernel(
    mass_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_chosen: int,
    heads: tl.constexpr,
    most_chosen: tl.constexpr,
) -> None:
    """Program (row)."""
    row = tl.program_id(0)
    place = tl.arange(0, most_chosen)
    chosen = tl.load(ids_ptr + row * num_chosen + place, place < num_chosen, other=-1) >= 0
    weights_ptr += row.to(tl.int64) * heads * num_chosen + place
    mass = tl.zeros([most_chosen], tl.float32)
    for head in tl.range(0, heads):
        mass += tl.load(weights_ptr + head * num_chosen, chosen, other=0.0)
    tl.store(mass_ptr + row * num_chosen + place, mass, place < num_chosen)


@triton.jit
def _attention(
    key: tl.tensor,
    query_ptr: tl.tensor,
    query_stride: int,
    lse_ptr: tl.tensor,
    lse_stride: int,
    token: tl.tensor,
    count: int,
    scale: float,
    head_size: tl.constexpr,
    padded: tl.constexpr,
) -> tl.tensor:
    """Attention [keys, queries] that keys receive from the queries of a row's tokens; 0 behind the last one."""
    within = tl.minimum(token, count - 1)
    query = lines(query_ptr + within * query_stride, head_size, padded)
    lse = tl.load(lse_ptr + within * lse_stride, token < count, other=float("inf"))
    return tl.exp2(scores_of(key, query) * scale - lse[None, :])
