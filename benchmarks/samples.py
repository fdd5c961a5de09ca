"""What is computed from measured seconds: the time of a prompt from measured steps."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product
from statistics import linear_regression
from typing import NamedTuple

from vllm_infllm.tools.samples import Ratio


class Step(NamedTuple):
    """One step of the scheduler: the tokens [start, start + tokens) of a request."""

    start: int
    tokens: int
    seconds: float
    processor_seconds: float

    @property
    def end(self) -> int:
        return self.start + self.tokens

    @property
    def middle(self) -> float:
        return self.start + self.tokens / 2

    @property
    def density(self) -> float:
        """Seconds a token."""
        return self.seconds / self.tokens


def prompt_seconds(steps: Iterable[Step], length: int) -> float:
    """Seconds of the first `length` tokens of a prompt of which `steps` were measured.

    A measured step counts as it is. Between two measured steps, the seconds a token are taken to grow linearly from the
    middle of the one to the middle of the other, as those of full attention do.

    Raises:
        ValueError: if no measured step begins at 0, or none ends at `length`, or steps overlap.
    """
    ordered = sorted(step for step in steps if step.end <= length)
    if not ordered or ordered[0].start != 0 or ordered[-1].end != length:
        raise ValueError(f"no steps were measured at the beginning and at the end of the first {length} tokens")
    seconds = ordered[0].seconds
    for a, b in pairwise(ordered):
        gap = b.start - a.end
        if gap < 0:
            raise ValueError(f"steps overlap: {a} and {b}")
        if gap:
            along = ((a.end + b.start) / 2 - a.middle) / (b.middle - a.middle)
            seconds += gap * (a.density + along * (b.density - a.density))
        seconds += b.seconds
    return seconds


def prompt_seconds_spread(steps: Iterable[Step], length: int) -> list[float]:
    """`prompt_seconds` from two halves of the steps: the first and the last, and every other one of those between."""
    ordered = sorted(step for step in steps if step.end <= length)
    inner = ordered[1:-1]
    return [prompt_seconds([*ordered[:1], *inner[i::2], *ordered[-1:]], length) for i in range(2)]


def ratio_of_prompts(numerator: Sequence[Step], denominator: Sequence[Step], length: int) -> Ratio:
    """Ratio of the seconds of a prompt; the spread is that of the halves of the steps."""
    value = prompt_seconds(numerator, length) / prompt_seconds(denominator, length)
    halves = product(prompt_seconds_spread(numerator, length), prompt_seconds_spread(denominator, length))
    ratios = [value, *(a / b for a, b in halves)]
    return Ratio(value, min(ratios), max(ratios))


def complete(steps: Iterable[Step], length: int) -> bool:
    """Whether every step of the first `length` tokens was measured."""
    return sum(step.tokens for step in steps if step.end <= length) == length


def predictor(steps: Sequence[Step]) -> Callable[[int, int], float]:
    """A function of start and tokens that predicts a step's seconds: a line through the seconds a token of `steps`."""
    if len({step.middle for step in steps}) < 2:
        average = sum(step.seconds for step in steps) / max(1, sum(step.tokens for step in steps))
        return lambda start, tokens: average * tokens
    slope, intercept = linear_regression([step.middle for step in steps], [step.density for step in steps])
    return lambda start, tokens: tokens * (intercept + slope * (start + tokens / 2))
