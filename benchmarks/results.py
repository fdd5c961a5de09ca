"""What the raw samples of a run say: a pure function of performance.json's "parts"."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.authors import Recorded
from benchmarks.samples import Step, complete, prompt_seconds, ratio_of_prompts
from vllm_infllm.tools.samples import Ratio, ratio_of_medians

Samples = Mapping[str, Any]


def steps(raw: Sequence[Sequence[float]]) -> list[Step]:
    """Steps as they come out of JSON."""
    return [Step(int(start), int(tokens), seconds, processor) for start, tokens, seconds, processor in raw]


# ---- kernels ---------------------------------------------------------------------------------------------------------


def read_share(samples: Samples, attend: str = "attend") -> Ratio:
    """Bytes a second of decode attention over those of reading memory."""
    per_byte_read = [s / samples["read_bytes"] for s in samples["read"]]
    return ratio_of_medians(per_byte_read, [s / samples[f"{attend}_bytes"] for s in samples[attend]])


def product_share(samples: Samples) -> Ratio:
    """Operations a second of prefill attention over those of a matrix product."""
    per_operation = [s / samples["product_operations"] for s in samples["product"]]
    return ratio_of_medians(per_operation, [s / samples["attend_operations"] for s in samples["attend"]])


def memory_share(samples: Samples) -> Ratio:
    """Seconds of selecting and sealing over those of the whole layer."""
    names = ("linear", "write", "select", "attend", "seal")
    turns = list(zip(*(samples[name] for name in names), strict=True))
    return ratio_of_medians([select + seal for _, _, select, _, seal in turns], [sum(turn) for turn in turns])


# ---- engines ---------------------------------------------------------------------------------------------------------


def run_seconds(runs: Sequence[Any]) -> list[float]:
    """Seconds of each run, a list of steps."""
    return [sum(step.seconds for step in steps(run)) for run in runs]


def step_seconds(blocks: Sequence[Any]) -> list[float]:
    """Median seconds a step of each block, a list of steps."""
    return [median(step.seconds for step in steps(block)) for block in blocks]


def short_prefill(samples: Samples) -> Ratio:
    """Stock's seconds over infllm's, of a prompt inside the window."""
    return ratio_of_medians(run_seconds(samples["stock"]["prefill"]), run_seconds(samples["infllm"]["prefill"]))


def short_decode(samples: Samples) -> Ratio:
    return ratio_of_medians(step_seconds(samples["stock"]["decode"]), step_seconds(samples["infllm"]["decode"]))


def decode(samples: Samples) -> Ratio:
    return ratio_of_medians(step_seconds(samples["stock"]["real"]), step_seconds(samples["infllm"]["real"]))


def measured_lengths(samples: Samples, lengths: Sequence[int]) -> Iterator[int]:
    """Those lengths up to whose end both sides were measured."""
    sides = [steps(side) for side in samples["steps"].values()]
    for length in lengths:
        if all(any(step.end == length for step in side) for side in sides):
            yield length


def prefill(samples: Samples, length: int) -> Ratio:
    return ratio_of_prompts(steps(samples["steps"]["stock"]), steps(samples["steps"]["infllm"]), length)


def prefill_seconds(samples: Samples, side: str, length: int) -> float:
    return prompt_seconds(steps(samples["steps"][side]), length)


def computed_whole(samples: Samples, side: str, length: int) -> bool:
    """Whether a side computed every token, or its seconds come from samples in part."""
    return complete(steps(samples["steps"][side]), length)


def sampled_seconds(samples: Samples, side: str, length: int, sampled: frozenset[int]) -> float:
    """Seconds of a prompt by the sampled steps alone."""
    return prompt_seconds([step for step in steps(samples["steps"][side]) if step.start in sampled], length)


def flat(samples: Samples, early: Sequence[int], late: Sequence[int]) -> Ratio | None:
    """InfLLM's seconds a token between the tokens `late` over those between `early`; None if not measured."""
    all_steps = steps(samples["steps"]["infllm"])
    parts = [[step.density for step in all_steps if a <= step.start and step.end <= b] for a, b in (late, early)]
    return ratio_of_medians(*parts) if len(parts[0]) == len(parts[1]) > 0 else None


def authors_prefill(samples: Samples) -> list[float]:
    """Processor seconds for 1,000 tokens of prompt, of each run."""
    totals = [sum(step.processor_seconds for step in steps(run["prefill"])) for run in samples["runs"]]
    return [total / samples["length"] * 1000 for total in totals]


def authors_decode(samples: Samples) -> list[float]:
    """Processor seconds a token of the answer, of each run."""
    return [median(step.processor_seconds for step in steps(run["decode"])) for run in samples["runs"]]


def against_authors(samples: Samples, recorded: Recorded) -> tuple[Ratio, Ratio]:
    """The recorded seconds over ours, of prompt and answer."""
    prompt, answer = authors_prefill(samples), authors_decode(samples)
    return (
        ratio_of_medians([recorded.prompt] * len(prompt), prompt),
        ratio_of_medians([recorded.answer] * len(answer), answer),
    )
