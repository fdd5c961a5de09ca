"""InfiniteBench's Code.Run: the value of a call through a chain of small functions among many."""

import re
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

from vllm_infllm.tools.eval.haystack import Text, encode, join, longest
from vllm_infllm.tools.eval.tasks.base import AnswerTask, Sample

DEPTHS = (2, 4, 6, 8, 10)
"""Calls in the chain: the functions of a level call functions of the next one, those of the last call none."""
ADDENDS = range(-12, 18)
NAMES = 1100


@dataclass(frozen=True)
class Program:
    """A prompt, and the value of the call it asks for."""

    text: Text
    value: int


@dataclass(frozen=True)
class CodeRun(AnswerTask):
    """Functions are listed by their number, so those of the chain lie anywhere; they are the needles, in call order."""

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        levels = Random(seed).choice(DEPTHS)

        def build(count: int) -> Text:
            return _program(levels, levels + count, Random(f"{seed}:{count}")).text

        count = longest(tokenizer, length, build)
        program = _program(levels, levels + count, Random(f"{seed}:{count}"))
        prompt, needles = encode(tokenizer, program.text)
        return Sample(prompt, [str(program.value)], {"needle_tokens": needles, "calls": levels})

    def score(self, sample: Sample, text: str) -> float:
        """Whether the first integer of the answer is the value."""
        number = re.search(r"-?\d+", text)
        return float(number is not None and number.group() == sample.answers[0])


def _program(levels: int, count: int, draw: Random) -> Program:
    """`count` functions on so many levels, and a call of one of the first level."""
    names = draw.sample(range(1, max(NAMES, 2 * count) + 1), count)
    level = [names[i::levels] for i in range(levels)]
    called = {name: draw.choice(below) for above, below in pairwise(level) for name in above}
    added = {name: draw.choice(ADDENDS) for name in names}
    chain = [draw.choice(level[0])]
    while chain[-1] in called:
        chain.append(called[chain[-1]])
    argument = draw.randint(-10, 10)

    ordered = sorted(names)
    function, call = f"func_{chain[0]}", f"func_{chain[0]}({argument})"
    head = f"There is a function called {function} in the following Python code.\n\n"
    tail = f"Please compute the exact value of {call}. The value of {call} is"
    sources = [_source(name, called.get(name), added[name]) for name in ordered]
    text = join([head, *sources, tail], [1 + ordered.index(name) for name in chain])
    return Program(text, argument + sum(added[name] for name in chain))


def _source(name: int, called: int | None, added: int) -> str:
    inner = "x" if called is None else f"func_{called}(x)"
    sign = f" {'-' if added < 0 else '+'} {abs(added)}" if added else ""
    return f"def func_{name}(x):\n    return {inner}{sign}\n\n"


CODE_RUN = CodeRun("code-run", 8)
