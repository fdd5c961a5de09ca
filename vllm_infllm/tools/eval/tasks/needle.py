"""RULER's needles in a haystack: numbers for words, in prose."""

from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_infllm.tools.eval.haystack import words
from vllm_infllm.tools.eval.tasks.base import HaystackTask, Sample, share_contained

NEEDLE = "One of the special magic numbers for {key} is: {value}.\n"
ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n",
    "\nWhat is the special magic number for {query} mentioned in the provided text? "
    "The special magic number for {query} mentioned in the provided text is",
)
SOME = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n",
    "\nWhat are all the special magic numbers for {query} mentioned in the provided text? "
    "The special magic numbers for {query} mentioned in the provided text are",
)


@dataclass(frozen=True)
class Needle(HaystackTask):
    """`keys` words with `values` numbers each are hidden, and those of `queries` words are asked for.

    A single number that is asked for lies at the depth; everything else anywhere.
    """

    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def has_depth(self) -> bool:
        return self.values * self.queries == 1

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        draw = Random(seed)
        adjectives, nouns = words("adjective"), words("noun")
        keys: list[str] = []
        while len(keys) < self.keys:
            key = f"{draw.choice(adjectives)}-{draw.choice(nouns)}"
            if key not in keys:
                keys.append(key)
        numbers = draw.sample(range(1_000_000, 10_000_000), self.keys * self.values)
        sentences = [NEEDLE.format(key=keys[i // self.values], value=number) for i, number in enumerate(numbers)]
        depths = [draw.random() for _ in numbers]
        if self.has_depth:
            depths[0] = depth

        asked = self.queries * self.values
        head, tail = ONE if asked == 1 else SOME
        query = (
            keys[0] if self.queries == 1 else ", ".join(keys[: self.queries - 1]) + f", and {keys[self.queries - 1]}"
        )
        needles = list(zip(depths, sentences, strict=True))
        prompt, places = self.hide(tokenizer, length, draw, head, needles, tail.format(query=query))
        return Sample(prompt, [str(number) for number in numbers[:asked]], {"needle_tokens": places[:asked]})

    def score(self, sample: Sample, text: str) -> float:
        return share_contained(sample.answers, text)


NEEDLES = (
    Needle("needle-single", 128, "plays"),
    Needle("needle-multikey", 128, "plays", keys=4),
    Needle("needle-multivalue", 128, "plays", values=4),
    Needle("needle-multiquery", 128, "plays", keys=4, queries=4),
)
