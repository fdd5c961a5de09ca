"""What a task is: it makes prompts, and most tasks judge answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from vllm_infllm.tools.eval.haystack import HaystackName, Text, encode, haystack, longest, weave


@dataclass(frozen=True)
class Sample:
    """One prompt, as token ids, and what is expected of it.

    `meta["needle_tokens"]`: where in the prompt what is asked for stands, a list of tokens [start, end).
    """

    prompt: list[int]
    answers: list[str]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task(ABC):
    """Makes samples; a sample is a function of the tokenizer and the arguments alone."""

    name: str
    max_tokens: int
    """How long an answer may get."""

    @property
    def has_depth(self) -> bool:
        """Whether `depth` says where the needle lies; other tasks ignore it."""
        return False

    @abstractmethod
    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        """A prompt of at most `length` tokens that falls short of it by less than one line (record, word, function).

        seed: of the run, ":", and the sample's name, "TASK/LENGTH/.../NUMBER" (plan.py).

        Raises:
            UsageError: if the task does not fit into so few tokens.
        """


@dataclass(frozen=True)
class AnswerTask(Task):
    """A task whose answer is a text."""

    @abstractmethod
    def score(self, sample: Sample, text: str) -> float:
        """How good an answer is, from 0 to 1."""


@dataclass(frozen=True)
class HaystackTask(AnswerTask):
    """A task that hides sentences in filler."""

    haystack: HaystackName

    def hide(
        self, tokenizer: Any, length: int, draw: Random, head: str, needles: Sequence[tuple[float, str]], tail: str
    ) -> tuple[list[int], list[list[int]]]:
        """Tokens of head, filler with each needle (depth, sentence) at its depth, and tail; tokens of each needle."""
        filler = haystack(self.haystack, draw)

        def build(lines: int) -> Text:
            return weave(head, filler(lines), needles, tail)

        return encode(tokenizer, build(longest(tokenizer, length, build)))


def share_contained(answers: Sequence[str], text: str) -> float:
    """RULER's measure: the share of the answers that the text contains, in upper or lower case."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)
