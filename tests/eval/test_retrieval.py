"""The share of layers and steps that retrieve a needle, by hand."""

import pytest

from vllm_infllm.memory.trace import Trace, TracedBlock
from vllm_infllm.tools.eval.retrieval import share_retrieved

PROMPT = 25
"""Tokens: 4 initial ones, units [4, 8), [8, 12), ..., window of 8; 3 units are sealed at its last token."""


def trace(*steps: list[list[int]]) -> Trace:
    """Two layers; a block of the prompt that retrieves everything, then the steps of the answer."""
    before = TracedBlock(20, PROMPT - 1, [[0, 1], [0, 1]])
    blocks = [TracedBlock(PROMPT - 1 + i, PROMPT + i, units) for i, units in enumerate(steps)]
    return Trace(4, 4, 8, ["a", "b"], [before, *blocks])


@pytest.mark.parametrize(
    ("steps", "needles", "expected"),
    [
        ([[[0, 2], [2]]], [[4, 7]], 0.5),  # the prompt's blocks do not count
        ([[[0], [1]], [[1], [1]]], [[5, 6]], 0.25),  # two layers, two steps
        ([[[1], [2]]], [[6, 10]], 0.5),  # a needle in units 0 and 1: either will do
        ([[[0], [0]]], [[4, 6], [12, 14]], 0.5),  # two needles
        ([[[0], [1]]], [[3, 6]], None),  # begins among the initial tokens
        ([[[0], [1]]], [[14, 17]], None),  # ends in the window
        ([[[0], [1]]], [[4, 6], [17, 19]], 0.5),  # only the first counts
    ],
)
def test_by_hand(steps: list[list[list[int]]], needles: list[list[int]], expected: float | None) -> None:
    assert share_retrieved(trace(*steps), PROMPT, needles) == expected


def test_a_unit_counts_from_the_step_on_that_could_retrieve_it() -> None:
    """Unit 3, tokens [16, 20), is sealed four tokens later."""
    steps = [[[0], [0]]] * 4 + [[[3], [0]]]
    assert trace(*steps).sealed_units(trace(*steps).blocks[-1]) == 4
    assert share_retrieved(trace(*steps), PROMPT, [[16, 18]]) == 0.5
