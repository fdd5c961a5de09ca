"""How well each token of a long text is predicted, by its position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_infllm.tools.eval.haystack import haystack
from vllm_infllm.tools.eval.tasks.base import Sample, Task

BIN = 256
"""Tokens of a bin: the average over fewer is mostly noise."""


@dataclass(frozen=True)
class Perplexity(Task):
    """Prose from a drawn place on, exactly as long as asked for; only the prompt's log-probabilities count."""

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        filler = haystack("plays", Random(seed))
        prompt: list[int] = []
        lines = length // 8 + 1
        while len(prompt) < length:
            prompt = tokenizer("".join(filler(lines)))["input_ids"]
            lines *= 2
        return Sample(prompt[:length], [])


def bins(logprobs: Sequence[float]) -> list[float]:
    """Mean negative log-likelihood of each bin of positions, of log-probabilities of all tokens but the first."""
    starts = range(0, len(logprobs) + 1, BIN)
    parts = [logprobs[max(start - 1, 0) : start - 1 + BIN] for start in starts]
    return [-math.fsum(part) / len(part) for part in parts if part]


PERPLEXITY = Perplexity("perplexity", 1)
