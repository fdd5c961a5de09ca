"""The real layer (InfLLMImpl on the reference ops, paged cache and store) against the oracle, without an engine.

`Layer` below plays the parts of the engine around it: block manager and connector. Whatever the layer must not read
is NaN: blocks that were freed or not yet written, attention of earlier owners, units that nobody has filled.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config

from tests.oracle import (
    NeoxRope,
    OracleConfig,
    OracleResult,
    execution_blocks,
    full_attention,
    infllm_attention,
)
from tests.test_oracle import SCALE, Golden
from vllm_infllm.attention import backend
from vllm_infllm.attention.metadata import InfLLMMetadata, Row
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.requests import RequestMemory, RequestTable
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import reference as ops

NEAR_TIE = 1e-5
"""Scores and attention sums closer than this may be ordered otherwise in float32 than in float64."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are tiny: on a busy machine, waiting for a second thread costs several times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The engine around one layer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a layer is built from."""

    config: OracleConfig
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    rotary_dim: int = 8
    attention_factor: float = 1.0
    max_cached_blocks: int = 0
    cache_strategy: str = "lru"
    max_len: int = 600

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    @property
    def cos_sin(self) -> Tensor:
        """Rotary table [max_len, rotary_dim], float32."""
        inv_freq = 10000.0 ** (-torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim)
        angles = torch.arange(self.max_len)[:, None] * inv_freq
        return (self.attention_factor * torch.cat([angles.cos(), angles.sin()], dim=-1)).float()

    @property
    def rope(self) -> NeoxRope:
        """The oracle's rope, by the very table that the layer has."""
        cos, sin = self.cos_sin.chunk(2, dim=-1)
        return NeoxRope(self.head_size, cos=cos, sin=sin)

    @property
    def kept_blocks(self) -> int:
        """Leading blocks that a request keeps for life: one, or the slots of its residency cache."""
        return self.config.n_init // self.config.block_size + self.max_cached_blocks if self.max_cached_blocks else 1

    def geometry(self) -> Geometry:
        return Geometry(self.config.block_size, self.config.n_init, self.config.n_local, self.config.exc)


@dataclass(eq=False)
class Sequence:
    """One request: raw q [H, N, D], k and v [KH, N, D], and how far it has come."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompt_len: int
    output: Tensor = field(init=False)
    computed: int = 0
    freed: int = 0  # leading blocks that are not held any more, but for the kept ones
    table: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output = torch.full((len(self), self.q.shape[0], self.q.shape[2]), math.nan)

    def __len__(self) -> int:
        return self.q.shape[1]

    @classmethod
    def random(cls, shape: Shape, length: int, prompt_len: int, seed: int) -> "Sequence":
        generator = torch.Generator().manual_seed(seed)
        sizes = [(shape.heads, length, shape.head_size)] + [(shape.kv_heads, length, shape.head_size)] * 2
        return cls(*(torch.randn(size, generator=generator) for size in sizes), prompt_len)


class Layer:
    """One layer with its memory, and the parts of block manager and connector that a step needs."""

    def __init__(
        self, shape: Shape, num_blocks: int, num_units: int, seed: int = 0, dtype: torch.dtype = torch.float32
    ):
        self.shape, self.config, self.dtype = shape, shape.config, dtype
        self.random = random.Random(seed)
        self.impl = make_impl(shape)
        self.impl.rope = RotaryTable(shape.cos_sin, neox=True)
        self.impl.layer = 0
        cache_shape = (num_blocks, shape.kv_heads, self.config.block_size, 2 * shape.head_size)
        self.cache = torch.full(cache_shape, math.nan, dtype=dtype)
        self.impl.memory = LayerMemory.allocate(num_units, num_blocks, shape.heads, self.cache, shape.head_size)
        for tensor in vars(self.impl.memory).values():
            tensor.fill_(math.nan)
        self.requests: RequestTable = {}
        self.free_blocks = self.random.sample(range(num_blocks), num_blocks)
        self.free_units = self.random.sample(range(num_units), num_units)

    @classmethod
    def for_one(cls, shape: Shape, length: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> "Layer":
        blocks = -(-length // shape.config.block_size)
        return cls(shape, blocks + 3, blocks, seed, dtype)

    def run(self, sequence: Sequence, chunk: int | None = None) -> Tensor:
        """Prefill in chunks of `chunk` tokens (all at once if None), then decode; returns the output [N, H, D]."""
        while sequence.computed < len(sequence):
            left = sequence.prompt_len - sequence.computed
            self.step([(sequence, min(left, chunk or left) if left > 0 else 1)])
        return sequence.output

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        """Compute the next tokens of each sequence, as one batch."""
        rows, slots, columns = [], [], []
        for sequence, count in work:
            start, end = sequence.computed, sequence.computed + count
            self._free_stored(sequence)
            self._grow(sequence, end)
            offset = sum(len(c[0]) for c in columns)
            rows.append(Row(offset, start, end, torch.tensor(sequence.table), sequence.table[0]))
            slots += [self._slot(sequence, token) for token in range(start, end)]
            columns.append(self._model_output(sequence, start, end))
        query, key, value = (torch.cat(parts).to(self.dtype) for parts in zip(*columns, strict=True))

        metadata = InfLLMMetadata(len(slots), torch.tensor(slots), rows)
        metadata.plan(self.requests, self.shape.geometry())
        output = torch.full_like(query, math.nan)
        self.impl.forward(None, query, key, value, self.cache, metadata, output)

        for row, (sequence, count) in zip(rows, work, strict=True):
            for cache in self.requests[row.first_block].residency.values():
                cache.check_integrity()
            sequence.output[row.start : row.end] = output[row.offset : row.offset + count].float()
            sequence.computed += count

    def finish(self, sequence: Sequence) -> None:
        """Take blocks and units back."""
        kept = self.shape.kept_blocks
        self._release(sequence.table[:kept] + sequence.table[max(kept, sequence.freed) :])
        units = self.requests.pop(sequence.table[0]).units
        for tensor in (self.impl.memory.keys, self.impl.memory.values, self.impl.memory.representatives):
            tensor[units] = math.nan
        self.free_units += units

    def _model_output(self, sequence: Sequence, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query, rotated key and value of the tokens, [n, heads, D]."""
        rope, positions = self.shape.rope, torch.arange(start, end)
        query = rope.rotate(sequence.q[:, start:end], positions).float()
        key = rope.rotate(sequence.k[:, start:end], positions).float()
        return query.transpose(0, 1), key.transpose(0, 1), sequence.v[:, start:end].transpose(0, 1)

    def _slot(self, sequence: Sequence, token: int) -> int:
        block, offset = divmod(token, self.config.block_size)
        return sequence.table[block] * self.config.block_size + offset

    def _free_stored(self, sequence: Sequence) -> None:
        """Free the blocks, but for the kept ones, that end n_local or more tokens before the next token."""
        gone = max(0, (sequence.computed - self.config.n_local) // self.config.block_size)
        self._release(sequence.table[max(self.shape.kept_blocks, sequence.freed) : gone])
        sequence.freed = gone

    def _release(self, blocks: list[int]) -> None:
        self.cache[blocks] = math.nan
        self.impl.memory.received[blocks] = math.nan
        self.free_blocks += blocks
        self.random.shuffle(self.free_blocks)

    def _grow(self, sequence: Sequence, end: int) -> None:
        while len(sequence.table) * self.config.block_size < end:
            sequence.table.append(self.free_blocks.pop())
        outgrows = len(sequence) > self.config.n_local
        request = self.requests.setdefault(sequence.table[0], RequestMemory(sequence.prompt_len, outgrows))
        while len(request.units) < (end - self.config.n_local) // self.config.block_size:
            request.units.append(self.free_units.pop(self.random.randrange(len(self.free_units))))


_VLLM_CONFIG: list[VllmConfig] = []


def make_impl(shape: Shape) -> "RecordingImpl":
    """A layer's implementation, constructed as vLLM does."""
    if not _VLLM_CONFIG:
        _VLLM_CONFIG.append(VllmConfig())
    vllm_config = copy.copy(_VLLM_CONFIG[0])
    config = shape.config
    vllm_config.additional_config = {
        "infllm": {
            "block_size": config.block_size,
            "n_init": config.n_init,
            "n_local": config.n_local,
            "topk": config.topk,
            "repr_topk": config.repr_topk,
            "exc_block_size": config.exc,
            "max_cached_blocks": shape.max_cached_blocks,
            "cache_strategy": shape.cache_strategy,
        }
    }
    with set_current_vllm_config(vllm_config):
        return RecordingImpl(shape.heads, shape.head_size, shape.scale, shape.kv_heads)


class RecordingImpl(backend.InfLLMImpl):
    """Notes what is sealed, and every selection that was made."""

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        self.received: list[Tensor] = []  # per sealed unit [H, B]
        self.representatives: list[Tensor] = []  # per sealed unit [H, D]
        self.selections: list[tuple[Tensor, list[int]]] = []  # scores and units, where there was a choice

    def forward(self, *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        select, represent = backend.ops.select, backend.ops.represent

        def noted_select(scores: Tensor, topk: int) -> Tensor:
            units = select(scores, topk)
            self.selections.append((scores.clone(), units.tolist()))
            return units

        def noted_represent(key: Tensor, received: Tensor, repr_topk: int) -> Tensor:
            representative = represent(key, received, repr_topk)
            self.received.append(received.clone())
            self.representatives.append(representative.clone())
            return representative

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend.ops, "select", noted_select)
            patch.setattr(backend.ops, "represent", noted_represent)
            return super().forward(*args, **kwargs)


# --- Comparison with the oracle --------------------------------------------------------------------------------------


def oracle_of(shape: Shape, sequence: Sequence, appends: list[int] | None = None) -> OracleResult:
    """What the sequence must give, its prompt handed over at once."""
    appends = appends or [sequence.prompt_len] + [1] * (len(sequence) - sequence.prompt_len)
    blocks = execution_blocks(shape.config, appends, sequence.prompt_len)
    return infllm_attention(shape.config, sequence.q, sequence.k, sequence.v, shape.rope, shape.scale, blocks)


def near_tie(values: Tensor, count: int) -> bool:
    """Whether the count-th and the next of the highest values [..., n] are too close to tell in float32."""
    if not 0 < count < values.shape[-1]:
        return False
    ordered = values.sort(dim=-1, descending=True).values
    return bool((ordered[..., count - 1] - ordered[..., count]).min() < NEAR_TIE)


def assert_equals_oracle(layer: Layer, sequence: Sequence, expected: OracleResult, atol: float = 1e-5) -> int:
    """Outputs, selections, scores, attention received and representatives, up to the first near tie.

    Returns the number of execution blocks compared; behind a near tie, the two may rightly go different ways.
    """
    config, impl = layer.config, layer.impl
    selections = iter(impl.selections)
    for number, block in enumerate(expected.blocks):
        if block.num_sealed > config.topk > 0:
            scores, selected = next(selections)
            torch.testing.assert_close(scores.double(), block.scores, rtol=1e-5, atol=1e-4)
            if near_tie(block.scores, config.topk):
                return number
            assert selected == block.selected
        tokens = slice(block.start, block.end)
        wanted = expected.output[:, tokens].transpose(0, 1)
        torch.testing.assert_close(sequence.output[tokens].double(), wanted, rtol=0, atol=atol)
        for unit in range(block.num_sealed, config.num_sealed(block.end)):
            torch.testing.assert_close(impl.received[unit].double(), expected.acc[unit], rtol=0, atol=atol)
            if near_tie(expected.acc[unit], config.repr_topk):
                return number + 1
            torch.testing.assert_close(impl.representatives[unit].double(), expected.repr_keys[unit], rtol=0, atol=atol)
    assert next(selections, None) is None or config.topk == 0
    assert len(impl.received) == config.num_sealed(len(sequence))
    return len(expected.blocks)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """MHA, GQA and MQA, with small sizes and every relation of the sizes to each other."""
    block_size = draw(st.sampled_from([2, 4, 8]))
    n_local = block_size * draw(st.integers(1, 5))
    config = OracleConfig(
        block_size=block_size,
        n_init=block_size * draw(st.integers(0, 2)),
        n_local=n_local,
        topk=draw(st.integers(0, 4)),
        repr_topk=draw(st.integers(1, block_size)),
        exc=draw(st.integers(1, n_local)),
    )
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2), (3, 1), (2, 3)]))
    head_size, rotary_dim = draw(st.sampled_from([(4, 4), (8, 8), (12, 12), (12, 4), (16, 8)]))
    factor = draw(st.sampled_from([1.0, 1.3]))
    # As many slots as units retrieved, or some more; without slots, units are read where they are.
    slots = draw(st.sampled_from([0, config.topk, config.topk + 1, config.topk + 3]))
    strategy = draw(st.sampled_from(["lru", "fifo", "lru-s"]))
    return Shape(config, kv_heads * group, kv_heads, head_size, rotary_dim, factor, slots, strategy)


@settings(max_examples=60, deadline=None)
@given(shapes(), st.data())
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
    assert len(layer.impl.selections) > len(expected.blocks) / 2


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
    choices = [units for units in golden.selected("c") if len(units) == 2][-len(layer.impl.selections) :]
    assert [units for _, units in layer.impl.selections] == choices
    received = torch.stack(layer.impl.received)
    torch.testing.assert_close(received, golden["c_block_token_score"].float(), rtol=0, atol=1e-5)
    keys = torch.stack(layer.impl.representatives)
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
@given(shapes(), st.integers(0, 2**31 - 1))
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
    unplanned = InfLLMMetadata(5, torch.zeros(5, dtype=torch.int64), [])
    for metadata in (None, unplanned):
        output = torch.full_like(query, math.nan)
        layer.impl.forward(None, query, key, key, layer.cache, metadata, output)
        assert (output == 0).all() and layer.cache.isnan().all()


def test_attention_of_stored_tokens_is_summed_over_queries() -> None:
    """`stored_received` is what the queries of the block gave each stored token; read by one-hot values."""
    generator = torch.Generator().manual_seed(12)
    query, far_query = (torch.randn(5, 6, 8, generator=generator) for _ in range(2))
    paged_key, stored_key = (torch.randn(n, 2, 8, generator=generator) for n in (40, 8))
    stored_value = torch.eye(8)[:, None].expand(-1, 2, -1)
    mass = torch.full((6, 8), math.nan)
    rope = RotaryTable(STANDARD.cos_sin, neox=True)
    paged = (query, 99, paged_key, torch.zeros(40, 2, 8), 64, 32, 0.5, rope)
    output, received = ops.attend(*paged, far_query, stored_key, stored_value, mass)
    torch.testing.assert_close(mass, output.sum(0), rtol=0, atol=1e-5)
    assert 0 < mass.sum() < query[..., 0].numel() - received.sum()  # the edge has its share, too


# --- Ties ------------------------------------------------------------------------------------------------------------


def test_equal_scores_select_the_first_units() -> None:
    """Queries of zero give every unit the same score: the first topk units are taken."""
    sequence, layer = Sequence.random(STANDARD, 200, 195, seed=10), Layer.for_one(STANDARD, 200)
    sequence.q.zero_()
    layer.run(sequence)
    assert layer.impl.selections and all(units == [0, 1] for _, units in layer.impl.selections)


def test_select_breaks_ties_by_the_lower_unit() -> None:
    """Among equal scores the lower unit wins, also where many are equal; the result is ascending."""
    assert ops.select(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 2]
    assert ops.select(torch.tensor([0.0, 5.0, 0.0, 7.0]), 3).tolist() == [0, 1, 3]
    assert ops.select(torch.zeros(5000), 3).tolist() == [0, 1, 2]
    assert ops.select(torch.tensor([2.0, 1.0]), 9).tolist() == [0, 1]


def test_represent_breaks_ties_by_the_earlier_token() -> None:
    """Among tokens that received the same attention the earlier ones represent the unit, head by head."""
    key = torch.arange(4.0).view(4, 1, 1).expand(4, 1, 3)  # token j has the key (j, j, j)
    received = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0]])
    assert ops.represent(key, received, 2)[:, 0].tolist() == [0.5, 0.5]  # tokens 0 and 1; 1 and 0
    assert ops.represent(key, received.flip(1), 1)[:, 0].tolist() == [0.0, 2.0]


# --- Would a fault be seen? ------------------------------------------------------------------------------------------

ATTEND, SELECT, SCORE, REPRESENT, ACCUMULATE = ops.attend, ops.select, ops.score, ops.represent, ops.accumulate
FAR, EXECUTION_BLOCKS = RotaryTable.far, Geometry.execution_blocks


def shifted_window(offset: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """`attend` with a window that is `offset` tokens off."""

    def attend(query, start, paged_key, paged_value, paged_start, n_local, *rest):  # type: ignore[no-untyped-def]
        return ATTEND(query, start, paged_key, paged_value, paged_start, n_local + offset, *rest)

    return attend


def double_counting(  # type: ignore[no-untyped-def]
    query, start, paged_key, paged_value, paged_start, n_local, scale, rope, far_query, stored_key, stored_value, *rest
) -> tuple[Tensor, Tensor]:
    """`attend` with the fault of the authors' code: the far part ends where the window of the last query begins."""
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
    return torch.einsum("htj,jhd->thd", p, torch.cat(values)), p[..., : len(paged_key)].sum(1)


def stored_blocks_off_by(tokens: int) -> Callable[[Geometry, int], int]:
    return lambda geometry, s: max(0, (s - geometry.n_local + tokens) // geometry.block_size)


FAULTS: dict[str, tuple[object, str, Callable]] = {
    "window one token too long": (ops, "attend", shifted_window(1)),
    "window one token too short": (ops, "attend", shifted_window(-1)),
    "double counting": (ops, "attend", double_counting),
    "far position n_local": (RotaryTable, "far", lambda self, x, at, n_local: FAR(self, x, at, n_local + 1)),
    "blocks stored a block too early": (Geometry, "stored_blocks", stored_blocks_off_by(STANDARD.config.block_size)),
    "blocks stored a block too late": (Geometry, "stored_blocks", stored_blocks_off_by(-STANDARD.config.block_size)),
    "blocks stored a token too early": (Geometry, "stored_blocks", stored_blocks_off_by(1)),
    "blocks stored a token too late": (Geometry, "stored_blocks", stored_blocks_off_by(-1)),
    "lowest scores selected": (ops, "select", lambda scores, topk: SELECT(-scores, topk)),
    "one unit too few": (ops, "select", lambda scores, topk: SELECT(scores, topk - 1)),
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
    monkeypatch.setattr(ops, "attend", double_counting)
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
