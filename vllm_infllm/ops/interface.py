"""The contract of the operations. Implementations are modules with these functions; they know tensors, no vLLM type.

Shapes: H query heads, KH key/value heads, D head size, B tokens a block; R rows (requests) in a batch of execution
blocks. Queries and keys of the model are rotated to their absolute positions.

How keys and values are packed inside a block of the paged cache or inside a unit of the store is the implementation's
own affair; `unpack` tells. A block of the cache holds all keys of a head, then all its values, in the
packing that keys and values have in the store.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.config import KEY
from vllm_infllm.memory.residency import Residency
from vllm_infllm.memory.store import LayerMemory


class Row(IntEnum):
    """Columns of `ExecutionBlocks.rows`."""

    OFFSET = 0
    """Where token `START` stands in the batch."""
    START = 1
    END = 2
    """The execution block is [START, END)."""
    EDGE = 3
    """First token that is read from the paged cache, the first of a block."""
    TABLE = 4
    """Row of `block_table`."""
    STORED = 5
    """Number of stored blocks."""
    UNITS = 6
    """Where the row's stored blocks begin in `units`."""
    ACCUMULATE = 7
    """Whether attention received must be summed up, because the request can outgrow the window."""
    REQUEST = 8
    """Number of the request among those of the worker: its place in the residency caches."""


class Leaving(IntEnum):
    """Columns of `ExecutionBlocks.leaving`."""

    PHYSICAL = 0
    """Physical id of the block."""
    BLOCK = 1
    """Number of the block in its request."""
    UNIT = 2
    """Host unit id that it moves to; -1 in rows that only fill up (never on the CPU)."""
    IS_UNIT = 3
    """1 for a unit, 0 for a block of initial tokens, which has no representative."""


@dataclass(frozen=True)
class ExecutionBlocks:
    """One execution block of each of R requests: what all layers process together.

    rows: [R, len(Row)] int64; rows of no tokens only fill up (never on the CPU).
    block_table: [requests, blocks] int32, physical ids; stale for blocks that were freed.
    units: [any] int64, host unit ids of the rows' stored blocks, in order, row after row.
    leaving: [L, len(Leaving)] int64, the blocks that are outside every window after these execution blocks.
    num_chosen: at least the most stored blocks that a row attends to.
    longest: most tokens of a row.
    most_stored: at least the most stored blocks of a row.
    host_rows: rows as the host knows them, where some have several tokens.
    """

    rows: torch.Tensor
    block_table: torch.Tensor
    units: torch.Tensor
    leaving: torch.Tensor
    num_chosen: int
    longest: int
    most_stored: int
    host_rows: list[list[int]] | None = None


@dataclass(frozen=True)
class LayerSettings:
    """What does not change in a layer: n_local in tokens, init_blocks in blocks, topk in units, repr_topk in tokens.

    local_attention: who else computes a part of the window in rows with several tokens ("xformers"); None: nobody.
    """

    n_local: int
    init_blocks: int
    topk: int
    repr_topk: int
    scale: float
    local_attention: str | None = None


STEP, MAX_HEAD_SIZE = 16, 256
"""Block and head sizes that compiled operations run: multiples of the first, head sizes from twice that on."""


def check_sizes(operations: str, head_size: int, block_size: int) -> str | None:
    """`Ops.check` of compiled operations. operations: their name for users."""
    if block_size % STEP:
        return (
            f"--block-size {block_size}: the {operations} operations need a multiple of {STEP}. Use one, or set "
            f'--additional-config "{KEY}": ops="reference".'
        )
    if head_size % STEP or not 2 * STEP <= head_size <= MAX_HEAD_SIZE:
        return (
            f"The model's head size {head_size}: the {operations} operations run {2 * STEP} to {MAX_HEAD_SIZE} in "
            f'steps of {STEP}. Set --additional-config "{KEY}": ops="reference".'
        )
    return None


class Ops(Protocol):
    """An implementation of the operations."""

    def check(self, head_size: int, block_size: int) -> str | None:
        """Why sizes cannot be run, naming the remedy; None if they can."""
        ...

    def describe(self) -> str:
        """Name and variant, for the startup line."""
        ...

    def write(self, cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Write key, value [N, KH, D] to slots [N] int64 (block * B + offset) of the cache [num_blocks, KH, B, 2D]."""
        ...

    def select(
        self,
        blocks: ExecutionBlocks,
        settings: LayerSettings,
        rope: RotaryTable,
        query: torch.Tensor,
        representatives: torch.Tensor,
    ) -> torch.Tensor:
        """Choose the stored blocks that each row attends to.

        Those of the initial tokens, and all units if there are at most topk, else the topk with the highest
        sum over heads of < mean far query of the row, representative >; on equal scores the lower unit.

        Args:
            query: [tokens, H, D] of the batch.
            representatives: [num_units, H, D].

        Returns:
            Host unit ids [R, num_chosen] int64 in the order of their tokens, filled up with -1.
        """
        ...

    def select_peak(
        self,
        blocks: ExecutionBlocks,
        settings: LayerSettings,
        rope: RotaryTable,
        query: torch.Tensor,
        keys: torch.Tensor,
        last: int,
    ) -> torch.Tensor:
        """As `select`, by the largest share of attention that any head of the row's last queries gives to a unit.

        Shares are those of a far query if it attended to all units of the row and to nothing else.

        Args:
            keys: [num_units, KH, B, D] of the store.
            last: how many queries of each row take part; all of a shorter row.
        """
        ...

    def attend(
        self,
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
        """One softmax over the local, initial, remainder and retrieved tokens of each row.

        Args:
            query, output: [tokens, H, D] of the batch; the rows' tokens of output are written.
            memory: of the layer; `received` of the paged blocks grows by the attention that their tokens get from
                queries that have them in their window, in rows that accumulate. Tokens from START on begin at 0.
            chosen: [R, num_chosen] host unit ids, as `select` returned them.
            slots: [R, num_chosen] int64, blocks of the paged cache that hold copies of the chosen units; None reads
                the store in place.
            mass: [R, num_chosen] float32, written if given: attention that each chosen block received, over all heads.
        """
        ...

    def seal(
        self,
        blocks: ExecutionBlocks,
        settings: LayerSettings,
        rope: RotaryTable,
        cache: torch.Tensor,
        memory: LayerMemory,
    ) -> None:
        """Move the leaving blocks into the store, keys un-rotated, and choose the representatives of units.

        A representative is, for each query head, the mean of the un-rotated keys of the repr_topk tokens that received
        most attention; on equal attention the earlier token.
        """
        ...

    def resolve(
        self, blocks: ExecutionBlocks, settings: LayerSettings, residency: Residency, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each chosen unit a slot of its request (see memory/residency.py), evicting others where none is empty.

        Returns:
            slots [R, num_chosen] int64, the paged block that holds, or is to hold, each chosen stored block; missing
            [R, num_chosen] int64, the host unit ids that must be copied into those blocks; -1 elsewhere in both.
        """
        ...

    def gather(self, memory: LayerMemory, missing: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
        """Copy units `missing` of the store into blocks `slots` of the cache; both int64, of one shape; -1 is none."""
        ...

    def attended(
        self,
        blocks: ExecutionBlocks,
        settings: LayerSettings,
        residency: Residency,
        chosen: torch.Tensor,
        mass: torch.Tensor,
    ) -> None:
        """Decay the attention mass of the resident units of each row, and add what `attend` wrote into `mass`."""
        ...

    def unpack(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [N, KH, B, D] of packed blocks or units, token by token."""
        ...


def halves(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed keys and values [num_blocks, KH, B, D] of a paged cache [num_blocks, KH, B, 2D], as views."""
    num_blocks, kv_heads, block_size, both = cache.shape
    keys, values = cache.view(num_blocks, kv_heads, 2, block_size, both // 2).unbind(2)
    return keys, values
