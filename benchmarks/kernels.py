"""The operations alone, on made-up layers of SmolLM2's shape."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.machine import last_level_cache, product, reading, threads
from benchmarks.plan import BLOCK_SIZE, Plan
from benchmarks.progress import Part
from vllm_infllm.memory import pages
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.ops.interface import LayerSettings, Ops
from vllm_infllm.tools import synthetic
from vllm_infllm.tools.synthetic import Heads

HEADS, HIDDEN, INTERMEDIATE = Heads(query=9, kv=3, size=64), 576, 1536
GEOMETRY = Geometry(block_size=BLOCK_SIZE, n_init=128, n_local=4096, exc_block_size=512)
SETTINGS = LayerSettings(
    n_local=GEOMETRY.n_local, init_blocks=GEOMETRY.init_blocks, topk=16, repr_topk=4, scale=HEADS.size**-0.5
)
ATTEND_CONTEXT = 12288
"""Where the attending alone is measured: beyond window, initial and retrieved tokens it no longer depends on it."""
SHARE_LAYERS = 8
BATCH = 8
"""Requests that decode in one call, where one alone is over before a thread that sleeps wakes up."""


def run(ops: Ops, plan: Plan, dtype: str, part: Part) -> None:
    """Seconds a layer: decode against reading memory, prefill against a matrix product, selecting and sealing against
    the rest of a layer."""
    counts = sorted({1, threads()})
    part.plan(2 * len(counts) + 2 * len(plan.share_contexts))
    seconds = plan.seconds["kernels"] / (2 * len(counts) + 2 * len(plan.share_contexts)) / 2
    torch_dtype = getattr(torch, dtype)
    part.samples |= {"decode": {}, "prefill": {}, "share": []}

    decode = Attending(ops, ATTEND_CONTEXT, 1, torch_dtype)
    batch = Attending(ops, ATTEND_CONTEXT, 1, torch_dtype, BATCH)
    working_set = max(plan.kernels_bytes, 4 * last_level_cache())
    layers = [decode.layer() for _ in range(working_set // decode.bytes + 1)]
    batches = [batch.layer() for _ in range(working_set // batch.bytes + 1)]
    memory = pages.empty((working_set // 4,), torch.float32).fill_(1)
    for count in counts:
        part.doing(f"decode, {count} threads")
        torch.set_num_threads(count)
        runs = {
            "attend": cycle(decode.attend, layers),
            "batch": cycle(batch.attend, batches),
            "read": reading(memory),
        }
        part.samples["decode"][str(count)] = part.alternate(runs, plan.samples, seconds) | {
            "attend_bytes": decode.bytes,
            "batch_bytes": batch.bytes,
            "batch_size": BATCH,
            "read_bytes": memory.nbytes,
            "working_set": decode.bytes * len(layers),
        }
        part.advance()
    del layers, batches, memory

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
class Layer(synthetic.Layer):
    """With the weights of its linear layers."""

    linear: list[torch.Tensor]


class Attending(synthetic.Attending):
    """An execution block of SmolLM2 in the default configuration, with what is not attention."""

    def __init__(self, ops: Ops, start: int, tokens: int, dtype: torch.dtype, requests: int = 1) -> None:
        super().__init__(ops, HEADS, GEOMETRY, SETTINGS, start, tokens, dtype, requests)
        self.hidden = torch.randn(tokens * requests, HIDDEN).to(dtype)
        self.activation = torch.randn(tokens * requests, INTERMEDIATE).to(dtype)

    def layer(self) -> Layer:
        width = HEADS.query * HEADS.size
        shapes = [
            (width + 2 * HEADS.kv * HEADS.size, HIDDEN),
            (HIDDEN, width),
            (2 * INTERMEDIATE, HIDDEN),
            (HIDDEN, INTERMEDIATE),
        ]
        return Layer(**vars(super().layer()), linear=[torch.randn(shape).to(self.dtype) for shape in shapes])

    def linear(self, layer: Layer) -> None:
        """The matrix products of a layer: query, key and value; output; gate and up; down."""
        for weight in layer.linear:
            torch.nn.functional.linear(self.hidden if weight.shape[1] == HIDDEN else self.activation, weight)
