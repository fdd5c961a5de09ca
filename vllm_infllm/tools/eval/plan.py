"""Which samples are run: every task at every length and depth, so many times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_infllm.tools.eval.tasks.base import Sample, Task


@dataclass(frozen=True)
class Point:
    """One sample to make: tokens of the prompt, depth of the needle where the task has one, and which of several."""

    task: str
    length: int
    depth: float | None
    index: int

    @property
    def id(self) -> str:
        """Names the sample, whatever else is run."""
        depth = "" if self.depth is None else f"/depth {self.depth:.4g}"
        return f"{self.task}/{self.length}{depth}/{self.index}"

    def sample(self, task: Task, tokenizer: Any, seed: int) -> Sample:
        """The sample, drawn from the seed and the id alone."""
        return task.generate(tokenizer, self.length, self.depth or 0.0, f"{seed}:{self.id}")


def points(tasks: Sequence[Task], lengths: Sequence[int], depths: Sequence[float], samples: int) -> list[Point]:
    """All samples, short ones first, so that there is something to see soon."""
    return [
        Point(task.name, length, depth, index)
        for length in sorted(lengths)
        for task in tasks
        for depth in (depths if task.has_depth else [None])
        for index in range(samples)
    ]
