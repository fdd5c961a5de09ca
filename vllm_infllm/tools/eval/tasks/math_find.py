"""InfiniteBench's Math.Find: an extreme value, or the median, of a long list of integers."""

import re
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

from vllm_infllm.tools.eval.haystack import Text, encode, join, longest
from vllm_infllm.tools.eval.tasks.base import AnswerTask, Sample

QUESTIONS = {
    f"{which}{kind}": (kind, rank)
    for kind in ("largest", "smallest")
    for rank, which in enumerate(("", "second ", "third "))
} | {"median": ("median", 0)}
"""What is asked for: its kind, and how many different values are larger (smaller)."""


@dataclass(frozen=True)
class MathFind(AnswerTask):
    """Integers from 0 to 99; the end that is asked for is moved inwards by up to 20, so that the answer varies."""

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        draw = Random(seed)
        question = draw.choice(list(QUESTIONS))
        kind, rank = QUESTIONS[question]
        low, high = 0, 99
        if kind == "smallest" or (kind == "median" and draw.random() > 0.5):
            low = draw.randint(0, 19)
        else:
            high = draw.randint(79, 99)
        verb = "Calculate" if kind == "median" else "Find"
        head = f"{verb} the {question} number from the list below:\n\n["
        tail = f"]\n\nYou should answer with only one number, no other words. The {question} number of the list is: "
        numbers: list[int] = []

        def build(count: int) -> Text:
            # Three different values at least, so that there is a third largest one.
            shown = _extended(numbers, 3 + count, draw, low, high)
            return join([head, ", ".join(map(str, shown)), tail])

        count = longest(tokenizer, length, build)
        prompt, _ = encode(tokenizer, build(count))
        return Sample(prompt, [_answer(numbers[: 3 + count], kind, rank)])

    def score(self, sample: Sample, text: str) -> float:
        """Whether the first number of the answer is the one expected."""
        number = re.search(r"\d+(\.\d+)?", text)
        return float(number is not None and float(number.group()) == float(sample.answers[0]))


def _extended(numbers: list[int], count: int, draw: Random, low: int, high: int) -> list[int]:
    """The first `count` numbers; new ones are drawn where there are fewer, the first three different."""
    if not numbers:
        numbers += draw.sample(range(low, high + 1), 3)
    while len(numbers) < count:
        numbers.append(draw.randint(low, high))
    return numbers[:count]


def _answer(numbers: list[int], kind: str, rank: int) -> str:
    if kind == "median":
        return f"{median(numbers):g}"
    return str(sorted(set(numbers), reverse=kind == "largest")[rank])


MATH_FIND = MathFind("math-find", 8)
