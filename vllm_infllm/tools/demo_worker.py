"""One side of the demo, in a process of its own: an engine that answers prompts one by one.

Reads a `Job` as JSON from standard input and writes one JSON object a line to standard output: `{"ready": true}` once
the engine is up, `{"tokens": n}` after each of its steps (n tokens of the prompt are through), and an `Answer` for each
prompt, or `{"error": message}` before it fails. Everything that vLLM prints goes to standard error.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_infllm.tools.worker_process import json_output


@dataclass(frozen=True)
class Job:
    """What to run: the keyword arguments of `vllm.LLM`, the token ids of the prompts, and what else
    `vllm.SamplingParams` are to be."""

    engine: dict[str, Any]
    prompts: list[list[int]]
    max_tokens: int
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one prompt gave, and what it took: seconds until the last token and until the first, the number of tokens,
    and KV blocks held at the peak."""

    text: str
    seconds: float
    first_seconds: float
    tokens: int
    blocks: int


def main(run: Callable[[Job], Iterator[dict[str, Any]]]) -> None:
    """Run the job on standard input, and write what `run` yields."""
    job = Job(**json.load(sys.stdin))
    with json_output() as write:
        for event in run(job):
            write(event)


def run(job: Job) -> Iterator[dict[str, Any]]:
    """Start the engine, warm it up with the beginning of a prompt, and answer the prompts in order."""
    from vllm import LLM

    llm = LLM(**job.engine, disable_log_stats=False)
    for _ in answer(llm, job.prompts[0][:256], max_tokens=2, **job.sampling):
        pass
    yield {"ready": True}
    for prompt in job.prompts:
        yield from answer(llm, prompt, job.max_tokens, **job.sampling)


def answer(llm: Any, prompt: list[int], max_tokens: int, **sampling: Any) -> Iterator[dict[str, Any]]:
    """Greedily complete one prompt, alone in the engine: yields the progress after every step, then the `Answer`."""
    from vllm import SamplingParams

    chunk = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    start, steps, peak = time.monotonic(), 0, 0
    params = SamplingParams(temperature=0, max_tokens=max_tokens, **sampling)
    llm.enqueue({"prompt_token_ids": prompt}, params, use_tqdm=False)
    outputs: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step() or outputs
        held = blocks_in_use(llm)
        # The engine also reports an idle step between two requests.
        steps += held > 0
        peak = max(peak, held)
        yield {"tokens": min(steps * chunk, len(prompt))}
    completion, first = outputs[-1].outputs[0], outputs[-1].metrics.first_token_latency
    yield asdict(Answer(completion.text, time.monotonic() - start, first, len(completion.token_ids), peak))


def blocks_in_use(llm: Any) -> int:
    """The blocks of the paged KV cache that requests hold now: vLLM's own gauge, times the blocks there are.

    With one request in the engine and prefix caching off, these are the blocks of that request. One block, the null
    block, is never given to a request and not counted by the gauge.
    """
    (usage,) = (metric.value for metric in llm.get_metrics() if metric.name == "vllm:kv_cache_usage_perc")
    return round(usage * (llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1))


if __name__ == "__main__":
    main(run)
