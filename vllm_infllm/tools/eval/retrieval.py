"""Whether what is asked for was retrieved: what accuracy depends on, and shows long before accuracy moves."""

from collections.abc import Sequence
from statistics import mean

from vllm_infllm.memory.trace import Trace, TracedBlock


def share_retrieved(trace: Trace, prompt_tokens: int, needles: Sequence[Sequence[int]]) -> float | None:
    """Share of layers and steps that retrieve a unit with part of a needle, mean over the needles.

    Steps are those that make the answer: of the last token of the prompt and of the tokens after it. A step does not
    count for a needle (tokens [start, end)) that is not wholly in units it can choose from: initial tokens and the
    window are attended to anyway.

    Returns:
        From 0 to 1; None if no step counts for any needle.
    """
    steps = [block for block in trace.blocks if block.end >= prompt_tokens]
    shares = [share for step in steps for needle in needles if (share := _share(trace, step, needle)) is not None]
    return mean(shares) if shares else None


def _share(trace: Trace, step: TracedBlock, needle: Sequence[int]) -> float | None:
    """Share of the layers that retrieve a unit with part of the needle in this step; None if it does not count."""
    start, end = needle
    first, last = trace.unit_of(start), trace.unit_of(end - 1)
    if first is None or last is None or last >= trace.sealed_units(step):
        return None
    return mean(any(first <= unit <= last for unit in of_layer) for of_layer in step.units)
