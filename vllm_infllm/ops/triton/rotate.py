"""The rotations of attention/rope.py in Triton: keys un-rotated as they are read, queries rotated to the far position.

A rotation by (cos, sin) is `x * cos + turned * sin`, where `turned` is x with each pair turned by a right angle. In
dims from rotary_dim on, and where nothing is read, cos is 1 and sin is 0.
"""

import torch
import triton
import triton.language as tl

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.ops import workspace
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Row

OFFSET, START, END = (tl.constexpr(int(column)) for column in (Row.OFFSET, Row.START, Row.END))
COLUMNS = tl.constexpr(len(Row))
VALUES = 2048
"""That a program rotates: some lines, each of one head of one token, which all lie in registers."""


def far_queries(
    blocks: ExecutionBlocks, settings: LayerSettings, rope: RotaryTable, query: torch.Tensor
) -> torch.Tensor:
    """Queries [tokens, H, D] of the rows that reach beyond the window, rotated to the far position, in their dtype."""
    far = workspace.take("far", tuple(query.shape), query.dtype, query.device)
    _, heads, head_size = query.shape
    padded = triton.next_power_of_2(head_size)
    lines = VALUES // padded
    far_queries_kernel[(len(blocks.rows), triton.cdiv(blocks.longest * heads, lines))](
        far,
        query,
        rope.cos_sin,
        blocks.rows,
        query.stride(0),
        settings.n_local,
        heads=heads,
        head_size=head_size,
        padded=padded,
        rotary_dim=rope.cos_sin.shape[1],
        neox=rope.neox,
        lines=lines,
    )
    return far


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def far_queries_kernel(
    far_ptr: tl.tensor,
    query_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    query_stride: int,
    n_local: int,
    heads: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    rotary_dim: tl.constexpr,
    neox: tl.constexpr,
    lines: tl.constexpr,
) -> None:
    """Program (row, some lines). The heads of a token follow each other."""
    row = rows_ptr + tl.program_id(0) * COLUMNS
    start, end = tl.load(row + START), tl.load(row + END)
    line = tl.program_id(1) * lines + tl.arange(0, lines)
    count = (end - start) * heads
    if (end <= n_local) | (tl.program_id(1) * lines >= count):
        return
    token, head = line // heads, line % heads
    place = tl.load(row + OFFSET) + token
    dims = tl.arange(0, padded)
    mask = (line < count)[:, None] & (dims < head_size)[None, :]
    lines_ptr = (query_ptr + place * query_stride + head * head_size)[:, None]
    x = far(lines_ptr, cos_sin_ptr, start + token, n_local - 1, dims, rotary_dim, neox, mask)
    out_ptr = (far_ptr + (place * heads + head) * head_size)[:, None] + dims[None, :]
    tl.store(out_ptr, x.to(far_ptr.dtype.element_ty), mask)


@triton.jit
def unrotated(
    base_ptr: tl.tensor,
    row_stride: int,
    cos_sin_ptr: tl.tensor,
    positions: tl.tensor,
    dims: tl.tensor,
    rotary_dim: tl.constexpr,
    neox: tl.constexpr,
    mask: tl.tensor,
) -> tl.tensor:
    """Keys, row i at base_ptr + i * row_stride, without the rotation by positions[i]: float32 [positions, dims].

    dims: from an even one on, an even number. mask: [positions, dims] or [positions, 1], what is read; 0 elsewhere.
    """
    rows = base_ptr + tl.arange(0, positions.shape[0])[:, None] * row_stride
    x, turned = _with_turned(rows, dims, rotary_dim, neox, mask)
    cos, sin = _angle(cos_sin_ptr, positions, dims, rotary_dim, neox, mask)
    return (x * cos - turned * sin) / (cos * cos + sin * sin)


@triton.jit
def far(
    rows: tl.tensor,
    cos_sin_ptr: tl.tensor,
    positions: tl.tensor,
    far_position: tl.tensor,
    dims: tl.tensor,
    rotary_dim: tl.constexpr,
    neox: tl.constexpr,
    mask: tl.tensor,
) -> tl.tensor:
    """Queries at `rows` [positions, 1], from positions[i] to the far position: float32 [positions, dims].

    Both rotations in one, and the attention factor of a key at position 0 (RotaryTable.far). dims, mask: as above.
    """
    x, turned = _with_turned(rows, dims, rotary_dim, neox, mask)
    cos, sin = _angle(cos_sin_ptr, positions, dims, rotary_dim, neox, mask)
    everywhere = tl.full([1, 1], True, tl.int1)
    far_cos, far_sin = _angle(cos_sin_ptr, tl.zeros([1], tl.int32) + far_position, dims, rotary_dim, neox, everywhere)
    factor = tl.where(dims < rotary_dim, tl.load(cos_sin_ptr), 1.0)[None, :] / (cos * cos + sin * sin)
    return (x * (far_cos * cos + far_sin * sin) + turned * (far_sin * cos - far_cos * sin)) * factor


@triton.jit
def _with_turned(
    rows: tl.tensor, dims: tl.tensor, rotary_dim: tl.constexpr, neox: tl.constexpr, mask: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """x [rows, dims] in float32, and x with its pairs (first, second) turned into (-second, first)."""
    x = tl.load(rows + dims[None, :], mask, other=0.0).to(tl.float32)
    if neox:
        is_first = dims < rotary_dim // 2
        partner = tl.where(is_first, dims + rotary_dim // 2, dims - rotary_dim // 2)
        rotated = mask & (dims < rotary_dim)[None, :]
        turned = tl.load(rows + partner[None, :], rotated, other=0.0).to(tl.float32)
        turned = tl.where(is_first[None, :], -turned, turned)
    else:
        first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        turned = tl.reshape(tl.join(-second, first), [x.shape[0], x.shape[1]])
    return x, turned


@triton.jit
def _angle(
    cos_sin_ptr: tl.tensor,
    positions: tl.tensor,
    dims: tl.tensor,
    rotary_dim: tl.constexpr,
    neox: tl.constexpr,
    mask: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """cos and sin [positions, dims]."""
    half: tl.constexpr = rotary_dim // 2
    pair = dims % half if neox else dims // 2
    cos_ptr = cos_sin_ptr + positions[:, None] * rotary_dim + pair[None, :]
    rotated = mask & (dims < rotary_dim)[None, :]
    return tl.load(cos_ptr, rotated, other=1.0), tl.load(cos_ptr + half, rotated, other=0.0)
