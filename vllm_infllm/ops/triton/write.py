"""New keys and values into the paged cache."""

import torch
import triton
import triton.language as tl

VALUES = 4096
"""Of keys, and as many of values, that a program writes: some lines, each of one head of one token."""


def write(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    _, kv_heads, block_size, both = cache.shape
    padded = triton.next_power_of_2(both // 2)
    lines = VALUES // padded
    write_kernel[(triton.cdiv(len(slots) * kv_heads, lines),)](
        cache,
        key,
        value,
        slots,
        len(slots),
        cache.stride(0),
        key.stride(0),
        value.stride(0),
        kv_heads=kv_heads,
        block_size=block_size,
        head_size=both // 2,
        padded=padded,
        lines=lines,
    )


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["slots_ptr"])
def write_kernel(
    cache_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    count: int,
    block_stride: int,
    key_stride: int,
    value_stride: int,
    kv_heads: tl.constexpr,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    lines: tl.constexpr,
) -> None:
    """Program (some lines). The heads of a token follow each other; a token of slot -1 is padding."""
    line = tl.program_id(0) * lines + tl.arange(0, lines)
    token, head = (line // kv_heads).to(tl.int64), line % kv_heads
    slot = tl.load(slots_ptr + token, token < count, other=-1)
    dims = tl.arange(0, padded)
    mask = (slot >= 0)[:, None] & (dims < head_size)[None, :]
    key = tl.load((key_ptr + token * key_stride + head * head_size)[:, None] + dims[None, :], mask)
    value = tl.load((value_ptr + token * value_stride + head * head_size)[:, None] + dims[None, :], mask)
    # Of each head of a block, all keys come first, then all values.
    place = slot // block_size * block_stride + (head * 2 * block_size + slot % block_size) * head_size
    key_to = (cache_ptr + place)[:, None] + dims[None, :]
    tl.store(key_to, key, mask)
    tl.store(key_to + block_size * head_size, value, mask)
