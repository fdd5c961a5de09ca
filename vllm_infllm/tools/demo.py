"""Find pass keys in a long text, with stock full attention and with InfLLM.

Both sides run in vLLM with the same prompts, one at a time, greedily and without compilation (enforce_eager: compiling
takes longer than it saves here). The exit status is 0 when InfLLM found every key.
"""

import argparse
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_infllm.plugin import unsupported_vllm
from vllm_infllm.tools import CommandError, UsageError
from vllm_infllm.tools.demo_report import Trial, report
from vllm_infllm.tools.demo_worker import Answer, Job
from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.passkey import passkey_prompt
from vllm_infllm.tools.sides import BLOCK_SIZE, ENV, engine_arguments, load_tokenizer
from vllm_infllm.tools.worker_process import json_lines

WORKER = "vllm_infllm.tools.demo_worker"
MAX_TOKENS = 8
DEPTHS, DEPTHS_SLOW = [0.1, 0.5, 0.9], [0.1, 0.9]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to ask, and how InfLLM is configured: by default so that it suits the demo model, trained on 8K tokens."""
    parser.add_argument("--model", help="folder or name of a model (default: the demo model)")
    parser.add_argument("--length", type=int, default=16384, help="tokens a prompt (default: %(default)s)")
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        metavar="DEPTH",
        help="where the keys are hidden: 0 is the start of the text, 1 its end (default: 0.1 0.5 0.9; on a CPU without "
        "bfloat16 instructions, where full attention takes minutes a prompt, 0.1 0.9)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the pass keys (default: %(default)s)")
    parser.add_argument("--n-local", type=int, default=1024, help="InfLLM's window in tokens (default: %(default)s)")
    parser.add_argument("--topk", type=int, default=8, help="units InfLLM retrieves (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Ask both sides, print the table."""
    if unsupported := unsupported_vllm():
        raise CommandError(unsupported)
    console = Console()
    model, dtype = args.model or str(demo_model()), demo_dtype()
    trials = _trials(model, args.depths or (DEPTHS if dtype == "bfloat16" else DEPTHS_SLOW), args)
    console.print(f"{len(trials)} pass keys, each in {args.length:,} tokens; {Path(model).name} in {dtype}, eager")

    infllm = {"n_local": args.n_local, "topk": args.topk}
    max_model_len = args.length + MAX_TOKENS
    sides = [
        Side("full attention", engine_arguments("full", model, dtype, max_model_len, infllm)),
        Side("infllm", engine_arguments("infllm", model, dtype, max_model_len, infllm)),
    ]
    answers = {side.name: _ask(side, trials, console) for side in sides}
    console.print(report(trials, answers, BLOCK_SIZE))
    return 0 if all(trial.found_in(answer) for trial, answer in zip(trials, answers["infllm"], strict=True)) else 1


@dataclass(frozen=True)
class Side:
    """One of the two engines: its name and the keyword arguments of `vllm.LLM`."""

    name: str
    engine: dict[str, Any]


def _trials(model: str, depths: list[float], args: argparse.Namespace) -> list[Trial]:
    """One prompt a depth, each with a key of its own."""
    tokenizer = load_tokenizer(model)
    draw = random.Random(args.seed)
    keys = [draw.randint(10000, 99999) for _ in depths]
    try:
        return [
            Trial(depth, key, passkey_prompt(tokenizer, args.length, depth, key))
            for depth, key in zip(depths, keys, strict=True)
        ]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _ask(side: Side, trials: list[Trial], console: Console) -> list[Answer]:
    """Put every prompt to one side, with a progress bar over the tokens of all prompts."""
    job = Job(side.engine, [trial.prompt for trial in trials], MAX_TOKENS)
    answers: list[Answer] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        total = sum(map(len, job.prompts))
        task = progress.add_task(f"{side.name:<14}", total=total, state="starting vLLM")
        for event in json_lines(WORKER, asdict(job), side.name.replace(" ", "-"), ENV):
            if "text" in event:
                answers.append(Answer(**event))
            done = sum(len(prompt) for prompt in job.prompts[: len(answers)]) + event.get("tokens", 0)
            progress.update(task, completed=done, state=f"{len(answers)} of {len(trials)} keys asked")
    return answers
