"""What the samples of `vllm-infllm bench` say: medians, ratios, crossovers; tables, plots and files.

A sample is one run of a command of `vllm bench` on one side.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from vllm_infllm.memory.plan import GIB
from vllm_infllm.tools.plotting import COLORS, plot
from vllm_infllm.tools.samples import Ratio, ratio_of_medians
from vllm_infllm.tools.tables import Table

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A figure of a sample: its field, what to call it, and how many of the field's units one shown unit is."""

    field: str
    title: str
    scale: float
    more_is_better: bool = False


METRICS = (
    Metric("ttft_ms", "time to first token, s", 1e3),
    Metric("tpot_ms", "time per output token, ms", 1),
    Metric("tokens_per_s", "tokens/s, prompts and answers", 1, more_is_better=True),
    Metric("offline_tokens_per_s", "tokens/s offline", 1, more_is_better=True),
    Metric("latency_s", "seconds a batch", 1),
)
RESIDENT = Metric("resident_bytes", "resident memory, GiB", GIB)
KV = Metric("kv_tokens", "KV cache in use, tokens", 1)


# ---- samples ---------------------------------------------------------------------------------------------------------


def serve_figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of the JSON of `vllm bench serve`: medians over the requests of a run, and its throughput."""
    return {
        "ttft_ms": measured["median_ttft_ms"],
        "tpot_ms": measured["median_tpot_ms"],
        "tokens_per_s": measured["total_token_throughput"],
        "prompt_tokens": measured["total_input_tokens"],
        "answer_tokens": measured["total_output_tokens"],
    }


def throughput_figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of the JSON of `vllm bench throughput`."""
    return {"offline_tokens_per_s": measured["tokens_per_second"]}


def latency_figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of the JSON of `vllm bench latency`."""
    return {"latency_s": median(measured["latencies"])}


def values(record: Record, metric: Metric, side: str, length: int, concurrency: int) -> list[float]:
    """The figures of one cell, one a round, in the order of rounds: that in which a side's samples were taken."""
    place = {"side": side, "length": length, "concurrency": concurrency}
    found = [sample for sample in record["samples"] if metric.field in sample and place.items() <= sample.items()]
    return [sample[metric.field] / metric.scale for sample in found]


def measured_metrics(record: Record) -> list[Metric]:
    """Those that there are samples of."""
    return [metric for metric in METRICS if any(metric.field in sample for sample in record["samples"])]


def gain(record: Record, metric: Metric, length: int, concurrency: int) -> Ratio:
    """By how much infllm is better: above 1 it is; the spread is that of the rounds."""
    stock, ours = (values(record, metric, side, length, concurrency) for side in ("stock", "infllm"))
    return ratio_of_medians(ours, stock) if metric.more_is_better else ratio_of_medians(stock, ours)


def crossover(gains: Mapping[int, float]) -> float | None:
    """The length from which on infllm is better at all measured lengths; None if it is not at the longest.

    gains: by length. Between two lengths the gain is taken to follow a straight line where both axes are logarithmic.
    """
    lengths = sorted(gains)
    better_from = next((i for i in range(len(lengths) - 1, -1, -1) if gains[lengths[i]] <= 1), -1) + 1
    if better_from == len(lengths):
        return None
    if better_from == 0:
        return float(lengths[0])
    below, above = lengths[better_from - 1], lengths[better_from]
    low, high = math.log(gains[below]), math.log(gains[above])
    return below * (above / below) ** (-low / (high - low))


def grid(record: Record) -> tuple[list[int], list[int]]:
    """Lengths and concurrencies of which both sides have samples of the same rounds."""
    places = {(s["length"], s["concurrency"]) for s in record["samples"]}
    return sorted({length for length, _ in places}), sorted({concurrency for _, concurrency in places})


def crossovers(record: Record, metric: Metric) -> dict[int, float | None]:
    """By concurrency."""
    lengths, concurrencies = grid(record)
    return {c: crossover({length: gain(record, metric, length, c).value for length in lengths}) for c in concurrencies}


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(record: Record) -> list[Table]:
    """One a metric and concurrency, narrow enough for any terminal, and the memory of all."""
    lengths, concurrencies = grid(record)
    found = [_speed(record, metric, lengths, c) for metric in measured_metrics(record) for c in concurrencies]
    return [*found, _memory(record, lengths, concurrencies)] if _has_memory(record) else found


def _has_memory(record: Record) -> bool:
    """Only servers are watched."""
    return any(RESIDENT.field in sample for sample in record["samples"])


def _speed(record: Record, metric: Metric, lengths: Sequence[int], concurrency: int) -> Table:
    rows = []
    for length in lengths:
        medians = (median(values(record, metric, side, length, concurrency)) for side in ("stock", "infllm"))
        figures = [f"{figure:,.2f}" for figure in medians]
        rows.append([f"{length:,}", *figures, str(gain(record, metric, length, concurrency))])
    header = ["prompt tokens", "stock", "infllm", "gain (spread)"]
    return Table(f"{metric.title}; requests at once: {concurrency}", header, rows)


def _memory(record: Record, lengths: Sequence[int], concurrencies: Sequence[int]) -> Table:
    header = ["prompt tokens x requests", "resident GiB: stock", "infllm", "KV cache in use, GiB: stock", "infllm"]
    rows = []
    for length in lengths:
        for c in concurrencies:
            cells = [
                f"{max(values(record, metric, side, length, c)) * scale:,.2f}"
                for metric, scale in ((RESIDENT, 1.0), (KV, record["kv_bytes_per_token"] / GIB))
                for side in ("stock", "infllm")
            ]
            rows.append([f"{length:,} x {c}", *cells])
    return Table("Memory at the peak", header, rows)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_json(record: Record, folder: Path) -> None:
    """All samples so far; replaced as a whole."""
    scratch = folder / "results.json.part"
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.rename(folder / "results.json")


def write(record: Record, folder: Path) -> None:
    """report.md and its plots."""
    lengths, _ = grid(record)
    metrics = [*measured_metrics(record), *([RESIDENT] if _has_memory(record) else [])]
    plots = [plot(folder / f"{metric.field}.svg", partial(_draw, record, metric)) for metric in metrics]
    parts = [
        "# Stock vLLM and InfLLM",
        f"{record['model']} in {record['dtype']}; answers of {record['output_len']} tokens; medians of "
        f"{record['rounds']} rounds, each with servers of its own. A gain above 1 is in favour of InfLLM; its spread "
        "is from the lowest to the highest round.",
        *(f"{table.title}\n\n{table.markdown()}" for table in tables(record)),
        "Resident: all processes of the server; pages that they share count more than once. On a CPU stock vLLM "
        "touches its whole KV cache, sized for the longest prompts, when it starts. KV cache in use: blocks that "
        "requests held, of the layers that run InfLLM, without its units in host memory.",
        "## Crossover",
        "\n".join(_crossover_lines(record)),
        *(f"![{file.stem}]({file.name})" for file in plots),
        "## Environment",
        Table("", ["", ""], list(record["environment"].items())).markdown(),
        f"{record['layers']}. Configuration: `{json.dumps(record['infllm'])}`",
        "\n".join(f"- {side}: `{shlex.join([record['model'], *flags])}`" for side, flags in record["engine"].items()),
        f"All samples are in results.json. Lengths: {', '.join(f'{length:,}' for length in lengths)}.",
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def _crossover_lines(record: Record) -> Iterator[str]:
    for metric in measured_metrics(record):
        for concurrency, length in crossovers(record, metric).items():
            where = "not within the measured lengths" if length is None else f"from {length:,.0f} tokens on"
            yield f"- {metric.title}, requests at once: {concurrency}: InfLLM is better {where}"


def _draw(record: Record, metric: Metric, axes: Any) -> None:
    lengths, concurrencies = grid(record)
    for concurrency, style in zip(concurrencies, ("-", "--", ":", "-.") * len(concurrencies), strict=False):
        for side, color in COLORS.items():
            cells = [values(record, metric, side, length, concurrency) for length in lengths]
            middles = [median(cell) for cell in cells]
            label = side if len(concurrencies) == 1 else f"{side}, {concurrency} at once"
            axes.plot(lengths, middles, style, marker=".", color=color, label=label)
            axes.fill_between(lengths, [min(c) for c in cells], [max(c) for c in cells], color=color, alpha=0.15)
    if metric in METRICS:
        for length in filter(None, crossovers(record, metric).values()):
            axes.axvline(length, color="tab:red", linewidth=0.8, linestyle=":")
            axes.annotate(f"{length:,.0f}", (length, 0), color="tab:red", fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length / 1024:g}K" for length in lengths])
    axes.set_xlabel("tokens of a prompt")
    axes.set_ylabel(metric.title)
