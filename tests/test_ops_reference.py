"""The reference ops in a real layer, against the oracle: every property of the algorithm, and faults that are seen."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.one_layer import Layer, Sequence, Shape, assert_equals_oracle, oracle_of, shapes
from tests.oracle import OracleConfig, full_attention
from tests.test_ops_cpu import Scene, Sizes, Task, bits
from tests.test_oracle import SCALE, Golden
from vllm_infllm.attention.metadata import InfLLMMetadata
from vllm_infllm.attention.planner import Limits
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.ops import reference as ops
from vllm_infllm.ops.interface import Leaving

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = shapes(block_sizes=[2, 4, 8], head_sizes=[(4, 4), (8, 8), (12, 12), (12, 4), (16, 8)])


@settings(max_examples=60, deadline=None)
@given(SMALL, st.data())
def test_layer_equals_the_oracle(shape: Shape, data: st.DataObject) -> None:
    """Prompt and decode of any length give the oracle's outputs, selections, received attention and representatives."""
    prompt_len = data.draw(st.integers(1, 6 * shape.config.n_local + 20), label="prompt_len")
    length = prompt_len + data.draw(st.integers(0, 12), label="decode")
    seed = data.draw(st.integers(0, 2**31 - 1), label="seed")
    sequence, layer = Sequence.random(shape, length, prompt_len, seed), Layer.for_one(shape, length, seed)
    layer.run(sequence)
    assert_equals_oracle(layer, sequence, oracle_of(shape, sequence))


STANDARD = Shape(OracleConfig(block_size=8, n_init=8, n_local=32, topk=2, repr_topk=2, exc=12), heads=6, kv_heads=2)
"""GQA, exc no multiple of the block size."""


def test_long_sequence_is_compared_to_its_end() -> None:
    """On a long prompt with a choice to make in most execution blocks, nothing is left out as a near tie."""
    sequence, layer = Sequence.random(STANDARD, 420, 400, seed=3), Layer.for_one(STANDARD, 420)
    layer.run(sequence)
    expected = oracle_of(STANDARD, sequence)
    assert assert_equals_oracle(layer, sequence, expected) == len(expected.blocks)
    assert len(layer.impl.record.selections) > len(expected.blocks) / 2


@pytest.mark.parametrize("length", [3, 32, 33, 41, 100])
def test_neither_initial_tokens_nor_units(length: int) -> None:
    """n_init 0 and topk 0: the window and the remainder are all that is seen, at any length."""
    shape = Shape(OracleConfig(block_size=8, n_init=0, n_local=32, topk=0, repr_topk=1, exc=16))
    sequence, layer = Sequence.random(shape, length, length - 2, seed=1), Layer.for_one(shape, length)
    layer.run(sequence)
    assert_equals_oracle(layer, sequence, oracle_of(shape, sequence))


def test_golden_case_c() -> None:
    """The recorded run of the authors' code, its mask corrected: outputs, scores, selections, representatives."""
    golden = Golden()
    shape = Shape(golden.config, heads=4, kv_heads=2, head_size=32, rotary_dim=32)
    # The recording does not cut before the last prompt token; as if its first append were not the end of the prompt.
    sequence = Sequence(golden.q, golden.k, golden.v, prompt_len=10_000)
    layer = Layer.for_one(shape, len(sequence))
    for length in golden["c_appends"].tolist():
        layer.step([(sequence, length)])

    recorded = golden["c_out"].transpose(0, 1).float()
    torch.testing.assert_close(sequence.output, recorded, rtol=0, atol=2e-5)
    expected = golden.run_oracle("c")
    assert math.isclose(shape.scale, SCALE)
    assert assert_equals_oracle(layer, sequence, expected) == len(expected.blocks)
    choices = [units for units in golden.selected("c") if len(units) == 2][-len(layer.impl.record.selections) :]
    assert layer.impl.record.selections == choices
    received = torch.stack(layer.impl.record.received)
    torch.testing.assert_close(received, golden["c_block_token_score"].float(), rtol=0, atol=1e-5)
    keys = torch.stack(layer.impl.record.representatives)
    torch.testing.assert_close(keys, golden["c_block_repr_key"].float(), rtol=0, atol=1e-5)


# --- Chunks and batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [12, 24, 60, 120])
def test_chunks_at_multiples_of_exc_change_nothing(chunk: int) -> None:
    """A prompt prefilled in chunks that end at multiples of exc_block_size comes out as prefilled at once."""
    whole, chunked = (Sequence.random(STANDARD, 210, 200, seed=5) for _ in range(2))
    Layer.for_one(STANDARD, 210, seed=1).run(whole)
    Layer.for_one(STANDARD, 210, seed=2).run(chunked, chunk)
    torch.testing.assert_close(chunked.output, whole.output, rtol=0, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(SMALL, st.integers(0, 2**31 - 1))
def test_batch_gives_what_each_request_gets_alone(shape: Shape, seed: int) -> None:
    """Requests that come and go, in batches of prefill chunks and decode steps, do not see each other."""
    geometry, exc, choice = shape.geometry(), shape.config.exc, random.Random(seed)
    lengths = [choice.randint(1, 5 * shape.config.n_local) for _ in range(5)]
    prompt_lens = [choice.randint(max(1, length - 9), length) for length in lengths]
    everyone = [Sequence.random(shape, lengths[i], prompt_lens[i], seed + i) for i in range(5)]
    waiting, running = list(everyone), []
    largest = sum(-(-length // shape.config.block_size) + 1 for length in lengths)
    together = Layer(shape, largest, largest, seed)
    while waiting or running:
        while waiting and (not running or choice.random() < 0.4):
            running.append(waiting.pop(0))
        work = []
        for sequence in choice.sample(running, choice.randint(1, len(running))):
            end = min(sequence.computed + choice.randint(exc, 3 * exc), sequence.prompt_len)
            count = geometry.chunk_end(sequence.computed, end, sequence.prompt_len) - sequence.computed
            work.append((sequence, count if sequence.computed < sequence.prompt_len else 1))
        together.step(work)
        for sequence in [sequence for sequence in running if sequence.computed == len(sequence)]:
            together.finish(sequence)
            running.remove(sequence)

    assert len(together.free_blocks) == largest and sorted(together.free_units) == list(range(largest))
    for i, sequence in enumerate(everyone):
        alone = Sequence.random(shape, len(sequence), sequence.prompt_len, seed + i)
        Layer.for_one(shape, len(sequence)).run(alone)
        torch.testing.assert_close(sequence.output, alone.output, rtol=0, atol=1e-6)


# --- Short requests --------------------------------------------------------------------------------------------------


def test_short_request_is_full_attention() -> None:
    """Up to n_local tokens, prompt and answer see exact full causal attention."""
    sequence, layer = Sequence.random(STANDARD, 32, 20, seed=7), Layer.for_one(STANDARD, 32)
    layer.run(sequence)
    full = full_attention(sequence.q, sequence.k, sequence.v, STANDARD.rope, STANDARD.scale)
    torch.testing.assert_close(sequence.output.double(), full.transpose(0, 1), rtol=0, atol=1e-5)


def test_short_request_touches_no_memory() -> None:
    """A request that cannot outgrow the window stores nothing and does not accumulate attention."""
    layer = Layer.for_one(STANDARD, 32)
    layer.run(Sequence.random(STANDARD, 32, 20, seed=7))
    assert all(tensor.isnan().all() for tensor in vars(layer.impl.memory).values())


def test_store_holds_raw_keys_and_values() -> None:
    """Block b of a request lies in the request's b-th unit, keys with their rotation taken off."""
    sequence, layer = Sequence.random(STANDARD, 150, 150, seed=8), Layer.for_one(STANDARD, 150)
    layer.run(sequence)
    units = layer.requests[sequence.table[0]].units
    assert len(units) == (150 - 32) // 8
    for block, unit in enumerate(units):
        tokens = slice(8 * block, 8 * block + 8)
        torch.testing.assert_close(layer.impl.memory.keys[unit], sequence.k[:, tokens], rtol=0, atol=1e-5)
        assert torch.equal(layer.impl.memory.values[unit], sequence.v[:, tokens])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loses_no_more_than_its_rounding(dtype: torch.dtype) -> None:
    """With every unit taken, so that no selection can tip over, outputs stay within the rounding of the dtype."""
    shape = Shape(OracleConfig(block_size=8, n_init=8, n_local=32, topk=100, repr_topk=2, exc=12), 4, 2, 16, 16)
    sequence, layer = Sequence.random(shape, 200, 190, seed=9), Layer.for_one(shape, 200, dtype=dtype)
    layer.run(sequence)
    expected = oracle_of(shape, sequence).output.transpose(0, 1)
    error = (sequence.output.double() - expected).abs()
    assert error.max() < 12 * torch.finfo(dtype).eps and error.mean() < torch.finfo(dtype).eps


def test_warm_up_attends_to_nothing() -> None:
    """Without a plan there is no request: the output is zero, and neither cache nor memory are written."""
    layer = Layer.for_one(STANDARD, 32)
    query, key = torch.randn(5, 6, 8), torch.randn(5, 2, 8)
    unplanned = InfLLMMetadata(
        5, torch.zeros(5, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int32), [], Limits(max_len=1)
    )
    for metadata in (None, unplanned):
        output = torch.full_like(query, math.nan)
        layer.impl.forward(None, query, key, key, layer.cache, metadata, output)
        assert (output == 0).all() and layer.cache.isnan().all()


def test_attention_of_stored_tokens_is_summed_over_queries() -> None:
    """The third result is what the queries of the block gave each stored token; read by one-hot values."""
    generator = torch.Generator().manual_seed(12)
    query, far_query = (torch.randn(5, 6, 8, generator=generator) for _ in range(2))
    paged_key, stored_key = (torch.randn(n, 2, 8, generator=generator) for n in (40, 8))
    stored_value = torch.eye(8)[:, None].expand(-1, 2, -1)
    rope = RotaryTable(STANDARD.cos_sin, neox=True)
    paged = (query, 99, paged_key, torch.zeros(40, 2, 8), 64, 32, 0.5, rope)
    output, received, mass = ops.attend_one(*paged, far_query, stored_key, stored_value)
    torch.testing.assert_close(mass, output.sum(0), rtol=0, atol=1e-5)
    assert 0 < mass.sum() < query[..., 0].numel() - received.sum()  # the edge has its share, too


# --- Ties ------------------------------------------------------------------------------------------------------------


def test_equal_scores_select_the_first_units() -> None:
    """Queries of zero give every unit the same score: the first topk units are taken."""
    sequence, layer = Sequence.random(STANDARD, 200, 195, seed=10), Layer.for_one(STANDARD, 200)
    sequence.q.zero_()
    layer.run(sequence)
    assert layer.impl.record.selections and all(units == [0, 1] for units in layer.impl.record.selections)


def test_top_breaks_ties_by_the_lower_unit() -> None:
    """Among equal scores the lower unit wins, also where many are equal; the result is ascending."""
    assert ops.top(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 2]
    assert ops.top(torch.tensor([0.0, 5.0, 0.0, 7.0]), 3).tolist() == [0, 1, 3]
    assert ops.top(torch.zeros(5000), 3).tolist() == [0, 1, 2]
    assert ops.top(torch.tensor([2.0, 1.0]), 9).tolist() == [0, 1]


def test_represent_breaks_ties_by_the_earlier_token() -> None:
    """Among tokens that received the same attention the earlier ones represent the unit, head by head."""
    key = torch.arange(4.0).view(4, 1, 1).expand(4, 1, 3)  # token j has the key (j, j, j)
    received = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0]])
    assert ops.represent(key, received, 2)[:, 0].tolist() == [0.5, 0.5]  # tokens 0 and 1; 1 and 0
    assert ops.represent(key, received.flip(1), 1)[:, 0].tolist() == [0.0, 2.0]


# --- Would a fault be seen? ------------------------------------------------------------------------------------------

ATTEND, TOP, SCORE, REPRESENT, ACCUMULATE = ops.attend_one, ops.top, ops.score, ops.represent, ops.accumulate
FAR, EXECUTION_BLOCKS = RotaryTable.far, Geometry.execution_blocks


def shifted_window(offset: int) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """`attend_one` with a window that is `offset` tokens off."""

    def attend_one(query, start, paged_key, paged_value, paged_start, n_local, *rest):  # type: ignore[no-untyped-def]
        return ATTEND(query, start, paged_key, paged_value, paged_start, n_local + offset, *rest)

    return attend_one


def double_counting(  # type: ignore[no-untyped-def]
    query, start, paged_key, paged_value, paged_start, n_local, scale, rope, far_query, stored_key, stored_value
) -> tuple[Tensor, Tensor, None]:
    """`attend_one` with the fault of the authors' code: the far part ends where the window of the last query begins."""
    end = start + len(query)
    num_edge = max(0, end - n_local - paged_start)
    far = [(rope.unrotate(paged_key[:num_edge], torch.arange(paged_start, paged_start + num_edge)), paged_value)]
    far += [(stored_key, stored_value)] if stored_key is not None else []
    per_head = query.shape[1] // paged_key.shape[1]
    paged_key = paged_key.repeat_interleave(per_head, dim=1)
    distance = torch.arange(start, end)[:, None] - torch.arange(paged_start, end)
    local = torch.einsum("thd,jhd->htj", query.float(), paged_key) * scale
    logits = [local.masked_fill((distance < 0) | (distance >= n_local), -math.inf)]
    values = [paged_value.repeat_interleave(per_head, dim=1)]
    for key, value in far if far_query is not None else []:
        logits.append(torch.einsum("thd,jhd->htj", far_query, key.repeat_interleave(per_head, dim=1)) * scale)
        values.append(value[: len(key)].repeat_interleave(per_head, dim=1))
    p = torch.cat(logits, dim=-1).softmax(dim=-1)
    return torch.einsum("htj,jhd->thd", p, torch.cat(values)), p[..., : len(paged_key)].sum(1), None


def stored_blocks_off_by(tokens: int) -> Callable[[Geometry, int], int]:
    return lambda geometry, s: max(0, (s - geometry.n_local + tokens) // geometry.block_size)


FAULTS: dict[str, tuple[object, str, Callable]] = {
    "window one token too long": (ops, "attend_one", shifted_window(1)),
    "window one token too short": (ops, "attend_one", shifted_window(-1)),
    "double counting": (ops, "attend_one", double_counting),
    "far position n_local": (RotaryTable, "far", lambda self, x, at, n_local: FAR(self, x, at, n_local + 1)),
    "blocks stored a block too early": (Geometry, "stored_blocks", stored_blocks_off_by(STANDARD.config.block_size)),
    "blocks stored a block too late": (Geometry, "stored_blocks", stored_blocks_off_by(-STANDARD.config.block_size)),
    "blocks stored a token too early": (Geometry, "stored_blocks", stored_blocks_off_by(1)),
    "blocks stored a token too late": (Geometry, "stored_blocks", stored_blocks_off_by(-1)),
    "lowest scores selected": (ops, "top", lambda scores, topk: TOP(-scores, topk)),
    "one unit too few": (ops, "top", lambda scores, topk: TOP(scores, topk - 1)),
    "scores of the last query": (ops, "score", lambda far, keys: SCORE(far[-1:], keys)),
    "least attended tokens represent": (ops, "represent", lambda key, received, k: REPRESENT(key, -received, k)),
    "one representative token more": (ops, "represent", lambda key, received, k: REPRESENT(key, received, k + 1)),
    "attention of earlier owners kept": (
        ops,
        "accumulate",
        lambda received, blocks, paged_start, start, new: ACCUMULATE(received, blocks, paged_start, 1 << 40, new),
    ),
    "attention of the last execution block only": (
        ops,
        "accumulate",
        lambda received, blocks, paged_start, start, new: ACCUMULATE(received, blocks, paged_start, paged_start, new),
    ),
    "keys stored with their rotation": (RotaryTable, "unrotate", lambda self, x, positions: x.float()),
    "no cut before the last prompt token": (
        Geometry,
        "execution_blocks",
        lambda self, start, end, prompt_len: EXECUTION_BLOCKS(self, start, end, 1 << 40),
    ),
}


def test_double_counting_repeats_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault as written here is theirs: with it, the layer gives the output that they recorded, case a."""
    golden = Golden()
    shape = Shape(golden.config, heads=4, kv_heads=2, head_size=32, rotary_dim=32)
    sequence = Sequence(golden.q, golden.k, golden.v, prompt_len=10_000)
    monkeypatch.setattr(ops, "attend_one", double_counting)
    layer = Layer.for_one(shape, len(sequence))
    for length in golden["a_appends"].tolist():
        layer.step([(sequence, length)])
    torch.testing.assert_close(sequence.output, golden["a_out"].transpose(0, 1).float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails for each of these faults: it would not pass a wrong mask, selection or sum."""
    sequence, layer = Sequence.random(STANDARD, 260, 250, seed=11), Layer.for_one(STANDARD, 260)
    expected = oracle_of(STANDARD, sequence)
    monkeypatch.setattr(*FAULTS[fault])
    # Blocks stored too early have no unit yet.
    with pytest.raises((AssertionError, IndexError) if "too early" in fault else AssertionError):
        layer.run(sequence)
        assert_equals_oracle(layer, sequence, expected)


def test_leaving_rows_that_only_fill_up_seal_nothing() -> None:
    """Plans for a GPU have them, whose unit is -1: no unit is that, least of all the last one."""
    sizes = Sizes(exc=64)
    scene = Scene(sizes, [Task(192, 250)], torch.float32, seed=1)
    scene.fill_received()
    blocks = scene.batch().blocks
    padding = blocks.leaving[:1].clone()
    padding[:, Leaving.UNIT] = -1
    sealed = []
    for leaving in (blocks.leaving, torch.cat([padding, blocks.leaving, padding])):
        cache, memory = scene.packed(ops, torch.float32)
        ops.seal(replace(blocks, leaving=leaving), sizes.settings, scene.rope, cache, memory)
        sealed.append(memory)
    assert len(blocks.leaving)
    for expected, got in zip(*(vars(memory).values() for memory in sealed), strict=True):
        assert torch.equal(bits(got), bits(expected))
