"""Calls that cross the end of a piece of Python's stack, told by the page faults of new memory."""

import resource
from collections.abc import Callable
from functools import partial

from vllm_infllm.worker.base import InfLLMWorker
from vllm_infllm.worker.stack import with_stack_room

CALLS = 200


def called() -> None:
    """The frame that may lie in a piece of its own."""


def faults(depth: int) -> int:
    """Page faults of `CALLS` calls by a loop that is `depth` frames below."""
    if depth:
        return faults(depth - 1)
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        called()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin


def below(depth: int, function: Callable[[], int]) -> int:
    return below(depth - 1, function) if depth else function()


def test_calls_in_a_step_never_map_memory() -> None:
    """At whatever depth a worker's method is called, and at whatever depth below it the layers are."""
    deepest = 200
    assert max(faults(depth) for depth in range(deepest)) >= CALLS, "no such pieces any more: remove the room"

    @with_stack_room
    def step(depth: int) -> int:
        return faults(depth)

    for above in range(0, deepest, 5):
        assert max(below(above, partial(step, depth)) for depth in range(deepest)) < CALLS / 10
    assert InfLLMWorker.execute_model.__code__.co_stacksize == step.__code__.co_stacksize
