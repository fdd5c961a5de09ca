"""The operations of execution blocks on made-up layers: any context without a prefill."""

from dataclasses import dataclass

import torch

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Ops


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads, and their size."""

    query: int
    kv: int
    size: int


@dataclass(frozen=True)
class Layer:
    """Tensors of one layer; no two layers share any."""

    cache: torch.Tensor
    memory: LayerMemory
    chosen: torch.Tensor


class Attending:
    """The execution block [start, start + tokens) of each of some requests, the same in every layer. On the CPU."""

    def __init__(
        self,
        ops: Ops,
        heads: Heads,
        geometry: Geometry,
        settings: LayerSettings,
        start: int,
        tokens: int,
        dtype: torch.dtype,
        requests: int = 1,
    ) -> None:
        self.ops, self.heads, self.settings, self.dtype, self.tokens = ops, heads, settings, dtype, tokens
        self.block_size, self.requests = geometry.block_size, requests
        self.blocks = execution_blocks(geometry, settings, start, start + tokens, requests)
        self.sealing = sealing(geometry, settings, start, tokens, requests)
        paged = -(-(start + tokens) // self.block_size) - geometry.stored_blocks(start)
        self.paged = paged * requests
        self.num_units = len(self.blocks.units)
        self.rope = rotary_table(start + tokens, heads.size)
        self.query = torch.randn(tokens * requests, heads.query, heads.size).to(dtype)
        self.key = torch.randn(tokens * requests, heads.kv, heads.size).to(dtype)
        self.output = torch.empty_like(self.query)
        self.first = start - geometry.edge_start(start)
        own = torch.arange(self.first, self.first + tokens)
        self.slots = (torch.arange(requests)[:, None] * paged * self.block_size + own).flatten()

    @property
    def visible(self) -> int:
        """Pairs of a query and a token that it sees: initial and retrieved, and from the edge to itself."""
        own = self.first + (self.tokens + 1) / 2
        return round(self.requests * self.tokens * (self.blocks.num_chosen * self.block_size + own))

    @property
    def operations(self) -> int:
        """Floating-point operations of both products of attention."""
        return 4 * self.heads.size * self.heads.query * self.visible

    @property
    def bytes(self) -> int:
        """Keys and values that a single query of each request sees."""
        return self.visible // self.tokens * 2 * self.heads.kv * self.heads.size * self.dtype.itemsize

    def layer(self) -> Layer:
        """A layer filled with noise; of the store only what is read and what is sealed is touched."""
        heads = self.heads
        cache = torch.randn(self.paged, heads.kv, self.block_size, 2 * heads.size).to(self.dtype)
        memory = LayerMemory.allocate(self.num_units, self.paged, heads.query, cache, heads.size)
        memory.representatives.copy_(torch.randn(memory.representatives.shape))
        memory.received.copy_(torch.rand(memory.received.shape))
        chosen = self.ops.select(self.blocks, self.settings, self.rope, self.query, memory.representatives)
        for unit in {*chosen.flatten().tolist(), *self.sealing.leaving[:, 2].tolist()}:
            memory.keys[unit] = torch.randn(memory.keys.shape[1:]).to(self.dtype)
            memory.values[unit] = torch.randn(memory.values.shape[1:]).to(self.dtype)
        return Layer(cache, memory, chosen)

    def write(self, layer: Layer) -> None:
        self.ops.write(layer.cache, self.key, self.key, self.slots)

    def select(self, layer: Layer) -> None:
        self.ops.select(self.blocks, self.settings, self.rope, self.query, layer.memory.representatives)

    def attend(self, layer: Layer) -> None:
        self.ops.attend(
            self.blocks,
            self.settings,
            self.rope,
            self.query,
            layer.cache,
            layer.memory,
            layer.chosen,
            None,
            self.output,
            None,
        )

    def seal(self, layer: Layer) -> None:
        self.ops.seal(self.sealing, self.settings, self.rope, layer.cache, layer.memory)


def execution_blocks(
    geometry: Geometry, settings: LayerSettings, start: int, end: int, requests: int = 1
) -> ExecutionBlocks:
    """The execution block [start, end) of each request; unit ids are in order, so are the ids of paged blocks."""
    stored, edge = geometry.stored_blocks(start), geometry.edge_start(start)
    paged, units = -(-(end - edge) // geometry.block_size), geometry.stored_blocks(end)
    table = torch.full((requests, stored + paged), -1, dtype=torch.int32)
    table[:, stored:] = torch.arange(requests * paged).view(requests, paged)
    rows = [
        [request * (end - start), start, end, edge, request, stored, request * units, 1, request]
        for request in range(requests)
    ]
    leaving = [
        [request * paged + block - stored, block, request * units + block, 1]
        for request in range(requests)
        for block in range(stored, units)
    ]
    return ExecutionBlocks(
        rows=torch.tensor(rows),
        block_table=table,
        units=torch.arange(requests * units),
        leaving=torch.tensor(leaving, dtype=torch.int64).view(-1, 4),
        num_chosen=min(stored, geometry.init_blocks + settings.topk),
        longest=end - start,
        most_stored=stored,
    )


def sealing(geometry: Geometry, settings: LayerSettings, start: int, tokens: int, requests: int = 1) -> ExecutionBlocks:
    """The execution blocks at or shortly before `start` that seal blocks; ones that seal none where none does."""
    while True:
        blocks = execution_blocks(geometry, settings, start, start + tokens, requests)
        if len(blocks.leaving) or start == 0:
            return blocks
        start -= 1


def rotary_table(length: int, head_size: int) -> RotaryTable:
    """The default rotary table of SmolLM2; no figure depends on which."""
    angles = torch.arange(length)[:, None] / 100000 ** (torch.arange(0, head_size, 2) / head_size)
    return RotaryTable(torch.cat([angles.cos(), angles.sin()], dim=1), neox=True)
