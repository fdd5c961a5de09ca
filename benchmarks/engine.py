"""The two sides of the benchmark: stock vLLM and InfLLM, each an engine in a process of its own."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from benchmarks.plan import ANSWER_ROOM, BLOCK_SIZE, Plan
from benchmarks.samples import Step
from vllm_infllm.tools import CommandError
from vllm_infllm.tools.model import full_cache_bytes
from vllm_infllm.tools.worker_process import WorkerProcess

SideName = Literal["stock", "infllm"]
SIDES: tuple[SideName, ...] = ("stock", "infllm")
ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
WORKER = "benchmarks.worker.BenchmarkWorker"
SETTLE_SECONDS = 1.2
"""A worker of vLLM looks for its next step without sleeping, for a second."""
GIB = 1 << 30
ENGINE_BYTES = 5 * GIB // 2
"""What an engine takes beside its KV cache, the demo model in it."""


class Engine:
    """Drives the engine of one side (see engine_worker.py)."""

    def __init__(self, process: WorkerProcess, description: dict[str, Any]) -> None:
        self._process = process
        self.description = description

    def start(self, tokens: int, answer: int) -> None:
        self._process.ask({"do": "start", "tokens": tokens, "answer": answer})

    def step(self, count: int, mode: str = "real") -> list[Step]:
        return [Step(*step) for step in self._process.ask({"do": "step", "count": count, "mode": mode})]

    def prefill(self, tokens: int, mode: str = "real") -> list[Step]:
        """Run the steps of the first `tokens` tokens of the prompt."""
        steps = self.step(1, mode)
        while steps[-1].end < tokens:
            steps += self.step(1, mode)
        return steps

    def finish(self) -> None:
        self._process.ask({"do": "finish"})


def settings(
    side: SideName, model: str, dtype: str, max_model_len: int, plan: Plan, infllm: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`: all defaults, but for lengths, one request at a time, and the memory of both.

    The worker is a process of its own, which is vLLM's default where the engine is one, too.
    """
    full_bytes = full_cache_bytes(model, dtype, max_model_len, BLOCK_SIZE)
    common = {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": 1,
        "max_num_batched_tokens": plan.chunk,
        "enable_prefix_caching": False,
        "enforce_eager": plan.eager,
        "distributed_executor_backend": "mp",
        "worker_extension_cls": WORKER,
    }
    if side == "stock":
        # Longer than the model was trained for: the rotary table has to be as long.
        long = {"max_position_embeddings": max_model_len}
        return common | {"kv_cache_memory_bytes": full_bytes, "hf_overrides": long}
    # Units for one request, with what a representative takes.
    pool = {"host_memory_gib": 1.1 * full_bytes / GIB}
    return common | {
        "attention_backend": "infllm",
        "block_size": BLOCK_SIZE,
        "additional_config": {"infllm": pool | dict(infllm)},
    }


def fitting(model: str, dtype: str, lengths: Iterable[int]) -> list[int]:
    """Those lengths for which both engines fit into the memory that is free.

    Raises:
        CommandError: if none is left.
    """
    import psutil

    free = psutil.virtual_memory().available
    needs = {
        n: len(SIDES) * (ENGINE_BYTES + full_cache_bytes(model, dtype, n + ANSWER_ROOM, BLOCK_SIZE)) for n in lengths
    }
    if min(needs.values()) > free:
        shortest = min(needs)
        raise CommandError(
            f"two engines for {shortest} tokens take {needs[shortest] / GIB:.1f} GiB, and {free / GIB:.1f} are free"
        )
    return [length for length, need in needs.items() if need <= free]


@contextmanager
def engines(
    sides: Mapping[SideName, dict[str, Any]], num_threads: int | None = None
) -> Iterator[dict[SideName, Engine]]:
    """Engines with these settings, started side by side and warmed up, alive until the block is left.

    num_threads: of each worker; None leaves it to vLLM, which binds one to each physical core.
    """
    env = ENV | ({"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(num_threads)} if num_threads else {})
    with ExitStack() as stack:
        processes = {side: stack.enter_context(WorkerProcess("benchmarks.engine_worker", side, env)) for side in sides}
        for side, process in processes.items():
            process.send(sides[side])
        running = {side: Engine(process, process.receive()) for side, process in processes.items()}
        for side, engine in running.items():
            engine.start(sides[side]["max_num_batched_tokens"] + 512, answer=8)
            engine.step(8)
            engine.finish()
        yield running


def in_turn(running: Mapping[SideName, Engine], turn: int) -> Iterator[tuple[SideName, Engine]]:
    """The engines in the order of this turn: each goes first in every other one. None disturbs the other."""
    ordered = list(running.items())
    for side, engine in ordered[::-1] if turn % 2 else ordered:
        time.sleep(SETTLE_SECONDS)
        yield side, engine
