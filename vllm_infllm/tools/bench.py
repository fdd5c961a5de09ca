"""Compare stock vLLM with InfLLM on this machine, by vLLM's own `vllm bench serve`.

Each side is served in turn by `vllm serve`, and measured over a grid of prompt lengths and concurrent requests with
random prompts and answers of a fixed length. Every round starts both servers anew, the side that was second going
first, and a warm-up precedes what counts. Prefix caching is off: each prompt is computed. Written into the output
folder: report.md with its plots, results.json with all samples, and logs.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_infllm.config import KEY
from vllm_infllm.plugin import unsupported_vllm
from vllm_infllm.tools import CommandError
from vllm_infllm.tools.engine_options import add_engine_options, blueprint, engine_options, list_of, positive, tokens
from vllm_infllm.tools.model import demo_dtype, demo_model, full_cache_bytes

if TYPE_CHECKING:
    from vllm_infllm.tools.blueprint import Blueprint
    from vllm_infllm.tools.server import Server

SIDES = ("stock", "infllm")
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

    _prepare(args)
    console = Console()
    drawn = blueprint(
        args.model,
        args.infllm,
        **{"max_num_seqs": max(args.concurrency)} | engine_options(args),
        max_model_len=_max_model_len(args),
    )
    record = _describe(args, drawn)
    cells = [Cell(length, concurrency) for length in args.lengths for concurrency in args.concurrency]
    with _progress(console, 2 * args.rounds * len(cells)) as step:
        for round_ in range(args.rounds):
            for side in SIDES if round_ % 2 == 0 else SIDES[::-1]:
                step(f"round {round_ + 1}: starting {side}", 0)
                for sample in _serve(side, round_, cells, record, args, step):
                    record["samples"].append(sample)
                    bench_report.write_json(record, args.output)
    bench_report.write(record, args.output)
    for table in bench_report.tables(record):
        console.print(table.rich())
    console.print(f"Written: {args.output / 'report.md'}")
    return 0


@dataclass(frozen=True)
class Cell:
    """One place of the grid: tokens of a prompt, and requests at once."""

    length: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.length:,} tokens x {self.concurrency}"


def _prepare(args: argparse.Namespace) -> None:
    """Fill in the demo model, and find out now whether the folder can be written."""
    if args.model is None:
        args.model, args.dtype = str(demo_model()), args.dtype or demo_dtype()
    try:
        (args.output / "logs").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output):
            pass
    except OSError as error:
        raise CommandError(f"--output {args.output} cannot be written: {error.strerror}.") from error


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
        "layers": drawn.layers.startup_lines(drawn.plan())[1],
        "kv_bytes_per_token": sizes.unit // block_size,
        "serve": {side: ["vllm", "serve", *_arguments(side, args, drawn)] for side in SIDES},
        "output_len": args.output_len,
        "rounds": args.rounds,
        "samples": [],
    }


def _arguments(side: str, args: argparse.Namespace, drawn: "Blueprint") -> list[str]:
    """Of `vllm serve`: the same for both, and what each needs for prompts of these lengths."""
    from vllm.engine.arg_utils import EngineArgs
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
        if longest > EngineArgs(model=args.model).create_model_config().max_model_len:
            # vLLM refuses more than the model was trained for. Unlike the environment variable that also allows it,
            # this makes the rotary tables as long.
            options["hf_overrides"] = json.dumps({"max_position_embeddings": longest})
        if current_platform.is_cpu() and "kv_cache_memory_bytes" not in options:
            # Without a size vLLM takes nearly all memory of the machine.
            needed = full_cache_bytes(args.model, options["dtype"], longest, drawn.layers.config.block_size)
            options["kv_cache_memory_bytes"] = needed * seqs
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [args.model, *flags, "--no-enable-prefix-caching"]


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Any]:
    """Hands out a function of a state and of how many runs are done with it; without a terminal it prints lines."""
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=total)

        def step(state: str, done: int) -> None:
            progress.update(task, description=state, advance=done)
            if not console.is_terminal:
                console.print(state)

        yield step


def _serve(
    side: str, round_: int, cells: list[Cell], record: dict[str, Any], args: argparse.Namespace, step: Any
) -> Iterator[dict[str, Any]]:
    """Start one side, warm it up with the smallest cell, and measure all cells, small ones first."""
    from vllm_infllm.tools.server import Server

    log = args.output / "logs" / f"{side}-{round_ + 1}.log"
    with Server(side, record["serve"][side][2:], log, args.start_timeout) as server:
        _measure(server, cells[0], -1, args)
        for cell in cells:
            step(f"round {round_ + 1}: {side}, {cell}", 0)
            sample = {"side": side, "round": round_, **asdict(cell), **_measure(server, cell, round_, args)}
            step(f"round {round_ + 1}: {side}, {cell}: {sample['ttft_ms'] / 1e3:.2f} s to the first token", 1)
            yield sample


def _measure(server: "Server", cell: Cell, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run of `vllm bench serve`, and what the server held at its peak."""
    from vllm_infllm.tools.server import Usage, run_vllm

    peak = Usage(0, 0.0)

    def watch() -> None:
        nonlocal peak
        server.check()
        now = server.usage()
        peak = Usage(max(peak.resident, now.resident), max(peak.cache, now.cache))

    log = server.log.with_suffix(".bench.log")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        run_vllm(
            f"vllm bench serve, {server.name}, {cell}",
            [
                *("bench", "serve", "--base-url", server.url, "--model", args.model),
                *("--dataset-name", "random", "--random-input-len", str(cell.length)),
                *("--random-output-len", str(args.output_len), "--ignore-eos", "--temperature", "0"),
                *("--num-prompts", str(cell.concurrency), "--max-concurrency", str(cell.concurrency)),
                *("--seed", str(seed + 1), "--ready-check-timeout-sec", "0", "--disable-tqdm"),
                *("--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", result.name),
            ],
            log,
            args.timeout,
            watch,
        )
        server.check()
        measured = json.loads(result.read_text())
    if measured["completed"] != cell.concurrency:
        reason = next(filter(None, measured.get("errors", [])), "no reason was given").splitlines()[-1]
        raise CommandError(
            f"{server.name}: {cell.concurrency - measured['completed']} of {cell.concurrency} requests of "
            f"{cell.length} tokens failed: {reason} (log: {server.log})"
        )
    blocks = server.metric("vllm:cache_config_info", "num_gpu_blocks") - 1
    block_size = server.metric("vllm:cache_config_info", "block_size")
    return {
        "ttft_ms": measured["median_ttft_ms"],
        "tpot_ms": measured["median_tpot_ms"],
        "tokens_per_s": measured["total_token_throughput"],
        "prompt_tokens": measured["total_input_tokens"],
        "answer_tokens": measured["total_output_tokens"],
        "resident_bytes": peak.resident,
        "kv_tokens": round(peak.cache * blocks) * round(block_size),
        "vllm_bench": {name: value for name, value in measured.items() if name != "generated_texts"},
    }
