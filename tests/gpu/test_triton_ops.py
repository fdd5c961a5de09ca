"""The Triton ops against the reference ops, op by op, in Triton's interpreter.

Scenes are those of the C++ ops: whatever an op must not read is NaN. Attention has a file of its own.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.gpu import build_cuda
from tests.test_ops_cpu import (
    SEEDS,
    Batch,
    Scene,
    Sizes,
    Task,
    any_sizes,
    any_tasks,
    assert_best_are_chosen,
    bits,
    in_every_dtype,
    leaving_tasks,
)
from vllm_infllm.ops import load, reference, workspace
from vllm_infllm.ops.interface import ExecutionBlocks, Leaving, Ops, Row

pytestmark = pytest.mark.usefixtures("one_thread")

build_cuda.load_for_cpu()
ops = load("triton")


def rounded_once(dtype: torch.dtype) -> dict[str, float]:
    """Bounds of arithmetic in float32 and one rounding to the dtype."""
    return {"rtol": 2e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps, "atol": 4e-6}


@st.composite
def sizes_of_models(draw: st.DrawFn, block_sizes: tuple[int, ...] = (16, 32, 48)) -> Sizes:
    """Heads as models have them, in small blocks: the interpreter is slow."""
    sizes = draw(any_sizes(block_sizes))
    head_size = draw(st.sampled_from([64, 96, 128, 256]))
    return replace(sizes, head_size=head_size, rotary_dim=draw(st.sampled_from([head_size, head_size // 2, 10])))


def among_empty_rows(blocks: ExecutionBlocks) -> ExecutionBlocks:
    """The rows, each behind a row of padding, which is like it but has no token."""
    rows = blocks.rows.repeat_interleave(2, 0)
    rows[::2, Row.END] = rows[::2, Row.START]
    return replace(blocks, rows=rows, host_rows=rows.tolist())


# --- write -----------------------------------------------------------------------------------------------------------


@in_every_dtype
@settings(max_examples=8, deadline=None)
@given(sizes_of_models(), st.integers(0, 60), SEEDS)
def test_write_fills_its_slots_and_no_others(dtype: torch.dtype, sizes: Sizes, count: int, seed: int) -> None:
    """Keys and values, parts of longer rows, come to their slots bit for bit; those of slot -1 to none."""
    generator, num_blocks = torch.Generator().manual_seed(seed), 3
    shape = (num_blocks, sizes.kv_heads, sizes.block_size, 2 * sizes.head_size)
    cache = torch.randn(shape, generator=generator).to(dtype)
    slots = torch.randperm(num_blocks * sizes.block_size, generator=generator)[:count]
    tokens = torch.randn(len(slots), sizes.kv_heads, 3 * sizes.head_size, generator=generator)
    tokens = tokens.to(dtype).flatten(1)
    key, value = (part.unflatten(1, (sizes.kv_heads, -1)) for part in tokens.chunk(3, 1)[1:])
    padding = torch.rand(len(slots), generator=generator) < 0.2
    expected = cache.clone()
    reference.write(expected, key[~padding], value[~padding], slots[~padding])
    ops.write(cache, key, value, slots.masked_fill(padding, -1))
    assert torch.equal(bits(cache), bits(expected))


# --- far queries -----------------------------------------------------------------------------------------------------


def rotate_far(scene: Scene, batch: Batch) -> Tensor:
    """Far queries of the batch, NaN where none were written."""
    workspace.take("far", tuple(batch.query.shape), scene.dtype, batch.query.device).fill_(math.nan)
    return ops.rotate.far_queries(among_empty_rows(batch.blocks), scene.sizes.settings, scene.rope, batch.query).float()


def expected_far(scene: Scene, task: Task, query: Tensor) -> Tensor:
    return scene.rope.far(query, torch.arange(task.start, task.end), scene.sizes.n_local)


@in_every_dtype
@settings(max_examples=8, deadline=None)
@given(st.data(), sizes_of_models(), SEEDS)
def test_far_queries_equal_the_reference(dtype: torch.dtype, data: st.DataObject, sizes: Sizes, seed: int) -> None:
    """Queries of rows that reach beyond the window are rotated, with both pairings and any rotary dims."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed)
    batch = scene.batch()
    far, written = rotate_far(scene, batch), torch.zeros(len(batch.query), dtype=torch.bool)
    for task, tokens in zip(scene.tasks, batch.tokens, strict=True):
        if task.end > sizes.n_local:
            torch.testing.assert_close(
                far[tokens], expected_far(scene, task, batch.query[tokens]), **rounded_once(dtype)
            )
            written[tokens] = True
    assert far[~written].isnan().all(), "queries of others were rotated"


@in_every_dtype
@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
def test_far_position_off_by_one_is_seen(dtype: torch.dtype, neox: bool) -> None:
    """The comparison above fails for queries of the position before."""
    scene = Scene(Sizes(neox=neox, attention_factor=1.3), [Task(200, 220)], dtype, seed=1)
    batch = scene.batch()
    far = rotate_far(scene, batch)[batch.tokens[0]]
    torch.testing.assert_close(far, expected_far(scene, Task(200, 220), scene.requests[0].query), **rounded_once(dtype))
    with pytest.raises(AssertionError, match="not close"):
        wrong = expected_far(scene, Task(199, 219), scene.requests[0].query)
        torch.testing.assert_close(far, wrong, **rounded_once(dtype))


# --- score and select ------------------------------------------------------------------------------------------------


def assert_scored(scene: Scene, batch: Batch, rows: Tensor, scores: Tensor) -> None:
    """Scores of the units of rows that have a choice equal the reference's; -inf elsewhere."""
    sizes = scene.sizes
    for row, got in zip(rows.tolist(), scores, strict=True):
        sealed = batch.blocks.units[row[Row.UNITS] :][: row[Row.STORED]][sizes.init_blocks :]
        if row[Row.START] == row[Row.END] or len(sealed) <= sizes.topk:
            assert (got == -math.inf).all()
            continue
        query = batch.query[row[Row.OFFSET] :][: row[Row.END] - row[Row.START]]
        far = expected_far(scene, Task(row[Row.START], row[Row.END]), query)
        expected = reference.score(far, scene.representatives[sealed])
        bound = 2e-7 * sizes.heads * sizes.head_size
        torch.testing.assert_close(got[: len(sealed)], expected, rtol=2e-6, atol=bound)
        assert (got[len(sealed) :] == -math.inf).all()


@in_every_dtype
@settings(max_examples=8, deadline=None)
@given(st.data(), sizes_of_models((16, 32)), SEEDS)
def test_scores_equal_the_reference(dtype: torch.dtype, data: st.DataObject, sizes: Sizes, seed: int) -> None:
    """Sum over heads of < mean far query, representative >, for the units of rows that have a choice."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed)
    scene.fill_representatives()
    batch = scene.batch()
    blocks = among_empty_rows(batch.blocks)
    scores = ops.score(blocks, sizes.settings, scene.rope, batch.query, scene.representatives)
    assert_scored(scene, batch, blocks.rows, scores)


@in_every_dtype
def test_scores_of_a_row_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """A decode step scores the same to the last bit alone as beside a long row, which is averaged in several parts."""
    sizes = Sizes(block_size=32, window_blocks=5, exc=150, head_size=96, rotary_dim=96)
    scene = Scene(sizes, [Task(1400, 1401), Task(1650, 1800)], dtype, seed=2)
    scene.fill_representatives()
    alone, together = scene.batch([0]), scene.batch()
    scores = []
    for batch in (alone, together):
        scores.append(ops.score(batch.blocks, sizes.settings, scene.rope, batch.query, scene.representatives).clone())
        assert_scored(scene, batch, batch.blocks.rows, scores[-1])
    row = together.blocks.rows[:, Row.START].tolist().index(1400)
    assert torch.equal(scores[0][0], scores[1][row, : scores[0].shape[1]])


@in_every_dtype
@settings(max_examples=5, deadline=None)
@given(st.data(), sizes_of_models((16,)), SEEDS)
def test_select_takes_the_best(dtype: torch.dtype, data: st.DataObject, sizes: Sizes, seed: int) -> None:
    """Initial tokens and the units with the highest scores, in order; nothing for rows of padding."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed)
    scene.fill_representatives()
    batch = scene.batch()
    blocks = among_empty_rows(batch.blocks)
    chosen = ops.select(blocks, sizes.settings, scene.rope, batch.query, scene.representatives)
    assert (chosen[::2] == -1).all()
    assert_best_are_chosen(scene, batch, chosen[1::2])


# --- seal ------------------------------------------------------------------------------------------------------------


def with_padding(leaving: Tensor) -> Tensor:
    """Leaving blocks, each behind one of padding."""
    padded = leaving.repeat_interleave(2, 0)
    padded[::2, Leaving.UNIT] = -1
    return padded


@in_every_dtype
@settings(max_examples=10, deadline=None)
@given(st.data(), sizes_of_models((16, 48, 144)), st.sampled_from([0, 1, 4]), SEEDS)
def test_seal_equals_the_reference(
    dtype: torch.dtype, data: st.DataObject, sizes: Sizes, levels: int, seed: int
) -> None:
    """Leaving blocks are stored un-rotated, with their representatives, on equal attention of the earlier tokens.

    Everything else in the store stays as it was.
    """
    repr_topk = data.draw(st.sampled_from([sizes.repr_topk, sizes.block_size]), label="repr_topk")
    sizes = replace(sizes, exc=sizes.n_local, repr_topk=repr_topk)
    scene = Scene(sizes, data.draw(leaving_tasks(sizes), label="tasks"), dtype, seed)
    scene.fill_received(levels)
    blocks = scene.batch().blocks
    leaving = blocks.leaving
    units, new = leaving[:, Leaving.UNIT], leaving[leaving[:, Leaving.IS_UNIT] == 1, Leaving.UNIT]

    cache, got = scene.packed(reference, dtype)
    ops.seal(replace(blocks, leaving=with_padding(leaving)), sizes.settings, scene.rope, cache, got)
    exact_cache, expected = scene.packed(reference, torch.float32)
    reference.seal(blocks, sizes.settings, scene.rope, exact_cache, expected)
    bounds = rounded_once(dtype)
    torch.testing.assert_close(got.keys[units].float(), expected.keys[units], **bounds)
    assert torch.equal(bits(got.values[units]), bits(expected.values[units].to(dtype)))
    torch.testing.assert_close(got.representatives[new].float(), expected.representatives[new], **bounds)

    for x, written in [(got.keys, units), (got.values, units), (got.representatives, new)]:
        others = torch.ones(scene.num_units, dtype=torch.bool).scatter(0, written, False)
        assert x[others].isnan().all()


# --- The module ------------------------------------------------------------------------------------------------------


def test_module_has_every_operation() -> None:
    """What the interface names is there, under the name that the configuration gives."""
    assert ops.describe() == "Triton and CUDA"
    assert all(callable(getattr(ops, name)) for name in vars(Ops) if not name.startswith("_"))


@pytest.mark.parametrize("block_size", [1, 8, 24, 136])
def test_block_sizes_that_cannot_be_run_are_named(block_size: int) -> None:
    """The reason names the flag, its value, what would do, and the implementation that runs any."""
    reason = ops.check(64, block_size) or ""
    assert f"--block-size {block_size}:" in reason and "multiple of 16" in reason and 'ops="reference"' in reason


@pytest.mark.parametrize("head_size", [16, 24, 72, 272])
def test_head_sizes_that_cannot_be_run_are_named(head_size: int) -> None:
    """The reason names the size, those that can be run, and the implementation that runs any."""
    reason = ops.check(head_size, 128) or ""
    assert f"head size {head_size}:" in reason and "32 to 256 in steps of 16" in reason and 'ops="reference"' in reason


def test_sizes_that_can_be_run_are_accepted() -> None:
    """Whatever the tests above run is accepted."""
    assert all(ops.check(head, block) is None for head in range(32, 257, 16) for block in (16, 48, 128, 144, 256))
