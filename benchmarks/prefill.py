"""A long prompt, step by step and in turn: InfLLM computes all of it, stock vLLM as much as the time allows.

Stock's steps that are left out are filled synthetically (see synthetic.py), so that the steps that it does compute
attend to a context of their true length.
"""

from benchmarks.engine import Engine, SideName, in_turn
from benchmarks.plan import Plan
from benchmarks.progress import Part
from benchmarks.samples import Step, predictor


def run(running: dict[SideName, Engine], plan: Plan, part: Part) -> None:
    """Measured steps of both sides, for as many of the plan's lengths as fit."""
    lengths, chunk = plan.prefill_lengths, plan.chunk
    steps: dict[SideName, list[Step]] = {"stock": [], "infllm": []}
    part.samples["steps"] = steps
    begun = max(s for s in plan.prefill_samples if set(range(0, s + 1, chunk)) <= plan.prefill_samples) + chunk
    all_until = begun
    """Stock computes every step before this token."""
    part.plan(lengths[-1] // chunk)
    for engine in running.values():
        engine.start(lengths[-1], answer=2)
    for start in range(0, lengths[-1], chunk):
        if start in (begun, *lengths[:-1]):
            goal = next(length for length in lengths if length > start)
            if start == begun:
                following = lengths[min(1, len(lengths) - 1)]
                if part.fits(_predict(steps, start, following, lengths[0], plan)):
                    all_until = lengths[0]
                else:
                    part.note(f"stock: no time for every step of {lengths[0]} tokens; its time comes from samples")
            if not part.fits(needed := _predict(steps, start, goal, all_until, plan)):
                part.note(f"{goal} tokens: not measured, {needed:.0f} s more do not fit into the time")
                break
        for side, engine in in_turn(running, start // chunk):
            part.doing(f"{side}, tokens from {start}")
            if side == "infllm" or start < all_until or start in plan.prefill_samples:
                steps[side] += engine.step(1)
            else:
                engine.step(1, "fill")
        part.advance()
    for engine in running.values():
        engine.finish()


def _predict(steps: dict[SideName, list[Step]], start: int, end: int, all_until: int, plan: Plan) -> float:
    """Seconds from token `start` to `end`, judging by the steps so far."""
    stock, infllm = predictor(steps["stock"]), steps["infllm"][-1].seconds
    seconds = 0.0
    for begin in range(start, end, plan.chunk):
        seconds += infllm
        if begin < all_until or begin in plan.prefill_samples:
            seconds += stock(begin, plan.chunk)
    return seconds
