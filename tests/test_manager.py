"""The block manager inside vLLM's own KVCacheManager: bounded blocks, units as a request grows, everything back."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import RequestStatus

from vllm_infllm.config import InfLLMConfig
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.manager import InfLLMManager, InfLLMSpec


def make_spec(geometry: Geometry, num_units: int, kept_blocks: int = 1) -> InfLLMSpec:
    return InfLLMSpec(
        block_size=geometry.block_size,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
        sliding_window=geometry.n_local,
        geometry=geometry,
        kept_blocks=kept_blocks,
        num_units=num_units,
    )


@dataclass(eq=False)
class Request:
    """A request as vLLM's KVCacheManager looks at it."""

    request_id: str
    num_prompt_tokens: int
    answer_len: int
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_tokens: int = field(init=False)
    first_block: int | None = None
    kept: list[int] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt_tokens

    @property
    def status(self) -> RequestStatus:
        return RequestStatus.RUNNING if self.num_computed_tokens else RequestStatus.WAITING

    @property
    def finished(self) -> bool:
        return self.num_computed_tokens == self.num_prompt_tokens + self.answer_len


class Engine:
    """vLLM's KVCacheManager over one InfLLM group, with every promise checked after each step."""

    def __init__(
        self, spec: InfLLMSpec, num_blocks: int, step_tokens: int, max_model_len: int, in_flight: int = 0
    ) -> None:
        """`in_flight` steps may be computed by the worker when the next one is scheduled (0: synchronous)."""
        self.spec, self.geometry, self.step_tokens, self.in_flight = spec, spec.geometry, step_tokens, in_flight
        most = step_tokens * (1 + in_flight)
        self.bound = spec.max_admission_blocks_per_request(most, max_model_len)
        self.kv = KVCacheManager(
            KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=max_model_len,
            scheduler_block_size=spec.block_size,
            hash_block_size=spec.block_size,
            max_in_flight_tokens=most,
            enable_caching=False,
        )
        manager = self.kv.coordinator.single_type_managers[0]
        assert isinstance(manager, InfLLMManager), "the spec is not registered with its manager"
        self.manager = manager
        self.running: list[Request] = []
        self.worker: dict[int, list[int]] = {}  # units by first block, as the worker is told
        self.ended: list[str] = []

    @property
    def free_blocks(self) -> int:
        return self.kv.block_pool.get_num_free_blocks()

    def blocks(self, request: Request) -> dict[int, int]:
        """Physical id of each block that the request holds, by its index."""
        table = self.manager.req_to_blocks[request.request_id]
        return {index: block.block_id for index, block in enumerate(table) if not block.is_null}

    def schedule(self, request: Request, num_new: int) -> bool:
        """Give the request slots for num_new tokens; whether there were blocks and units enough."""
        units = list(self.manager.units.get(request.request_id, ()))
        first = request.num_computed_tokens == 0
        free, pool_free = self.free_blocks, self.manager.pool.num_free
        if self.kv.allocate_slots(request, num_new, full_sequence_must_fit=first) is None:
            assert self.manager.units.get(request.request_id, []) == units, "units taken without blocks"
            assert self.manager.pool.num_free == pool_free and self.free_blocks >= free
            return False
        if first:
            request.first_block = self.manager.first_block(request.request_id)
            self.worker[request.first_block] = []
            self.running.append(request)
        self.check_step(request, num_new)
        request.num_computed_tokens += num_new
        request.num_in_flight_tokens = num_new if self.in_flight else 0
        request.num_tokens = max(request.num_prompt_tokens, request.num_computed_tokens + 1)
        return True

    def end_step(self) -> None:
        for request_id, units in self.manager.take_new_units().items():
            self.worker[self.manager.first_block(request_id)] += units
        assert self.manager.take_ended() == self.ended, "the worker keeps what ended, or loses what goes on"
        self.ended = []
        self.check_integrity()

    def end(self, request: Request) -> None:
        """The request is finished, aborted or preempted."""
        self.kv.free(request)
        self.running.remove(request)
        self.ended.append(request.request_id)
        del self.worker[request.first_block]

    def check_step(self, request: Request, num_new: int) -> None:
        """What the step computes and what steps in flight still read is there; no more than the bound is held."""
        computed, blocks = request.num_computed_tokens, self.blocks(request)
        processed = computed - request.num_in_flight_tokens
        size = self.geometry.block_size
        needed = range(self.geometry.edge_start(processed) // size, -(-(computed + num_new) // size))
        kept = range(min(self.spec.kept_blocks, -(-(computed + num_new) // size)))
        assert set(blocks) == {*kept, *needed}, "a block that is read was freed, or one that is not read is held"
        if request.kept:
            assert [blocks[i] for i in range(len(request.kept))] == request.kept, "a kept block was exchanged"
        request.kept = [blocks[i] for i in kept]
        assert blocks[0] == request.first_block, "the first block names the request for life"
        assert len(blocks) <= self.bound
        request.peak = max(request.peak, len(blocks))
        assert self.manager.blocks_held(request.request_id) == len(blocks)
        assert len(self.manager.units[request.request_id]) == self.geometry.stored_blocks(computed + num_new)

    def check_integrity(self) -> None:
        """Every block and every unit has one owner or is free, and the worker knows of each unit."""
        self.manager.pool.check_integrity()
        held = [block for request in self.running for block in self.blocks(request).values()]
        assert len(set(held)) == len(held) and self.kv.block_pool.null_block.block_id not in held
        assert self.free_blocks + len(held) == self.kv.block_pool.num_gpu_blocks - 1
        assert self.manager.num_blocks_held == len(held)
        units = [unit for request in self.running for unit in self.manager.units[request.request_id]]
        assert len(set(units)) == len(units) == self.manager.pool.num_units - self.manager.pool.num_free
        for request in self.running:
            assert self.worker[request.first_block] == self.manager.units[request.request_id]

    def check_all_back(self) -> None:
        """Nothing is held and nothing remembered when no request is left."""
        assert self.free_blocks == self.kv.block_pool.num_gpu_blocks - 1
        assert self.manager.pool.num_free == self.manager.pool.num_units
        manager = self.manager
        assert manager.take_ended() == self.ended
        leftovers = (manager.units, manager.take_new_units(), manager.take_ended(), manager.req_to_blocks)
        assert not any(leftovers) and not self.worker
        assert manager.num_blocks_held == 0 and not manager.short_of_units


@st.composite
def engines(draw: st.DrawFn) -> tuple[Engine, int]:
    """An engine that has room for at least one request of max_model_len, and that length."""
    block_size = draw(st.integers(1, 4))
    n_local = block_size * draw(st.integers(1, 4))
    exc = draw(st.integers(1, n_local))
    geometry = Geometry(block_size, block_size * draw(st.integers(0, 2)), n_local, exc)
    max_model_len = draw(st.integers(1, 120))
    step_tokens, in_flight = draw(st.integers(exc, 3 * exc)), draw(st.integers(0, 1))
    spec = make_spec(geometry, geometry.stored_blocks(max_model_len) + draw(st.integers(0, 8)), draw(st.integers(1, 4)))
    bound = spec.max_admission_blocks_per_request(step_tokens * (1 + in_flight), max_model_len)
    num_blocks = 1 + bound + draw(st.integers(0, 5 * bound))
    return Engine(spec, num_blocks, step_tokens, max_model_len, in_flight), max_model_len


@settings(max_examples=150, deadline=None)
@given(engines(), st.integers(0, 2**31 - 1))
def test_requests_come_grow_and_go(engine_and_length: tuple[Engine, int], seed: int) -> None:
    """Chunks, decode, waiting, preemption and aborts keep every promise; all requests finish, everything is back.

    A request that finds no room waits if it has not started, else the last one running is preempted, as in vLLM. One
    that runs alone always finds room, or the engine would hang.
    """
    engine, max_model_len = engine_and_length
    choice = random.Random(seed)
    waiting = []
    for i in range(choice.randint(1, 6)):
        prompt_len = choice.randint(1, max_model_len)
        waiting.append(Request(f"r{i}", prompt_len, choice.randint(0, max_model_len - prompt_len)))

    for _ in range(3000):
        if not waiting and not engine.running:
            break
        budget, preempted = engine.step_tokens, False
        for request in list(engine.running):
            if request not in engine.running:
                continue  # preempted for one before it
            left = request.num_prompt_tokens - request.num_computed_tokens
            num_new = min(budget, max(1, left), choice.randint(1, engine.step_tokens))
            while num_new and not engine.schedule(request, num_new):
                last = engine.running[-1]
                assert len(engine.running) > 1, "a request that runs alone finds no room"
                engine.end(last)
                # It starts again with the answer so far as part of its prompt.
                answered = last.num_tokens - last.num_prompt_tokens
                waiting.insert(0, Request(last.request_id, last.num_tokens, last.answer_len - answered))
                preempted = True
                if last is request:
                    num_new = 0
            budget -= num_new
        while waiting and budget and not preempted:
            num_new = min(budget, waiting[0].num_prompt_tokens, choice.randint(1, engine.step_tokens))
            if not engine.schedule(waiting[0], num_new):
                assert engine.running, "a request that would run alone is not admitted"
                break
            waiting.pop(0)
            budget -= num_new
        engine.end_step()
        for request in list(engine.running):
            if request.finished or choice.random() < 0.01:
                engine.end(request)
        engine.check_integrity()
    else:
        pytest.fail("requests are left over")
    engine.check_all_back()


PAPER = Geometry(block_size=128, n_init=128, n_local=4096, exc_block_size=512)


@pytest.mark.parametrize("kept_blocks", [1, 33])
def test_long_prompt_holds_exactly_the_bound(kept_blocks: int) -> None:
    """32K tokens with the paper's sizes in steps that end inside blocks: the bound is met and never exceeded."""
    step = 2048 + 127
    engine = Engine(make_spec(PAPER, 300, kept_blocks), 1000, step, 40000)
    request = Request("long", 32768, 0)
    while not request.finished:
        assert engine.schedule(request, min(step, request.num_prompt_tokens - request.num_computed_tokens))
        engine.end_step()
    assert request.peak == engine.bound == kept_blocks + PAPER.window_blocks(step)
    assert len(engine.manager.units["long"]) == 224


def test_short_models_are_bounded_by_their_length() -> None:
    """A request is never expected to hold more blocks than max_model_len fills."""
    spec = make_spec(PAPER, 0)
    assert spec.max_admission_blocks_per_request(8192, 1000) == 8
    assert spec.max_admission_blocks_per_request(8192, 1024) == 8
    assert spec.max_admission_blocks_per_request(2048, 1 << 20) == 1 + PAPER.window_blocks(2048)


# --- The manager by itself -------------------------------------------------------------------------------------------

SMALL = Geometry(block_size=4, n_init=4, n_local=8, exc_block_size=8)


def make_manager(num_units: int, num_blocks: int = 50, **other: object) -> InfLLMManager:
    arguments = {
        "block_pool": BlockPool(num_blocks, enable_caching=False, hash_block_size=SMALL.block_size),
        "enable_caching": False,
        "kv_cache_group_id": 0,
        "scheduler_block_size": SMALL.block_size,
    }
    return InfLLMManager(make_spec(SMALL, num_units), **{**arguments, **other})


def wanted(manager: InfLLMManager, request_id: str, num_tokens: int, computed: int = 0) -> int:
    return manager.get_num_blocks_to_allocate(request_id, num_tokens, [], computed, computed, num_tokens)


def test_short_units_ask_for_more_blocks_than_there_are() -> None:
    """Without a unit for every block that will be stored, the request must wait; asking takes nothing."""
    manager = make_manager(num_units=3)
    free = manager.block_pool.get_num_free_blocks()
    assert wanted(manager, "a", 8 + 3 * 4 + 3) == 6  # 23 tokens, 3 blocks stored
    assert wanted(manager, "a", 8 + 4 * 4) > free
    assert manager.pool.num_free == 3 and manager.block_pool.get_num_free_blocks() == free
    assert not manager.units and manager.take_new_units() == {}


def test_units_held_count_for_their_request_only() -> None:
    """A request may grow on units of its own when none is free; another one may not start."""
    manager = make_manager(num_units=3)
    manager.allocate_new_blocks("a", 20, 20)
    assert len(manager.units["a"]) == 3 and manager.pool.num_free == 0
    assert wanted(manager, "a", 23, computed=20) == 1
    assert wanted(manager, "b", 11) == 3  # stores nothing yet
    assert wanted(manager, "b", 12) > manager.block_pool.get_num_free_blocks()


def test_short_of_units_until_there_are_enough() -> None:
    """From the refusal of a request until as many units are free as it lacked, or it is gone."""
    manager = make_manager(num_units=3)
    manager.allocate_new_blocks("a", 16, 16)
    assert wanted(manager, "b", 12) <= manager.block_pool.get_num_free_blocks() and not manager.short_of_units
    wanted(manager, "b", 16)
    assert manager.short_of_units
    manager.free("a")
    assert not manager.short_of_units
    manager.allocate_new_blocks("c", 16, 16)
    wanted(manager, "b", 16)
    wanted(manager, "d", 20)
    assert manager.short_of_units
    manager.free("b")
    assert manager.short_of_units
    manager.free("d")
    assert not manager.short_of_units


def test_units_are_announced_once() -> None:
    """Units given since the last step are told to the worker once, in order; those of an ended request never."""
    manager = make_manager(num_units=10)
    manager.allocate_new_blocks("a", 16, 16)
    assert manager.take_new_units() == {"a": [0, 1]}
    assert manager.take_new_units() == {}
    manager.allocate_new_blocks("a", 20, 20)
    manager.allocate_new_blocks("b", 12, 12)
    manager.free("b")
    assert manager.take_new_units() == {"a": [2]}


def test_ending_twice_or_unseen_is_harmless() -> None:
    """A request aborted before it got anything, or ended already, gives nothing back a second time."""
    manager = make_manager(num_units=4)
    free = manager.block_pool.get_num_free_blocks()
    manager.free("never seen")
    manager.allocate_new_blocks("a", 20, 20)
    manager.free("a")
    manager.free("a")
    manager.pool.check_integrity()
    assert manager.pool.num_free == 4 and manager.block_pool.get_num_free_blocks() == free


def test_prefix_caching_is_refused() -> None:
    """Units are not shared between requests, so vLLM's prefix caching must be off; the flag is named."""
    with pytest.raises(ValueError, match="--no-enable-prefix-caching"):
        make_manager(4, enable_caching=True)


def test_changed_block_size_is_refused() -> None:
    """vLLM unifies block sizes over the layers of a hybrid model; the message names both sizes and the flag."""
    spec = make_spec(SMALL, 4)
    object.__setattr__(spec, "block_size", 16)
    pool = BlockPool(10, enable_caching=False, hash_block_size=16)
    with pytest.raises(ValueError, match=r"from 4 to 16.*--block-size 16"):
        InfLLMManager(spec, block_pool=pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=16)


def test_spec_takes_over_the_layers_cache_shape() -> None:
    """The InfLLM spec asks for the same bytes a block as the full-attention spec that it replaces."""
    full = FullAttentionSpec(block_size=128, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    spec = InfLLMSpec.of(full, InfLLMConfig(n_local=1024))
    assert spec.page_size_bytes == full.page_size_bytes
    assert (spec.sliding_window, spec.geometry.n_local, spec.block_size) == (1024, 1024, 128)
