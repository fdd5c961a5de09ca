"""The part of the window that xformers provides: its masks materialized, and the merge with the Triton kernel.

FlashAttention's operator does not run here, but all of xformers up to it: a stand-in reads the pages that it is given.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from xformers.ops import fmha

from tests.gpu.test_triton_attend import LONG, TRITON, rounding
from tests.gpu.test_triton_ops import among_empty_rows, sizes_of_models
from tests.test_ops_cpu import (
    SEEDS,
    Batch,
    Scene,
    Sizes,
    Task,
    any_tasks,
    assert_same_attention,
    in_every_dtype,
)
from tests.test_ops_cpu import attend as run
from vllm_infllm.ops import reference, workspace
from vllm_infllm.ops.interface import ExecutionBlocks, Row
from vllm_infllm.ops.triton import local_xformers

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Masks -----------------------------------------------------------------------------------------------------------


def shared_tokens(row: list[int], n_local: int, block_size: int) -> list[int]:
    """Tokens of whole paged blocks before the row that each of its queries has in its window: by definition."""
    start, end, edge = row[Row.START], row[Row.END], row[Row.EDGE]
    if end - start < 2:
        return []
    shared = []
    for block in range(edge // block_size, start // block_size):
        tokens = range(block * block_size, (block + 1) * block_size)
        if all(edge <= j < start and 0 <= t - j < n_local for j in tokens for t in range(start, end)):
            shared += tokens
    return shared


def labelled(scene: Scene, batch: Batch, gap: int) -> Tensor:
    """A cache whose keys say (row, kv head, token), and whose values say that and that they are values.

    gap: pages between a block and the next one.
    """
    sizes = scene.sizes
    pages = torch.full((scene.num_blocks, 2 * sizes.kv_heads + gap, sizes.block_size, 4), -1.0)
    for i, row in enumerate(batch.blocks.rows.tolist()):
        table = batch.blocks.block_table[row[Row.TABLE]].tolist()
        for token in range(row[Row.EDGE], row[Row.END]):
            block, offset = table[token // sizes.block_size], token % sizes.block_size
            for head in range(sizes.kv_heads):
                pages[block, 2 * head, offset] = torch.tensor([i, head, token, 0])
                pages[block, 2 * head + 1, offset] = torch.tensor([i, head, token, 1])
    cache = pages[:, : 2 * sizes.kv_heads].unflatten(1, (sizes.kv_heads, 2))
    return cache.as_strided(
        (scene.num_blocks, sizes.kv_heads, sizes.block_size, 8), (pages.stride(0), sizes.block_size * 8, 8, 1)
    )


def materialized(mask: Any) -> Tensor:
    """[queries, tokens of pages], whether a query sees a token."""
    shape = mask.q_seqinfo.seqstart_py[-1], mask.k_seqinfo.seqstart_py[-1]
    bias = mask.materialize(shape)
    assert set(bias.unique().tolist()) <= {0.0, -math.inf}
    return bias == 0


@settings(max_examples=60, deadline=None)
@given(st.data(), sizes_of_models(), st.sampled_from([0, 1, 3]), SEEDS)
def test_masks_show_the_shared_tokens(data: st.DataObject, sizes: Sizes, gap: int, seed: int) -> None:
    """Each query of a ragged batch sees exactly its row's shared tokens, of its kv head, keys and values alike."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), torch.float32, seed)
    batch = scene.batch()
    blocks = among_empty_rows(batch.blocks)
    cache = labelled(scene, batch, gap)
    shared = local_xformers.shared_of(blocks, cache, sizes.n_local)
    expected = [shared_tokens(row, sizes.n_local, sizes.block_size) for row in batch.blocks.rows.tolist()]
    if shared is None:
        assert not any(expected)
        return
    bounds = shared.bounds[1::2].tolist()
    assert not shared.bounds[::2].any(), "rows of padding have none"
    assert [list(range(first, stop)) for first, stop, _ in bounds] == expected
    key, value = (x[0, :, 0] for x in local_xformers.pages(cache, group=3))
    sees = materialized(shared.mask)
    queries = [(h, i, t) for h in range(sizes.kv_heads) for i, row in enumerate(expected) if row
               for t in range(*scene_span(scene, i))]  # fmt: skip
    assert len(sees) == len(queries)
    for seen, (head, i, _) in zip(sees, queries, strict=True):
        places = seen.nonzero()[:, 0]
        labels = sorted(key[places].tolist())
        assert labels == [[i, head, token, 0] for token in expected[i]]
        assert torch.equal(value[places][:, :3], key[places][:, :3]) and (value[places][:, 3] == 1).all()
    begins = [begin for (_, _, begin), tokens in zip(bounds, expected, strict=True) if tokens]
    lengths = [end - begin for begin, end in shared.tokens]
    assert begins == [sum(lengths[:n]) for n in range(len(lengths))]


def scene_span(scene: Scene, i: int) -> tuple[int, int]:
    return scene.tasks[i].start, scene.tasks[i].end


# --- Attention -------------------------------------------------------------------------------------------------------


class StandIn:
    """FlashAttention 3's operator, which xformers calls, in plain torch: pages by the block table, no other mask."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        assert key.shape == value.shape and key.shape[2] == 1 and not kwargs["is_causal"]
        assert kwargs["leftpad_k"] is None and kwargs["window_left"] == kwargs["window_right"] == -1
        out, lse = torch.full_like(query, math.nan), torch.full(query.shape[1::-1], math.nan)
        begins = kwargs["cu_seqlens_q"].tolist()
        table, lengths = kwargs["block_table"], kwargs["seqused_k"].tolist()
        for begin, end, pages, length in zip(begins, begins[1:], table, lengths, strict=False):
            keys, values = (x[pages.long(), :, 0].flatten(0, 1)[:length].float() for x in (key, value))
            scores = torch.einsum("mgd,nd->mgn", query[begin:end].float(), keys) * kwargs["softmax_scale"]
            lse[:, begin:end] = scores.logsumexp(-1).T
            out[begin:end] = torch.einsum("mgn,nd->mgd", scores.softmax(-1), values).to(out.dtype)
        return out, lse


_not_supported_reasons = fmha.flash3.FwOp.not_supported_reasons


def reasons_but_the_device(inputs: fmha.Inputs) -> list[str]:
    """Why xformers cannot run these inputs, but that they are not on a GPU."""
    of_device = ("device=", "A100", "built")
    return [reason for reason in _not_supported_reasons(inputs) if not any(word in reason for word in of_device)]


@pytest.fixture
def flash3(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return standing_in(monkeypatch)


def standing_in(patch: pytest.MonkeyPatch) -> StandIn:
    """All of xformers runs but for the operator, on CPU tensors of any dtype; the workspace is NaN when it is taken."""
    take, stand_in = workspace.take, StandIn()
    patch.setattr(workspace, "take", lambda *args: take(*args).fill_(math.nan))
    patch.setattr(fmha.flash3.FwOp, "OPERATOR", stand_in)
    patch.setattr(fmha.flash3.FwOp, "SUPPORTED_DEVICES", {"cpu"})
    patch.setattr(fmha.flash3.FwOp, "not_supported_reasons", reasons_but_the_device)
    patch.setattr(fmha.flash3.FwOp, "SUPPORTED_DTYPES", {torch.float32, torch.bfloat16, torch.float16})
    return stand_in


def settings_of(scene: Scene) -> Any:
    return replace(scene.sizes.settings, local_attention="xformers")


def assert_equals_reference(scene: Scene, batch: Batch, chosen: Tensor, **kwargs: Any) -> None:
    """Outputs, attention received, and mass."""
    expected = run(scene, batch, chosen, reference, torch.float32, weigh=True, **kwargs)
    got = run(scene, batch, chosen, TRITON, scene.dtype, weigh=True, settings=settings_of(scene), **kwargs)
    assert_same_attention(scene, batch, chosen, got, expected, rounding(scene.dtype))


SPANS = [Task(2560, 2670), Task(5003, 5004), Task(128, 256), Task(2304, 2306), Task(0, 200), Task(700, 725)]


@in_every_dtype
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (7, 1)])
def test_merged_attention_equals_the_reference(flash3: StandIn, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    """Rows with and without shared blocks, with one token, and blocks that leave the window meanwhile."""
    sizes = replace(LONG, heads=heads, kv_heads=kv_heads, topk=2)
    scene = Scene(sizes, SPANS, dtype, seed=heads)
    scene.fill_received()
    batch = scene.batch()
    assert_equals_reference(scene, batch, scene.choose(batch))
    assert flash3.calls == 1


@in_every_dtype
@settings(max_examples=10, deadline=None)
@given(data=st.data(), sizes=sizes_of_models(), seed=SEEDS)
def test_any_batch_equals_the_reference(dtype: torch.dtype, data: st.DataObject, sizes: Sizes, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        standing_in(patch)
        scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed)
        scene.fill_received()
        batch = scene.batch()
        assert_equals_reference(scene, batch, scene.choose(batch))


def test_scores_of_any_size(flash3: StandIn) -> None:
    """What is found may weigh nothing beside the rest, or everything."""
    scene = Scene(replace(LONG, topk=2, block_size=64, window_blocks=8), SPANS, torch.float32, seed=2, loudness=60.0)
    scene.fill_received()
    batch = scene.batch()
    chosen = scene.choose(batch)
    expected = run(scene, batch, chosen, reference, torch.float32)
    got = run(scene, batch, chosen, TRITON, scene.dtype, settings=settings_of(scene))
    assert_same_attention(scene, batch, chosen, got, expected, (5e-4, 5e-4))


def test_layers_share_one_plan(flash3: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are built once for all layers of a round, and anew for the next round and for another window."""
    built: list[ExecutionBlocks] = []
    shared_of = local_xformers.shared_of
    monkeypatch.setattr(
        local_xformers, "shared_of", lambda blocks, *args: [built.append(blocks), shared_of(blocks, *args)][1]
    )
    scene = Scene(replace(LONG, topk=2), SPANS[:1], torch.float32, seed=4)
    scene.fill_received()
    one, other = scene.batch(), scene.batch()
    chosen = scene.choose(one)
    for batch in (one, one, other, one):
        run(scene, batch, chosen, TRITON, scene.dtype, settings=settings_of(scene))
    assert [blocks is one.blocks for blocks in built] == [True, False, True]
    run(scene, one, chosen, TRITON, scene.dtype, settings=replace(settings_of(scene), n_local=256))
    assert len(built) == 4


@in_every_dtype
def test_xformers_takes_pages_where_they_lie(dtype: torch.dtype) -> None:
    """What xformers has against these inputs is that they are not on a GPU; it copies no keys and values."""
    scene = Scene(replace(LONG, heads=6, kv_heads=2), [Task(2560, 2670)], dtype, seed=6)
    batch = scene.batch()
    cache = scene.packed(TRITON, dtype)[0]
    shared = local_xformers.shared_of(batch.blocks, cache, scene.sizes.n_local)
    assert shared is not None
    key, value = local_xformers.pages(cache, group=3)
    query = torch.zeros((1, 220, 3, 64), dtype=dtype)
    inputs = fmha.Inputs(query, key, value, shared.mask, is_partial=True)
    inputs.validate_inputs()
    reasons = reasons_but_the_device(inputs)
    assert reasons == [] if dtype != torch.float32 else ["dtype=" in reason for reason in reasons] == [True]
    converted = fmha.flash3._convert_input_format(inputs, supports_mqa=True)[0]
    for ours, theirs, first in ((key, converted.key, 0), (value, converted.value, 128 * 64)):
        assert theirs.data_ptr() == ours.data_ptr() == cache[0, 0].data_ptr() + first * dtype.itemsize
        assert theirs.shape[1:] == (128, 1, 64) and theirs.stride()[:2] == (128 * 64, 64)
