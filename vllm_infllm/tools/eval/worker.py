"""One backend of an evaluation, in a process of its own: an engine that answers requests as they come.

The first line on standard input holds {"engine": keyword arguments of `vllm.LLM`, "concurrency": n}, every further one
a `Request`; an `Answer` for each goes to standard output, in the order in which they are ready.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from vllm_infllm.memory.trace import ARGUMENT, Trace
from vllm_infllm.tools.eval.answers import Answer, Request
from vllm_infllm.tools.eval.retrieval import share_retrieved
from vllm_infllm.tools.worker_process import json_output


def main() -> None:
    """Start the engine and answer until standard input ends."""
    with json_output() as write:
        from vllm import LLM

        job = json.loads(sys.stdin.readline())
        llm = LLM(**job["engine"], disable_log_stats=False)

        def receive() -> Request | None:
            line = sys.stdin.readline()
            return Request(**json.loads(line)) if line else None

        for answer in answers(llm, job["concurrency"], receive):
            write(asdict(answer))


def answers(llm: Any, concurrency: int, receive: Callable[[], Request | None]) -> Iterator[Answer]:
    """Keep `concurrency` requests in the engine as long as `receive` has more."""
    running: dict[str, tuple[Request, float]] = {}
    ended = False
    while True:
        while not ended and len(running) < concurrency:
            request = receive()
            ended = request is None
            if request is not None:
                # Not by LLM.enqueue: it returns an id that outputs do not carry.
                llm.llm_engine.add_request(request.id, {"prompt_token_ids": request.prompt}, _parameters(request))
                running[request.id] = request, time.monotonic()
        if not running:
            return
        for output in llm.llm_engine.step():
            if output.finished:
                request, start = running.pop(output.request_id)
                yield _answer(request, output, time.monotonic() - start)


def _parameters(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=request.max_tokens,
        prompt_logprobs=0 if request.prompt_logprobs else None,
        extra_args={ARGUMENT: True} if request.needles else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _answer(request: Request, output: Any, seconds: float) -> Answer:
    logprobs = None
    if request.prompt_logprobs:
        steps = zip(output.prompt_logprobs[1:], request.prompt[1:], strict=True)
        logprobs = [step[token].logprob for step, token in steps]
    retrieved = None
    if request.needles:
        trace = Trace.from_json(output.kv_transfer_params[ARGUMENT])
        retrieved = share_retrieved(trace, len(request.prompt), request.needles)
    return Answer(request.id, output.outputs[0].text, seconds, output.metrics.first_token_latency, logprobs, retrieved)


if __name__ == "__main__":
    main()
