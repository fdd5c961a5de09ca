"""The CUDA operations, compiled for the CPU by cuda_shim.h: against the reference operations, and a plain model."""

import random
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu import build_cuda
from tests.plain_residency import PlainModel
from vllm_infllm.memory.residency import EMPTY, Residency, Strategy
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import reference, workspace
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Row

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
INF, NAN = float("inf"), float("nan")
SEEDS = st.integers(0, 2**31 - 1)
UNTOUCHED = 123456789


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    build_cuda.load_for_cpu()
    from vllm_infllm.ops import cuda

    return cuda


def settings_of(init_blocks: int, topk: int) -> LayerSettings:
    return LayerSettings(n_local=64, init_blocks=init_blocks, topk=topk, repr_topk=1, scale=1.0)


def execution_blocks(
    rows: list[list[int]], num_chosen: int, units: Tensor | None = None, table: Tensor | None = None
) -> ExecutionBlocks:
    return ExecutionBlocks(
        rows=torch.tensor(rows, dtype=torch.int64).view(-1, len(Row)),
        block_table=torch.zeros((1, 1), dtype=torch.int32) if table is None else table,
        units=torch.empty(0, dtype=torch.int64) if units is None else units,
        leaving=torch.empty((0, 4), dtype=torch.int64),
        num_chosen=num_chosen,
        longest=1,
        most_stored=max((row[Row.STORED] for row in rows), default=0),
    )


def row_of(stored: int, units: int = 0, table: int = 0, request: int = 0, empty: bool = False) -> list[int]:
    return [0, 100_000, 100_000 + (not empty), 0, table, stored, units, 1, request]


def poison(name: str, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """What an operation is going to write, and a little behind it, which it must leave alone."""
    return workspace.take(name, (count + 9,), dtype, CPU).fill_(UNTOUCHED)[count:]


# --- top-k -----------------------------------------------------------------------------------------------------------

SPECIAL = [NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, -3.4e38]


def scores_of(kind: str, count: int, draw: torch.Generator) -> Tensor:
    normal = torch.randn(count, generator=draw)
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (count,), generator=draw)]
    return {
        "normal": normal,
        "ties": torch.randint(-3, 3, (count,), generator=draw).float(),
        "equal": torch.full((count,), -2.5),
        "last bits": (torch.randint(200, (count,), generator=draw) + 0x40400000).int().view(torch.float32),
        "special": special,
        "mixed": torch.where(normal > 1, special, normal),
        "falling": -torch.arange(count).float(),
        "nan": torch.full((count,), NAN),
    }[kind]


KINDS = ("normal", "ties", "equal", "last bits", "special", "mixed", "falling", "nan")


def top_batch(
    stored: list[int], init_blocks: int, topk: int, kinds: list[str], draw: torch.Generator
) -> tuple[Tensor, ExecutionBlocks, Tensor]:
    """Scores, blocks, and what is to be chosen. -1 stored is an empty row. Scores not to be read are the highest."""
    rows, scores, units, chosen = [], [], [], []
    num_chosen = init_blocks + topk + 1
    most = max([0, *stored])
    for count, kind in zip(stored, kinds, strict=True):
        rows.append(row_of(count if count >= 0 else 3, 5 + len(units) * (most + 7), empty=count < 0))
        own = torch.randperm(most + 7, generator=draw) + 1_000_000 * len(units)
        units.append(own)
        sealed = own[: max(count, 0)][init_blocks:]
        score = torch.full((most + 1,), INF)
        if len(sealed) > topk:
            score[: len(sealed)] = scores_of(kind, len(sealed), draw)
            comparable = score[: len(sealed)].masked_fill(score[: len(sealed)].isnan(), -INF)
            sealed = sealed[reference.top(comparable, topk)]
        scores.append(score)
        wanted = [*own[: max(count, 0)][:init_blocks].tolist(), *sealed.tolist()]
        chosen.append(wanted + [-1] * (num_chosen - len(wanted)))
    blocks = execution_blocks(rows, num_chosen, torch.cat([torch.full((5,), -7), *units]))
    return torch.stack(scores)[:, :most], blocks, torch.tensor(chosen)


def check_top(cuda: ModuleType, stored: list[int], init_blocks: int, topk: int, kinds: list[str], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores, blocks, expected = top_batch(stored, init_blocks, topk, kinds, draw)
    behind = poison("chosen", expected.numel())
    chosen = cuda.topk(scores, blocks, settings_of(init_blocks, topk))
    assert torch.equal(chosen, expected)
    assert (behind == UNTOUCHED).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", [0, 1, 16, 130])
def test_topk_of_any_size(cuda: ModuleType, kind: str, topk: int) -> None:
    """Around warps, blocks of threads and topk, up to far more units than are stored in practice."""
    sizes = [0, 1, 2, 31, 32, 33, 64, 65, 127, 129, 500, 1000, topk + 1, topk + 2, topk + 3]
    check_top(cuda, [*sizes, -1], init_blocks=2, topk=topk, kinds=[kind] * (len(sizes) + 1), seed=topk)


@pytest.mark.parametrize("size", [4097, 16384, 16386, 20000])
def test_topk_of_many_units(cuda: ModuleType, size: int) -> None:
    kinds = ["normal", "ties", "last bits", "mixed", "equal"]
    check_top(cuda, [size, size - 1, size, -1, size], init_blocks=1, topk=16, kinds=kinds, seed=size)


@settings(max_examples=150)
@given(data=st.data(), init_blocks=st.integers(0, 3), topk=st.integers(0, 40), seed=SEEDS)
def test_topk_of_ragged_batches(cuda: ModuleType, data: st.DataObject, init_blocks: int, topk: int, seed: int) -> None:
    stored = data.draw(st.lists(st.integers(-1, 90), max_size=5))
    kinds = [data.draw(st.sampled_from(KINDS)) for _ in stored]
    if stored:
        check_top(cuda, stored, init_blocks, topk, kinds, seed)


# --- copies ----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.float64]


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(256, size, dtype=torch.uint8, generator=draw).view(dtype)


def memory_of(units: int, kv_heads: int, block_size: int, head_size: int, dtype: torch.dtype, seed: int) -> LayerMemory:
    draw = torch.Generator().manual_seed(seed)
    stored = (random_bytes((units, kv_heads, block_size, head_size), dtype, draw) for _ in range(2))
    return LayerMemory(*stored, torch.empty(0), torch.empty(0))


def check_gather(cuda: ModuleType, memory: LayerMemory, missing: Tensor, slots: Tensor, num_blocks: int) -> None:
    """Byte for byte, also what is between and in other blocks; the reference copies the same bytes as integers."""
    _, kv_heads, block_size, head_size = memory.keys.shape
    shape = (num_blocks, 2, kv_heads, block_size, 2 * head_size)
    before = random_bytes(shape, memory.keys.dtype, torch.Generator().manual_seed(5))
    ours, theirs = before.clone(), before.clone()
    cuda.gather(memory, missing, slots, ours[:, 1])
    stored = [x.view(torch.uint8) for x in (memory.keys, memory.values)]
    reference.gather(
        LayerMemory(*stored, torch.empty(0), torch.empty(0)), missing, slots, theirs.view(torch.uint8)[:, 1]
    )
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "block_size", "head_size"), [(1, 16, 32), (3, 16, 80), (2, 48, 64), (8, 16, 128), (20, 32, 32)]
)
def test_gather_copies_bytes(
    cuda: ModuleType, dtype: torch.dtype, kv_heads: int, block_size: int, head_size: int
) -> None:
    """Units of several and of few vectors and heads, into blocks of a cache with gaps between them."""
    memory = memory_of(9, kv_heads, block_size, head_size, dtype, seed=kv_heads)
    missing = torch.tensor([[-1, 4, -1, 0], [8, -1, -1, 4], [-1, -1, -1, -1]])
    slots = torch.tensor([[3, 7, -1, 0], [11, 2, 5, 6], [-1, -1, 1, 1]])
    check_gather(cuda, memory, missing, slots, num_blocks=12)


@settings(max_examples=60)
@example(rows=250, num_chosen=17, hits=0.0, seed=0)
@given(rows=st.integers(0, 40), num_chosen=st.integers(0, 20), hits=st.sampled_from([0.0, 0.5, 0.98, 1.0]), seed=SEEDS)
def test_gather_of_any_number(cuda: ModuleType, rows: int, num_chosen: int, hits: float, seed: int) -> None:
    """More places than all warps look at at once, and none."""
    draw, shape = torch.Generator().manual_seed(seed), (rows, num_chosen)
    slots = torch.randperm(rows * num_chosen, generator=draw).view(shape)
    missing = torch.randint(6, shape, generator=draw).masked_fill(torch.rand(shape, generator=draw) < hits, -1)
    check_gather(cuda, memory_of(6, 1, 16, 32, torch.bfloat16, seed), missing, slots, rows * num_chosen + 1)


def test_gather_into_a_column_of_blocks(cuda: ModuleType) -> None:
    """Initial tokens: the blocks are a column of `leaving`, and padding has no unit."""
    leaving = torch.tensor([[4, 0, 3, 0], [9, 9, 9, 1], [1, 1, 5, 0]])
    memory = memory_of(6, 2, 16, 32, torch.float16, seed=1)
    check_gather(cuda, memory, torch.tensor([3, -1, 5]), leaving[:, 0], num_blocks=6)


# --- residency -------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """Requests that grow, are processed in batches of any of them, and end."""

    init_blocks: int
    topk: int
    slots: int
    seed: str
    requests: int = 6
    stored: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.stored = {request: self.draw.randint(0, 3 * self.slots) for request in range(self.requests)}
        blocks = self.init_blocks + self.slots
        self.table = torch.randperm(1000, generator=torch.Generator().manual_seed(3)).int()
        self.table = self.table[: self.requests * blocks].view(self.requests, blocks)

    @property
    def settings(self) -> LayerSettings:
        return settings_of(self.init_blocks, self.topk)

    @property
    def num_chosen(self) -> int:
        """More than are chosen, where there are slots for them."""
        return self.init_blocks + min(self.topk + 2, self.slots)

    def ended(self) -> int | None:
        """A request that ends now; another takes its number."""
        if self.draw.random() > 0.01:
            return None
        request = self.draw.randrange(self.requests)
        self.stored[request] = 0
        return request

    def step(self) -> tuple[ExecutionBlocks, Tensor]:
        """Blocks of the next batch, and the units chosen for it."""
        rows, chosen = [], []
        requests = self.draw.sample(range(self.requests), self.draw.randint(0, 4))
        for i, request in enumerate(requests):
            self.stored[request] += self.draw.choice([0, 0, 1 + self.draw.randint(0, self.topk // 4)])
            units = [1000 * request + block for block in range(self.stored[request])]
            wanted = units[: self.init_blocks] + self.some(units[self.init_blocks :])
            rows.append(row_of(len(units), table=i, request=request))
            chosen.append(wanted + [-1] * (self.num_chosen - len(wanted)))
            if self.draw.random() < 0.1:  # an empty row, of a request that is not to be touched
                rows.append(row_of(50, table=UNTOUCHED, request=self.draw.randrange(self.requests), empty=True))
                chosen.append([-1] * self.num_chosen)
        blocks = execution_blocks(rows, self.num_chosen, table=self.table)
        return blocks, torch.tensor(chosen, dtype=torch.int64).view(-1, self.num_chosen)

    def some(self, units: list[int]) -> list[int]:
        """Units of a request, in order; the same ones come again often."""
        if len(units) <= self.topk:
            return units
        favourites = units[-3 * self.slots // 2 :]
        few = self.draw.sample(favourites, min(len(favourites), self.topk - self.draw.randint(0, min(2, self.topk))))
        rest = self.draw.sample([u for u in units if u not in few], self.topk - len(few))
        return sorted(few + rest)

    def mass(self, chosen: Tensor) -> Tensor:
        """Attention that the chosen blocks received: sometimes none, and NaN where nobody may look."""
        values = [[self.draw.choice([0.0, self.draw.random()]) for _ in row] for row in chosen.tolist()]
        mass = torch.tensor(values, dtype=torch.float32).view(chosen.shape).masked_fill(chosen < 0, NAN)
        mass[:, : self.init_blocks] = NAN
        return mass


GEOMETRIES = {(2, 4, 7): 2500, (0, 3, 3): 600, (1, 40, 75): 300}
"""Initial blocks, topk and slots; and a number of steps: more than 10,000 in all, with three strategies."""

any_life = pytest.mark.parametrize(("geometry", "steps"), GEOMETRIES.items(), ids=str)
any_strategy = pytest.mark.parametrize("strategy", Strategy, ids=lambda strategy: strategy.name)


def caches_of(life: Life, strategy: Strategy) -> Residency:
    return Residency.allocate(strategy, 0.5, life.requests, 3, life.slots, CPU)


def resolved(cuda: ModuleType, life: Life, layer: Residency, blocks: ExecutionBlocks, chosen: Tensor) -> tuple:
    """Slots and missing, as lists; both are written whole, and nothing behind them."""
    behind = [poison(name, chosen.numel()) for name in ("slots", "missing")]
    slots, missing = cuda.resolve(blocks, life.settings, layer, chosen)
    assert all((tail == UNTOUCHED).all() for tail in behind)
    return slots.tolist(), missing.tolist()


@any_strategy
@any_life
def test_policies_equal_a_plain_model(
    cuda: ModuleType, geometry: tuple[int, int, int], steps: int, strategy: Strategy
) -> None:
    """The same unit in each slot after every step; only misses are copied, wanted units never leave."""
    life = Life(*geometry, seed=f"{geometry} {strategy}")
    caches = caches_of(life, strategy)
    layer, models = caches.layer(1), [PlainModel(strategy, 0.5) for _ in range(life.requests)]
    counts = np.zeros((life.requests, 3), np.int64)
    for _ in range(steps):
        if (request := life.ended()) is not None:
            caches.reset(request)
            models[request] = PlainModel(strategy, 0.5)
        blocks, chosen = life.step()
        slots, missing = resolved(cuda, life, layer, blocks, chosen)
        layer.check_integrity()
        mass = life.mass(chosen)
        cuda.attended(blocks, life.settings, layer, chosen, mass)
        for i, row in enumerate(blocks.rows.tolist()):
            if row[Row.START] == row[Row.END]:
                assert set(slots[i]) | set(missing[i]) == {-1}
                continue
            counts[row[Row.REQUEST]] += check_row(life, models[row[Row.REQUEST]], row, chosen[i], slots[i], missing[i])
            models[row[Row.REQUEST]].attended(dict(zip(chosen[i].tolist(), mass[i].numpy(), strict=True)))
        for units, model in zip(layer.unit.tolist(), models, strict=True):
            assert units[: len(model.slots)] == model.slots and set(units[len(model.slots) :]) <= {EMPTY}
    assert layer.counts.tolist() == counts.tolist() and counts.min() > 0
    for model, kept in zip(models, layer.mass.numpy(), strict=True):
        assert all(model.mass[unit] == kept[slot] for slot, unit in enumerate(model.slots) if unit != EMPTY)
    assert (caches.unit[:, [0, 2]] == EMPTY).all() and not caches.counts[:, [0, 2]].any(), "another layer was touched"


def check_row(
    life: Life, model: PlainModel, row: list[int], chosen: Tensor, slots: list[int], missing: list[int]
) -> tuple[int, int, int]:
    """Slots and missing of a row are what the model says; returns its hits, misses and evictions."""
    init, stored = life.init_blocks, row[Row.STORED]
    wanted = {unit: place for place, unit in enumerate(chosen.tolist()) if unit >= 0 and place >= init}
    available = min(max(stored - init, 0), life.slots)
    before = set(model.slots)
    new, left = model.resolve(wanted, available)
    assert set(new) == set(wanted) - before and not set(left) & set(wanted)
    table = life.table[row[Row.TABLE]].tolist()
    initial = table[: min(init, stored)] + [-1] * (init - stored)
    of_units = [table[init + model.slots.index(unit)] for unit in wanted]
    assert slots == initial + of_units + [-1] * (len(slots) - len(initial + of_units))
    assert missing == [unit if unit in new else -1 for unit in chosen.tolist()]
    return len(wanted) - len(new), len(new), len(left)


@any_strategy
@any_life
def test_tensors_equal_the_reference(
    cuda: ModuleType, geometry: tuple[int, int, int], steps: int, strategy: Strategy
) -> None:
    """All tensors of the caches, bit for bit, after a number of steps of both."""
    life = Life(*geometry, seed=f"twin {geometry} {strategy}")
    ours, theirs = caches_of(life, strategy), caches_of(life, strategy)
    for _ in range(steps // 20):
        blocks, chosen = life.step()
        got = resolved(cuda, life, ours.layer(0), blocks, chosen)
        expected = reference.resolve(blocks, life.settings, theirs.layer(0), chosen)
        assert got == tuple(x.tolist() for x in expected)
        mass = life.mass(chosen)
        cuda.attended(blocks, life.settings, ours.layer(0), chosen, mass)
        reference.attended(blocks, life.settings, theirs.layer(0), chosen, mass)
        for name in ("unit", "arrived", "used", "mass", "clock", "counts"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


# --- refusals, and what runs without data ----------------------------------------------------------------------------


def test_wrong_tensors_are_refused(cuda: ModuleType) -> None:
    """Before a kernel reads them."""
    life = Life(1, 4, 4, seed="refusals")
    layer = caches_of(life, Strategy.LRU).layer(0)
    blocks = execution_blocks([row_of(20)], 5, torch.arange(20), life.table)
    with pytest.raises(RuntimeError, match="scores has the wrong dtype"):
        cuda.topk(torch.zeros((1, 19), dtype=torch.float64), blocks, life.settings)
    with pytest.raises(RuntimeError, match="chosen has 2 rows, not 1"):
        cuda.resolve(blocks, life.settings, layer, torch.full((2, 5), -1))
    with pytest.raises(RuntimeError, match="5 units chosen, and a request has 4 slots"):
        cuda.resolve(blocks, life.settings, layer, torch.full((1, 6), -1))
    memory = LayerMemory(*(torch.zeros((2, 1, 16, 32)) for _ in range(2)), torch.empty(0), torch.empty(0))
    with pytest.raises(RuntimeError, match="cache must be"):
        cuda.gather(memory, torch.tensor([0]), torch.tensor([0]), torch.zeros((2, 1, 16, 32)))
    with pytest.raises(RuntimeError, match="missing and slots differ in shape"):
        cuda.gather(memory, torch.tensor([0]), torch.tensor([0, 1]), torch.zeros((2, 1, 16, 64)))


@pytest.mark.usefixtures("fake_tensors")
def test_fake_tensors(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """All operations can be traced for a GPU where there is none. (A CPU torch cannot index fake CUDA tensors.)"""
    monkeypatch.setattr(workspace, "take", lambda name, shape, dtype, on: torch.empty(shape, dtype=dtype, device=on))
    device = torch.device("cuda")
    with FakeTensorMode():
        layer = Residency.allocate(Strategy.LRU_S, 0.5, 8, 2, 6, device).layer(1)
        rows, table = torch.empty((3, len(Row)), dtype=torch.int64, device=device), torch.empty((3, 9), device=device)
        units = torch.empty(50, dtype=torch.int64, device=device)
        blocks = ExecutionBlocks(rows, table.int(), units, units.view(-1, 2), 5, 1, 30)
        chosen = cuda.topk(torch.empty((3, 29), device=device), blocks, settings_of(1, 4))
        slots, missing = cuda.resolve(blocks, settings_of(1, 4), layer, chosen)
        stored = [torch.empty((40, 2, 16, 32), dtype=torch.bfloat16) for _ in range(2)]
        cache = torch.empty((30, 2, 16, 64), dtype=torch.bfloat16, device=device)
        cuda.gather(LayerMemory(*stored, units, units), missing, slots, cache)
        cuda.attended(blocks, settings_of(1, 4), layer, chosen, torch.empty((3, 5), device=device))
    for tensor in (chosen, slots, missing):
        assert tensor.shape == (3, 5) and tensor.dtype == torch.int64 and tensor.device.type == "cuda"
