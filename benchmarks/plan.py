"""What is measured, and how long each part may take."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

PARTS = ("machine", "kernels", "short", "prefill", "decode", "authors")
ENGINE_PARTS = ("short", "prefill", "decode")
"""Parts that run the pair of engines, stock and infllm in the default configuration."""
BLOCK_SIZE = 128
ANSWER_ROOM = 512
"""Tokens that every engine has room for beyond its longest prompt."""


@dataclass(frozen=True)
class Plan:
    """Lengths are in tokens; every part stops when its seconds are spent, and says what it left out."""

    name: str
    seconds: dict[str, float]
    """Share of each part; what earlier parts leave over is added."""
    total: float = 3600
    eager: bool = False
    """Without compilation."""
    chunk: int = 2048
    """Tokens a step of prefill (--max-num-batched-tokens)."""
    short_lengths: tuple[int, ...] = (512, 2048, 4096)
    short_answer: int = 64
    short_runs: int = 5
    prefill_lengths: tuple[int, ...] = (32768, 65536, 131072)
    prefill_samples: frozenset[int] = field(default_factory=frozenset)
    """Where steps begin that stock computes even if it has not the time to compute all: so that some end at each
    length."""
    flat: tuple[tuple[int, int], tuple[int, int]] = ((8192, 16384), (57344, 65536))
    """Early and late tokens of a prompt, whose seconds a token are compared."""
    decode_contexts: tuple[int, ...] = (32768, 65536, 131072)
    decode_blocks: int = 5
    decode_steps: int = 16
    authors_length: int = 16384
    authors_answer: int = 64
    authors_runs: int = 2
    kernels_bytes: int = 512 << 20
    """Least working set of the decode kernel; four times the last-level cache if that is more."""
    share_contexts: tuple[int, ...] = (32768, 131072)
    samples: int = 20
    """Most samples of a kernel."""

    def lengths(self, part: str) -> tuple[int, ...]:
        """Lengths of the prompts of a part."""
        return {
            "short": self.short_lengths,
            "prefill": self.prefill_lengths,
            "decode": self.decode_contexts,
            "authors": (self.authors_length,),
        }[part]

    @property
    def long_lengths(self) -> set[int]:
        return {*self.prefill_lengths, *self.decode_contexts}

    def only(self, lengths: Collection[int]) -> "Plan":
        """This plan without long prompts of other lengths."""
        prefill = tuple(length for length in self.prefill_lengths if length in lengths)
        decode = tuple(length for length in self.decode_contexts if length in lengths)
        return replace(self, prefill_lengths=prefill, decode_contexts=decode)

    def max_model_len(self, parts: Iterable[str]) -> int:
        return max(length for part in parts for length in self.lengths(part)) + ANSWER_ROOM


def _around(chunk: int, *lengths: int) -> frozenset[int]:
    """Starts of two steps in the middle and two steps at the end of each stretch between lengths."""
    starts = {0, chunk, 2 * chunk, 3 * chunk}
    for low, high in zip((0, *lengths), lengths, strict=False):
        middle = (low + high) // 2 // chunk * chunk
        starts |= {middle - chunk, middle, high - 2 * chunk, high - chunk}
    return frozenset(starts)


FULL = Plan(
    name="full",
    seconds={
        "machine": 60,
        "kernels": 240,
        "engines": 300,
        "short": 480,
        "prefill": 1500,
        "decode": 480,
        "authors": 420,
    },
    prefill_samples=_around(2048, 32768, 65536, 131072),
)
QUICK = Plan(
    name="quick",
    seconds={"machine": 10, "kernels": 40, "engines": 300, "short": 60, "prefill": 90, "decode": 60, "authors": 240},
    total=600,
    eager=True,
    short_lengths=(512, 1024),
    short_answer=8,
    short_runs=2,
    prefill_lengths=(6144, 10240),
    prefill_samples=frozenset({0, 2048, 4096, 6144, 8192}),
    flat=((4096, 6144), (8192, 10240)),
    decode_contexts=(8192, 16384),
    decode_blocks=2,
    decode_steps=4,
    authors_length=4096,
    authors_answer=8,
    authors_runs=1,
    kernels_bytes=64 << 20,
    share_contexts=(8192, 32768),
    samples=3,
)
"""A smoke run of some minutes: every line of code runs, no figure means anything."""
