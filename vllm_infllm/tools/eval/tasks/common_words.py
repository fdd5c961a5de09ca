"""RULER's common words: the ten words of a long list that appear more often than the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_infllm.tools.eval.haystack import Text, encode, join, longest, words
from vllm_infllm.tools.eval.tasks.base import AnswerTask, Sample, share_contained

HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
TAIL = (
    "\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
COMMON = 10
SHORT = 4096
"""Below so many tokens common and other words appear less often."""
ROUND = 65536
"""Every further so many tokens all words appear that much more often, or the English words would run out."""


@dataclass(frozen=True)
class CommonWords(AnswerTask):
    """Ten words 30 times and others 3 times (6 and 1 in short lists), after a short example with its answer."""

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        draw = Random(seed)
        drawn = draw.sample(words("noun", "adjective", "verb"), len(words("noun", "adjective", "verb")))
        short, rounds = length < SHORT, -(-length // ROUND)
        others, common, repeats = (10, 3, 1) if short else (30, 10, 3)
        example_words, drawn = drawn[: COMMON + others], drawn[COMMON + others :]
        example = _numbered(example_words, common, repeats, draw) + TAIL + " " + _number(example_words[:COMMON])
        common, repeats = (6, 1) if short else (30 * rounds, 3 * rounds)

        def build(count: int) -> Text:
            listed = _numbered(drawn[: COMMON + count], common, repeats, Random(f"{seed}:{count}"))
            return join([HEAD, example, "\n", HEAD, listed, TAIL])

        prompt, _ = encode(tokenizer, build(longest(tokenizer, length, build)))
        return Sample(prompt, drawn[:COMMON])

    def score(self, sample: Sample, text: str) -> float:
        return share_contained(sample.answers, text)


def _numbered(some: Sequence[str], common: int, repeats: int, draw: Random) -> str:
    """The first ten words `common` times, the others `repeats` times, in random order."""
    listed = [*some[:COMMON]] * common + [*some[COMMON:]] * repeats
    draw.shuffle(listed)
    return _number(listed)


def _number(listed: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


COMMON_WORDS = CommonWords("common-words", 120)
