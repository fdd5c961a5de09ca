"""RULER's frequent words: the three most frequent of made-up words that follow Zipf's law."""

import math
import string
from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_infllm.tools.eval.haystack import Text, encode, join, longest
from vllm_infllm.tools.eval.tasks.base import AnswerTask, Sample, share_contained

HEAD = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
TAIL = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
TOKENS_PER_WORD = 50
"""One word of the vocabulary for so many tokens of the prompt."""


@dataclass(frozen=True)
class FrequentWords(AnswerTask):
    """The word of rank k makes up 1 / (zeta(2) k^2) of the text; rank 1 is noise, dots."""

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        draw = Random(seed)
        vocabulary = ["..."]
        while len(vocabulary) < max(length // TOKENS_PER_WORD, 5):
            word = "".join(draw.choices(string.ascii_lowercase, k=6))
            if word not in vocabulary:
                vocabulary.append(word)

        def build(count: int) -> Text:
            return join([HEAD, " ".join(_coded(vocabulary, 40 + count, Random(f"{seed}:{count}"))), TAIL])

        prompt, _ = encode(tokenizer, build(longest(tokenizer, length, build)))
        return Sample(prompt, vocabulary[1:4])

    def score(self, sample: Sample, text: str) -> float:
        return share_contained(sample.answers, text)


def _coded(vocabulary: list[str], count: int, draw: Random) -> list[str]:
    """About `count` words in random order."""
    zeta = math.pi**2 / 6
    text = [word for rank, word in enumerate(vocabulary, 1) for _ in range(int(count / zeta / rank**2))]
    draw.shuffle(text)
    return text


FREQUENT_WORDS = FrequentWords("frequent-words", 50)
