"""RULER's variable tracking: which variables have a value, through a chain of assignments in a repetitive text."""

import string
from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_infllm.tools.eval.haystack import haystack, weave
from vllm_infllm.tools.eval.tasks.base import HaystackTask, Sample, share_contained

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
TAIL = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)
HOPS = 4
EXAMPLE_LINES = 10


@dataclass(frozen=True)
class VariableTracking(HaystackTask):
    """One chain of five variables, its assignments in order and anywhere, after a short example with its answer."""

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        draw = Random(seed)
        names, needles, tail = _chain(draw, letters=3)
        example = weave(HEAD, haystack(self.haystack, draw)(EXAMPLE_LINES), needles, tail).text
        head = f"{example}{' '.join(names)}\n\n{HEAD}"
        names, needles, tail = _chain(draw, letters=5)
        prompt, places = self.hide(tokenizer, length, draw, head, needles, tail)
        return Sample(prompt, names, {"needle_tokens": places})

    def score(self, sample: Sample, text: str) -> float:
        return share_contained(sample.answers, text)


def _chain(draw: Random, letters: int) -> tuple[list[str], list[tuple[float, str]], str]:
    """Names of the variables, their assignments with depths, and the question."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(draw.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = draw.randint(10000, 99999)
    assigned = [str(value), *(f"VAR {name}" for name in names[:-1])]
    sentences = [f"VAR {name} = {what}\n" for name, what in zip(names, assigned, strict=True)]
    depths = sorted(draw.random() for _ in names)
    return names, list(zip(depths, sentences, strict=True)), TAIL.format(value=value, count=len(names))


VARIABLE_TRACKING = VariableTracking("variable-tracking", 60, "grass")
