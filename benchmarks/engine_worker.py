"""One side of the benchmark, in a process of its own: a vLLM engine with at most one request, driven step by step.

The engine's worker is another process, as in `vllm serve` and as vLLM wants it on a CPU: while the worker computes, the
engine waits for it without sleeping. What is needed of the worker, it is asked for (see worker.py).

The first line on standard input holds the keyword arguments of `vllm.LLM`; every further line is a command, a JSON
object whose "do" is a method of `Engine` and whose other members are its arguments. Each line is answered by one.
"""

import json
import random
import sys
import time
from typing import Any

from benchmarks.samples import Step
from benchmarks.synthetic import Mode
from vllm_infllm.tools.worker_process import json_output


def main() -> None:
    """Start the engine and answer commands until standard input ends."""
    with json_output() as write:
        from vllm import LLM

        engine = Engine(LLM(**json.loads(sys.stdin.readline())))
        write(engine.describe())
        for line in sys.stdin:
            command = json.loads(line)
            write(getattr(engine, command.pop("do"))(**command))


class Engine:
    """An engine, its scheduler in this process, and its request.

    llm: has `BenchmarkWorker` as its `worker_extension_cls`.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._worker_description = self._worker("begin_benchmark")

    def describe(self) -> dict[str, Any]:
        """What runs here, as it turned out."""
        config = self.llm.llm_engine.vllm_config
        return {
            **self._worker_description,
            "executor": config.parallel_config.distributed_executor_backend,
            "block_size": config.cache_config.block_size,
            "compiled": config.compilation_config.mode != 0,
            "infllm": config.additional_config.get("infllm"),
        }

    def start(self, tokens: int, answer: int) -> None:
        """Take on a request with a prompt of `tokens` random tokens, answered with `answer` tokens; compute nothing."""
        from vllm import SamplingParams

        assert not self.scheduler.requests, "the last request was not finished"
        vocabulary = range(self.llm.llm_engine.vllm_config.model_config.get_vocab_size())
        prompt = random.Random(tokens).choices(vocabulary, k=tokens)
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        self.llm.enqueue({"prompt_token_ids": prompt}, params, use_tqdm=False)
        (self.request,) = self.scheduler.requests.values()

    def step(self, count: int, mode: Mode) -> list[Step]:
        """Run `count` steps of the request, or as many as are left of it."""
        self._worker("switch", mode)
        steps: list[Step] = []
        while len(steps) < count and self.llm.llm_engine.has_unfinished_requests():
            start, processor, clock = self.request.num_computed_tokens, self._processor_seconds(), time.perf_counter()
            self.llm.llm_engine.step()
            seconds = time.perf_counter() - clock
            if tokens := self.request.num_computed_tokens - start:
                steps.append(Step(start, tokens, seconds, self._processor_seconds() - processor))
        return steps

    def finish(self) -> None:
        """Drop the request."""
        self.llm.llm_engine.abort_request([self.request.request_id], internal=True)
        self.llm.llm_engine.step()

    def _processor_seconds(self) -> float:
        return float(self._worker("processor_seconds"))

    def _worker(self, method: str, *args: Any) -> Any:
        (answer,) = self.llm.collective_rpc(method, args=args)
        return answer


if __name__ == "__main__":
    main()
