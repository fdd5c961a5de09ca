"""The scores of units: mean far query of a row, times representatives, over all heads."""

import torch
import triton
import triton.language as tl

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.ops import workspace
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Row
from vllm_infllm.ops.triton.rotate import far

OFFSET, START, END, STORED, UNITS_AT = (
    tl.constexpr(int(column)) for column in (Row.OFFSET, Row.START, Row.END, Row.STORED, Row.UNITS)
)
COLUMNS = tl.constexpr(len(Row))
UNITS, CHUNK = 4, 1024
"""Units that a program scores, and values of each that it reads at a time."""


def score(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    query: torch.Tensor,
    representatives: torch.Tensor,
) -> torch.Tensor:
    """Scores [R, most units of a row] float32, of rows that have a choice: -inf in others and behind a row's units."""
    num_rows, num_units = len(blocks.rows), max(0, blocks.most_stored - settings.init_blocks)
    scores = workspace.take("scores", (num_rows, num_units), torch.float32, query.device)
    mean = mean_far_query(blocks, settings, rope, query)
    score_kernel[(num_rows, triton.cdiv(num_units, UNITS))](
        scores,
        mean,
        representatives,
        blocks.rows,
        blocks.units,
        num_units,
        settings.init_blocks,
        settings.topk,
        size=mean.shape[1] * mean.shape[2],
        num_tile=UNITS,
        chunk=CHUNK,
    )
    return scores


def mean_far_query(
    blocks: ExecutionBlocks, settings: LayerSettings, rope: RotaryTable, query: torch.Tensor
) -> torch.Tensor:
    """Mean far query [R, H, D] float32 of the rows that have a choice."""
    _, heads, head_size = query.shape
    mean = workspace.take("mean", (len(blocks.rows), heads, head_size), torch.float32, query.device)
    padded = triton.next_power_of_2(head_size)
    # Few long rows are spread over programs by parts of a head; rows of one token are many, and short as they are.
    tokens, dims, warps = (1, padded, 1) if blocks.longest == 1 else (64, 32, 4)
    mean_far_query_kernel[(len(blocks.rows), heads, triton.cdiv(head_size, dims))](
        mean,
        query,
        rope.cos_sin,
        blocks.rows,
        query.stride(0),
        settings.n_local,
        settings.init_blocks,
        settings.topk,
        heads=heads,
        head_size=head_size,
        num_dims=dims,
        rotary_dim=rope.cos_sin.shape[1],
        neox=rope.neox,
        num_tokens=tokens,
        num_warps=warps,
    )
    return mean


@triton.jit
def _units_to_score(row: tl.tensor, init_blocks: int, topk: int) -> tl.tensor:
    """Number of units of a row that has a choice, else 0."""
    sealed = tl.load(row + STORED) - init_blocks
    has_choice = (sealed > topk) & (tl.load(row + START) < tl.load(row + END))
    return tl.where(has_choice, sealed, 0)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def mean_far_query_kernel(
    mean_ptr: tl.tensor,
    query_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    query_stride: int,
    n_local: int,
    init_blocks: int,
    topk: int,
    heads: tl.constexpr,
    head_size: tl.constexpr,
    num_dims: tl.constexpr,
    rotary_dim: tl.constexpr,
    neox: tl.constexpr,
    num_tokens: tl.constexpr,
) -> None:
    """Program (row, head, some dims)."""
    row, head = rows_ptr + tl.program_id(0) * COLUMNS, tl.program_id(1)
    if _units_to_score(row, init_blocks, topk) == 0:
        return
    start = tl.load(row + START)
    count = tl.load(row + END) - start
    dims = tl.program_id(2) * num_dims + tl.arange(0, num_dims)
    row_ptr = query_ptr + tl.load(row + OFFSET) * query_stride + head * head_size
    total = tl.zeros([num_dims], tl.float32)
    for first in range(0, count, num_tokens):
        token = first + tl.arange(0, num_tokens)
        mask = (token < count)[:, None] & (dims < head_size)[None, :]
        lines_ptr = (row_ptr + token * query_stride)[:, None]
        x = far(lines_ptr, cos_sin_ptr, start + token, n_local - 1, dims, rotary_dim, neox, mask)
        total += tl.sum(x, 0)
    line = tl.program_id(0) * heads + head
    tl.store(mean_ptr + line * head_size + dims, total / count, dims < head_size)


@triton.jit(do_not_specialize=["num_units"], do_not_specialize_on_alignment=["rows_ptr", "units_ptr"])
def score_kernel(
    scores_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    representatives_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    units_ptr: tl.tensor,
    num_units: int,
    init_blocks: int,
    topk: int,
    size: tl.constexpr,
    num_tile: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    """Program (row, some units). All heads of a representative lie together: `size` values."""
    row = rows_ptr + tl.program_id(0) * COLUMNS
    u = tl.program_id(1) * num_tile + tl.arange(0, num_tile)
    count = _units_to_score(row, init_blocks, topk)
    scored = u < count
    score = tl.full([num_tile], float("-inf"), tl.float32)
    if tl.program_id(1) * num_tile < count:
        unit = tl.load(units_ptr + tl.load(row + UNITS_AT) + init_blocks + u, scored, other=0)
        products = tl.zeros([num_tile, chunk], tl.float32)
        for first in range(0, size, chunk):
            place = first + tl.arange(0, chunk)
            mask = scored[:, None] & (place < size)[None, :]
            read = tl.load((representatives_ptr + unit * size)[:, None] + place[None, :], mask, other=0.0)
            mean = tl.load(mean_ptr + tl.program_id(0) * size + place, place < size, other=0.0)
            products += read.to(tl.float32) * mean[None, :]
        score = tl.where(scored, tl.sum(products, 1), score)
    tl.store(scores_ptr + tl.program_id(0) * num_units + u, score, u < num_units)
