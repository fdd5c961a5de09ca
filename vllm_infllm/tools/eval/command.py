"""Evaluate long contexts: needles, aggregation, tracing and perplexity, by length and depth.

Backends run in vLLM one after another, each in a process of its own, or the prompts go to a running server. A run
that was cut off goes on where it was when it is started again. Results, one JSON object a line, and pictures go to a
folder.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_infllm.plugin import unsupported_vllm
from vllm_infllm.tools import CommandError, UsageError
from vllm_infllm.tools.eval import report, tasks
from vllm_infllm.tools.eval.answers import Answer, Answering, OwnEngine, Request
from vllm_infllm.tools.eval.client import Server
from vllm_infllm.tools.eval.haystack import HAYSTACKS
from vllm_infllm.tools.eval.plan import Point, points
from vllm_infllm.tools.eval.results import Record, Results
from vllm_infllm.tools.eval.tasks.base import AnswerTask, Sample, Task
from vllm_infllm.tools.eval.tasks.perplexity import Perplexity, bins
from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.sides import BACKENDS, ENV, engine_arguments, load_tokenizer

TASK_HELP = (
    f"one or more of {', '.join(tasks.TASKS)}; of LongBench and InfiniteBench, whose documents come from a hub: "
    f"{', '.join(tasks.harness.NAMES)}"
)
DEMO_INFLLM = {"n_local": 1024, "topk": 8}
FLAGS = {
    "model": "--model",
    "max_model_len": "--max-model-len",
    "attention_backend": "--backends",
    "additional_config": "--infllm",
}
"""Arguments of vllm.LLM that have a flag: what is checked of them would not hold if --engine had the last word."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tasks, which engines, how long, how many, where to."""
    parser.add_argument("tasks", nargs="+", metavar="TASK", help=TASK_HELP)
    parser.add_argument(
        "--model", help="folder or name of a model (default: the demo model); its tokenizer cuts prompts"
    )
    parser.add_argument(
        "--backends",
        help="infllm (the default), streaming (infllm that retrieves nothing), full (stock attention), infllm-RULE "
        "(another selection rule: infllm-peak, say), comma-separated",
    )
    parser.add_argument("--lengths", default="4k,8k,16k", help="tokens a prompt, k = 1024 (default: %(default)s)")
    parser.add_argument(
        "--depths",
        type=_depths,
        default="5",
        help="depths of the needle: how many, evenly from 0 to 1, or which, as 0.2,0.5 (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=_positive, default=1, help="samples for each length and depth (default: %(default)s)"
    )
    parser.add_argument("--haystack", choices=HAYSTACKS, help="filler of all needle tasks (default: each benchmark's)")
    parser.add_argument("--seed", type=int, default=0, help="determines every prompt (default: %(default)s)")
    parser.add_argument(
        "--infllm",
        type=_json_object,
        help=f"InfLLM's configuration as JSON (for the demo model: {json.dumps(DEMO_INFLLM)})",
    )
    parser.add_argument(
        "--engine", type=_json_object, default={}, help="further arguments of vllm.LLM as JSON, for all backends"
    )
    parser.add_argument("--max-model-len", type=_positive, help="default: the longest prompt and answer")
    parser.add_argument("--base-url", help="ask this server (http://HOST:PORT/v1) instead of starting engines")
    parser.add_argument(
        "--concurrency", type=_positive, default=1, help="prompts that are answered together (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("eval-results"), help="folder of the results (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Ask what was not asked yet; print tables, draw pictures."""
    evaluation = _prepare(args)
    console = Console()
    with Results(args.output, evaluation.settings) as results:
        for backend, answering in evaluation.answering.items():
            _ask(backend, answering, evaluation, results, console)
    wanted = [(backend, point.id) for backend in evaluation.answering for point in evaluation.points]
    records = [results.records[key] for key in wanted]

    from vllm_infllm.tools.eval import pictures

    console.print(report.times(records).rich())
    if any(record.retrieved is not None for record in records):
        console.print(report.retrieved(records).rich())
    console.print(report.scores(records).rich())
    files = [args.output / "results.jsonl", *pictures.draw(records, args.output)]
    console.print("\n".join(map(str, files)), highlight=False, soft_wrap=True)
    return 0


@dataclass(frozen=True)
class Evaluation:
    """What is to be run: checked, nothing started and nothing written yet."""

    tasks: dict[str, Task]
    points: list[Point]
    tokenizer: Any
    seed: int
    answering: dict[str, Answering]
    settings: dict[str, Any]
    """All that a single result depends on besides its sample and its backend."""

    def sample(self, point: Point) -> Sample:
        return point.sample(self.tasks[point.task], self.tokenizer, self.seed)


def _prepare(args: argparse.Namespace) -> Evaluation:
    """Check everything that can be checked before something is started or written."""
    chosen = {name: tasks.find(name, args.haystack) for name in args.tasks}
    lengths = _lengths(args.lengths)
    if fixed := FLAGS.keys() & args.engine.keys():
        raise UsageError(f"--engine: give {', '.join(f'{FLAGS[name]} instead of {name}' for name in sorted(fixed))}")
    if not args.base_url and (unsupported := unsupported_vllm()):
        raise CommandError(unsupported)
    if missing := [name for name in ("matplotlib", "openai") if not find_spec(name)]:
        raise CommandError(f"needs {' and '.join(missing)}: pip install 'vllm-infllm[eval]'")
    if args.model and args.model.startswith((".", "/", "~")) and not Path(args.model).is_dir():
        raise UsageError(f"--model {args.model}: there is no such folder")
    model = args.model or str(demo_model())
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    tokenizer = load_tokenizer(model)
    if not tokenizer.is_fast:
        raise UsageError(f"--model {model}: its tokenizer cannot tell where in a text a token lies (it is a slow one)")

    needed = max(lengths) + max(task.max_tokens for task in chosen.values())
    infllm = args.infllm
    if infllm is None:
        infllm = DEMO_INFLLM if Path(model) == demo_model().resolve() else {}
    settings = {"model": model, "seed": args.seed, "haystack": args.haystack}
    answering: dict[str, Answering]
    if args.base_url:
        (name,) = _split("--backends", args.backends or "server", one=True)
        server = Server.connect(args.base_url, args.concurrency)
        _check_length(needed, min(server.max_model_len, args.max_model_len or server.max_model_len), lengths)
        answering = {name: server}
        settings |= {"base_url": args.base_url}
    else:
        backends = _split("--backends", args.backends or "infllm")
        max_model_len = args.max_model_len or needed
        _check_length(needed, max_model_len, lengths)
        extra = {"dtype": demo_dtype()} | args.engine
        answering = {}
        for backend in BACKENDS:
            if backend in backends:
                engine = engine_arguments(backend, model, extra["dtype"], max_model_len, infllm, args.concurrency)
                retrieves = backend.startswith("infllm")
                answering[backend] = OwnEngine(backend, engine | extra, args.concurrency, ENV, retrieves)
        settings |= {"infllm": infllm, "engine": extra}

    plan = points(list(chosen.values()), lengths, args.depths, args.samples)
    evaluation = Evaluation(chosen, plan, tokenizer, args.seed, answering, settings)
    for name in chosen:
        # Does it fit into the shortest prompts, and are its texts installed?
        evaluation.sample(next(point for point in plan if point.task == name))
    return evaluation


def _check_length(needed: int, max_model_len: int, lengths: Sequence[int]) -> None:
    if needed > max_model_len:
        raise UsageError(
            f"--lengths {max(lengths)}: with the answer a prompt takes up to {needed} tokens, and max_model_len is "
            f"{max_model_len}"
        )


def _ask(backend: str, answering: Answering, evaluation: Evaluation, results: Results, console: Console) -> None:
    """Have all samples answered that are not yet, with a progress bar over the tokens of their prompts."""
    left = [point for point in evaluation.points if not results.has(backend, point.id)]
    done = len(evaluation.points) - len(left)
    if not left:
        console.print(f"{backend}: all {done} prompts were answered before")
        return
    asked: dict[str, tuple[Point, Sample]] = {}

    def requests() -> Iterator[Request]:
        for point in left:
            sample, task = evaluation.sample(point), evaluation.tasks[point.task]
            asked[point.id] = point, sample
            needles = sample.meta.get("needle_tokens", []) if answering.retrieves else []
            yield Request(point.id, sample.prompt, task.max_tokens, isinstance(task, Perplexity), needles)

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    clocks = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *clocks, console=console, speed_estimate_period=3600) as bar:
        total = sum(point.length for point in left)
        line = bar.add_task(backend, total=total, state=f"{done} of {len(evaluation.points)} prompts; starting")
        for answer in answering(requests()):
            point, sample = asked.pop(answer.id)
            results.add(_record(backend, evaluation.tasks[point.task], point, sample, answer))
            done += 1
            bar.update(line, advance=point.length, state=f"{done} of {len(evaluation.points)} prompts")


def _record(backend: str, task: Task, point: Point, sample: Sample, answer: Answer) -> Record:
    nll = None if answer.logprobs is None else bins(answer.logprobs)
    if nll and not all(map(isfinite, nll)):
        raise CommandError(f"{backend}: log-probabilities of {point.id} are not finite")
    return Record(
        task=point.task,
        backend=backend,
        length=point.length,
        depth=point.depth,
        sample=point.id,
        prompt_tokens=len(sample.prompt),
        answer=answer.text,
        expected=sample.answers,
        meta=sample.meta,
        seconds=round(answer.seconds, 4),
        first_token_seconds=round(answer.first_token_seconds, 4),
        score=task.score(sample, answer.text) if isinstance(task, AnswerTask) else None,
        nll=nll,
        retrieved=answer.retrieved,
    )


def _split(flag: str, text: str, one: bool = False) -> list[str]:
    """The backends of a comma-separated list; any one name where it only labels a server."""
    names = [name.strip() for name in text.split(",")]
    if one and len(names) > 1:
        raise UsageError(f"{flag} {text}: a server runs one backend; name it, and run the others against other servers")
    if unknown := [name for name in names if not one and name not in BACKENDS]:
        raise UsageError(f"{flag}: there is no backend {unknown[0]!r}; the backends are {', '.join(BACKENDS)}")
    return names


def _lengths(text: str) -> list[int]:
    """The lengths of a comma-separated list, each once: 4096, 4k."""
    lengths = []
    for part in text.split(","):
        number, unit = (part.strip()[:-1], 1024) if part.strip().lower().endswith("k") else (part.strip(), 1)
        if not number.isdecimal() or not int(number):
            raise UsageError(f"--lengths {text}: {part.strip()!r} is no number of tokens; write 4k,16k or 4096,16384")
        lengths.append(int(number) * unit)
    return sorted(set(lengths))


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _depths(text: str) -> list[float]:
    """Depths from 0 to 1: so many, evenly (a single one in the middle), or those that are listed."""
    if text.isdecimal() and int(text):
        return [i / (int(text) - 1) for i in range(int(text))] if int(text) > 1 else [0.5]
    try:
        depths = sorted({float(part) for part in text.split(",")})
    except ValueError:
        depths = []
    if not depths or not all(0 <= depth <= 1 for depth in depths) or text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of depths, or depths from 0 to 1 as 0.2,0.5")
    return depths


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
