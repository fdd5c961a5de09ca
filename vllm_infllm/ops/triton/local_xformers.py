"""Optional: the middle of the window by xformers' paged attention, `memory_efficient_attention_partial`.

Of a row [start, end) with several tokens, the *shared* blocks lie whole before `start` and inside every query's window:

    EDGE          end - n_local                      start        end
     |   edge tokens  .  border |  shared blocks  |  .  own tokens |

All queries see all of their tokens, so the mask has no borders but those between rows. (xformers 0.0.35 has no paged
mask with a window.) attend_prefill does the rest, and begins its softmax with what is found here: a merge by
log-sum-exp.

Of the paged operators of xformers 0.0.35, this calls FlashAttention 3. The FlashAttention 2 in torch takes no paged
masks, and triton_splitk wants block pointers, which the Triton that vLLM 0.32 comes with (3.9) has no more.

xformers wants keys and values [1, pages * page size, heads, D], with one stride from token to token. Here the keys of a
head are together in a block, and its values follow: so a page is the keys of one head of a block, and the values are
the same pages of a view that begins one page later. Nothing is copied but queries; each kv head of a row is a sequence
of its own, with as many query heads as share it.
"""

import weakref
from dataclasses import dataclass

import torch
from xformers.ops import fmha
from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask

from vllm_infllm.ops.interface import ExecutionBlocks, Row
from vllm_infllm.ops.triton.attend_prefill import SHORTEST, Found
from vllm_infllm.ops.triton.tiles import Call

NOBODYS_PAGE = 1
"""Fills up tables of pages: values, where pages of keys are meant."""


@dataclass(frozen=True)
class Shared:
    """Shared blocks of the rows that have some.

    tokens: [start, end) in the batch, of each such row. bounds: [R, 3] int64: first shared token, the one behind the
    last, and where the row's queries begin among all such rows'; 0 in other rows. mask: over sequences (kv head, row),
    pages of this cache.
    """

    tokens: list[tuple[int, int]]
    bounds: torch.Tensor
    mask: PagedBlockDiagonalPaddedKeysMask


def attend(call: Call) -> Found | None:
    """Softmax over the shared blocks of all rows with several tokens; None if no row has any."""
    shared = _shared_once(call)
    if shared is None:
        return None
    group = call.heads // call.kv_heads
    query = torch.cat([call.query[begin:end] for begin, end in shared.tokens])
    query = query.unflatten(1, (call.kv_heads, group)).transpose(0, 1).reshape(1, -1, group, call.head_size)
    key, value = pages(call.cache, group)
    out, lse = fmha.memory_efficient_attention_partial(
        query, key, value, shared.mask, scale=call.settings.scale, op=fmha.flash3.FwOp
    )
    return Found(out[0], lse[0], shared.bounds)


def pages(cache: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, pages * B, group, D] in place; all of the group's heads are one. For the pages, see above."""
    blocks, kv_heads, block_size, both = cache.shape
    head_size = both // 2
    of_block = pages_of_block(cache)
    shape = (1, ((blocks - 1) * of_block + 2 * kv_heads - 1) * block_size, group, head_size)
    strides, first = (cache.stride(0) * blocks, head_size, 0, 1), cache.storage_offset()
    key = cache.as_strided(shape, strides, first)
    return key, cache.as_strided(shape, strides, first + block_size * head_size)


def pages_of_block(cache: torch.Tensor) -> int:
    """From one block's first page to the next block's."""
    page = cache.shape[2] * cache.shape[3] // 2
    if cache.stride()[1:] != (2 * page, cache.shape[3], 1) or cache.stride(0) % page:
        raise AssertionError(f"a paged cache with strides {cache.stride()}, in pages of {page} values")
    return cache.stride(0) // page


_last: list[tuple["weakref.ref[ExecutionBlocks]", tuple[int, ...], Shared | None]] = []


def _shared_once(call: Call) -> Shared | None:
    """The same for all layers, which process the same blocks one after another."""
    sizes = (*call.cache.shape, *call.cache.stride(), call.settings.n_local)
    if not _last or _last[0][0]() is not call.blocks or _last[0][1] != sizes:
        _last[:] = [(weakref.ref(call.blocks), sizes, shared_of(call.blocks, call.cache, call.settings.n_local))]
    return _last[0][2]


def shared_of(blocks: ExecutionBlocks, cache: torch.Tensor, n_local: int) -> Shared | None:
    """Shared blocks of all rows with several tokens, found on the host."""
    assert blocks.host_rows is not None, "rows with several tokens are known on the host"
    kv_heads, block_size = cache.shape[1:3]
    bounds = [[0, 0, 0] for _ in blocks.host_rows]
    tokens: list[tuple[int, int]] = []
    tables: list[torch.Tensor] = []
    for row, bound in zip(blocks.host_rows, bounds, strict=True):
        start, end, table = row[Row.START], row[Row.END], row[Row.TABLE]
        first = -(-max(row[Row.EDGE], end - n_local) // block_size)
        stop = start // block_size
        if end - start < SHORTEST.value or first >= stop:
            continue
        bound[:] = first * block_size, stop * block_size, sum(e - b for b, e in tokens)
        tokens.append((row[Row.OFFSET], row[Row.OFFSET] + end - start))
        tables.append(blocks.block_table[table, first:stop])
    if not tokens:
        return None
    heads = torch.arange(kv_heads, dtype=torch.int32, device=cache.device)
    longest = max(len(table) for table in tables)
    pages = torch.full((kv_heads, len(tables), longest), NOBODYS_PAGE, dtype=torch.int32, device=cache.device)
    for i, table in enumerate(tables):
        pages[:, i, : len(table)] = table * pages_of_block(cache) + 2 * heads[:, None]
    mask = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[end - begin for begin, end in tokens] * kv_heads,
        kv_seqlen=[len(table) * block_size for table in tables] * kv_heads,
        block_tables=pages.flatten(0, 1),
        page_size=block_size,
        device=cache.device,
    )
    return Shared(tokens, torch.tensor(bounds).to(cache.device, non_blocking=True), mask)
