"""InfiniteBench's Retrieve.PassKey and Retrieve.Number: digits hidden in a repetitive text."""

import re
from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_infllm.tools import passkey
from vllm_infllm.tools.eval.tasks.base import HaystackTask, Sample


@dataclass(frozen=True)
class Digits(HaystackTask):
    """`needle` with the digits at the depth; the answer counts when its first number is the one hidden."""

    head: str
    needle: str
    tail: str
    repeated: bool
    """Ten digits of which each is repeated at once in most places, not five independent ones."""

    @property
    def has_depth(self) -> bool:
        return True

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        draw = Random(seed)
        digits = _repeated_digits(draw) if self.repeated else str(draw.randint(10000, 99999))
        needle = self.needle.format(key=digits)
        prompt, needles = self.hide(tokenizer, length, draw, self.head, [(depth, needle)], self.tail)
        return Sample(prompt, [digits], {"needle_tokens": needles})

    def score(self, sample: Sample, text: str) -> float:
        number = re.search(r"\d+", text)
        return float(number is not None and number.group() == sample.answers[0])


def _repeated_digits(draw: Random) -> str:
    """Five digits, and five times one of those so far doubled in its place: 0044401199, say."""
    digits = [str(draw.randrange(10)) for _ in range(5)]
    for _ in range(5):
        place = draw.randrange(len(digits))
        digits.insert(place, digits[place])
    return "".join(digits)


PASSKEY = Digits(
    "passkey", 10, "grass", head=passkey.TASK, needle=passkey.NEEDLE, tail=passkey.QUESTION, repeated=False
)
PLAIN_PASSKEY = Digits(
    "passkey-plain", 10, "plays", head="", needle="The pass key is {key}.\n", tail="The pass key is", repeated=False
)
"""For models too small to see a question in the landmark wording, where prose surrounds it."""
NUMBER = Digits(
    "number",
    16,
    "grass",
    head="There is an important info hidden inside a lot of irrelevant text. Find it. "
    "I will quiz you about the important information there.\n\n",
    needle="The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n",
    tail="\nWhat is the sequence of digits?\n\nThe sequence of digits is",
    repeated=True,
)
