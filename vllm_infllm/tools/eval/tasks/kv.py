"""InfiniteBench's Retrieve.KV: the value of one key in a long JSON object of random UUIDs."""

from dataclasses import dataclass
from random import Random
from typing import Any
from uuid import UUID

from vllm_infllm.tools.eval.haystack import Text, encode, longest, weave
from vllm_infllm.tools.eval.tasks.base import AnswerTask, Sample

HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
TAIL = '}}\n\nKey: "{key}"\nThe value associated with the specified key is: '


@dataclass(frozen=True)
class KeyValue(AnswerTask):
    """The record that is asked for lies at the depth; the last record is always another."""

    @property
    def has_depth(self) -> bool:
        return True

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        draw = Random(seed)
        key, value, last = _uuid(draw), _uuid(draw), _record(draw)
        records: list[str] = []

        def build(count: int) -> Text:
            while len(records) < count:
                records.append(_record(draw) + ", ")
            return weave(HEAD, records[:count], [(depth, f'"{key}": "{value}", ')], last + TAIL.format(key=key))

        prompt, needles = encode(tokenizer, build(longest(tokenizer, length, build)))
        return Sample(prompt, [value], {"needle_tokens": needles})

    def score(self, sample: Sample, text: str) -> float:
        """Whether the value is a word of the answer, punctuation aside."""
        words = "".join(" " if c in "\n:\"'.,?!{}" else c for c in text).split()
        return float(sample.answers[0] in words)


def _uuid(draw: Random) -> str:
    return str(UUID(int=draw.getrandbits(128), version=4))


def _record(draw: Random) -> str:
    return f'"{_uuid(draw)}": "{_uuid(draw)}"'


KV = KeyValue("kv", 64)
