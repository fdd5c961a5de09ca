"""The operations alone, on made-up layers of SmolLM2's shape."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.machine import last_level_cache, product, reading, threads
from benchmarks.plan import BLOCK_SIZE, Plan
from benchmarks.progress import Part
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory import pages
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Ops

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, INTERMEDIATE = 9, 3, 64, 576, 1536
GEOMETRY = Geometry(block_size=BLOCK_SIZE, n_init=128, n_local=4096, exc_block_size=512)
SETTINGS = LayerSettings(
    n_local=GEOMETRY.n_local, init_blocks=GEOMETRY.init_blocks, topk=16, repr_topk=4, scale=HEAD_SIZE**-0.5
)
ATTEND_CONTEXT = 12288
"""Where the attending alone is measured: beyond window, initial and retrieved tokens it no longer depends on it."""
SHARE_LAYERS = 8


def run(ops: Ops, plan: Plan, dtype: str, part: Part) -> None:
    """Seconds a layer: decode against reading memory, prefill against a matrix product, selecting and sealing against
    the rest of a layer."""
    counts = sorted({1, threads()})
    part.plan(2 * len(counts) + 2 * len(plan.share_contexts))
    seconds = plan.seconds["kernels"] / (2 * len(counts) + 2 * len(plan.share_contexts)) / 2
    torch_dtype = getattr(torch, dtype)
    part.samples |= {"decode": {}, "prefill": {}, "share": []}

    decode = Attending(ops, ATTEND_CONTEXT, 1, torch_dtype)
    working_set = max(plan.kernels_bytes, 4 * last_level_cache())
    layers = [decode.layer() for _ in range(working_set // decode.bytes + 1)]
    memory = pages.empty((working_set // 4,), torch.float32).fill_(1)
    for count in counts:
        part.doing(f"decode, {count} threads")
        torch.set_num_threads(count)
        runs = {"attend": cycle(decode.attend, layers), "read": reading(memory)}
        part.samples["decode"][str(count)] = part.alternate(runs, plan.samples, seconds) | {
            "attend_bytes": decode.bytes,
            "read_bytes": memory.nbytes,
            "working_set": decode.bytes * len(layers),
        }
        part.advance()
    del layers, memory

    prefill = Attending(ops, ATTEND_CONTEXT, GEOMETRY.exc_block_size, torch_dtype)
    layers = [prefill.layer() for _ in range(SHARE_LAYERS)]
    size = round((prefill.operations / 2) ** (1 / 3))
    for count in counts:
        part.doing(f"prefill, {count} threads")
        torch.set_num_threads(count)
        runs = {"attend": cycle(prefill.attend, layers), "product": product(size, dtype)}
        part.samples["prefill"][str(count)] = part.alternate(runs, plan.samples, seconds) | {
            "attend_operations": prefill.operations,
            "product_operations": 2 * size**3,
        }
        part.advance()
    del layers

    for context in plan.share_contexts:
        for tokens in (GEOMETRY.exc_block_size, 1):
            part.doing(f"share of select and seal, {tokens} tokens at {context}")
            part.samples["share"].append(
                {"context": context, "tokens": tokens} | _share(ops, context, tokens, torch_dtype, plan, seconds, part)
            )
            part.advance()


def cycle(operation: Callable[[Any], None], layers: Sequence[Any]) -> Callable[[], float]:
    """A function that runs `operation` on every layer and returns the seconds a layer."""

    def run() -> float:
        begin = time.perf_counter()
        for layer in layers:
            operation(layer)
        return (time.perf_counter() - begin) / len(layers)

    return run


def _share(
    ops: Ops, context: int, tokens: int, dtype: torch.dtype, plan: Plan, seconds: float, part: Part
) -> dict[str, Any]:
    """Seconds a layer of each operation of an execution block that ends after `context` tokens.

    A decode step seals a block of every 128th token only; its seconds are spread over these.
    """
    work = Attending(ops, context - tokens, tokens, dtype)
    layers = [work.layer() for _ in range(SHARE_LAYERS)]
    runs = {
        "linear": cycle(work.linear, layers),
        "write": cycle(work.write, layers),
        "select": cycle(work.select, layers),
        "attend": cycle(work.attend, layers),
        "seal": cycle(work.seal, layers),
    }
    samples = part.alternate(runs, plan.samples, seconds)
    if tokens < BLOCK_SIZE:
        samples["seal"] = [s * tokens / BLOCK_SIZE for s in samples["seal"]]
    return samples


@dataclass(frozen=True)
class Layer:
    """Tensors of one layer; no two layers share any."""

    cache: torch.Tensor
    memory: LayerMemory
    chosen: torch.Tensor
    linear: list[torch.Tensor]


class Attending:
    """The execution block [start, start + tokens) of one request, the same in every layer."""

    def __init__(self, ops: Ops, start: int, tokens: int, dtype: torch.dtype) -> None:
        self.ops, self.dtype, self.tokens = ops, dtype, tokens
        self.blocks, self.sealing = execution_block(start, start + tokens), sealing(start, tokens)
        self.paged = -(-(start + tokens) // BLOCK_SIZE) - GEOMETRY.stored_blocks(start)
        self.num_units = len(self.blocks.units)
        self.rope = _rope(start + tokens)
        self.query = torch.randn(tokens, HEADS, HEAD_SIZE).to(dtype)
        self.key = torch.randn(tokens, KV_HEADS, HEAD_SIZE).to(dtype)
        self.output = torch.empty_like(self.query)
        self.hidden = torch.randn(tokens, HIDDEN).to(dtype)
        self.activation = torch.randn(tokens, INTERMEDIATE).to(dtype)
        first = start - GEOMETRY.edge_start(start)
        self.slots = torch.arange(first, first + tokens)

    @property
    def visible(self) -> int:
        """Pairs of a query and a token that it sees: initial and retrieved, and from the edge to itself."""
        own = self.slots[0].item() + (self.tokens + 1) / 2
        return round(self.tokens * (self.blocks.num_chosen * BLOCK_SIZE + own))

    @property
    def operations(self) -> int:
        """Floating-point operations of both products of attention."""
        return 4 * HEAD_SIZE * HEADS * self.visible

    @property
    def bytes(self) -> int:
        """Keys and values that a single query sees."""
        return self.visible // self.tokens * 2 * KV_HEADS * HEAD_SIZE * self.dtype.itemsize

    def layer(self) -> Layer:
        """A layer filled with noise; of the store only what is read and what is sealed is touched."""
        cache = torch.randn(self.paged, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE).to(self.dtype)
        memory = LayerMemory.allocate(self.num_units, self.paged, HEADS, cache, HEAD_SIZE)
        memory.representatives.copy_(torch.randn(memory.representatives.shape))
        memory.received.copy_(torch.rand(memory.received.shape))
        chosen = self.ops.select(self.blocks, SETTINGS, self.rope, self.query, memory.representatives)
        for unit in {*chosen.flatten().tolist(), *self.sealing.leaving[:, 2].tolist()}:
            memory.keys[unit] = torch.randn(memory.keys.shape[1:]).to(self.dtype)
            memory.values[unit] = torch.randn(memory.values.shape[1:]).to(self.dtype)
        shapes = [
            ((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN),
            (HIDDEN, HEADS * HEAD_SIZE),
            (2 * INTERMEDIATE, HIDDEN),
            (HIDDEN, INTERMEDIATE),
        ]
        return Layer(cache, memory, chosen, [torch.randn(shape).to(self.dtype) for shape in shapes])

    def linear(self, layer: Layer) -> None:
        """The matrix products of a layer: query, key and value; output; gate and up; down."""
        for weight in layer.linear:
            torch.nn.functional.linear(self.hidden if weight.shape[1] == HIDDEN else self.activation, weight)

    def write(self, layer: Layer) -> None:
        self.ops.write(layer.cache, self.key, self.key, self.slots)

    def select(self, layer: Layer) -> None:
        self.ops.select(self.blocks, SETTINGS, self.rope, self.query, layer.memory.representatives)

    def attend(self, layer: Layer) -> None:
        self.ops.attend(
            self.blocks,
            SETTINGS,
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
        self.ops.seal(self.sealing, SETTINGS, self.rope, layer.cache, layer.memory)


def execution_block(start: int, end: int) -> ExecutionBlocks:
    """One request's execution block [start, end); unit ids are in order, so are the ids of its paged blocks."""
    stored, edge = GEOMETRY.stored_blocks(start), GEOMETRY.edge_start(start)
    paged = -(-(end - edge) // BLOCK_SIZE)
    table = torch.full((1, stored + paged), -1, dtype=torch.int32)
    table[0, stored:] = torch.arange(paged)
    leaving = [[block - stored, block, block, 1] for block in range(stored, GEOMETRY.stored_blocks(end))]
    return ExecutionBlocks(
        rows=torch.tensor([[0, start, end, edge, 0, stored, 0, 1, 0]]),
        block_table=table,
        units=torch.arange(GEOMETRY.stored_blocks(end)),
        leaving=torch.tensor(leaving, dtype=torch.int64).view(-1, 4),
        num_chosen=min(stored, GEOMETRY.init_blocks + SETTINGS.topk),
        longest=end - start,
        most_stored=stored,
    )


def sealing(start: int, tokens: int) -> ExecutionBlocks:
    """The execution block at or shortly before `start` that seals blocks."""
    while not len((blocks := execution_block(start, start + tokens)).leaving):
        start -= 1
    return blocks


def _rope(length: int) -> RotaryTable:
    """The default rotary table of SmolLM2."""
    angles = torch.arange(length)[:, None] / 100000 ** (torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    return RotaryTable(torch.cat([angles.cos(), angles.sin()], dim=1), neox=True)
