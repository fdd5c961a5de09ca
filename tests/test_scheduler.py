"""Scheduler, block manager and what the worker is told, without a model: nothing leaks, whenever a request ends.

The worker's table of requests is driven by the metadata of each step and compared with what the scheduler holds.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from vllm.plugins import load_general_plugins
from vllm.v1.request import RequestStatus

from tests import tiny_models
from tests.schedulers import answer, assert_all_returned, build, infllm_manager, request
from vllm_infllm.memory.requests import RequestTable

FIELDS = {"n_init": 32, "n_local": 128, "topk": 3, "exc_block_size": 64}
FLAGS = {"block_size": 32, "max_num_seqs": 4, "max_model_len": 1024, "max_num_batched_tokens": 256}
UNITS = (1024 - 128) // 32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    load_general_plugins()
    yield tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


class Engine:
    """A scheduler, and the worker's table of requests as its metadata make it."""

    def __init__(self, llama: str, units: int, **flags: Any) -> None:
        self.scheduler = build(llama, FIELDS, {**FLAGS, **flags}, units)
        self.manager, self.table, self.preemptions = infllm_manager(self.scheduler), RequestTable(), 0

    def add(self, request_id: str, length: int, max_tokens: int, priority: int = 0) -> None:
        self.scheduler.add_request(request(request_id, length, max_tokens, priority))

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def schedule(self) -> None:
        """The first half of a step; the worker applies the metadata."""
        self.output = self.scheduler.schedule()
        (update,) = self.output.kv_connector_metadata.groups.values()
        self.scheduler.connector._apply(update, self.table, None)
        self.preemptions += len(self.output.preempted_req_ids or ())
        self.check()

    def finish_step(self) -> None:
        """The second half, with what the model answered."""
        self.scheduler.update_from_output(self.output, answer(self.scheduler, self.output))

    def check(self) -> None:
        """What runs is known to the worker under its first block, with exactly its units; nothing else is."""
        self.manager.pool.check_integrity()
        running = [r.request_id for r in self.scheduler.running]
        assert len(self.table) == len(running)
        for request_id in running:
            known = self.table[self.manager.first_block(request_id)]
            assert known is self.table.named(request_id)
            assert known.units.tolist() == self.manager.units[request_id]

    def drain(self) -> None:
        for _ in range(3000):
            if not self.scheduler.has_requests():
                break
            self.schedule()
            self.finish_step()
        assert not self.scheduler.has_requests(), "requests wait for ever"
        assert_all_returned(self.scheduler)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """What happens, in order: a request comes (its length, tokens to answer), one is aborted, half a step is made."""
    come = st.tuples(st.just("add"), st.integers(1, 900), st.integers(1, 120))
    gone = st.tuples(st.just("abort"), st.integers(0, 12), st.just(0))
    step = st.tuples(st.just("half a step"), st.just(0), st.just(0))
    return draw(st.lists(come | gone | step | step | step, min_size=5, max_size=60))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(history=histories(), units=st.integers(UNITS, 2 * UNITS), policy=st.sampled_from(["fcfs", "priority"]))
def test_nothing_leaks_whenever_requests_end(
    llama: str, history: list[tuple[str, int, int]], units: int, policy: str
) -> None:
    """Aborted while waiting, in the step of their admission or of a preemption, between schedule and answer: in the end
    all units and blocks are free, and the worker knows of no one."""
    engine, scheduled = Engine(llama, units, scheduling_policy=policy), False
    for number, (what, a, b) in enumerate(history):
        if what == "add":
            engine.add(str(number), a, min(b, 1023 - a), priority=b % 4)
        elif what == "abort":
            engine.abort(list(engine.scheduler.requests)[a]) if a < len(engine.scheduler.requests) else None
        elif scheduled:
            engine.finish_step()
            scheduled = False
        else:
            engine.schedule()
            scheduled = True
    if scheduled:
        engine.finish_step()
    engine.drain()
    engine.schedule()  # ends of the last step travel with the next
    assert len(engine.table) == 0
    event(f"preemptions: {min(engine.preemptions, 3)}")


def test_an_id_used_again_in_the_step_in_which_it_ended(llama: str) -> None:
    """The end of the first request is told before the admission of the second, though both travel in one step."""
    engine = Engine(llama, UNITS)
    engine.add("same", 400, 50)
    engine.schedule()
    engine.finish_step()
    engine.abort("same")
    engine.add("same", 300, 1)
    engine.schedule()
    assert engine.table.named("same").prompt_len == 300
    engine.finish_step()
    engine.drain()


def test_aborted_in_the_step_of_its_admission(llama: str) -> None:
    """Between schedule and answer, when the worker has been told of it already."""
    engine = Engine(llama, UNITS)
    engine.add("gone", 600, 50)
    engine.add("stays", 300, 50)
    engine.schedule()
    engine.abort("gone")
    engine.finish_step()
    engine.schedule()
    assert len(engine.table) == 1
    engine.finish_step()
    engine.drain()


def test_aborted_while_waiting(llama: str) -> None:
    """The worker never hears of it but for its end, which it takes for granted."""
    engine = Engine(llama, UNITS, max_num_seqs=1)
    engine.add("runs", 300, 5)
    engine.add("waits", 300, 5)
    engine.schedule()
    engine.abort("waits")
    engine.finish_step()
    engine.drain()


def test_preempted_and_aborted_before_it_starts_again(llama: str) -> None:
    """Two answers outgrow the pool; the one that was preempted is aborted while it waits."""
    engine = Engine(llama, UNITS)
    for name in ("first", "second"):
        engine.add(name, 500, 500)
    while not engine.preemptions:
        engine.schedule()
        engine.finish_step()
    assert len(engine.table) == 1
    engine.abort("second")
    engine.drain()


def test_the_shortest_answers(llama: str) -> None:
    """Prompts of one token, of just the window and just beyond it, with answers of one token."""
    engine = Engine(llama, UNITS)
    for length in (1, 127, 128, 129, 159, 160, 161, 1023):
        engine.add(str(length), length, 1)
    engine.drain()


def test_preempted_in_the_step_that_gave_it_units(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A more important request takes the units of one that the same step has served already: the worker must not be
    told of units that are gone. Lengths and pool are such that both need a unit in one step, and one is left."""
    engine, given = Engine(llama, UNITS + 1, scheduling_policy="priority"), {}
    allocate = engine.manager.allocate_new_blocks

    def noting(request_id: str, *args: Any) -> Any:
        before = len(engine.manager.units.get(request_id, ()))
        blocks = allocate(request_id, *args)
        given[request_id] = len(engine.manager.units[request_id]) - before
        return blocks

    monkeypatch.setattr(engine.manager, "allocate_new_blocks", noting)
    engine.add("less", 400, 600, priority=1)
    engine.schedule()
    engine.finish_step()
    engine.add("more", 402, 600, priority=0)
    while not engine.preemptions:
        given.clear()
        engine.schedule()
        engine.finish_step()
    assert given == {"less": 1, "more": 1} and list(engine.manager.units) == ["more"]
    engine.drain()
