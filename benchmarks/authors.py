"""InfLLM in the configuration of a recorded run of the authors' code, on one thread."""

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.engine import Engine, engines, settings
from benchmarks.plan import Plan
from benchmarks.progress import Part

CONFIGURATION = {"n_local": 1024, "topk": 8, "exc_block_size": 512}


@dataclass(frozen=True)
class Recorded:
    """Processor seconds of the authors' code on one thread, with this model and configuration: for 1,000 tokens of a
    prompt of 16K tokens, and for a token of the answer."""

    where: str
    prompt: float
    answer: float


GOAL = Recorded("a CPU of 470 GFLOP/s in bfloat16, bfloat16", 4.6, 0.103)
RECORDED = (
    GOAL,
    # thunlp/InfLLM at 12b7079, its attention in torch with the calls of CUDA taken out, the last of the prompt's tokens
    # alone; the faster one of two runs each, while other jobs kept the other core busy.
    Recorded("an Emerald Rapids without AMX, bfloat16", 11.28, 0.1345),
    Recorded("the same, float32", 10.89, 0.1388),
)


def run(model: str, dtype: str, ops: str, plan: Plan, part: Part) -> None:
    """Steps of prompt and answer, one list a run."""
    part.plan(plan.authors_runs)
    part.doing("starting vLLM on one thread")
    max_model_len = plan.max_model_len(("authors",))
    side = settings("infllm", model, dtype, max_model_len, plan, {"ops": ops, **CONFIGURATION})
    part.samples |= {"length": plan.authors_length, "runs": []}
    with engines({"infllm": side}, num_threads=1) as running:
        longest = 0.0
        for turn in range(plan.authors_runs):
            if not part.fits(longest):
                part.note(f"{turn} of {plan.authors_runs} runs: the time is spent")
                break
            part.doing(f"prompt of {plan.authors_length} tokens, run {turn + 1}")
            begin = time.monotonic()
            part.samples["runs"].append(_run(running["infllm"], plan))
            longest = max(longest, time.monotonic() - begin)
            part.advance()


def _run(engine: Engine, plan: Plan) -> dict[str, Any]:
    engine.start(plan.authors_length, plan.authors_answer + 1)
    steps = {"prefill": engine.prefill(plan.authors_length), "decode": engine.step(plan.authors_answer)}
    engine.finish()
    return steps
