"""What the attention kernels share: one call's tensors and sizes, tiles of keys and values, a step of the softmax.

Scores are kept times log2(e), so that the softmax is one of powers of 2.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Row

COLUMNS = tl.constexpr(len(Row))
OFFSET, START, END = (tl.constexpr(int(column)) for column in (Row.OFFSET, Row.START, Row.END))
EDGE, TABLE, ACCUMULATE = (tl.constexpr(int(column)) for column in (Row.EDGE, Row.TABLE, Row.ACCUMULATE))
Shape = TypeVar("Shape")
LOG2E = tl.constexpr(math.log2(math.e))
FLOAT32 = tl.constexpr("tf32x3")
"""Float32 products as three of tensor cores: errors of some 2 ** -21, and registers for a fraction of the operands."""
LOWEST = tl.constexpr(-1e30)
"""Below any score, and finite: the difference of two of them is a number."""


@dataclass(frozen=True)
class Call:
    """The tensors of one call of `attend`, and what its kernels are compiled for.

    far: queries [tokens, H, D] rotated to the far position. ids: [R, num_chosen] int64, the blocks of `keys` and
    `values` [any, KH, B, D] that hold the chosen units; -1 stands behind a row's last one.
    """

    blocks: ExecutionBlocks
    settings: LayerSettings
    rope: RotaryTable
    query: torch.Tensor
    far: torch.Tensor
    cache: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor
    received: torch.Tensor
    output: torch.Tensor

    @property
    def rows(self) -> int:
        return len(self.blocks.rows)

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.cache.shape[1]

    @property
    def block_size(self) -> int:
        return self.cache.shape[2]

    @property
    def head_size(self) -> int:
        return self.query.shape[2]

    @property
    def padded(self) -> int:
        """Head size of a tile."""
        return triton.next_power_of_2(self.head_size)

    @property
    def scale(self) -> float:
        return self.settings.scale * LOG2E.value

    @property
    def most_chosen(self) -> int:
        """Places for the chosen blocks of any row, the same in every batch."""
        most = self.settings.init_blocks + self.settings.topk
        return triton.next_power_of_2(max(1, most, self.blocks.num_chosen))

    def shape(self, half: dict[int, Shape], full: dict[int, Shape]) -> Shape:
        """That of the tiles of a kernel, which gives them by head size of a tile: in 16 bits, and in float32."""
        return (full if self.query.dtype == torch.float32 else half)[max(64, self.padded)]

    def tile(self, largest: int) -> int:
        """Tokens of a tile, which lies in one block."""
        return min(largest, self.block_size & -self.block_size)

    def heads_constants(self) -> dict[str, Any]:
        """Compile-time arguments that every kernel takes."""
        return {
            "group": self.heads // self.kv_heads,
            "block_size": self.block_size,
            "head_size": self.head_size,
            "padded": self.padded,
        }

    def rope_constants(self) -> dict[str, Any]:
        return {"rotary_dim": self.rope.cos_sin.shape[1], "neox": self.rope.neox}

    def stored(self) -> tuple[Any, ...]:
        """The chosen blocks: keys, values, ids; strides of a block and of a head in it; number of ids in a row."""
        return self.keys, self.values, self.ids, self.keys.stride(0), self.keys.stride(1), self.blocks.num_chosen


@triton.jit
def place_of_row(rows_ptr: tl.tensor, row: int) -> tuple[tl.tensor, ...]:
    """Where the row's tokens stand in the batch (64 bits), and its START, END and EDGE."""
    row_ptr = rows_ptr + row * COLUMNS
    start, end = tl.load(row_ptr + START).to(tl.int32), tl.load(row_ptr + END).to(tl.int32)
    return tl.load(row_ptr + OFFSET), start, end, tl.load(row_ptr + EDGE).to(tl.int32)


@triton.jit
def blocks_of_row(rows_ptr: tl.tensor, row: int, table_ptr: tl.tensor, table_stride: int) -> tl.tensor:
    """The row's line of the block table."""
    return table_ptr + tl.load(rows_ptr + row * COLUMNS + TABLE) * table_stride


@triton.jit
def count_chosen(ids_ptr: tl.tensor, num_chosen: int, most_chosen: tl.constexpr) -> tl.tensor:
    """Number of a row's chosen blocks."""
    place = tl.arange(0, most_chosen)
    ids = tl.load(ids_ptr + place, place < num_chosen, other=-1)
    return tl.sum((ids >= 0).to(tl.int32), 0)


@triton.jit
def block_of(blocks_ptr: tl.tensor, token: int, end: int, block_size: tl.constexpr) -> tl.tensor:
    """Physical id, 64 bits, of the block of a row's token; from END on, that of the last token.

    Loops read the id of the next tile's block ahead: tiles whose address comes from a load in the same turn of the loop
    are pipelined less deep.
    """
    return tl.load(blocks_ptr + tl.minimum(token, end - 1) // block_size).to(tl.int64)


@triton.jit
def paged_key(
    cache_ptr: tl.tensor,
    physical: int,
    kv_head: int,
    token: int,
    block_stride: int,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
) -> tl.tensor:
    """Where the key of a token lies in its block; its value is block_size * head_size behind it."""
    head_ptr = cache_ptr + physical * block_stride + kv_head * (2 * block_size * head_size)
    return head_ptr + token % block_size * head_size


@triton.jit
def lines(starts: tl.tensor, head_size: tl.constexpr, padded: tl.constexpr) -> tl.tensor:
    """Tile [n, padded] of the vectors that begin at starts [n]; 0 from head_size on."""
    dims = tl.arange(0, padded)
    ptrs = starts[:, None] + dims[None, :]
    return tl.load(ptrs) if padded == head_size else tl.load(ptrs, (dims < head_size)[None, :], other=0.0)


@triton.jit
def tile_at(base_ptr: tl.tensor, size: tl.constexpr, head_size: tl.constexpr, padded: tl.constexpr) -> tl.tensor:
    """Tile [size, padded] of keys or values that follow each other."""
    return lines(base_ptr + tl.arange(0, size) * head_size, head_size, padded)


@triton.jit
def written_tile_at(
    base_ptr: tl.tensor, count: int, size: tl.constexpr, head_size: tl.constexpr, padded: tl.constexpr
) -> tl.tensor:
    """The same of a tile of which only `count` tokens are written; 0 behind them."""
    token, dims = tl.arange(0, size)[:, None], tl.arange(0, padded)[None, :]
    mask = token < count if padded == head_size else (token < count) & (dims < head_size)
    return tl.load(base_ptr + token * head_size + dims, mask, other=0.0)


@triton.jit
def scores_of(query: tl.tensor, key: tl.tensor) -> tl.tensor:
    """[M, N], not scaled."""
    return tl.dot(query, tl.trans(key), input_precision=FLOAT32)


@triton.jit
def softmax_step(
    scores: tl.tensor, value: tl.tensor, scale: float, attended: tl.tensor, total: tl.tensor, highest: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile to the softmax: scores [M, N], -inf where a query does not see a token; value [N, padded].

    State: attended [M, padded] and total [M], both relative to 2 ** highest [M].
    """
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    weight = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(weight, 1)
    attended = tl.dot(weight.to(value.dtype), value, attended * shrink[:, None], input_precision=FLOAT32)
    return attended, total, higher
