"""One real layer (InfLLMImpl on any implementation of the ops, paged cache and store) without an engine.

`Layer` plays the parts of the engine around it: block manager and connector. Whatever the layer must not read is NaN:
blocks that were freed or not yet written, attention of earlier owners, units that nobody has filled.
"""

import copy
import math
import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config

from tests.oracle import NeoxRope, OracleConfig, OracleResult, execution_blocks, infllm_attention
from vllm_infllm.attention.backend import InfLLMImpl
from vllm_infllm.attention.metadata import InfLLMMetadata
from vllm_infllm.attention.planner import Limits, Span
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.requests import RequestTable
from vllm_infllm.memory.residency import Residency, Strategy
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import reference
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Leaving, Row

NEAR_TIE = 1e-5
"""Scores and attention sums closer than this may be ordered otherwise in float32 than in float64."""


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
        return rotary_table(self.max_len, self.rotary_dim, self.attention_factor)

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


def rotary_table(max_len: int, rotary_dim: int, attention_factor: float) -> Tensor:
    """Cosines, then sines, [max_len, rotary_dim] float32."""
    inv_freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(max_len)[:, None] * inv_freq
    return (attention_factor * torch.cat([angles.cos(), angles.sin()], dim=-1)).float()


@st.composite
def shapes(draw: st.DrawFn, block_sizes: Items[int], head_sizes: Items[tuple[int, int]], max_window: int = 5) -> Shape:
    """MHA, GQA and MQA, with small sizes and every relation of the sizes to each other.

    head_sizes: (head size, rotary dimension); max_window: longest window in blocks.
    """
    block_size = draw(st.sampled_from(block_sizes))
    n_local = block_size * draw(st.integers(1, max_window))
    config = OracleConfig(
        block_size=block_size,
        n_init=block_size * draw(st.integers(0, 2)),
        n_local=n_local,
        topk=draw(st.integers(0, 4)),
        repr_topk=draw(st.integers(1, block_size)),
        exc=draw(st.integers(1, n_local)),
    )
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2), (3, 1), (2, 3)]))
    head_size, rotary_dim = draw(st.sampled_from(head_sizes))
    factor = draw(st.sampled_from([1.0, 1.3]))
    # As many slots as units retrieved, or some more; without slots, units are read where they are.
    slots = draw(st.sampled_from([0, config.topk, config.topk + 1, config.topk + 3]))
    strategy = draw(st.sampled_from(["lru", "fifo", "lru-s"]))
    return Shape(config, kv_heads * group, kv_heads, head_size, rotary_dim, factor, slots, strategy)


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
        self,
        shape: Shape,
        num_blocks: int,
        num_units: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        ops: str = "reference",
    ):
        self.shape, self.config, self.dtype = shape, shape.config, dtype
        self.random = random.Random(seed)
        self.impl = make_impl(shape, ops)
        self.impl.rope = RotaryTable(shape.cos_sin, neox=True)
        cache_shape = (num_blocks, shape.kv_heads, self.config.block_size, 2 * shape.head_size)
        self.cache = torch.full(cache_shape, math.nan, dtype=dtype)
        self.impl.residency = self._residency()
        self.impl.memory = LayerMemory.allocate(num_units, num_blocks, shape.heads, self.cache, shape.head_size)
        for tensor in vars(self.impl.memory).values():
            tensor.fill_(math.nan)
        self.limits = Limits(shape.max_len, requests=8, units=num_units, layers=1)
        self.requests = RequestTable()
        self.free_blocks = self.random.sample(range(num_blocks), num_blocks)
        self.free_units = self.random.sample(range(num_units), num_units)

    @classmethod
    def for_one(cls, shape: Shape, length: int, seed: int = 0, **kwargs: Any) -> "Layer":
        """With memory for one sequence of this length."""
        blocks = -(-length // shape.config.block_size)
        return cls(shape, blocks + 3, blocks, seed, **kwargs)

    def run(self, sequence: Sequence, chunk: int | None = None) -> Tensor:
        """Prefill in chunks of `chunk` tokens (all at once if None), then decode; returns the output [N, H, D]."""
        while sequence.computed < len(sequence):
            left = sequence.prompt_len - sequence.computed
            self.step([(sequence, min(left, chunk or left) if left > 0 else 1)])
        return sequence.output

    def step(self, work: list[tuple[Sequence, int]], graph: Any = None) -> None:
        """Compute the next tokens of each sequence, as one batch; by a graph (tests/gpu/test_graph.py) if given."""
        spans, slots, columns = [], [], []
        for table, (sequence, count) in enumerate(work):
            start, end = sequence.computed, sequence.computed + count
            self._free_stored(sequence)
            self._grow(sequence, end)
            offset = sum(len(c[0]) for c in columns)
            spans.append(Span(offset, start, end, table))
            slots += [self._slot(sequence, token) for token in range(start, end)]
            columns.append(self._model_output(sequence, start, end))
        query, key, value = (torch.cat(parts).to(self.dtype) for parts in zip(*columns, strict=True))

        block_table = self._block_table([sequence for sequence, _ in work])
        slot_mapping = torch.tensor(slots)
        num_requests = graph.num_requests if graph else len(work)
        metadata = InfLLMMetadata(len(slots), slot_mapping, block_table, spans, self.limits, num_requests)
        requests = [self.requests[sequence.table[0]] for sequence, _ in work]
        metadata.plan(requests, self.shape.geometry(), self.config.topk)
        output = torch.full_like(query, math.nan)
        if graph:
            graph.replay(query, key, value, slot_mapping, block_table, output)
        else:
            self.impl.forward(None, query, key, value, self.cache, metadata, output)

        for span, (sequence, count) in zip(spans, work, strict=True):
            if self.impl.residency:
                self.impl.residency.check_integrity()
            sequence.output[span.start : span.end] = output[span.offset : span.offset + count].float()
            sequence.computed += count

    def finish(self, sequence: Sequence) -> None:
        """Take blocks and units back."""
        kept = self.shape.kept_blocks
        self._release(sequence.table[:kept] + sequence.table[max(kept, sequence.freed) :])
        units = self.requests[sequence.table[0]].units
        self.requests.end(str(id(sequence)))
        for tensor in (self.impl.memory.keys, self.impl.memory.values, self.impl.memory.representatives):
            tensor[units] = math.nan
        self.free_units += units.tolist()

    def _residency(self, requests: int = 8) -> Residency | None:
        if not self.shape.max_cached_blocks:
            return None
        strategy, decay = Strategy.of(self.shape.cache_strategy), self.impl.config.score_decay
        slots, device = self.shape.max_cached_blocks, self.cache.device
        return Residency.allocate(strategy, decay, requests, 1, slots, device).layer(0)

    def _model_output(self, sequence: Sequence, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query, rotated key and value of the tokens, [n, heads, D]."""
        rope, positions = self.shape.rope, torch.arange(start, end)
        query = rope.rotate(sequence.q[:, start:end], positions).float()
        key = rope.rotate(sequence.k[:, start:end], positions).float()
        return query.transpose(0, 1), key.transpose(0, 1), sequence.v[:, start:end].transpose(0, 1)

    def _block_table(self, sequences: list[Sequence]) -> Tensor:
        """Padded with any block, like the block table of an engine that has served longer requests."""
        width = max(len(sequence.table) for sequence in sequences) + 2
        any_block = range(len(self.cache))
        rows = [seq.table + self.random.choices(any_block, k=width - len(seq.table)) for seq in sequences]
        return torch.tensor(rows, dtype=torch.int32)

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
        if sequence.computed == 0:
            new = self.requests.admit(str(id(sequence)), sequence.table[0], sequence.prompt_len, outgrows)
            if self.impl.residency:
                self.impl.residency.reset(new.number)
        request = self.requests[sequence.table[0]]
        while len(request.units) < (end - self.config.n_local) // self.config.block_size:
            request.give([self.free_units.pop(self.random.randrange(len(self.free_units)))])


_VLLM_CONFIG: list[VllmConfig] = []


def make_impl(shape: Shape, ops: str = "reference") -> "RecordingImpl":
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
            "ops": ops,
        }
    }
    with set_current_vllm_config(vllm_config):
        return RecordingImpl(shape.heads, shape.head_size, shape.scale, shape.kv_heads)


class RecordingImpl(InfLLMImpl):
    """Notes what is sealed, and every selection that was made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ops = self.record = Record(self.ops)


class Record:
    """An implementation of the ops, and what went in and came out of it."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops
        self.received: list[Tensor] = []  # per sealed unit [H, B]
        self.representatives: list[Tensor] = []  # per sealed unit [H, D]
        self.selections: list[list[int]] = []  # units, by their number in the request, where there was a choice
        self.scores: list[Tensor] = []  # by which they were selected; of the reference only

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def select(self, blocks: ExecutionBlocks, settings: LayerSettings, *args: Any) -> Tensor:
        def noted_top(scores: Tensor, topk: int) -> Tensor:
            self.scores.append(scores.clone())
            return top(scores, topk)

        top = reference.top
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "top", noted_top)
            chosen = self.ops.select(blocks, settings, *args)
        for row, ids in zip(blocks.rows.tolist(), chosen.tolist(), strict=True):
            stored = blocks.units[row[Row.UNITS] :][: row[Row.STORED]].tolist()
            if len(stored) > settings.init_blocks + settings.topk:
                units = [stored.index(unit) - settings.init_blocks for unit in ids if unit >= 0]
                self.selections.append(units[settings.init_blocks :])
        return chosen

    def seal(
        self, blocks: ExecutionBlocks, settings: LayerSettings, rope: RotaryTable, cache: Tensor, memory: LayerMemory
    ) -> None:
        leaving = blocks.leaving[blocks.leaving[:, Leaving.IS_UNIT] == 1]
        self.received += memory.received[leaving[:, Leaving.PHYSICAL]].unbind()
        self.ops.seal(blocks, settings, rope, cache, memory)
        self.representatives += memory.representatives[leaving[:, Leaving.UNIT]].unbind()


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
    """Outputs, selections, scores (of the reference), attention received and representatives, up to the first near tie.

    Returns the number of execution blocks compared; behind a near tie, the two may rightly go different ways.
    """
    config, record = layer.config, layer.impl.record
    selections, scores = iter(record.selections), iter(record.scores)
    for number, block in enumerate(expected.blocks):
        if block.num_sealed > config.topk > 0:
            if record.ops is reference:
                torch.testing.assert_close(next(scores).double(), block.scores, rtol=1e-5, atol=1e-4)
            selected = next(selections)
            if near_tie(block.scores, config.topk):
                return number
            assert selected == block.selected
        tokens = slice(block.start, block.end)
        wanted = expected.output[:, tokens].transpose(0, 1)
        torch.testing.assert_close(sequence.output[tokens].double(), wanted, rtol=0, atol=atol)
        for unit in range(block.num_sealed, config.num_sealed(block.end)):
            torch.testing.assert_close(record.received[unit].double(), expected.acc[unit], rtol=0, atol=atol)
            if near_tie(expected.acc[unit], config.repr_topk):
                return number + 1
            torch.testing.assert_close(
                record.representatives[unit].double(), expected.repr_keys[unit], rtol=0, atol=atol
            )
    assert next(selections, None) is None or config.topk == 0
    assert len(record.received) == config.num_sealed(len(sequence))
    return len(expected.blocks)
