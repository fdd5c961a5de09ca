"""What the figures should be, and whether they are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import results
from benchmarks.authors import GOAL
from benchmarks.plan import Plan
from vllm_infllm.tools.samples import Ratio

SHORT = 0.97
PREFILL = {32768: 2.5, 65536: 4.5}
DECODE = {32768: 1.7, 65536: 2.8, 131072: 4.5}
FLAT = 1.10
READ = 0.70
PRODUCT = 0.50
SHARE = 0.05
AUTHORS = 3.0


@dataclass(frozen=True)
class Target:
    """A ratio and its bound; no ratio: not measured."""

    name: str
    ratio: Ratio | None
    bound: float
    at_least: bool = True
    percent: bool = False
    """Shown so, because it is small."""

    @property
    def met(self) -> bool:
        if self.ratio is None:
            return False
        return self.ratio.value >= self.bound if self.at_least else self.ratio.value <= self.bound

    @property
    def wanted(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.bound:{self._format}}"

    @property
    def found(self) -> str:
        return "" if self.ratio is None else format(self.ratio, self._format)

    @property
    def _format(self) -> str:
        return ".1%" if self.percent else ".2f"

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "not measured"
        return "met" if self.met else f"missed by {abs(self.ratio.value / self.bound - 1):.0%}"


def targets(parts: Mapping[str, Any], plan: Plan) -> Iterator[Target]:
    """All targets; those of parts that were not run are not measured."""
    short = parts.get("short", {})
    for length in plan.short_lengths:
        samples = _filled(short.get(str(length)), "decode")
        yield Target(f"{length} tokens, prefill, stock / infllm", samples and results.short_prefill(samples), SHORT)
        yield Target(f"{length} tokens, decode, stock / infllm", samples and results.short_decode(samples), SHORT)
    long = parts.get("prefill", {"steps": {"stock": [], "infllm": []}})
    for length, bound in PREFILL.items():
        measured = length in results.measured_lengths(long, [length])
        yield Target(
            f"prefill of {length} tokens, stock / infllm", results.prefill(long, length) if measured else None, bound
        )
    yield Target("infllm, late tokens of a prompt / early ones", results.flat(long, *plan.flat), FLAT, at_least=False)
    for context, bound in DECODE.items():
        samples = _filled(parts.get("decode", {}).get(str(context)), "real")
        yield Target(f"decode at {context} tokens, stock / infllm", samples and results.decode(samples), bound)
    kernels = parts.get("kernels", {"decode": {}, "prefill": {}, "share": []})
    for count, samples in kernels["decode"].items():
        for attend, requests in (("attend", "1 request"), ("batch", f"{samples['batch_size']} requests")):
            name = f"decode attention of {requests} / memory read, threads: {count}"
            yield Target(name, results.read_share(samples, attend), READ)
    for count, samples in kernels["prefill"].items():
        yield Target(f"prefill attention / matrix product, threads: {count}", results.product_share(samples), PRODUCT)
    for samples in kernels["share"]:
        name = f"select and seal / layer, {samples['tokens']} tokens at {samples['context']}"
        yield Target(name, results.memory_share(samples), SHARE, at_least=False, percent=True)
    authors = parts.get("authors", {"runs": []})
    prompt, answer = results.against_authors(authors, GOAL) if authors["runs"] else (None, None)
    yield Target("processor time of a prompt, authors' code / infllm", prompt, AUTHORS)
    yield Target("processor time of a decoded token, authors' code / infllm", answer, AUTHORS)


def _filled(samples: Any, name: str) -> Any:
    """`samples` if both sides have any of that name."""
    return samples if samples and all(side[name] for side in samples.values()) else None
