"""The engine of `vllm-infllm explain`, in a process of its own: answers one prompt with a trace.

Reads the `Job` of demo_worker.py, with one prompt, as JSON from standard input and writes JSON lines to standard
output: `{"tokens": n}` after each step (n tokens of the prompt are through), then `{"text", "token_ids", "trace"}`, or
`{"error": message}` before it fails. Everything that vLLM prints goes to standard error.
"""

from collections.abc import Iterator
from typing import Any

from vllm_infllm.memory.trace import ARGUMENT
from vllm_infllm.tools.demo_worker import Job, main


def run(job: Job) -> Iterator[dict[str, Any]]:
    """Start the engine and answer the job's one prompt greedily."""
    from vllm import LLM, SamplingParams

    (prompt,) = job.prompts
    llm = LLM(**job.engine)
    params = SamplingParams(temperature=0, max_tokens=job.max_tokens, extra_args={ARGUMENT: True})
    llm.enqueue({"prompt_token_ids": prompt}, params, use_tqdm=False)
    outputs: list[Any] = []
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step() or outputs
        steps += 1
        yield {"tokens": min(steps * job.engine["max_num_batched_tokens"], len(prompt))}
    (output,) = outputs
    completion = output.outputs[0]
    trace = output.kv_transfer_params[ARGUMENT]
    yield {"text": completion.text, "token_ids": list(completion.token_ids), "trace": trace}


if __name__ == "__main__":
    main(run)
