"""Compare stock vLLM with InfLLM on this machine, by vLLM's own `vllm bench serve`, `throughput` and `latency`.

Each side is served in turn by `vllm serve`, and measured over a grid of prompt lengths and concurrent requests with
random prompts and answers of a fixed length. Every round starts both servers anew, the side that was second going
first, and a warm-up precedes what counts. Prefix caching is off: each prompt is computed. Written into the output
folder: report.md with its plots, results.json with all samples, and logs.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_infllm.config import KEY
from vllm_infllm.plugin import unsupported_vllm
from vllm_infllm.tools import CommandError, UsageError
from vllm_infllm.tools.engine_options import (
    add_engine_options,
    blueprint,
    engine_options,
    list_of,
    positive,
    tokens,
    trained_length,
)
from vllm_infllm.tools.model import demo_dtype, demo_model, full_cache_bytes

if TYPE_CHECKING:
    from vllm_infllm.tools.blueprint import Blueprint

COMMANDS = ("serve", "throughput", "latency")
MARGIN = 16
"""Tokens by which a random prompt may come out longer than it was asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid, the engine, and where to write."""
    parser.add_argument("--model", help="folder or name of a model (default: the demo model)")
    parser.add_argument(
        "--lengths",
        type=list_of(tokens),
        default=[1 << 10, 8 << 10, 32 << 10],
        metavar="TOKENS,...",
        help="of a prompt (default: 1k,8k,32k)",
    )
    parser.add_argument(
        "--concurrency",
        type=list_of(positive),
        default=[1],
        metavar="N,...",
        help="requests at once, as many as a run has (default: 1)",
    )
    parser.add_argument(
        "--commands",
        type=list_of(_command),
        default=["serve"],
        metavar="NAME,...",
        help=f"of vllm bench, among {', '.join(COMMANDS)}; the last two start an engine for each figure "
        "(default: serve, which gives the times to the first token and for each further one)",
    )
    parser.add_argument("--output-len", type=tokens, default=64, metavar="TOKENS", help="of an answer (default: 64)")
    parser.add_argument("--rounds", type=positive, default=3, help="samples of each side (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("vllm-infllm-bench"), metavar="FOLDER", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=7200, metavar="SECONDS", help="for one run (default: %(default)s)"
    )
    parser.add_argument(
        "--start-timeout", type=positive, default=900, metavar="SECONDS", help="for a server (default: %(default)s)"
    )
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the report, print it."""
    if unsupported := unsupported_vllm():
        raise CommandError(unsupported)
    from vllm_infllm.tools import bench_report
    from vllm_infllm.tools.bench_run import Bench, Cell, Turn

    if args.model is None:
        args.model, args.dtype = str(demo_model()), args.dtype or demo_dtype()
    console = Console()
    drawn = blueprint(
        args.model,
        args.infllm,
        **{"max_num_seqs": max(args.concurrency)} | engine_options(args),
        max_model_len=_max_model_len(args),
    )
    record = _describe(args, drawn)
    _make_folder(args.output)
    cells = [Cell(length, concurrency) for length in sorted(args.lengths) for concurrency in sorted(args.concurrency)]
    sides = list(record["engine"])
    with _progress(console, 2 * args.rounds * len(cells) * len(args.commands)) as step:
        bench = Bench(record, cells, args, step)
        for round_ in range(args.rounds):
            for side in sides if round_ % 2 == 0 else sides[::-1]:
                bench.measure(Turn(side, round_))
    bench_report.write(record, args.output)
    for table in bench_report.tables(record):
        console.print(table.rich())
    console.print(f"Written: {args.output / 'report.md'}")
    return 0


def _command(text: str) -> str:
    if text not in COMMANDS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(COMMANDS)}")
    return text


def _make_folder(output: Path) -> None:
    """Find out whether it can be written before hours are spent."""
    try:
        (output / "logs").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}.") from error


def _max_model_len(args: argparse.Namespace) -> int:
    return max(args.lengths) + args.output_len + MARGIN


def _describe(args: argparse.Namespace, drawn: "Blueprint") -> dict[str, Any]:
    """Everything about the run but its samples."""
    from vllm_infllm.tools.doctor import findings_here

    sizes, block_size = drawn.layers.sizes, drawn.layers.config.block_size
    return {
        "model": args.model,
        "dtype": str(drawn.vllm_config.model_config.dtype).removeprefix("torch."),
        "environment": {finding.what: finding.found for finding in findings_here()},
        "infllm": drawn.layers.config.model_dump(exclude_none=True),
        "layers": drawn.layers.startup_lines(drawn.plan)[1],
        "kv_bytes_per_token": sizes.unit // block_size,
        "engine": {side: _engine_flags(side, args, drawn) for side in ("stock", "infllm")},
        "output_len": args.output_len,
        "rounds": args.rounds,
        "samples": [],
    }


def _engine_flags(side: str, args: argparse.Namespace, drawn: "Blueprint") -> list[str]:
    """The same for both, and what each needs for prompts of these lengths."""
    from vllm.platforms import current_platform

    model, longest, seqs = drawn.vllm_config.model_config, _max_model_len(args), max(args.concurrency)
    options = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": longest,
        "max_num_seqs": seqs,
        **engine_options(args),
    }
    if side == "infllm":
        options |= {"attention_backend": "infllm", "additional_config": json.dumps({KEY: args.infllm})}
    else:
        if longest > trained_length(args.model):
            # vLLM refuses more than the model was trained for. Unlike the environment variable that also allows it,
            # this makes the rotary tables as long.
            options["hf_overrides"] = json.dumps({"max_position_embeddings": longest})
        if current_platform.is_cpu() and "kv_cache_memory_bytes" not in options:
            # Without a size vLLM takes nearly all memory of the machine.
            needed = full_cache_bytes(args.model, options["dtype"], longest, drawn.layers.config.block_size)
            options["kv_cache_memory_bytes"] = needed * seqs
    flags = ["--no-enable-prefix-caching"]
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """Hands out a function of a state and of how many runs are done with it; without a terminal it prints lines."""
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=total)

        def step(state: str, done: int) -> None:
            progress.update(task, description=state, advance=done)
            if not console.is_terminal:
                console.print(state)

        yield step
