"""Attention of rows with several tokens: one program attends with the queries of one group of heads.

The queries of a tile are those of some tokens, all heads of the group for each, so that they share tiles of keys and
values: line = token * group + head.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_infllm.ops.triton.rotate import unrotated
from vllm_infllm.ops.triton.tiles import (
    LOG2E,
    LOWEST,
    Call,
    block_of,
    blocks_of_row,
    count_chosen,
    lines,
    paged_key,
    place_of_row,
    scores_of,
    softmax_step,
    tile_at,
    written_tile_at,
)

SHORTEST = tl.constexpr(2)
"""Rows of fewer tokens are attend_decode's, in any batch: a row's results do not depend on who else is in it."""


@dataclass(frozen=True)
class Shape:
    """Lines and tokens of a tile; tokens of a tile of edge tokens, whose keys are un-rotated in registers."""

    lines: int
    tokens: int
    edge_tokens: int
    warps: int
    stages: int


HALF = {64: Shape(128, 64, 32, 8, 3), 128: Shape(128, 64, 16, 8, 3), 256: Shape(64, 32, 16, 8, 2)}
"""By the head size of a tile, in 16 bits."""
FLOAT = {64: Shape(32, 32, 16, 4, 2), 128: Shape(32, 32, 16, 8, 2), 256: Shape(16, 16, 16, 8, 2)}


@dataclass(frozen=True)
class Found:
    """What another provider (local_xformers.py) found in tokens of the window that all queries of a row see.

    out: [KH * N, G, D], for each kv head the N queries of the rows that have such tokens, with the G heads that share
    it. lse: [G, KH * N], base e. bounds: [R, 3] int64, of each row: the first such token and the one behind the last,
    both the first of a block, and where its queries begin among the N. Rows without have equal ones.
    """

    out: torch.Tensor
    lse: torch.Tensor
    bounds: torch.Tensor


def attend(call: Call, lse: torch.Tensor, found: Found | None = None) -> None:
    """Write the output of rows with several tokens, and their log-sum-exp, base 2, to lse [tokens, H] float32.

    found: for tokens that are not read here; the softmax begins with it.
    """
    shape, blocks = call.shape(HALF, FLOAT), call.blocks
    none = Found(call.output, lse, blocks.rows)
    out, found_lse, bounds = ((found or none).out, (found or none).lse, (found or none).bounds)
    group = call.heads // call.kv_heads
    attend_prefill_kernel[(triton.cdiv(blocks.longest * group, shape.lines), call.kv_heads, call.rows)](
        call.output,
        lse,
        call.query,
        call.far,
        call.cache,
        call.rope.cos_sin,
        blocks.rows,
        blocks.block_table,
        *call.stored(),
        call.output.stride(0),
        call.query.stride(0),
        call.cache.stride(0),
        blocks.block_table.stride(0),
        call.settings.n_local,
        call.scale,
        out,
        found_lse,
        bounds,
        out.stride(0),
        out.stride(1),
        found_lse.stride(0),
        found_lse.stride(1),
        found_lse.shape[1] // call.kv_heads,
        **call.heads_constants(),
        **call.rope_constants(),
        most_chosen=call.most_chosen,
        tile_lines=shape.lines,
        tile=call.tile(shape.tokens),
        edge_tile=call.tile(shape.edge_tokens),
        begun=found is not None,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


@triton.jit(
    do_not_specialize=["num_chosen", "table_stride", "found_lse_stride", "found_lse_head_stride", "num_found"],
    do_not_specialize_on_alignment=["rows_ptr", "table_ptr", "ids_ptr", "bounds_ptr"],
)
def attend_prefill_kernel(
    output_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    query_ptr: tl.tensor,
    far_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    table_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    unit_stride: int,
    unit_head_stride: int,
    num_chosen: int,
    output_stride: int,
    query_stride: int,
    block_stride: int,
    table_stride: int,
    n_local: int,
    scale: float,
    found_ptr: tl.tensor,
    found_lse_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    found_stride: int,
    found_head_stride: int,
    found_lse_head_stride: int,
    found_lse_stride: int,
    num_found: int,
    group: tl.constexpr,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    rotary_dim: tl.constexpr,
    neox: tl.constexpr,
    most_chosen: tl.constexpr,
    tile_lines: tl.constexpr,
    tile: tl.constexpr,
    edge_tile: tl.constexpr,
    begun: tl.constexpr,
) -> None:
    """Program (tile of lines, kv head, row)."""
    first_line, kv_head, row = tl.program_id(0) * tile_lines, tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * group
    offset, start, end, edge = place_of_row(rows_ptr, row)
    if (end - start < SHORTEST) | (first_line >= (end - start) * group):
        return
    blocks_ptr = blocks_of_row(rows_ptr, row, table_ptr, table_stride)

    # Lines behind the last one repeat it: they are not written.
    line = first_line + tl.arange(0, tile_lines)
    present = line < (end - start) * group
    line = tl.minimum(line, (end - start) * group - 1)
    token, head = line // group, kv_head * group + line % group
    position = start + token
    first = start + first_line // group
    last = tl.minimum(end - 1, start + (first_line + tile_lines - 1) // group)

    dims = tl.arange(0, padded)
    if begun:
        # What was found is the beginning of the softmax; its `found` tiles, from `gap` on, are left out below.
        bounds_ptr += row * 3
        gap = tl.load(bounds_ptr).to(tl.int32) // tile
        found = tl.load(bounds_ptr + 1).to(tl.int32) // tile - gap
        query_of_found = kv_head.to(tl.int64) * num_found + tl.load(bounds_ptr + 2) + token
        from_ptr = found_ptr + query_of_found * found_stride + line % group * found_head_stride
        mask = tl.where(dims < head_size, found, 0)[None, :] > 0
        attended = tl.load(from_ptr[:, None] + dims[None, :], mask, other=0.0).to(tl.float32)
        from_ptr = found_lse_ptr + query_of_found * found_lse_stride + line % group * found_lse_head_stride
        highest = tl.load(from_ptr, tl.where(present, found, 0) > 0, other=0.0).to(tl.float32) * LOG2E
        highest = tl.where(found > 0, highest, LOWEST)
        total = tl.zeros([tile_lines], tl.float32) + tl.where(found > 0, 1.0, 0.0)
    else:
        attended = tl.zeros([tile_lines, padded], tl.float32)
        total = tl.zeros([tile_lines], tl.float32)
        highest = tl.full([tile_lines], LOWEST, tl.float32)
        gap, found = 0, 0

    # Local tokens: tiles in all windows first, then those on a border of some window.
    query = lines(query_ptr + offset * query_stride + token * query_stride + head * head_size, head_size, padded)
    lower = tl.maximum(edge, first - n_local + 1) // tile
    upper = last // tile + 1
    whole = tl.maximum(lower, tl.cdiv(tl.maximum(0, last - n_local + 1), tile))
    broken = tl.maximum(whole, (first + 1) // tile)
    begin = _behind_gap(whole, gap, found, begun) * tile
    physical = block_of(blocks_ptr, begin, end, block_size)
    for i in tl.range(whole, broken - found):
        key_ptr = paged_key(cache_ptr, physical, kv_head, begin, block_stride, block_size, head_size)
        begin = _behind_gap(i + 1, gap, found, begun) * tile
        physical = block_of(blocks_ptr, begin, end, block_size)
        scores = scores_of(query, tile_at(key_ptr, tile, head_size, padded))
        value = tile_at(key_ptr + block_size * head_size, tile, head_size, padded)
        attended, total, highest = softmax_step(scores, value, scale, attended, total, highest)
    begin = tl.where(lower < whole, lower, broken) * tile
    physical = block_of(blocks_ptr, begin, end, block_size)
    for i in tl.range(lower + 1, upper + 1 - (broken - whole)):
        key_ptr = paged_key(cache_ptr, physical, kv_head, begin, block_stride, block_size, head_size)
        distance = position[:, None] - (begin + tl.arange(0, tile))[None, :]
        scores = scores_of(query, tile_at(key_ptr, tile, head_size, padded))
        scores = tl.where((distance >= 0) & (distance < n_local), scores, float("-inf"))
        value = written_tile_at(key_ptr + block_size * head_size, end - begin, tile, head_size, padded)
        begin = tl.where(i < whole, i, i + (broken - whole)) * tile
        physical = block_of(blocks_ptr, begin, end, block_size)
        attended, total, highest = softmax_step(scores, value, scale, attended, total, highest)

    # Edge tokens: out of the window, not stored yet. They are few; un-rotating them is not pipelined.
    query = lines(far_ptr + offset * heads * head_size + (token * heads + head) * head_size, head_size, padded)
    for i in tl.range(edge // edge_tile, tl.cdiv(tl.maximum(edge, last - n_local + 1), edge_tile), num_stages=1):
        begin = i * edge_tile
        physical = block_of(blocks_ptr, begin, end, block_size)
        key_ptr = paged_key(cache_ptr, physical, kv_head, begin, block_stride, block_size, head_size)
        tokens = begin + tl.arange(0, edge_tile)
        key = unrotated(key_ptr, head_size, cos_sin_ptr, tokens, dims, rotary_dim, neox, (dims < head_size)[None, :])
        scores = scores_of(query, key.to(query.dtype))
        scores = tl.where(position[:, None] - tokens[None, :] >= n_local, scores, float("-inf"))
        value = tile_at(key_ptr + block_size * head_size, edge_tile, head_size, padded)
        attended, total, highest = softmax_step(scores, value, scale, attended, total, highest)

    # Stored blocks.
    ids_ptr += row * num_chosen
    tiles: tl.constexpr = block_size // tile
    count = count_chosen(ids_ptr, num_chosen, most_chosen) * tiles
    unit = tl.load(ids_ptr, count > 0, other=0)
    for i in tl.range(0, count):
        at = unit * unit_stride + kv_head * unit_head_stride + i % tiles * (tile * head_size)
        unit = tl.load(ids_ptr + tl.minimum(i + 1, count - 1) // tiles)
        scores = scores_of(query, tile_at(keys_ptr + at, tile, head_size, padded))
        value = tile_at(values_ptr + at, tile, head_size, padded)
        attended, total, highest = softmax_step(scores, value, scale, attended, total, highest)

    output_ptr += offset * output_stride
    out_ptr = output_ptr + (token * output_stride + head * head_size)[:, None] + dims[None, :]
    out = (attended / total[:, None]).to(output_ptr.dtype.element_ty)
    tl.store(out_ptr, out, present[:, None] & (dims < head_size)[None, :])
    tl.store(lse_ptr + offset * heads + token * heads + head, highest + tl.log2(total), present)


@triton.jit
def _behind_gap(i: int, gap: int, found: int, begun: tl.constexpr) -> tl.tensor:
    """The i-th tile, where `found` tiles from number `gap` on are left out."""
    return tl.where(i < gap, i, i + found) if begun else i
