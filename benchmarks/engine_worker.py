"""One side of the benchmark, in a process of its own: a vLLM engine with at most one request, driven step by step.

The first line on standard input holds the keyword arguments of `vllm.LLM`; every further line is a command, a JSON
object whose "do" is a method of `Engine` and whose other members are its arguments. Each line is answered by one.
"""

import json
import random
import sys
import time
from typing import Any

from benchmarks.samples import Step
from benchmarks.synthetic import Mode, Synthetic
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
    """An engine in this process, and its request."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.synthetic = Synthetic(self.runner)

    def describe(self) -> dict[str, Any]:
        """What runs here, as it turned out."""
        layers = self.runner.compilation_config.static_forward_context.values()
        ops = {layer.impl.ops.describe() for layer in layers if hasattr(layer.impl, "ops")}
        config = self.llm.llm_engine.vllm_config
        return {
            "backend": ", ".join({layer.attn_backend.get_name() for layer in layers}),
            "ops": ", ".join(ops) or None,
            "block_size": config.cache_config.block_size,
            "compiled": config.compilation_config.mode != 0,
            "infllm": config.additional_config.get("infllm"),
        }

    def start(self, tokens: int, answer: int) -> None:
        """Take on a request with a prompt of `tokens` random tokens, answered with `answer` tokens; compute nothing."""
        from vllm import SamplingParams

        assert not self.scheduler.requests, "the last request was not finished"
        vocabulary = range(self.runner.model_config.get_vocab_size())
        prompt = random.Random(tokens).choices(vocabulary, k=tokens)
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        self.llm.enqueue({"prompt_token_ids": prompt}, params, use_tqdm=False)
        (self.request,) = self.scheduler.requests.values()

    def step(self, count: int, mode: Mode) -> list[Step]:
        """Run `count` steps of the request, or as many as are left of it."""
        self.synthetic.mode = mode
        steps: list[Step] = []
        while len(steps) < count and self.llm.llm_engine.has_unfinished_requests():
            start, clock, processor = self.request.num_computed_tokens, time.perf_counter(), time.process_time()
            self.llm.llm_engine.step()
            seconds, processor_seconds = time.perf_counter() - clock, time.process_time() - processor
            if tokens := self.request.num_computed_tokens - start:
                steps.append(Step(start, tokens, seconds, processor_seconds))
        return steps

    def finish(self) -> None:
        """Drop the request."""
        self.llm.llm_engine.abort_request([self.request.request_id], internal=True)
        self.llm.llm_engine.step()


if __name__ == "__main__":
    main()
