"""Attention of rows with one token: keys are split over programs, whose softmaxes are joined after.

The paged tokens of a row, from EDGE on, are cut into splits, and so are the tokens of its chosen blocks, whose splits
follow. What a split covers depends on the row alone, and splits are joined in their order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_infllm.ops import workspace
from vllm_infllm.ops.triton.rotate import unrotated
from vllm_infllm.ops.triton.tiles import (
    ACCUMULATE,
    COLUMNS,
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

SPLITS_AT_A_TIME = tl.constexpr(32)
SCORES_AT_A_TIME = 1024


@dataclass(frozen=True)
class Shape:
    """Tokens of a tile; tokens of a tile of edge tokens, whose keys are un-rotated in registers."""

    tokens: int
    edge_tokens: int
    warps: int
    stages: int


HALF = {64: Shape(64, 32, 4, 3), 128: Shape(64, 16, 4, 3), 256: Shape(32, 16, 4, 3)}
"""By the head size of a tile, in 16 bits."""
FLOAT = {64: Shape(32, 32, 4, 2), 128: Shape(32, 16, 4, 2), 256: Shape(16, 16, 8, 2)}


def split_tokens(call: Call) -> int:
    """A few hundred programs for one row of the usual 50 blocks of 128, whatever the number of kv heads."""
    return min(256, max(128, triton.next_power_of_2(32 * call.kv_heads)))


@dataclass(frozen=True)
class Parts:
    """What splits leave to be joined.

    highest, total [R, H, splits], attended [R, H, splits, D]: softmax of each split. scores [R, H, n_local]: not
    scaled, of the tokens in the window, in rows that accumulate. stored [R, H, num_chosen * tiles of a block]:
    log-sum-exp, base 2, of each tile of the chosen blocks, if they are weighed. All float32.
    """

    highest: torch.Tensor
    total: torch.Tensor
    attended: torch.Tensor
    scores: torch.Tensor
    stored: torch.Tensor

    @classmethod
    def take(cls, call: Call, weighs: bool) -> "Parts":
        paged = call.settings.n_local + (2 + call.settings.init_blocks) * call.block_size
        stored = call.blocks.num_chosen * call.block_size
        splits = triton.cdiv(paged, split_tokens(call)) + triton.cdiv(stored, split_tokens(call))
        tiles = stored // call.tile(call.shape(HALF, FLOAT).tokens) if weighs else 0

        def take(name: str, *shape: int) -> torch.Tensor:
            shape = (call.rows, call.heads, *shape)
            return workspace.take(f"decode {name}", shape, torch.float32, call.query.device)

        return cls(
            highest=take("highest", splits),
            total=take("total", splits),
            attended=take("attended", splits, call.head_size),
            scores=take("scores", call.settings.n_local),
            stored=take("stored", tiles),
        )


def attend(call: Call, weights: torch.Tensor | None) -> None:
    """Write the output of rows with one token and the attention that their tokens received.

    weights: [R, H, num_chosen] float32, written if given: attention that each chosen block received from each head.
    """
    parts = Parts.take(call, weights is not None)
    _attend_splits(call, parts, weights is not None)
    _join(call, parts, weights)


def _attend_splits(call: Call, parts: Parts, weighs: bool) -> None:
    shape, blocks = call.shape(HALF, FLOAT), call.blocks
    attend_split_kernel[(parts.highest.shape[2], call.kv_heads, call.rows)](
        parts.highest,
        parts.total,
        parts.attended,
        parts.scores,
        parts.stored,
        call.query,
        call.far,
        call.cache,
        call.rope.cos_sin,
        blocks.rows,
        blocks.block_table,
        *call.stored(),
        call.query.stride(0),
        call.cache.stride(0),
        blocks.block_table.stride(0),
        call.settings.n_local,
        call.scale,
        **call.heads_constants(),
        **call.rope_constants(),
        most_chosen=call.most_chosen,
        tile_heads=max(16, triton.next_power_of_2(call.heads // call.kv_heads)),
        tile=call.tile(shape.tokens),
        edge_tile=call.tile(shape.edge_tokens),
        split_tokens=split_tokens(call),
        weighs=weighs,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def _join(call: Call, parts: Parts, weights: torch.Tensor | None) -> None:
    blocks = call.blocks
    join_kernel[(1 + triton.cdiv(call.settings.n_local, SCORES_AT_A_TIME), call.heads, call.rows)](
        call.output,
        call.received,
        parts.stored if weights is None else weights,
        parts.highest,
        parts.total,
        parts.attended,
        parts.scores,
        parts.stored,
        blocks.rows,
        blocks.block_table,
        call.ids,
        blocks.num_chosen,
        parts.highest.shape[2],
        call.output.stride(0),
        blocks.block_table.stride(0),
        call.settings.n_local,
        call.scale,
        block_size=call.block_size,
        head_size=call.head_size,
        padded=call.padded,
        most_chosen=call.most_chosen,
        tiles=call.block_size // call.tile(call.shape(HALF, FLOAT).tokens),
        padded_tiles=triton.next_power_of_2(call.block_size // call.tile(call.shape(HALF, FLOAT).tokens)),
        split_tokens=split_tokens(call),
        scores_at_a_time=SCORES_AT_A_TIME,
        weighs=weights is not None,
        num_warps=4,
    )


@triton.jit(
    do_not_specialize=["num_chosen", "table_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "table_ptr", "ids_ptr"],
)
def attend_split_kernel(
    highest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    stored_ptr: tl.tensor,
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
    query_stride: int,
    block_stride: int,
    table_stride: int,
    n_local: int,
    scale: float,
    group: tl.constexpr,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    rotary_dim: tl.constexpr,
    neox: tl.constexpr,
    most_chosen: tl.constexpr,
    tile_heads: tl.constexpr,
    tile: tl.constexpr,
    edge_tile: tl.constexpr,
    split_tokens: tl.constexpr,
    weighs: tl.constexpr,
) -> None:
    """Program (split, kv head, row): the queries of one group of heads with the tokens of one split."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, heads = tl.num_programs(0), tl.num_programs(1) * group
    offset, start, end, edge = place_of_row(rows_ptr, row)
    if end - start != 1:
        return
    ids_ptr += row * num_chosen
    chosen = count_chosen(ids_ptr, num_chosen, most_chosen)
    paged_splits = tl.cdiv(end - edge, split_tokens)
    if split >= paged_splits + tl.cdiv(chosen * block_size, split_tokens):
        return
    blocks_ptr = blocks_of_row(rows_ptr, row, table_ptr, table_stride)

    # Heads behind the last one of the group repeat it: they are not written.
    line = tl.arange(0, tile_heads)
    present = line < group
    head = kv_head * group + tl.minimum(line, group - 1)
    line_of_row = row.to(tl.int64) * heads + head

    attended = tl.zeros([tile_heads, padded], tl.float32)
    total = tl.zeros([tile_heads], tl.float32)
    highest = tl.full([tile_heads], LOWEST, tl.float32)

    # Paged tokens [begin, stop) of this split, none in a split of stored ones: those in the window, ...
    begin = edge + split * split_tokens
    stop = tl.minimum(end, begin + split_tokens)
    window = end - n_local
    query = lines(query_ptr + offset * query_stride + head * head_size, head_size, padded)
    kept_end = tl.where(tl.load(rows_ptr + row * COLUMNS + ACCUMULATE) != 0, end, window)
    physical = block_of(blocks_ptr, tl.maximum(begin, window), end, block_size)
    for i in tl.range(tl.maximum(begin, window) // tile, tl.cdiv(stop, tile)):
        key_ptr = paged_key(cache_ptr, physical, kv_head, i * tile, block_stride, block_size, head_size)
        physical = block_of(blocks_ptr, (i + 1) * tile, end, block_size)
        token = i * tile + tl.arange(0, tile)
        visible = ((token >= window) & (token < end))[None, :]
        scores = scores_of(query, tile_at(key_ptr, tile, head_size, padded))
        kept_ptr = scores_ptr + line_of_row[:, None] * n_local + (token - window)[None, :]
        tl.store(kept_ptr, scores, present[:, None] & ((token >= window) & (token < kept_end))[None, :])
        scores = tl.where(visible, scores, float("-inf"))
        value = written_tile_at(key_ptr + block_size * head_size, end - i * tile, tile, head_size, padded)
        attended, total, highest = softmax_step(scores, value, scale, attended, total, highest)

    # ... and those that left it and are not stored yet.
    query = lines(far_ptr + (offset * heads + head) * head_size, head_size, padded)
    dims = tl.arange(0, padded)
    for i in tl.range(begin // edge_tile, tl.cdiv(tl.minimum(stop, window), edge_tile), num_stages=1):
        physical = block_of(blocks_ptr, i * edge_tile, end, block_size)
        key_ptr = paged_key(cache_ptr, physical, kv_head, i * edge_tile, block_stride, block_size, head_size)
        token = i * edge_tile + tl.arange(0, edge_tile)
        key = unrotated(key_ptr, head_size, cos_sin_ptr, token, dims, rotary_dim, neox, (dims < head_size)[None, :])
        scores = tl.where((token < window)[None, :], scores_of(query, key.to(query.dtype)), float("-inf"))
        value = tile_at(key_ptr + block_size * head_size, edge_tile, head_size, padded)
        attended, total, highest = softmax_step(scores, value, scale, attended, total, highest)

    # Stored blocks.
    tiles: tl.constexpr = block_size // tile
    first = tl.maximum(0, split - paged_splits) * (split_tokens // tile)
    last = tl.where(split < paged_splits, 0, tl.minimum(chosen * tiles, first + split_tokens // tile))
    unit = tl.load(ids_ptr + first // tiles, first < last, other=0)
    for i in tl.range(first, last):
        at = unit * unit_stride + kv_head * unit_head_stride + i % tiles * (tile * head_size)
        unit = tl.load(ids_ptr + tl.minimum(i + 1, last - 1) // tiles)
        scores = scores_of(query, tile_at(keys_ptr + at, tile, head_size, padded))
        if weighs:
            peak = tl.max(scores, 1)
            of_tile = peak * scale + tl.log2(tl.sum(tl.exp2((scores - peak[:, None]) * scale), 1))
            tl.store(stored_ptr + line_of_row * (num_chosen * tiles) + i, of_tile, present)
        value = tile_at(values_ptr + at, tile, head_size, padded)
        attended, total, highest = softmax_step(scores, value, scale, attended, total, highest)

    part = line_of_row * splits + split
    tl.store(highest_ptr + part, highest, present)
    tl.store(total_ptr + part, total, present)
    mask = present[:, None] & (dims < head_size)[None, :]
    tl.store(attended_ptr + part[:, None] * head_size + dims[None, :], attended, mask)


@triton.jit(
    do_not_specialize=["num_chosen", "splits", "table_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "table_ptr", "ids_ptr"],
)
def join_kernel(
    output_ptr: tl.tensor,
    received_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    highest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    stored_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    table_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_chosen: int,
    splits: int,
    output_stride: int,
    table_stride: int,
    n_local: int,
    scale: float,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    most_chosen: tl.constexpr,
    tiles: tl.constexpr,
    padded_tiles: tl.constexpr,
    split_tokens: tl.constexpr,
    scores_at_a_time: tl.constexpr,
    weighs: tl.constexpr,
) -> None:
    """Program (part, head, row): part 0 writes the output, the others what the tokens in the window received."""
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    offset, start, end, edge = place_of_row(rows_ptr, row)
    accumulate = tl.load(rows_ptr + row * COLUMNS + ACCUMULATE)
    window = end - n_local
    first = window + (part - 1) * scores_at_a_time
    if (end - start != 1) | ((part > 0) & ((accumulate == 0) | (first + scores_at_a_time <= edge))):
        return
    chosen = count_chosen(ids_ptr + row * num_chosen, num_chosen, most_chosen)
    count = tl.cdiv(end - edge, split_tokens) + tl.cdiv(chosen * block_size, split_tokens)
    line = row.to(tl.int64) * heads + head
    highest, total = _joined(highest_ptr + line * splits, total_ptr + line * splits, count)

    if part == 0:
        out = _attended(
            attended_ptr + line * splits * head_size, highest_ptr + line * splits, count, highest, padded, head_size
        )
        dims = tl.arange(0, padded)
        out_ptr = output_ptr + offset * output_stride + head * head_size + dims
        tl.store(out_ptr, (out / total).to(output_ptr.dtype.element_ty), dims < head_size)
        if weighs:
            place, of_block = tl.arange(0, most_chosen)[:, None], tl.arange(0, padded_tiles)[None, :]
            lse_ptr = stored_ptr + line * (num_chosen * tiles) + place * tiles + of_block
            lse = tl.load(lse_ptr, (place < chosen) & (of_block < tiles), other=float("-inf"))
            weight = tl.sum(tl.exp2(lse - (highest + tl.log2(total))), 1)
            tl.store(
                weights_ptr + line * num_chosen + tl.arange(0, most_chosen), weight, tl.arange(0, most_chosen) < chosen
            )
    else:
        token = first + tl.arange(0, scores_at_a_time)
        visible = (token >= edge) & (token >= window) & (token < end)
        score = tl.load(scores_ptr + line * n_local + (token - window), visible, other=0.0)
        new = tl.exp2(score * scale - (highest + tl.log2(total)))
        blocks_ptr = blocks_of_row(rows_ptr, row, table_ptr, table_stride)
        physical = tl.load(blocks_ptr + token // block_size, visible, other=0).to(tl.int64)
        into_ptr = received_ptr + (physical * heads + head) * block_size + token % block_size
        tl.store(into_ptr, tl.load(into_ptr, visible & (token < start), other=0.0) + new, visible)


@triton.jit
def _joined(highest_ptr: tl.tensor, total_ptr: tl.tensor, count: int) -> tuple[tl.tensor, tl.tensor]:
    """Highest score of a row and head over all splits, and the total relative to it."""
    splits = tl.arange(0, SPLITS_AT_A_TIME)
    highest = tl.full([SPLITS_AT_A_TIME], LOWEST, tl.float32)
    for i in tl.range(0, count, SPLITS_AT_A_TIME):
        highest = tl.maximum(highest, tl.load(highest_ptr + i + splits, i + splits < count, other=LOWEST))
    peak = tl.max(highest, 0)
    total = tl.zeros([SPLITS_AT_A_TIME], tl.float32)
    for i in tl.range(0, count, SPLITS_AT_A_TIME):
        weight = tl.exp2(tl.load(highest_ptr + i + splits, i + splits < count, other=LOWEST) - peak)
        total += weight * tl.load(total_ptr + i + splits, i + splits < count, other=0.0)
    return peak, tl.sum(total, 0)


@triton.jit
def _attended(
    attended_ptr: tl.tensor,
    highest_ptr: tl.tensor,
    count: int,
    peak: float,
    padded: tl.constexpr,
    head_size: tl.constexpr,
) -> tl.tensor:
    """What the splits of a row and head attended to, relative to the highest score."""
    splits, dims = tl.arange(0, SPLITS_AT_A_TIME), tl.arange(0, padded)[None, :]
    attended = tl.zeros([SPLITS_AT_A_TIME, padded], tl.float32)
    for i in tl.range(0, count, SPLITS_AT_A_TIME):
        weight = tl.exp2(tl.load(highest_ptr + i + splits, i + splits < count, other=LOWEST) - peak)
        mask = (i + splits < count)[:, None] & (dims < head_size)
        attended += weight[:, None] * tl.load(attended_ptr + (i + splits)[:, None] * head_size + dims, mask, other=0.0)
    return tl.sum(attended, 0)
