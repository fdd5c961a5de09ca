"""Attention in Triton against the reference ops, in Triton's interpreter.

Scenes are those of the C++ ops: whatever must not be read is NaN, and so is the workspace.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.gpu.test_triton_ops import among_empty_rows, sizes_of_models
from tests.test_ops_cpu import (
    SEEDS,
    Batch,
    Outcome,
    Scene,
    Sizes,
    Task,
    any_tasks,
    assert_same_attention,
    bits,
    in_every_dtype,
)
from tests.test_ops_cpu import attend as run
from vllm_infllm.ops import reference, workspace
from vllm_infllm.ops.interface import Row
from vllm_infllm.ops.triton.attend import attend

pytestmark = pytest.mark.usefixtures("one_thread")

TRITON = SimpleNamespace(write=reference.write, gather=reference.gather, attend=attend)


@pytest.fixture(scope="module", autouse=True)
def nothing_in_the_workspace() -> Iterator[None]:
    """Tensors of the workspace are NaN when they are taken."""
    take = workspace.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "take", lambda *args: take(*args).fill_(math.nan))
        yield


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Bounds of outputs, and of attention received and mass: keys, far queries and probabilities are rounded."""
    eps = torch.finfo(dtype).eps
    return (2e-5, 2e-6) if dtype == torch.float32 else (2.5 * eps, 0.5 * eps)


def assert_equals_reference(
    scene: Scene,
    batch: Batch,
    chosen: Tensor,
    bounds: tuple[float, float] | None = None,
    padding: bool = False,
    **kwargs: Any,
) -> None:
    """Outputs, attention received and mass; the mass of no block is 0. Rows of padding change nothing."""
    expected = run(scene, batch, chosen, reference, torch.float32, **kwargs)
    if padding:
        padded = torch.full_like(chosen, -1).repeat_interleave(2, 0)
        padded[1::2] = chosen
        in_padding = replace(batch, blocks=among_empty_rows(batch.blocks))
        got = run(scene, in_padding, padded, TRITON, scene.dtype, **kwargs)
        assert got.mass is None or not got.mass[::2].any()
        got.mass = None if got.mass is None else got.mass[1::2]
    else:
        got = run(scene, batch, chosen, TRITON, scene.dtype, **kwargs)
    assert_same_attention(scene, batch, chosen, got, expected, bounds or rounding(scene.dtype))
    assert got.mass is None or not got.mass[chosen < 0].any()


# --- Against the reference -------------------------------------------------------------------------------------------


@in_every_dtype
@settings(max_examples=12, deadline=None)
@given(st.data(), sizes_of_models(), st.booleans(), st.booleans(), st.booleans(), SEEDS)
def test_attend_equals_the_reference(
    dtype: torch.dtype, data: st.DataObject, sizes: Sizes, from_slots: bool, weigh: bool, padding: bool, seed: int
) -> None:
    """Any batch gives the reference's outputs, attention received and mass, from the store as from slots."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed)
    scene.fill_received()
    batch = scene.batch()
    chosen = scene.choose(batch)
    assert_equals_reference(scene, batch, chosen, padding=padding, from_slots=from_slots, weigh=weigh)


LONG = Sizes(block_size=128, window_blocks=4, exc=256, topk=8, heads=7, kv_heads=1, head_size=64, rotary_dim=64)
"""Windows and stored blocks of many tiles and splits."""
LONG_TASKS = [Task(2560, 2670), Task(5003, 5004), Task(128, 256), Task(2304, 2306), Task(511, 512, accumulate=False)]


@in_every_dtype
@pytest.mark.parametrize("block_size", [128, 48])
def test_attend_over_many_blocks(dtype: torch.dtype, block_size: int) -> None:
    """Rows of more keys and queries than are processed at a time give the reference's results, too."""
    window_blocks = 512 // block_size
    scene = Scene(replace(LONG, block_size=block_size, window_blocks=window_blocks), LONG_TASKS, dtype, seed=3)
    scene.fill_received()
    batch = scene.batch()
    assert_equals_reference(scene, batch, scene.choose(batch), weigh=True)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(
    "dtype, num_heads, kv_heads", [(torch.float32, 5, 5), (torch.bfloat16, 6, 2), (torch.float16, 17, 1)], ids=str
)
def test_attend_with_any_heads_and_ropes(dtype: torch.dtype, num_heads: int, kv_heads: int, neox: bool) -> None:
    """Groups that divide no tile, rotation of some dimensions, an attention factor, edge tokens in any kind of row."""
    sizes = Sizes(exc=64, heads=num_heads, kv_heads=kv_heads, head_size=96, rotary_dim=32, neox=neox)
    sizes = replace(sizes, attention_factor=1.3, sharpness=2.0)
    scene = Scene(sizes, [Task(400, 447), Task(203, 204), Task(64, 81)], dtype, seed=8)
    scene.fill_received()
    batch = scene.batch()
    assert_equals_reference(scene, batch, scene.choose(batch), weigh=True)


@settings(max_examples=8, deadline=None)
@given(st.data(), sizes_of_models(block_sizes=(16, 32)), SEEDS)
def test_attend_with_scores_of_any_size(data: st.DataObject, sizes: Sizes, seed: int) -> None:
    """Scores of some hundreds, in one block and not in another, neither overflow nor get lost when parts are joined."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), torch.float32, seed, loudness=60.0)
    scene.fill_received()
    batch = scene.batch()
    # What is left of a score of this size behind its rounding.
    assert_equals_reference(scene, batch, scene.choose(batch), bounds=(5e-4, 5e-4), weigh=True)


@pytest.mark.parametrize("from_slots", [False, True])
def test_fewer_chosen_than_others_have(from_slots: bool) -> None:
    """Rows may have any number of chosen blocks, none included."""
    scene = Scene(
        Sizes(topk=4, exc=64), [Task(400, 401), Task(400, 430), Task(300, 301), Task(300, 318)], torch.float32, 3
    )
    scene.fill_received()
    batch = scene.batch()
    chosen = scene.choose(batch)
    chosen[0, 2:] = chosen[1, 1:] = chosen[2] = chosen[3] = -1
    assert_equals_reference(scene, batch, chosen, from_slots=from_slots, weigh=True)


@in_every_dtype
@pytest.mark.parametrize("offset", [-1, 1])
@pytest.mark.parametrize("task", [Task(400, 401), Task(400, 430), Task(64, 94)], ids=str)
def test_window_off_by_one_token_is_seen(dtype: torch.dtype, offset: int, task: Task) -> None:
    """The comparison fails when the kernels are given a window that is one token too long or too short."""
    scene = Scene(Sizes(exc=64, sharpness=2.0), [task], dtype, seed=4)
    scene.fill_received()
    batch = scene.batch()
    chosen = scene.choose(batch)
    expected = run(scene, batch, chosen, reference, torch.float32)
    assert_same_attention(scene, batch, chosen, run(scene, batch, chosen, TRITON, dtype), expected, rounding(dtype))
    wrong = replace(scene.sizes.settings, n_local=scene.sizes.n_local + offset)
    got = run(scene, batch, chosen, TRITON, dtype, settings=wrong)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_attention(scene, batch, chosen, got, expected, rounding(dtype))


# --- Rows and batches ------------------------------------------------------------------------------------------------


@in_every_dtype
@pytest.mark.parametrize("start", [30, 64, 80, 400, 415])
def test_one_token_equals_the_first_of_two(dtype: torch.dtype, start: int) -> None:
    """The kernels of rows with one token give what those of longer rows do."""
    scene = Scene(Sizes(exc=64, head_size=64, rotary_dim=64), [Task(start, start + 2)], dtype, seed=1)
    scene.fill_received()
    batch = scene.batch()
    chosen = scene.choose(batch)
    both = run(scene, batch, chosen, TRITON, dtype)
    rows = batch.blocks.rows.clone()
    rows[:, Row.END] -= 1
    one_token = replace(batch, blocks=replace(batch.blocks, rows=rows, longest=1))
    one = run(scene, one_token, chosen, TRITON, dtype)
    first = batch.tokens[0].start
    bound = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(one.output[first], both.output[first], rtol=bound, atol=bound)
    assert one.output[first + 1].isnan().all()


@in_every_dtype
@settings(max_examples=3, deadline=None)
@given(st.data(), sizes_of_models(), SEEDS)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, data: st.DataObject, sizes: Sizes, seed: int) -> None:
    """A row gives and receives the same to the last bit alone and among others."""
    assert_same_alone(Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    """The same for rows of many tiles and splits."""
    assert_same_alone(Scene(LONG, LONG_TASKS, dtype, seed=5))


def assert_same_alone(scene: Scene) -> None:
    scene.fill_received()
    everyone = scene.batch()
    chosen = scene.choose(everyone)
    together = run(scene, everyone, chosen, TRITON, scene.dtype, weigh=True)
    for i, request in enumerate(scene.requests):
        batch = scene.batch([i])
        own_chosen = chosen[i : i + 1, : batch.blocks.num_chosen]
        alone = run(scene, batch, own_chosen, TRITON, scene.dtype, weigh=True)
        own = request.slots // scene.sizes.block_size, slice(None), request.slots % scene.sizes.block_size
        assert torch.equal(bits(together.output[everyone.tokens[i]]), bits(alone.output[batch.tokens[0]]))
        assert torch.equal(bits(together.received[own]), bits(alone.received[own]))
        assert torch.equal(bits(mass_of(together)[i, : own_chosen.shape[1]]), bits(mass_of(alone)[0]))


def mass_of(outcome: Outcome) -> Tensor:
    assert outcome.mass is not None
    return outcome.mass
