"""The report: tables and plots from performance.json, and what is said about them."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import results
from benchmarks.authors import RECORDED
from benchmarks.plan import Plan
from benchmarks.plots import draw
from benchmarks.tables import fill_in
from benchmarks.targets import targets
from vllm_infllm.tools.tables import Table

SIDES = ("stock", "infllm")
NAME = "performance"
TITLE = "# Performance\n"


def write(record: Mapping[str, Any], plan: Plan, folder: Path) -> list[Path]:
    """Bring the tables of `folder`/performance.md and the plots up to date; text around the tables stays as it is."""
    page = folder / f"{NAME}.md"
    text = page.read_text() if page.exists() else TITLE
    sections = {name: section(name, record, plan) for name in SECTIONS}
    page.write_text(fill_in(text, {name: body for name, body in sections.items() if body}))
    return [page, *draw(record["parts"], folder / NAME)]


def dump(record: Mapping[str, Any]) -> str:
    """The record as JSON, a step or a list of samples a line, with six digits."""
    text = json.dumps(json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.6g}")), indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def section(name: str, record: Mapping[str, Any], plan: Plan) -> str:
    """Tables and remarks of one part as Markdown; empty if it was never run."""
    remarks = [f"- {note}" for note in record["notes"].get(name, [])]
    bodies = [table.markdown() for table in tables(name, record, plan)]
    return "\n\n".join([*bodies, "\n".join(remarks)] if remarks else bodies)


def tables(name: str, record: Mapping[str, Any], plan: Plan) -> list[Table]:
    """The tables of one section; none if its part was never run."""
    if name == "targets":
        return [_targets(record, plan)]
    return SECTIONS[name](record, plan) if name in record["parts"] else []


def _targets(record: Mapping[str, Any], plan: Plan) -> Table:
    rows = [(target.name, target.found, target.wanted, target.verdict) for target in targets(record["parts"], plan)]
    return Table("Targets", ("", "ratio (spread)", "wanted", ""), rows)


def _machine(record: Mapping[str, Any], plan: Plan) -> list[Table]:
    environments: list[tuple[Any, list[str]]] = []
    for part, environment in record["environments"].items():
        for known, measured in environments:
            if known == environment:
                measured.append(part)
                break
        else:
            environments.append((environment, [part]))
    rows = [
        ("parts measured", *(", ".join(measured) for _, measured in environments)),
        *((label, *(show(environment) for environment, _ in environments)) for label, show in _FACTS.items()),
    ]
    samples = record["parts"]["machine"]
    reached = [("memory read, GB/s", samples["bandwidth"])]
    reached += [(f"{dtype} matrix product, GFLOP/s", by_count) for dtype, by_count in samples["product"].items()]
    return [
        Table("Machine", ("", *([""] * len(environments))), rows),
        Table(
            "What the machine reaches",
            ("", *(_threads(count) for count in samples["bandwidth"])),
            [(label, *(f"{median(taken):.1f}" for taken in by_count.values())) for label, by_count in reached],
        ),
    ]


_FACTS = {
    "CPU": lambda e: e["cpu"],
    "instructions": lambda e: ", ".join(e["flags"]) or "none of those that matter",
    "threads": lambda e: str(e["threads"]),
    "`OMP_WAIT_POLICY`": lambda e: e["omp_wait_policy"],
    "last-level cache": lambda e: f"{e['last_level_cache_mib']:.0f} MiB",
    "memory": lambda e: f"{e['memory_gib']:.1f} GiB",
    "dtype": lambda e: e["dtype"],
    "operations": lambda e: e["ops"],
    "versions": lambda e: ", ".join(f"{name} {version}" for name, version in e["versions"].items()),
}


def _kernels(record: Mapping[str, Any], plan: Plan) -> list[Table]:
    samples = record["parts"]["kernels"]
    attending = []
    for count, taken in samples["decode"].items():
        for attend, requests in (("attend", "1 request"), ("batch", f"{taken['batch_size']} requests")):
            rates = [taken[f"{name}_bytes"] / median(taken[name]) / 1e9 for name in (attend, "read")]
            label = f"decode, {requests}, {taken['working_set'] >> 20} MiB, {_threads(count)}"
            attending.append((label, *(f"{rate:.1f} GB/s" for rate in rates), f"{results.read_share(taken, attend)}"))
    for count, taken in samples["prefill"].items():
        rates = [taken[f"{name}_operations"] / median(taken[name]) / 1e9 for name in ("attend", "product")]
        share = results.product_share(taken)
        attending.append((f"prefill, {_threads(count)}", *(f"{rate:.0f} GFLOP/s" for rate in rates), f"{share}"))
    names = ("linear", "write", "select", "attend", "seal")
    shares = [
        (
            f"{taken['tokens']} at {taken['context']:,}",
            *(f"{median(taken[name]) * 1e6:.0f}" for name in names),
            f"{results.memory_share(taken).value:.1%}",
        )
        for taken in samples["share"]
    ]
    return [
        Table("Attention alone", ("", "attention", "memory read or matrix product", "ratio"), attending),
        Table(
            "A layer, in microseconds",
            ("tokens at context", "linear layers", *names[1:], "select and seal"),
            shares,
        ),
    ]


def _short(record: Mapping[str, Any], plan: Plan) -> list[Table]:
    rows = []
    for length, samples in record["parts"]["short"].items():
        if not samples["infllm"]["decode"]:
            continue
        seconds = {side: median(results.run_seconds(samples[side]["prefill"])) for side in SIDES}
        step = {side: median(results.step_seconds(samples[side]["decode"])) for side in SIDES}
        rows.append(
            (
                f"{int(length):,}",
                *(f"{seconds[side]:.2f}" for side in SIDES),
                str(results.short_prefill(samples)),
                *(f"{step[side] * 1e3:.1f}" for side in SIDES),
                str(results.short_decode(samples)),
                str(len(samples["infllm"]["decode"])),
            )
        )
    header = ("tokens", "prefill s: stock", "infllm", "ratio", "decode ms: stock", "infllm", "ratio", "runs")
    return [Table("Short prompts", header, rows)]


def _prefill(record: Mapping[str, Any], plan: Plan) -> list[Table]:
    samples = record["parts"]["prefill"]
    rows = []
    for length in results.measured_lengths(samples, plan.prefill_lengths):
        seconds = {side: results.prefill_seconds(samples, side, length) for side in SIDES}
        whole = results.computed_whole(samples, "stock", length)
        sampled = results.sampled_seconds(samples, "stock", length, plan.prefill_samples)
        check = f"{sampled:.0f} ({sampled / seconds['stock'] - 1:+.1%})" if whole else ""
        rows.append(
            (
                f"{length:,}",
                *(f"{seconds[side]:.0f}" for side in SIDES),
                str(results.prefill(samples, length)),
                "all computed" if whole else "sampled steps",
                check,
            )
        )
    header = ("tokens", "s: stock", "infllm", "ratio", "stock's seconds from", "by samples alone")
    prompts = Table("Whole prompts", header, rows)
    early, late = plan.flat
    steps = results.steps(samples["steps"]["infllm"])
    flat = results.flat(samples, early, late)
    if flat is None:
        return [prompts]
    per_thousand = [
        f"{median(step.density for step in steps if a <= step.start and step.end <= b) * 1e3:.2f}" for a, b in plan.flat
    ]
    columns = ("infllm, s for 1K tokens", *(f"from {a:,} to {b:,}" for a, b in plan.flat), "ratio")
    return [prompts, Table("Flatness", columns, [("", *per_thousand, str(flat))])]


def _decode(record: Mapping[str, Any], plan: Plan) -> list[Table]:
    rows = []
    for context, samples in record["parts"]["decode"].items():
        real, idle = (
            {side: median(results.step_seconds(samples[side][mode]) or [float("nan")]) for side in SIDES}
            for mode in ("real", "idle")
        )
        attention = (real["stock"] - idle["stock"]) / (real["infllm"] - idle["infllm"])
        cells = (f"{seconds[side] * 1e3:.1f}" for side in SIDES for seconds in (real, idle))
        rows.append((f"{int(context):,}", *cells, str(results.decode(samples)), f"{attention:.1f}"))
    header = (
        "context",
        "stock ms",
        "of it not attention",
        "infllm ms",
        "of it not attention",
        "ratio",
        "ratio of attention",
    )
    return [Table("Decode", header, rows)]


def _authors(record: Mapping[str, Any], plan: Plan) -> list[Table]:
    samples = record["parts"]["authors"]
    if not samples["runs"]:
        return []
    prompt, answer = median(results.authors_prefill(samples)), median(results.authors_decode(samples))
    rows = []
    for recorded in RECORDED:
        of_prompt, of_answer = results.against_authors(samples, recorded)
        theirs = recorded.where
        rows.append(
            (f"1,000 tokens of prompt; theirs: {theirs}", f"{recorded.prompt:.1f} s", f"{prompt:.2f} s", f"{of_prompt}")
        )
        rows.append(
            (
                f"decoded token; theirs: {theirs}",
                f"{recorded.answer * 1e3:.0f} ms",
                f"{answer * 1e3:.1f} ms",
                f"{of_answer}",
            )
        )
    header = ("", "authors' code", f"infllm, {record['environments']['authors']['dtype']}", "ratio")
    return [Table("Processor time on one thread", header, rows)]


SECTIONS = {
    "targets": lambda record, plan: [_targets(record, plan)],
    "machine": _machine,
    "kernels": _kernels,
    "short": _short,
    "prefill": _prefill,
    "decode": _decode,
    "authors": _authors,
}


def _threads(count: str) -> str:
    return f"{count} thread{'s' * (count != '1')}"


def tables_of(names: Iterable[str], record: Mapping[str, Any], plan: Plan) -> Iterable[Table]:
    """The tables of several sections."""
    for name in names:
        yield from tables(name, record, plan)
