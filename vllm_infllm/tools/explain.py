"""Show what InfLLM retrieved while it read a text and answered it.

Runs one prompt with a trace, draws for each execution block how many layers retrieved which part of the text (PNG), and
prints the text of the units that were retrieved most.
"""

import argparse
import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vllm_infllm.config import DEFAULT_BLOCK_SIZE, InfLLMConfig
from vllm_infllm.memory.trace import Trace
from vllm_infllm.plugin import unsupported_vllm
from vllm_infllm.tools import CommandError, UsageError
from vllm_infllm.tools.demo_worker import Job
from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.sides import load_tokenizer
from vllm_infllm.tools.worker_process import json_lines

WORKER = "vllm_infllm.tools.explain_worker"
CHUNK = 2048
ENV = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to ask, and how InfLLM is configured: by default so that it suits the demo model, trained on 8K tokens."""
    parser.add_argument("--prompt-file", type=Path, required=True, help="text file with the whole prompt")
    parser.add_argument("--model", help="folder or name of a model (default: the demo model)")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of the answer (default: %(default)s)")
    parser.add_argument("--n-local", type=int, default=1024, help="InfLLM's window in tokens (default: %(default)s)")
    parser.add_argument("--topk", type=int, default=8, help="units InfLLM retrieves (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("explain.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--most", type=int, default=5, help="units whose text is printed (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the prompt, write the picture, print the answer and the table."""
    if unsupported := unsupported_vllm():
        raise CommandError(unsupported)
    _check(args)
    heatmap = _heatmap()
    model = args.model or str(demo_model())
    tokenizer = load_tokenizer(model)
    prompt = tokenizer.encode(_read(args.prompt_file))
    computed = len(prompt) + args.max_tokens - 1
    if not InfLLMConfig(n_local=args.n_local).geometry.sealed_units(computed - 1):
        raise UsageError(
            f"--prompt-file {args.prompt_file} has {len(prompt)} tokens, and with --n-local {args.n_local} nothing "
            "leaves the window that could be retrieved: give a longer text or lower --n-local."
        )
    console = Console()
    engine = {
        "model": model,
        "dtype": demo_dtype(),
        "max_model_len": len(prompt) + args.max_tokens,
        "max_num_seqs": 1,
        "max_num_batched_tokens": CHUNK,
        "block_size": DEFAULT_BLOCK_SIZE,
        "enforce_eager": True,
        "attention_backend": "infllm",
        "additional_config": {"infllm": {"n_local": args.n_local, "topk": args.topk}},
    }
    answer = _ask(Job(engine, [prompt], args.max_tokens), console)
    trace = Trace.from_json(answer["trace"])
    heatmap.draw(trace, len(prompt), args.output)
    console.print(Text(f"answer: {answer['text'].strip()}"))
    units = trace.sealed_units(trace.blocks[-1])
    console.print(f"{args.output}: {len(trace.blocks)} execution blocks, {units} units, {len(trace.layers)} layers")
    console.print(most_retrieved(trace, [*prompt, *answer["token_ids"]], tokenizer, args.most))
    return 0


def most_retrieved(trace: Trace, tokens: list[int], tokenizer: Any, most: int) -> Table:
    """The units retrieved most where layers had a choice, with their text."""
    choices = Trace(**{**vars(trace), "blocks": [block for block in trace.blocks if trace.had_choice(block)]})
    table = Table(title="Most retrieved units, where there was a choice", caption="times: layers x execution blocks")
    for column in ("unit", "tokens", "times", "of"):
        table.add_column(column, justify="right")
    table.add_column("text")
    for unit, times in choices.retrievals().most_common(most):
        at = trace.tokens_of(unit)
        chances = sum(trace.sealed_units(block) > unit for block in choices.blocks) * len(trace.layers)
        text = " ".join(tokenizer.decode(tokens[at.start : at.stop]).split())
        table.add_row(str(unit), f"{at.start}-{at.stop - 1}", str(times), str(chances), Text(text))
    return table


def _check(args: argparse.Namespace) -> None:
    """Refuse what would only fail after the prompt has been run."""
    for flag in ("max_tokens", "n_local", "topk", "most"):
        value = getattr(args, flag)
        if value < 1:
            raise UsageError(f"--{flag.replace('_', '-')} {value}: give 1 or more.")
    if args.n_local % DEFAULT_BLOCK_SIZE:
        raise UsageError(f"--n-local {args.n_local}: give a multiple of {DEFAULT_BLOCK_SIZE}, the tokens of a unit.")
    if not args.output.absolute().parent.is_dir():
        raise UsageError(f"--output {args.output}: there is no folder {args.output.absolute().parent}.")
    if args.output.suffix != ".png":
        raise UsageError(f"--output {args.output}: give a name that ends with .png.")


def _heatmap() -> ModuleType:
    """The module that draws; its packages are an extra."""
    try:
        return importlib.import_module("vllm_infllm.tools.heatmap")
    except ImportError as error:
        raise CommandError(f"{error}: pip install 'vllm-infllm[explain]'.") from error


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt-file {file}: {error}") from error


def _ask(job: Job, console: Console) -> dict[str, Any]:
    """Run the job, with a progress bar over the tokens of the prompt; returns its answer."""
    answer: dict[str, Any] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting vLLM", total=len(job.prompts[0]))
        for event in json_lines(WORKER, asdict(job), "explain", ENV):
            if "trace" in event:
                answer = event
            progress.update(task, description="reading", completed=event.get("tokens", 0))
    return answer
