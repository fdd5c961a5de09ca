"""Blocks that leave every window: their way into the store, and the representatives of units."""

import torch
import triton
import triton.language as tl

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Leaving
from vllm_infllm.ops.triton.rotate import unrotated

PHYSICAL, BLOCK, UNIT, IS_UNIT = (tl.constexpr(int(column)) for column in Leaving)
COLUMNS = tl.constexpr(len(Leaving))
TOKENS = 16
"""Tokens that are processed at a time; divides every block size."""


def seal(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    cache: torch.Tensor,
    memory: LayerMemory,
) -> None:
    count, (_, kv_heads, block_size, both), heads = len(blocks.leaving), cache.shape, memory.received.shape[1]
    sizes = {
        "block_size": block_size,
        "head_size": both // 2,
        "padded": triton.next_power_of_2(both // 2),
        "rotary_dim": rope.cos_sin.shape[1],
        "neox": rope.neox,
        "tokens": TOKENS,
    }
    store_kernel[(count, kv_heads, block_size // TOKENS)](
        memory.keys, memory.values, cache, rope.cos_sin, blocks.leaving, cache.stride(0), kv_heads=kv_heads, **sizes
    )
    represent_kernel[(count, heads)](
        memory.representatives,
        memory.received,
        cache,
        rope.cos_sin,
        blocks.leaving,
        cache.stride(0),
        min(settings.repr_topk, block_size),
        heads=heads,
        group=heads // kv_heads,
        block_padded=triton.next_power_of_2(block_size),
        **sizes,
    )


@triton.jit(do_not_specialize_on_alignment=["leaving_ptr"])
def store_kernel(
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    leaving_ptr: tl.tensor,
    block_stride: int,
    kv_heads: tl.constexpr,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    rotary_dim: tl.constexpr,
    neox: tl.constexpr,
    tokens: tl.constexpr,
) -> None:
    """Program (leaving block, kv head, some tokens)."""
    row, head = leaving_ptr + tl.program_id(0) * COLUMNS, tl.program_id(1)
    unit = tl.load(row + UNIT)
    if unit < 0:
        return
    first = tl.program_id(2) * tokens
    token, dims = first + tl.arange(0, tokens), tl.arange(0, padded)
    key_ptr = cache_ptr + tl.load(row + PHYSICAL) * block_stride + (head * 2 * block_size + first) * head_size
    positions = tl.load(row + BLOCK) * block_size + token
    mask = (dims < head_size)[None, :]
    key = unrotated(key_ptr, head_size, cos_sin_ptr, positions, dims, rotary_dim, neox, mask)
    tile = tl.arange(0, tokens)[:, None] * head_size + dims[None, :]
    value = tl.load(key_ptr + block_size * head_size + tile, mask)
    place = (unit * kv_heads + head) * block_size * head_size + first * head_size + tile
    tl.store(keys_ptr + place, key.to(keys_ptr.dtype.element_ty), mask)
    tl.store(values_ptr + place, value, mask)


@triton.jit(do_not_specialize_on_alignment=["leaving_ptr"])
def represent_kernel(
    representatives_ptr: tl.tensor,
    received_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    leaving_ptr: tl.tensor,
    block_stride: int,
    repr_topk: int,
    heads: tl.constexpr,
    group: tl.constexpr,
    block_padded: tl.constexpr,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    rotary_dim: tl.constexpr,
    neox: tl.constexpr,
    tokens: tl.constexpr,
) -> None:
    """Program (leaving block, query head). Of the keys, only those that represent are read."""
    row, head = leaving_ptr + tl.program_id(0) * COLUMNS, tl.program_id(1)
    unit = tl.load(row + UNIT)
    if (unit < 0) | (tl.load(row + IS_UNIT) == 0):
        return
    physical, start = tl.load(row + PHYSICAL), tl.load(row + BLOCK) * block_size
    received_ptr += (physical * heads + head) * block_size
    others, dims = tl.arange(0, block_padded), tl.arange(0, padded)
    other = tl.load(received_ptr + others, others < block_size, other=float("-inf"))
    total = tl.zeros([padded], tl.float32)
    for first in range(0, block_size, tokens):
        token = first + tl.arange(0, tokens)
        own = tl.load(received_ptr + token)
        before = (other[None, :] > own[:, None]) | (
            (other[None, :] == own[:, None]) & (others[None, :] < token[:, None])
        )
        represents = tl.sum(before.to(tl.int32), 1) < repr_topk
        key_ptr = cache_ptr + physical * block_stride + (head // group * 2 * block_size + first) * head_size
        mask = represents[:, None] & (dims < head_size)[None, :]
        key = unrotated(key_ptr, head_size, cos_sin_ptr, start + token, dims, rotary_dim, neox, mask)
        total += tl.sum(key, 0)
    mean = (total / repr_topk).to(representatives_ptr.dtype.element_ty)
    tl.store(representatives_ptr + (unit * heads + head) * head_size + dims, mean, dims < head_size)
