"""Find the largest window and retrieval that meet a goal for memory or latency.

Considered are settings of n_local and topk; the best is the one with which a query attends to the most tokens
(n_local + topk units), on a tie the one with the larger window. Memory comes from the memory plan. Milliseconds a
decoded token come from a short measurement at the longest context: InfLLM's operations on a few made-up layers, times
the layers of the model, and a matrix product with as many numbers as the model has weights. vLLM's own time a step is
not in it. No engine is started and no weights are read.

The last line on standard output is the choice as JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from vllm_infllm.config import DEFAULT_BLOCK_SIZE, KEY, ConfigError, InfLLMConfig, resolve
from vllm_infllm.memory.plan import GIB
from vllm_infllm.plugin import unsupported_vllm
from vllm_infllm.tools import CommandError
from vllm_infllm.tools.engine_options import (
    add_engine_options,
    blueprint,
    engine_options,
    list_of,
    positive,
    tokens,
    trained_length,
)
from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.tables import Table

if TYPE_CHECKING:
    from vllm_infllm.tools.blueprint import Blueprint

TOPKS = [4, 8, 16, 32, 64]
LAYERS = 8
"""Most layers that are measured; each has tensors of its own, as in a model."""
WEIGHT_BYTES = 256 << 20
"""Most bytes of weights that are measured."""
SAMPLES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Goals, candidates and the engine."""
    parser.add_argument("--model", help="folder or name of a model (default: the demo model)")
    parser.add_argument("--max-model-len", type=tokens, metavar="TOKENS", help="longest request (default: as trained)")
    parser.add_argument(
        "--max-kv-gib-per-request",
        type=_goal,
        metavar="GIB",
        help="goal: paged KV cache of a request at its bound, with the attention that is summed up beside it",
    )
    parser.add_argument(
        "--max-ms-per-token", type=_goal, metavar="MS", help="goal: decoding one request at the longest context"
    )
    parser.add_argument(
        "--n-local",
        type=list_of(tokens),
        metavar="TOKENS,...",
        help="windows to consider (default: 2, 4, 8, ... blocks, as far as the model was trained)",
    )
    parser.add_argument(
        "--topk",
        type=list_of(positive),
        default=TOPKS,
        metavar="N,...",
        help="units to consider (default: 4,8,16,32,64)",
    )
    add_engine_options(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Consider all candidates, print what they take and the choice."""
    if args.max_kv_gib_per_request is None and args.max_ms_per_token is None:
        args.usage_error("give a goal: --max-kv-gib-per-request, --max-ms-per-token or both")
    if fixed := {"n_local", "topk"} & args.infllm.keys():
        args.usage_error(f"--infllm sets {' and '.join(sorted(fixed))}, which --n-local and --topk vary: leave it out")
    if unsupported := unsupported_vllm():
        raise CommandError(unsupported)
    if args.model is None:
        args.model, args.dtype = str(demo_model()), args.dtype or demo_dtype()
    goal = Goal(args.max_kv_gib_per_request, args.max_ms_per_token)
    considered = _consider(args, measure=goal.ms is not None)
    console = Console()
    console.print(_table(considered, goal).rich())
    for refusal in dict.fromkeys(candidate.refusal for candidate in considered if candidate.refusal):
        console.print(f"refused: {refusal}", highlight=False, soft_wrap=True)
    best = choose(considered, goal)
    if best is None:
        raise CommandError(explain_failure(considered, goal))
    infllm = {**args.infllm, "n_local": best.n_local, "topk": best.topk}
    console.print(f"--additional-config '{json.dumps({KEY: infllm})}'", soft_wrap=True)
    choice = {"kv_gib_per_request": best.kv_gib, "ms_per_token": best.ms, "additional_config": {KEY: infllm}}
    print(json.dumps(choice))
    return 0


# ---- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """Most GiB of paged KV cache a request, most milliseconds a token; None is no goal."""

    kv_gib: float | None
    ms: float | None


@dataclass(frozen=True)
class Candidate:
    """A setting and what it takes: paged KV cache and host units of one longest request in GiB, milliseconds a token
    (None: not measured), or why an engine would refuse it."""

    n_local: int
    topk: int
    block_size: int
    kv_gib: float = 0.0
    host_gib: float = 0.0
    ms: float | None = None
    refusal: str | None = None

    @property
    def attended(self) -> int:
        """Tokens of window and retrieved units."""
        return self.n_local + self.topk * self.block_size

    def verdict(self, goal: Goal) -> str:
        """Empty if it meets the goal."""
        if self.refusal:
            return "refused"
        misses = [
            (goal.kv_gib is not None and self.kv_gib > goal.kv_gib, "too much KV cache"),
            (goal.ms is not None and self.ms is not None and self.ms > goal.ms, "too slow"),
        ]
        return ", ".join(why for missed, why in misses if missed)


def choose(considered: Sequence[Candidate], goal: Goal) -> Candidate | None:
    """The candidate that meets the goal and attends to most tokens; on a tie that with the larger window."""
    fitting = [candidate for candidate in considered if not candidate.verdict(goal)]
    return max(fitting, key=lambda candidate: (candidate.attended, candidate.n_local), default=None)


def explain_failure(considered: Sequence[Candidate], goal: Goal) -> str:
    """What the smallest figures are, where nothing meets the goal."""
    possible = [candidate for candidate in considered if not candidate.refusal]
    if not possible:
        return f"no setting can start: {considered[0].refusal}"
    parts = []
    if goal.kv_gib is not None:
        least = min(possible, key=lambda candidate: candidate.kv_gib)
        parts.append(f"--max-kv-gib-per-request {goal.kv_gib:g} (least: {least.kv_gib:.4f} at n_local {least.n_local})")
    if goal.ms is not None:
        fastest = min(possible, key=lambda candidate: candidate.ms or 0.0)
        parts.append(
            f"--max-ms-per-token {goal.ms:g} (fastest: {fastest.ms:.2f} at n_local {fastest.n_local}, topk "
            f"{fastest.topk})"
        )
    return f"no setting meets {' and '.join(parts)}: raise the goal, or consider smaller --n-local and --topk."


def _table(considered: Sequence[Candidate], goal: Goal) -> Table:
    rows = []
    for candidate in considered:
        verdict = candidate.verdict(goal) or ("chosen" if candidate == choose(considered, goal) else "meets the goal")
        figures = ("-", "-", "-")
        if not candidate.refusal:
            figures = (
                f"{candidate.kv_gib:.4f}",
                f"{candidate.host_gib:.4f}",
                "-" if candidate.ms is None else f"{candidate.ms:.2f}",
            )
        rows.append((str(candidate.n_local), str(candidate.topk), str(candidate.attended), *figures, verdict))
    header = ("n_local", "topk", "tokens attended", "paged KV GiB", "host GiB", "ms a token", "")
    return Table("For one request of the longest context", header, rows)


# ---- what a candidate takes ------------------------------------------------------------------------------------------


def _goal(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _consider(args: argparse.Namespace, measure: bool) -> list[Candidate]:
    """All candidates, by window, then topk. Only the window changes the plan, so it is made once a window.

    Raises:
        CommandError: if the engine would be refused whatever the setting.
    """
    from vllm.platforms import current_platform

    if measure and not current_platform.is_cpu():
        raise CommandError("--max-ms-per-token is measured on CPU only so far: use --max-kv-gib-per-request.")
    options = {**engine_options(args), "max_model_len": args.max_model_len}
    block_size = args.block_size or DEFAULT_BLOCK_SIZE
    trained_len = trained_length(args.model)
    considered = []
    linear: float | None = None
    windows = args.n_local or _windows(args.infllm, block_size, trained_len)
    for n_local in track(sorted(windows), "considering", console=Console(stderr=True), transient=True):
        drawn: Blueprint | None = None
        for topk in sorted(args.topk):
            fields = {**args.infllm, "n_local": n_local, "topk": topk}
            try:
                config = resolve(fields, block_size, trained_len)
                drawn = drawn or blueprint(args.model, fields, **options)
                if measure and linear is None:
                    linear = _linear_seconds(drawn)
                considered.append(_candidate(drawn, config, linear))
            except (ConfigError, CommandError) as error:
                considered.append(Candidate(n_local, topk, block_size, refusal=str(error)))
    return considered


def _windows(infllm: dict[str, Any], block_size: int, trained_len: int) -> list[int]:
    """2, 4, 8, ... blocks, up to the last that fits the trained length; 2 at least, so that a refusal can be shown."""
    windows = [2 * block_size]
    while True:
        try:
            resolve({**infllm, "n_local": 2 * windows[-1]}, block_size, trained_len)
        except ConfigError:
            return windows
        windows.append(2 * windows[-1])


def _candidate(drawn: "Blueprint", config: InfLLMConfig, linear_seconds: float | None) -> Candidate:
    """linear_seconds: of the linear layers; None if milliseconds are not wanted."""
    sizes, longest = drawn.layers.sizes, drawn.vllm_config.model_config.max_model_len
    return Candidate(
        config.n_local,
        config.topk,
        config.block_size,
        kv_gib=(sizes.paged_request + sizes.received_request) / GIB,
        host_gib=config.geometry.stored_blocks(longest) * drawn.plan.unit_bytes / GIB,
        ms=None if linear_seconds is None else 1e3 * (_attention_seconds(drawn, config, longest) + linear_seconds),
    )


def _attention_seconds(drawn: "Blueprint", config: InfLLMConfig, context: int) -> float:
    """Seconds of InfLLM's operations in a decode step that ends at `context`, all layers."""
    from vllm_infllm import ops
    from vllm_infllm.ops.interface import LayerSettings
    from vllm_infllm.tools.synthetic import Attending

    name = drawn.layers.config.ops
    assert name  # the effective configuration names them
    heads = drawn.heads
    settings = LayerSettings(
        config.n_local, config.geometry.init_blocks, config.topk, config.repr_topk, scale=heads.size**-0.5
    )
    dtype = drawn.vllm_config.model_config.dtype
    work = Attending(ops.load(name), heads, config.geometry, settings, context - 1, 1, dtype)
    layers = [work.layer() for _ in range(min(LAYERS, drawn.num_layers))]

    def step() -> None:
        for layer in layers:
            work.write(layer)
            work.select(layer)
            work.attend(layer)

    def seal() -> None:
        for layer in layers:
            work.seal(layer)

    # A block is sealed once in as many steps as it has tokens.
    seconds = _seconds(step) + (_seconds(seal) / config.block_size if len(work.sealing.leaving) else 0.0)
    return seconds / len(layers) * drawn.num_layers


def _linear_seconds(drawn: "Blueprint") -> float:
    """Seconds of one token's product with as many numbers as there are weights."""
    import torch

    model = drawn.vllm_config.model_config
    width = model.get_hidden_size()
    rows = max(1, min(WEIGHT_BYTES, drawn.weight_bytes) // (width * model.dtype.itemsize))
    weight, hidden = torch.randn(rows, width).to(model.dtype), torch.randn(1, width).to(model.dtype)
    return _seconds(lambda: torch.nn.functional.linear(hidden, weight)) * drawn.weight_bytes / weight.nbytes


def _seconds(run_once: Callable[[], Any]) -> float:
    """Median of a few runs, after one that does not count."""
    run_once()
    samples = []
    for _ in range(SAMPLES):
        begin = time.perf_counter()
        run_once()
        samples.append(time.perf_counter() - begin)
    return median(samples)
