"""The C++ ops against the reference ops, op by op, on every instruction set that this machine can run.

`Scene` below builds execution blocks over plain keys and values, which each implementation packs for itself; the
reference gets the same rounded inputs in float32. Whatever an op must not read is NaN: blocks that were freed, tokens
that are not written yet, attention received by earlier owners, units that were not chosen, the tokens of others.
"""

import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.one_layer import Layer, Sequence, Shape, assert_equals_oracle, oracle_of, rotary_table, shapes
from tests.oracle import OracleConfig
from tests.test_oracle import Golden
from vllm_infllm.attention.metadata import InfLLMMetadata
from vllm_infllm.attention.planner import Limits, Span
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.requests import RequestMemory
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import cpu, reference
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Leaving, Row, halves

pytestmark = pytest.mark.usefixtures("one_thread")

in_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module", params=os.environ.get("INFLLM_TEST_ISAS", ",".join(cpu.isas())).split(","))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ ops run this instruction set."""
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(cpu.isas()[-1])


# --- Scenes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer, and how its keys are rotated."""

    block_size: int = 16
    init_blocks: int = 1
    window_blocks: int = 4
    exc: int = 48
    topk: int = 2
    repr_topk: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    rotary_dim: int = 32
    neox: bool = True
    attention_factor: float = 1.0
    sharpness: float = 1.0
    """The scale of the scores, times the square root of the head size."""

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.block_size, self.init_blocks * self.block_size, self.n_local, self.exc)

    @property
    def n_local(self) -> int:
        return self.window_blocks * self.block_size

    @property
    def settings(self) -> LayerSettings:
        scale = self.sharpness * self.head_size**-0.5
        return LayerSettings(self.n_local, self.init_blocks, self.topk, self.repr_topk, scale)

    def rope(self, max_len: int, dtype: torch.dtype) -> RotaryTable:
        table = rotary_table(max_len, self.rotary_dim, self.attention_factor)
        return RotaryTable(table.to(dtype).float(), self.neox)


LONG = Sizes(block_size=128, window_blocks=4, exc=256, topk=8, heads=8, kv_heads=2, head_size=64, rotary_dim=64)
"""Windows and stored blocks of many tiles."""


@dataclass(frozen=True)
class Task:
    """The execution block [start, end) of one request."""

    start: int
    end: int
    accumulate: bool = True


@st.composite
def any_sizes(draw: st.DrawFn, block_sizes: tuple[int, ...] = (16, 32, 48, 144, 256)) -> Sizes:
    """MHA, GQA and MQA; heads, blocks and windows of one and of several vectors or tiles."""
    block_size = draw(st.sampled_from(block_sizes))
    window_blocks = draw(st.integers(1, 4 if block_size < 100 else 2))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2), (3, 1), (2, 3), (1, 7), (1, 8)]))
    head_size = draw(st.sampled_from([32, 48, 64, 80, 96, 112, 128, 256]))
    return Sizes(
        block_size=block_size,
        init_blocks=draw(st.integers(0, 2)),
        window_blocks=window_blocks,
        exc=draw(st.integers(1, window_blocks * block_size)),
        topk=draw(st.integers(0, 4)),
        repr_topk=draw(st.integers(1, min(block_size, 8))),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_size=head_size,
        rotary_dim=draw(st.sampled_from([head_size, head_size // 2, 10])),
        neox=draw(st.booleans()),
        attention_factor=draw(st.sampled_from([1.0, 1.3])),
        sharpness=draw(st.sampled_from([1.0, 3.0])),
    )


@st.composite
def any_tasks(draw: st.DrawFn, sizes: Sizes) -> list[Task]:
    """Decode steps and prefill blocks of requests shorter than the window, a few windows long, and far longer."""
    block_size, n_local = sizes.block_size, sizes.n_local
    shorter, longer = st.integers(0, n_local), st.integers(0, 5 * n_local)
    far_longer = longer.map(lambda token: token + 20 * n_local)
    # A token around those from which the first token, block and unit are outside the window.
    turning_points = [n_local, n_local + block_size, n_local + (sizes.init_blocks + 1) * block_size]
    turning = st.sampled_from([token + offset for token in turning_points for offset in (-1, 0, 1)])
    tasks = []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.one_of(shorter, longer, far_longer, turning))
        room = sizes.exc - start % sizes.exc
        length = draw(st.sampled_from([1, room]) | st.integers(1, room))
        tasks.append(Task(start, start + length, draw(st.booleans())))
    return tasks


@dataclass(eq=False)
class Request:
    """What a task finds in the memory, and its part of the batch; keys and values in the dtype of the model."""

    task: Task
    table: list[int]  # physical ids; stale for blocks that were freed
    units: Tensor  # host unit ids, [stored blocks at the end of the task]
    slots: Tensor  # of the tokens that are read from the paged cache
    key: Tensor  # [n, KH, D] of these tokens, rotated
    value: Tensor
    query: Tensor  # [tokens, H, D]


@dataclass(eq=False)
class Batch:
    """Some requests of a scene in one round of execution blocks."""

    blocks: ExecutionBlocks
    query: Tensor  # [tokens, H, D], NaN where other tokens of the step stand
    tokens: list[slice]  # of each request


@dataclass(eq=False)
class Outcome:
    """What an op has written."""

    output: Tensor
    received: Tensor
    mass: Tensor | None = None


@dataclass(eq=False)
class Scene:
    """Requests that share a paged cache and a store."""

    sizes: Sizes
    tasks: list[Task]
    dtype: torch.dtype
    seed: int
    loudness: float = 1.0
    """Each block's keys are longer by a random factor up to this one."""
    requests: list[Request] = field(init=False)
    num_blocks: int = field(init=False)
    num_units: int = field(init=False)

    def __post_init__(self) -> None:
        sizes, geometry = self.sizes, self.sizes.geometry
        self.generator, choose = torch.Generator().manual_seed(self.seed), random.Random(self.seed)
        num_blocks = [-(-task.end // sizes.block_size) for task in self.tasks]
        freed = [geometry.stored_blocks(task.start) for task in self.tasks]
        num_units = [geometry.stored_blocks(task.end) for task in self.tasks]
        # The first block of a request is its own even where it is empty; two blocks and three units are nobody's.
        self.num_blocks = sum(n - f + (f > 0) for n, f in zip(num_blocks, freed, strict=True)) + 2
        self.num_units = sum(num_units) + 3
        blocks = choose.sample(range(self.num_blocks), self.num_blocks)
        units = choose.sample(range(self.num_units), self.num_units)
        self.requests = []
        for task, n, f, u in zip(self.tasks, num_blocks, freed, num_units, strict=True):
            own = [b >= f or b == 0 for b in range(n)]
            table = [blocks.pop() if mine else choose.randrange(self.num_blocks) for mine in own]
            positions = torch.arange(f * sizes.block_size, task.end)
            physical = torch.tensor(table)[positions // sizes.block_size]
            self.requests.append(
                Request(
                    task=task,
                    table=table,
                    units=torch.tensor([units.pop() for _ in range(u)], dtype=torch.int64),
                    slots=physical * sizes.block_size + positions % sizes.block_size,
                    key=self._keys(len(positions)),
                    value=self._normal(len(positions), sizes.kv_heads, sizes.head_size),
                    query=self._normal(task.end - task.start, sizes.heads, sizes.head_size),
                )
            )
        self.rope = sizes.rope(max(sizes.n_local, *(task.end for task in self.tasks)), self.dtype)
        per_unit = (sizes.kv_heads, sizes.block_size, sizes.head_size)
        self.unit_keys, self.unit_values = (
            torch.full((self.num_units, *per_unit), math.nan, dtype=self.dtype) for _ in range(2)
        )
        self.representatives = torch.full((self.num_units, sizes.heads, sizes.head_size), math.nan, dtype=self.dtype)
        self.received = torch.full((self.num_blocks, sizes.heads, sizes.block_size), math.nan)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def _keys(self, count: int) -> Tensor:
        sizes = self.sizes
        louder = torch.rand(count // sizes.block_size + 1, generator=self.generator) ** 3 * (self.loudness - 1) + 1
        each = louder.repeat_interleave(sizes.block_size)[:count, None, None]
        return (torch.randn((count, sizes.kv_heads, sizes.head_size), generator=self.generator) * each).to(self.dtype)

    def fill_representatives(self) -> None:
        """Of all sealed units."""
        for request in self.requests:
            sealed = request.units[self.sizes.init_blocks : self.sizes.geometry.stored_blocks(request.task.start)]
            self.representatives[sealed] = self._normal(len(sealed), *self.representatives.shape[1:])

    def fill_sealed_units(self) -> None:
        """All of them, but not the blocks of initial tokens."""
        for request in self.requests:
            stored = self.sizes.geometry.stored_blocks(request.task.start)
            self.fill_units(request.units[self.sizes.init_blocks : stored])

    def fill_units(self, units: Tensor) -> None:
        """Give these units keys and values."""
        kv_heads, block_size, head_size = self.unit_keys.shape[1:]
        keys = self._keys(len(units) * block_size).view(-1, block_size, kv_heads, head_size).transpose(1, 2)
        self.unit_keys[units] = keys
        self.unit_values[units] = self._normal(*keys.shape)

    def fill_received(self, levels: int = 0) -> None:
        """Attention received by tokens before the execution blocks, where it is summed up; small integers if asked."""
        flat = self.received.transpose(1, 2).reshape(-1, self.sizes.heads)
        for request in self.requests:
            slots = request.slots[: len(request.slots) - len(request.query)] if request.task.accumulate else []
            shape = (len(slots), self.sizes.heads)
            new = torch.rand(shape, generator=self.generator)
            flat[slots] = (new * levels).floor() if levels else new
        self.received = flat.view(-1, self.sizes.block_size, self.sizes.heads).transpose(1, 2).contiguous()

    def batch(self, which: list[int] | None = None) -> Batch:
        """Plan the round of some requests (or of all), with tokens of others between them."""
        members = [self.requests[i] for i in (which if which is not None else range(len(self.requests)))]
        sizes, choose = self.sizes, random.Random(self.seed)
        # As in a model, where a query is a part of a longer row: queries, keys and values.
        width = sizes.heads * sizes.head_size
        total = sum(len(member.query) + 3 for member in members)
        rows = torch.full((total, width + 2 * sizes.head_size), math.nan, dtype=self.dtype)
        query = rows[:, :width].view(total, sizes.heads, sizes.head_size)
        place = choose.sample(range(len(members)), len(members))
        columns = max(len(member.table) for member in members) + 2
        block_table = torch.zeros(len(members), columns, dtype=torch.int32).random_(self.num_blocks)
        spans, tokens, offset = [], [], 0
        for member, table in zip(members, place, strict=True):
            offset += choose.randint(0, 3)
            tokens.append(slice(offset, offset + len(member.query)))
            query[tokens[-1]] = member.query
            block_table[table, : len(member.table)] = torch.tensor(member.table)
            spans.append(Span(offset, member.task.start, member.task.end, table))
            offset += len(member.query)
        metadata = InfLLMMetadata(total, torch.empty(0), block_table, spans, Limits(max_len=1 << 20))
        requests = [RequestMemory(0, member.task.accumulate, 0, member.units) for member in members]
        metadata.plan(requests, sizes.geometry, sizes.topk)
        (only_round,) = metadata.rounds
        return Batch(only_round.blocks, query, tokens)

    def packed(self, ops: ModuleType, dtype: torch.dtype, spare_blocks: int = 0) -> tuple[Tensor, LayerMemory]:
        """Paged cache and memory, as `ops` packs them."""
        sizes = self.sizes
        shape = (self.num_blocks + spare_blocks, sizes.kv_heads, sizes.block_size, 2 * sizes.head_size)
        cache = torch.full(shape, math.nan, dtype=dtype)
        for request in self.requests:
            ops.write(cache, request.key.to(dtype), request.value.to(dtype), request.slots)
        # A unit of the store is packed as a block of the cache.
        scratch = torch.empty(self.num_units, *shape[1:], dtype=dtype)
        by_token = [x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (self.unit_keys, self.unit_values)]
        ops.write(scratch, *by_token, torch.arange(self.num_units * sizes.block_size))
        keys, values = (half.contiguous() for half in halves(scratch))
        received = torch.full((len(cache), *self.received.shape[1:]), math.nan)
        received[: self.num_blocks] = self.received
        return cache, LayerMemory(keys, values, self.representatives.to(dtype), received)

    def choose(self, batch: Batch) -> Tensor:
        """Select for the batch, and give the chosen units keys and values."""
        self.fill_representatives()
        queries, representatives = batch.query.float(), self.representatives.float()
        chosen = reference.select(batch.blocks, self.sizes.settings, self.rope, queries, representatives)
        self.fill_units(chosen[chosen >= 0])
        return chosen


def attend(
    scene: Scene,
    batch: Batch,
    chosen: Tensor,
    ops: ModuleType,
    dtype: torch.dtype,
    from_slots: bool = False,
    weigh: bool = False,
    settings: LayerSettings | None = None,
) -> Outcome:
    """What `ops` makes of a batch; with chosen units in slots, those of the store are NaN."""
    cache, memory = scene.packed(ops, dtype, spare_blocks=chosen.numel())
    slots = None
    if from_slots:
        copies = torch.where(chosen.flatten() >= 0, torch.arange(chosen.numel()) + scene.num_blocks, -1)
        slots = copies.view(chosen.shape)
        ops.gather(memory, chosen, slots, cache)
        memory.keys.fill_(math.nan)
        memory.values.fill_(math.nan)
    query = batch.query if dtype == scene.dtype else batch.query.to(dtype)
    output = torch.full(query.shape, math.nan, dtype=dtype)
    mass = torch.full(chosen.shape, math.nan) if weigh else None
    used = settings or scene.sizes.settings
    ops.attend(batch.blocks, used, scene.rope, query, cache, memory, chosen, slots, output, mass)
    return Outcome(output, memory.received, mass)


def bits(x: Tensor) -> Tensor:
    """For comparisons in which NaN equals itself."""
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Bounds, relative and absolute, of the error of outputs, and of attention received and mass."""
    if dtype == torch.float32:
        return 2e-5, 2e-6
    # Un-rotated keys are rounded to the dtype. The dot-product instruction also takes far queries and probabilities
    # rounded, which moves the logits.
    eps = torch.finfo(dtype).eps
    rounds_queries = dtype == torch.bfloat16 and "avx512_bf16" in cpu.describe()
    return (3.5 if rounds_queries else 2.5) * eps, 0.5 * eps


def assert_same_attention(
    scene: Scene,
    batch: Batch,
    chosen: Tensor,
    got: Outcome,
    expected: Outcome,
    bounds: tuple[float, float] | None = None,
) -> None:
    """Outputs, attention received and attention mass, to the rounding of the dtype (or other bounds)."""
    others = torch.ones(len(batch.query), dtype=torch.bool)
    outputs, sums = ({"rtol": bound, "atol": bound} for bound in bounds or rounding(scene.dtype))
    for tokens in batch.tokens:
        others[tokens] = False
        torch.testing.assert_close(got.output[tokens].float(), expected.output[tokens], **outputs)
    assert got.output[others].isnan().all(), "the output of other tokens was written"

    before = scene.received
    summed = torch.zeros(scene.num_blocks, scene.sizes.block_size, dtype=torch.bool)
    unspecified = summed.clone()  # the last block of a row, behind its end
    for request in scene.requests:
        if request.task.accumulate:
            unspecified[request.table[-1]] = True
            summed.view(-1)[request.slots] = True
    summed, untouched = (x[:, None].expand_as(before) for x in (summed, ~(summed | unspecified)))
    received, wanted = got.received[: len(before)], expected.received[: len(before)]
    torch.testing.assert_close(received[summed], wanted[summed], **sums)
    assert torch.equal(bits(received[untouched]), bits(before[untouched])), "attention received by others was written"
    if got.mass is not None and expected.mass is not None:
        present = chosen >= 0
        torch.testing.assert_close(got.mass[present], expected.mass[present], **sums)


# --- write -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@in_every_dtype
@settings(max_examples=15, deadline=None)
@given(any_sizes(), st.integers(0, 100), SEEDS)
def test_write_fills_its_slots_and_no_others(dtype: torch.dtype, sizes: Sizes, count: int, seed: int) -> None:
    """Written keys and values come out of `unpack` bit for bit; what other slots hold stays as it was."""
    generator, num_blocks = torch.Generator().manual_seed(seed), 3
    everything = torch.randn(num_blocks * sizes.block_size, 3, sizes.kv_heads, sizes.head_size, generator=generator)
    everything[:, :, 0, 0] = math.nan
    everything = everything.to(dtype)
    everything[:, 0] *= 1e-40  # subnormal, or zero with a sign
    cache = torch.zeros(num_blocks, sizes.kv_heads, sizes.block_size, 2 * sizes.head_size, dtype=dtype)
    cpu.write(cache, everything[:, 0], everything[:, 1], torch.arange(len(everything)))

    slots = torch.randperm(len(everything), generator=generator)[:count]
    key, value = (torch.randn(everything.shape, generator=generator).to(dtype)[:count, i] for i in (1, 2))
    cpu.write(cache, key, value, slots)
    everything[slots, 0], everything[slots, 1] = key, value
    for part, expected in zip(cpu.unpack(*halves(cache)), everything.unbind(1)[:2], strict=True):
        by_token = part.transpose(1, 2).flatten(0, 1)
        assert torch.equal(bits(by_token), bits(expected))


# --- select ----------------------------------------------------------------------------------------------------------


def mean_scores(scene: Scene, far: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of units by the paper's rule for far queries [T, H, D] float64, and how far rounding may move them."""
    keys = scene.representatives[units].double()
    scores = torch.einsum("hd,uhd->u", far.mean(0), keys)
    return scores, 4e-6 * torch.einsum("hd,uhd->u", far.abs().mean(0), keys.abs()).max()


def peak_scores(scene: Scene, far: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the largest share of attention, as log-odds."""
    scale, keys = scene.sizes.settings.scale, scene.unit_keys[units].double()
    grouped = far.unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("tkgd,ukbd->tkgub", grouped, keys).flatten(0, 2) * scale
    of_units = logits.logsumexp(2)
    best = torch.nn.functional.one_hot(of_units.argmax(1), len(units)).bool()
    but_best = of_units.masked_fill(best, -math.inf).logsumexp(1, keepdim=True)
    but_one = torch.logaddexp(but_best, of_units.amax(1, keepdim=True)).exp() - of_units.exp()
    others = torch.where(best, but_best, but_one.log())
    size = torch.einsum("tkgd,ukbd->tkgub", grouped.abs(), keys.abs()).max() * scale
    # The dot-product instruction takes rounded queries.
    rounds_queries = scene.dtype == torch.bfloat16 and "avx512_bf16" in cpu.describe()
    return (of_units - others).amax(0), (2**-8 if rounds_queries else 2e-6) * size


def assert_best_are_chosen(
    scene: Scene,
    batch: Batch,
    chosen: Tensor,
    scores_of: Callable[[Scene, Tensor, Tensor], tuple[Tensor, Tensor]] = mean_scores,
    last: int = 1 << 20,
) -> None:
    """Initial tokens and the best units for the last queries, in order, up to rounding; -1 behind the last unit."""
    settings = scene.sizes.settings
    assert chosen.dtype == torch.int64 and chosen.shape == (len(batch.blocks.rows), batch.blocks.num_chosen)
    for row, tokens, ids in zip(batch.blocks.rows.tolist(), batch.tokens, chosen, strict=True):
        stored = batch.blocks.units[row[Row.UNITS] :][: row[Row.STORED]].tolist()
        count = min(len(stored), settings.init_blocks + settings.topk)
        assert (ids[count:] == -1).all()
        places = [stored.index(unit) for unit in ids[:count].tolist()]
        assert places == sorted(set(places)), "ascending, none twice"
        assert places[: settings.init_blocks] == list(range(min(count, settings.init_blocks)))
        if not 0 < settings.topk < len(stored) - settings.init_blocks:
            continue
        positions = torch.arange(row[Row.START], row[Row.END])
        far = scene.rope.far(batch.query[tokens], positions, settings.n_local).double()
        scores, rounding = scores_of(scene, far[-last:], torch.tensor(stored[settings.init_blocks :]))
        taken = torch.zeros(len(scores), dtype=torch.bool)
        taken[[place - settings.init_blocks for place in places[settings.init_blocks :]]] = True
        assert scores[taken].min() >= scores[~taken].max() - rounding


@pytest.mark.usefixtures("isa")
@in_every_dtype
@settings(max_examples=15, deadline=None)
@given(st.data(), any_sizes(), SEEDS)
def test_select_takes_the_best_units(dtype: torch.dtype, data: st.DataObject, sizes: Sizes, seed: int) -> None:
    """The chosen units are those of the highest scores; fewer than topk are all taken, rows are filled up with -1."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed)
    scene.fill_representatives()
    batch = scene.batch()
    chosen = cpu.select(batch.blocks, sizes.settings, scene.rope, batch.query, scene.representatives)
    assert_best_are_chosen(scene, batch, chosen)


MANY_UNITS = [Task(16 * 1500 + 7, 16 * 1500 + 8), Task(16 * 1200, 16 * 1200 + 30), Task(3, 9), Task(99, 100)]
"""Two requests with far more than a thousand units, one with none, one with two."""


@pytest.mark.usefixtures("isa")
@in_every_dtype
@pytest.mark.parametrize("topk", [0, 1, 16, 1190, 4000])
def test_select_among_more_than_a_thousand_units(dtype: torch.dtype, topk: int) -> None:
    """The best of very many units are found, for any topk up to more than there are."""
    scene = Scene(Sizes(topk=topk, window_blocks=3), MANY_UNITS, dtype, seed=1)
    scene.fill_representatives()
    batch = scene.batch()
    chosen = cpu.select(batch.blocks, scene.sizes.settings, scene.rope, batch.query, scene.representatives)
    assert_best_are_chosen(scene, batch, chosen)


@pytest.mark.usefixtures("isa")
@in_every_dtype
@pytest.mark.parametrize("topk", [1, 16, 500])
def test_select_takes_the_lower_of_equal_units(dtype: torch.dtype, topk: int) -> None:
    """Where representatives are equal, or queries zero, so that scores are, the lower units are taken."""
    sizes = Sizes(topk=topk, window_blocks=3, heads=6, head_size=48)
    scene = Scene(sizes, MANY_UNITS, dtype, seed=2)
    scene.fill_representatives()
    sealed = scene.requests[0].units[1 : sizes.geometry.stored_blocks(MANY_UNITS[0].start)]
    kind = torch.randint(3, (len(sealed),), generator=scene.generator)
    scene.representatives[sealed] = scene.representatives[sealed[:3]][kind]
    scene.requests[1].query.zero_()

    batch = scene.batch()
    chosen = cpu.select(batch.blocks, sizes.settings, scene.rope, batch.query, scene.representatives)
    assert_best_are_chosen(scene, batch, chosen)
    far = scene.rope.far(scene.requests[0].query, torch.tensor([MANY_UNITS[0].start]), sizes.n_local)
    kinds = torch.stack([scene.representatives[sealed[kind == i][0]] for i in range(3)])
    scores = reference.score(far, kinds)[kind]
    assert torch.equal(chosen[0, 1 : topk + 1], sealed[reference.top(scores, topk)])
    assert torch.equal(chosen[1, 1 : topk + 1], scene.requests[1].units[1 : topk + 1])


def select_peak(scene: Scene, batch: Batch, ops: ModuleType, last: int) -> Tensor:
    dtype = scene.dtype if ops is cpu else torch.float32
    _, memory = scene.packed(ops, dtype)
    chosen: Tensor = ops.select_peak(
        batch.blocks, scene.sizes.settings, scene.rope, batch.query.to(dtype), memory.keys, last
    )
    return chosen


@pytest.mark.usefixtures("isa")
@in_every_dtype
@settings(max_examples=25, deadline=None)
@given(st.data(), any_sizes(), st.sampled_from([1, 3, 32, 1 << 30]), SEEDS)
def test_select_peak_takes_the_units_of_the_largest_shares(
    dtype: torch.dtype, data: st.DataObject, sizes: Sizes, last: int, seed: int
) -> None:
    """By the last queries of each row, in C++ and in the reference."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed)
    scene.fill_sealed_units()
    batch = scene.batch()
    for ops in (cpu, reference):
        assert_best_are_chosen(scene, batch, select_peak(scene, batch, ops, last), peak_scores, last)


@pytest.mark.usefixtures("isa")
@in_every_dtype
@pytest.mark.parametrize("sharpness, topk", [(0.3, 16), (40.0, 16), (40.0, 2)])
def test_select_peak_among_more_than_a_thousand_units(dtype: torch.dtype, sharpness: float, topk: int) -> None:
    """Where attention is spread over all of them, and where almost all of it is on one, of more than may be chosen."""
    scene = Scene(Sizes(topk=topk, window_blocks=3, sharpness=sharpness), MANY_UNITS, dtype, seed=1)
    scene.fill_sealed_units()
    batch = scene.batch()
    for last in (4, 32):
        assert_best_are_chosen(scene, batch, select_peak(scene, batch, cpu, last), peak_scores, last)


@pytest.mark.usefixtures("isa")
@in_every_dtype
@pytest.mark.parametrize("topk", [1, 16, 500])
def test_select_peak_takes_the_lower_of_equal_units(dtype: torch.dtype, topk: int) -> None:
    """Where keys are equal, or queries zero."""
    scene = Scene(Sizes(topk=topk, window_blocks=3), MANY_UNITS, dtype, seed=2)
    scene.fill_sealed_units()
    sealed = scene.requests[0].units[1 : scene.sizes.geometry.stored_blocks(MANY_UNITS[0].start)]
    best = select_peak(scene, scene.batch(), cpu, 1)[0, 1 : topk + 1]
    scene.unit_keys[sealed[: topk + 3]] = scene.unit_keys[best[-1]].clone()
    scene.requests[1].query.zero_()
    chosen = select_peak(scene, scene.batch(), cpu, 1)
    assert torch.equal(chosen[1, 1 : topk + 1], scene.requests[1].units[1 : topk + 1])
    equal = [u for u, keys in enumerate(scene.unit_keys[sealed]) if torch.equal(keys, scene.unit_keys[best[-1]])]
    taken = [u for u, unit in enumerate(sealed.tolist()) if unit in chosen[0, 1 : topk + 1].tolist() and u in equal]
    assert taken == equal[: len(taken)] and taken


@pytest.mark.usefixtures("isa")
@in_every_dtype
@pytest.mark.parametrize("last", [1, 32, 1 << 30])
def test_select_peak_does_not_depend_on_batch_and_threads(dtype: torch.dtype, last: int) -> None:
    """Also where rows are split over threads."""
    scene = Scene(LONG, [Task(2560, 2670), Task(5003, 5004), Task(128, 130), Task(4000, 4001)], dtype, 5)
    scene.fill_sealed_units()
    together = select_peak(scene, scene.batch(), cpu, last)
    for i in range(len(scene.requests)):
        alone = select_peak(scene, scene.batch([i]), cpu, last)[0]
        assert torch.equal(together[i, : len(alone)], alone)
    torch.set_num_threads(2)
    try:
        assert torch.equal(select_peak(scene, scene.batch(), cpu, last), together)
    finally:
        torch.set_num_threads(1)


# --- attend ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@in_every_dtype
@settings(max_examples=40, deadline=None)
@given(st.data(), any_sizes(), st.booleans(), st.booleans(), SEEDS)
def test_attend_equals_the_reference(
    dtype: torch.dtype, data: st.DataObject, sizes: Sizes, from_slots: bool, weigh: bool, seed: int
) -> None:
    """Any batch gives the reference's outputs, attention received and mass, from the store as from slots."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed)
    scene.fill_received()
    batch = scene.batch()
    chosen = scene.choose(batch)
    got = attend(scene, batch, chosen, cpu, dtype, from_slots, weigh)
    expected = attend(scene, batch, chosen, reference, torch.float32, from_slots, weigh)
    assert_same_attention(scene, batch, chosen, got, expected)


@pytest.mark.usefixtures("isa")
@in_every_dtype
def test_attend_over_many_blocks(dtype: torch.dtype) -> None:
    """Rows of more keys and queries than are processed at a time give the reference's results, too."""
    tasks = [Task(2560, 2670), Task(5003, 5004), Task(128, 256), Task(2304, 2306), Task(511, 512, accumulate=False)]
    scene = Scene(LONG, tasks, dtype, seed=3)
    scene.fill_received()
    batch = scene.batch()
    chosen = scene.choose(batch)
    got = attend(scene, batch, chosen, cpu, dtype, weigh=True)
    expected = attend(scene, batch, chosen, reference, torch.float32, weigh=True)
    assert_same_attention(scene, batch, chosen, got, expected)


@pytest.mark.usefixtures("isa")
@settings(max_examples=15, deadline=None)
@given(st.data(), any_sizes(block_sizes=(16, 32)), SEEDS)
def test_attend_with_scores_of_any_size(data: st.DataObject, sizes: Sizes, seed: int) -> None:
    """Scores of some hundreds, in one block and not in another, neither overflow nor get lost when parts are joined."""
    scene = Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), torch.float32, seed, loudness=60.0)
    scene.fill_received()
    batch = scene.batch()
    chosen = scene.choose(batch)
    got, expected = (attend(scene, batch, chosen, ops, torch.float32, weigh=True) for ops in (cpu, reference))
    # What is left of a score of this size behind its rounding.
    assert_same_attention(scene, batch, chosen, got, expected, bounds=(5e-4, 5e-4))


@pytest.mark.usefixtures("isa")
@in_every_dtype
@pytest.mark.parametrize("offset", [-1, 1])
@pytest.mark.parametrize("task", [Task(400, 401), Task(400, 430), Task(64, 94)], ids=str)
def test_window_off_by_one_token_is_seen(dtype: torch.dtype, offset: int, task: Task) -> None:
    """The comparison above fails when the C++ ops are given a window that is one token too long or too short."""
    sizes = Sizes(exc=64, sharpness=2.0)
    scene = Scene(sizes, [task], dtype, seed=4)
    scene.fill_received()
    batch = scene.batch()
    chosen = scene.choose(batch)
    expected = attend(scene, batch, chosen, reference, torch.float32)
    assert_same_attention(scene, batch, chosen, attend(scene, batch, chosen, cpu, dtype), expected)
    wrong = replace(sizes.settings, n_local=sizes.n_local + offset)
    got = attend(scene, batch, chosen, cpu, dtype, settings=wrong)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_attention(scene, batch, chosen, got, expected)


# --- seal ------------------------------------------------------------------------------------------------------------


@st.composite
def leaving_tasks(draw: st.DrawFn, sizes: Sizes) -> list[Task]:
    """Execution blocks as long as the window, or nearly: after most of them some blocks are outside."""
    starts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    lengths = st.integers(sizes.block_size, sizes.n_local)
    return [Task(start * sizes.n_local, start * sizes.n_local + draw(lengths)) for start in starts]


@pytest.mark.usefixtures("isa")
@in_every_dtype
@settings(max_examples=20, deadline=None)
@given(st.data(), any_sizes(), st.sampled_from([0, 1, 4]), SEEDS)
def test_seal_equals_the_reference(
    dtype: torch.dtype, data: st.DataObject, sizes: Sizes, levels: int, seed: int
) -> None:
    """Leaving blocks are stored un-rotated, with their representatives, on equal attention of the earlier tokens.

    Everything else in the store stays as it was.
    """
    sizes = replace(sizes, exc=sizes.n_local)
    scene = Scene(sizes, data.draw(leaving_tasks(sizes), label="tasks"), dtype, seed)
    scene.fill_received(levels)
    batch, eps = scene.batch(), torch.finfo(dtype).eps
    leaving = batch.blocks.leaving
    units, new = leaving[:, Leaving.UNIT], leaving[leaving[:, Leaving.IS_UNIT] == 1, Leaving.UNIT]

    got, expected = ([ops, *scene.packed(ops, to)] for ops, to in ((cpu, dtype), (reference, torch.float32)))
    for ops, cache, memory in (got, expected):
        ops.seal(batch.blocks, sizes.settings, scene.rope, cache, memory)
    stored, wanted = (ops.unpack(memory.keys, memory.values) for ops, _, memory in (got, expected))
    bounds = {"rtol": eps if dtype != torch.float32 else 2e-6, "atol": 1e-6}
    torch.testing.assert_close(stored[0][units].float(), wanted[0][units], **bounds)
    assert torch.equal(bits(stored[1][units]), bits(wanted[1][units].to(dtype)))
    representatives = got[2].representatives[new].float()
    torch.testing.assert_close(representatives, expected[2].representatives[new], **bounds)

    def others(ids: Tensor) -> Tensor:
        return torch.ones(scene.num_units, dtype=torch.bool).scatter(0, ids, False)

    for x, written in [(stored[0], units), (stored[1], units), (got[2].representatives, new)]:
        assert x[others(written)].isnan().all()


@pytest.mark.usefixtures("isa")
@in_every_dtype
def test_seal_takes_the_earlier_of_equal_tokens(dtype: torch.dtype) -> None:
    """Among tokens that received the same attention, the earlier ones represent the unit, head by head."""
    sizes = Sizes(repr_topk=5, exc=64)
    scene = Scene(sizes, [Task(256, 320)], dtype, seed=6)
    scene.fill_received(levels=2)
    batch = scene.batch()
    cache, memory = scene.packed(cpu, dtype)
    cpu.seal(batch.blocks, sizes.settings, scene.rope, cache, memory)
    keys, _ = cpu.unpack(memory.keys, memory.values)
    assert len(batch.blocks.leaving) == 4
    for physical, _, unit, _ in batch.blocks.leaving.tolist():
        for head in range(sizes.heads):
            received = scene.received[physical, head].tolist()
            best = sorted(range(sizes.block_size), key=lambda token: (-received[token], token))[: sizes.repr_topk]
            mean = keys[unit, head // 2, best].float().mean(0)
            bound = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(memory.representatives[unit, head].float(), mean, rtol=bound, atol=bound)


# --- Batches and threads ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@in_every_dtype
@settings(max_examples=6, deadline=None)
@given(st.data(), any_sizes(), SEEDS)
def test_a_row_does_not_depend_on_batch_and_threads(
    dtype: torch.dtype, data: st.DataObject, sizes: Sizes, seed: int
) -> None:
    """A row chooses, gives and receives the same to the last bit alone and among others, with one thread and two."""
    assert_invariant(Scene(sizes, data.draw(any_tasks(sizes), label="tasks"), dtype, seed))


@pytest.mark.usefixtures("isa")
@in_every_dtype
def test_long_rows_do_not_depend_on_batch_and_threads(dtype: torch.dtype) -> None:
    """The same for rows that are split over threads."""
    assert_invariant(Scene(LONG, [Task(2560, 2670), Task(5003, 5004), Task(128, 130), Task(4000, 4001)], dtype, 5))


def assert_invariant(scene: Scene) -> None:
    scene.fill_received()
    everyone = scene.batch()
    scene.choose(everyone)
    together = [run_everything(scene, everyone, threads) for threads in (1, 2)]
    for one, two in zip(*together, strict=True):
        assert torch.equal(bits(one), bits(two)), "threads"
    chosen, output, received, mass = together[0]
    for i, request in enumerate(scene.requests):
        batch = scene.batch([i])
        alone_chosen, alone_output, alone_received, alone_mass = run_everything(scene, batch, threads=2)
        count = alone_chosen.shape[1]
        assert torch.equal(chosen[i, :count], alone_chosen[0])
        assert torch.equal(bits(output[everyone.tokens[i]]), bits(alone_output[batch.tokens[0]]))
        assert torch.equal(bits(mass[i, :count]), bits(alone_mass[0]))
        own = request.slots // scene.sizes.block_size, slice(None), request.slots % scene.sizes.block_size
        assert torch.equal(bits(received[own]), bits(alone_received[own]))


def run_everything(scene: Scene, batch: Batch, threads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Units chosen, output, attention received and mass."""
    torch.set_num_threads(threads)
    try:
        settings = scene.sizes.settings
        chosen = cpu.select(batch.blocks, settings, scene.rope, batch.query, scene.representatives)
        outcome = attend(scene, batch, chosen, cpu, scene.dtype, weigh=True)
    finally:
        torch.set_num_threads(1)
    assert outcome.mass is not None
    return chosen, outcome.output, outcome.received[: scene.num_blocks], outcome.mass


# --- A whole layer ---------------------------------------------------------------------------------------------------

LAYERS = shapes(block_sizes=[16, 32], head_sizes=[(32, 32), (48, 16), (64, 64)], max_window=3)


def cpu_layer(shape: Shape, length: int, seed: int = 0, **kwargs: Any) -> Layer:
    return Layer.for_one(shape, length, seed, ops="cpu", **kwargs)


@pytest.mark.usefixtures("isa")
@settings(max_examples=10, deadline=None)
@given(LAYERS, st.data())
def test_layer_equals_the_oracle(shape: Shape, data: st.DataObject) -> None:
    """Prompt and decode of any length give the oracle's outputs, selections, received attention and representatives."""
    prompt_len = data.draw(st.integers(1, 5 * shape.config.n_local + 20), label="prompt_len")
    length = prompt_len + data.draw(st.integers(0, 12), label="decode")
    seed = data.draw(SEEDS, label="seed")
    sequence, layer = Sequence.random(shape, length, prompt_len, seed), cpu_layer(shape, length, seed)
    layer.run(sequence)
    assert_equals_oracle(layer, sequence, oracle_of(shape, sequence))


@pytest.mark.usefixtures("isa")
def test_golden_case_c() -> None:
    """The recorded run of the authors' code, its mask corrected, comes out of the C++ ops."""
    golden = Golden()
    shape = Shape(golden.config, heads=4, kv_heads=2, head_size=32, rotary_dim=32)
    # The recording does not cut before the last prompt token; as if its first append were not the end of the prompt.
    sequence = Sequence(golden.q, golden.k, golden.v, prompt_len=10_000)
    layer = cpu_layer(shape, len(sequence))
    for length in golden["c_appends"].tolist():
        layer.step([(sequence, length)])
    recorded = golden["c_out"].transpose(0, 1).float()
    torch.testing.assert_close(sequence.output, recorded, rtol=0, atol=2e-5)
    expected = golden.run_oracle("c")
    assert assert_equals_oracle(layer, sequence, expected) == len(expected.blocks)


WINDOW_OF_64 = Shape(OracleConfig(16, n_init=16, n_local=64, topk=2, repr_topk=2, exc=24), 6, 2, 32, 32)


@pytest.mark.usefixtures("isa")
def test_layer_does_not_depend_on_batch_and_chunks() -> None:
    """Requests prefilled in chunks and batched with others come out to the last bit as alone and at once."""
    lengths = [(300, 290), (150, 140), (50, 30)]
    together = Layer(WINDOW_OF_64, num_blocks=40, num_units=40, ops="cpu")
    running = [Sequence.random(WINDOW_OF_64, *lengths[i], seed=i) for i in range(3)]
    while work := [sequence for sequence in running if sequence.computed < len(sequence)]:
        left = [sequence.prompt_len - sequence.computed for sequence in work]
        together.step([(seq, min(72, rest) if rest > 0 else 1) for seq, rest in zip(work, left, strict=True)])
    for i, sequence in enumerate(running):
        alone = Sequence.random(WINDOW_OF_64, *lengths[i], seed=i)
        cpu_layer(WINDOW_OF_64, len(alone), seed=9).run(alone)
        assert torch.equal(sequence.output, alone.output)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_layer_loses_no_more_than_its_rounding(dtype: torch.dtype) -> None:
    """With every unit taken, so that no selection can tip over, outputs stay within the rounding of the dtype."""
    config = OracleConfig(block_size=16, n_init=16, n_local=64, topk=100, repr_topk=2, exc=24)
    shape = Shape(config, 4, 2, 32, 32)
    sequence, layer = Sequence.random(shape, 400, 390, seed=9), cpu_layer(shape, 400, dtype=dtype)
    layer.run(sequence)
    error = (sequence.output.double() - oracle_of(shape, sequence).output.transpose(0, 1)).abs()
    assert error.max() < 12 * torch.finfo(dtype).eps and error.mean() < torch.finfo(dtype).eps


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 8, 24, 136])
def test_block_sizes_that_cannot_be_run_are_named(block_size: int) -> None:
    """The reason names the flag, its value, what would do, and the implementation that runs any."""
    reason = cpu.check(64, block_size) or ""
    assert f"--block-size {block_size}:" in reason and "multiple of 16" in reason and 'ops="reference"' in reason


@pytest.mark.parametrize("head_size", [16, 24, 72, 272])
def test_head_sizes_that_cannot_be_run_are_named(head_size: int) -> None:
    """The reason names the size, those that can be run, and the implementation that runs any."""
    reason = cpu.check(head_size, 128) or ""
    assert f"head size {head_size}:" in reason and "32 to 256 in steps of 16" in reason and 'ops="reference"' in reason


def test_sizes_that_can_be_run_are_accepted() -> None:
    """Whatever the tests above run is accepted."""
    assert all(cpu.check(head, block) is None for head in range(32, 257, 16) for block in (16, 48, 128, 144, 256))
