"""Measure InfLLM on CPU against stock vLLM: kernels, short prompts, long prompts, decoding at long contexts.

Both sides run the demo model in processes of their own, in turn. The whole takes an hour at most; each part has its
share and says what it leaves out. Writes tables into performance.md between their marks (the text around them stays),
plots, and performance.json with all samples. A part that is run alone replaces its own samples only.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import authors, decode, kernels, machine, prefill, report, short
from benchmarks.engine import Engine, SideName, engines, fitting, settings
from benchmarks.plan import ENGINE_PARTS, FULL, PARTS, QUICK, Plan
from benchmarks.progress import Display, Part
from vllm_infllm import ops
from vllm_infllm.config import ConfigError
from vllm_infllm.plugin import unsupported_vllm
from vllm_infllm.tools import CommandError
from vllm_infllm.tools.model import demo_dtype, demo_model

MINIMUM_SECONDS = 5
MEASURE = {"short": short.run, "prefill": prefill.run, "decode": decode.run}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when everything ran, targets met or not; 1 when a part broke off; 130 on Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        return run(args)
    except (CommandError, ConfigError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke run of some minutes; its figures mean nothing")
    parser.add_argument(
        "--parts",
        type=lambda text: tuple(text.split(",")),
        default=PARTS,
        metavar="PART,...",
        help=f"what to run (default: {','.join(PARTS)})",
    )
    parser.add_argument(
        "--output", type=Path, help="folder of performance.md (default: docs; build/benchmark with --quick)"
    )
    parser.add_argument("--ops", choices=["cpu", "reference"], default="cpu", help="InfLLM's operations (default: cpu)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the parts, writing the samples after each."""
    if unknown := set(args.parts) - set(PARTS):
        raise CommandError(f"--parts: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if unsupported := unsupported_vllm():
        raise CommandError(unsupported)
    plan = QUICK if args.quick else FULL
    folder = args.output or Path("build/benchmark" if args.quick else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    with Display(console) as display:
        bench = Bench(plan, args.parts, args.ops, folder / f"{report.NAME}.json", display)
        bench.measure()
    written = report.write(bench.record, plan, folder)
    for table in report.tables_of([*args.parts, "targets"], bench.record, plan):
        console.print(table.rich())
    files = ", ".join(map(str, [*written, bench.path]))
    console.print(f"{(time.monotonic() - bench.begin) / 60:.0f} minutes; written: {files}")
    return int(bench.failed)


class Bench:
    """A run, and the record of all parts that were ever run into the same file."""

    def __init__(self, plan: Plan, parts: Sequence[str], ops_name: str, path: Path, display: Display) -> None:
        self.plan, self.path, self.display = plan, path, display
        self.ops_name, self.ops = ops_name, ops.load(ops_name)  # type: ignore[arg-type]
        self.model, self.dtype = str(demo_model()), demo_dtype()
        self.environment = machine.describe(self.dtype, self.ops.describe())
        self.begin = time.monotonic()
        self.failed = False
        self.with_engines = tuple(part for part in ENGINE_PARTS if part in parts)
        self.to_come = [part for part in plan.seconds if part in parts or (part == "engines" and self.with_engines)]
        self.record: dict[str, Any] = {"plan": plan.name, "environments": {}, "engines": {}, "notes": {}, "parts": {}}
        if path.exists():
            self.record = json.loads(path.read_text())
            if self.record["plan"] != plan.name:
                raise CommandError(f"{path} is of a {self.record['plan']} run, this one is {plan.name}: remove it")

    def measure(self) -> None:
        """Run what is to come."""
        if "machine" in self.to_come:
            self._run("machine", lambda part: machine.run(self.plan, self.dtype, part))
        if "kernels" in self.to_come:
            self._run("kernels", lambda part: kernels.run(self.ops, self.plan, self.dtype, part))
        if self.with_engines:
            self._measure_engines()
        if "authors" in self.to_come:
            self._run("authors", lambda part: authors.run(self.model, self.dtype, self.ops_name, self.plan, part))

    def _measure_engines(self) -> None:
        plan = self.plan.only(fitting(self.model, self.dtype, self.plan.long_lengths))
        with ExitStack() as stack:
            with self._part("engines") as part:
                part.doing("starting two vLLM engines" + ("" if plan.eager else " and compiling"))
                length = plan.max_model_len(self.with_engines)
                sides: dict[SideName, dict[str, Any]] = {
                    "stock": settings("stock", self.model, self.dtype, length, plan, {}),
                    "infllm": settings("infllm", self.model, self.dtype, length, plan, {"ops": self.ops_name}),
                }
                running: dict[SideName, Engine] = stack.enter_context(engines(sides))
            self.record["engines"] = {side: engine.description for side, engine in running.items()}
            for name in self.with_engines:
                left_out = sorted(set(self.plan.lengths(name)) - set(plan.lengths(name)))
                self._run(name, partial(_measure_pair, name, running, plan, left_out))

    def _run(self, name: str, measure: Callable[[Part], None]) -> None:
        """Measure a part and write its samples down at once: a later failure must not lose them."""
        with self._part(name) as part:
            if not part.fits(MINIMUM_SECONDS):
                part.note("not run: the time of the whole benchmark is spent")
            else:
                try:
                    measure(part)
                except CommandError as error:
                    part.note(f"broke off: {error}")
                    self.failed = True
                self.record["parts"][name] = part.samples
                self.record["environments"][name] = self.environment
            self.record["notes"][name] = part.notes
            self.path.write_text(report.dump(self.record))

    def _part(self, name: str) -> AbstractContextManager[Part]:
        """The next part, with its own share of the time and what is left over by earlier ones."""
        self.to_come.remove(name)
        reserved = sum(self.plan.seconds[later] for later in self.to_come)
        return self.display.part(name, self.plan.total - (time.monotonic() - self.begin) - reserved)


def _measure_pair(name: str, running: dict[SideName, Engine], plan: Plan, left_out: Sequence[int], part: Part) -> None:
    for length in left_out:
        part.note(f"{length} tokens: not measured, the free memory does not hold both engines")
    MEASURE[name](running, plan, part)


if __name__ == "__main__":
    sys.exit(main())
