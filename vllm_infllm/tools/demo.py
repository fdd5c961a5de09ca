"""Find pass keys in a long text, with stock full attention and with InfLLM.

Both sides run in vLLM with the same prompts, one at a time, greedily and without compilation (enforce_eager: compiling
takes longer than it saves here). The exit status is 0 when InfLLM found every key.
"""

import argparse
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_infllm.plugin import unsupported_vllm
from vllm_infllm.tools import CommandError
from vllm_infllm.tools.demo_report import Trial, report
from vllm_infllm.tools.demo_worker import Answer, Job
from vllm_infllm.tools.model import demo_dtype, demo_model, full_cache_bytes
from vllm_infllm.tools.passkey import passkey_prompt
from vllm_infllm.tools.worker_process import json_lines

WORKER = "vllm_infllm.tools.demo_worker"
MAX_TOKENS = 8
CHUNK = 2048
BLOCK_SIZE = 128
DEPTHS, DEPTHS_SLOW = [0.1, 0.5, 0.9], [0.1, 0.9]
# On a CPU vLLM keeps a core free for its other processes; with one request at a time they sleep while it computes.
ENV = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


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

    common = {
        "model": model,
        "dtype": dtype,
        "max_model_len": args.length + MAX_TOKENS,
        "max_num_seqs": 1,
        "max_num_batched_tokens": CHUNK,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    infllm = {"n_local": args.n_local, "topk": args.topk}
    # vLLM refuses a length that the model was not trained on, and would take nearly all memory of a CPU machine. The
    # override, unlike the environment variable that also allows the length, makes its rotary tables as long.
    full = {
        "hf_overrides": {"max_position_embeddings": args.length + MAX_TOKENS},
        "kv_cache_memory_bytes": full_cache_bytes(model, dtype, args.length + MAX_TOKENS, BLOCK_SIZE),
    }
    sides = [
        Side("full attention", common | full),
        Side("infllm", common | {"attention_backend": "infllm", "additional_config": {"infllm": infllm}}),
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
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=sys.maxsize)
    except (OSError, ValueError) as error:
        raise CommandError(f"--model {model}: {error}") from error
    draw = random.Random(args.seed)
    keys = [draw.randint(10000, 99999) for _ in depths]
    try:
        return [
            Trial(depth, key, passkey_prompt(tokenizer, args.length, depth, key))
            for depth, key in zip(depths, keys, strict=True)
        ]
    except ValueError as error:
        raise CommandError(str(error)) from error


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
