"""Ratios of what was measured in turn, with their spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """A ratio, and the lowest and the highest that its samples give."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self, ".2f")

    def __format__(self, spec: str) -> str:
        """Each figure by `spec`."""
        spec = spec or ".2f"
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio of the medians; the spread is that of the pairs, i-th of one and i-th of the other, measured in turn."""
    pairs = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return Ratio(median(numerators) / median(denominators), min(pairs), max(pairs))
