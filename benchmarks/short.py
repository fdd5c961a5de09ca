"""Prompts inside the window: InfLLM must lose nothing against stock vLLM."""

import time

from benchmarks.engine import Engine, SideName, in_turn
from benchmarks.plan import Plan
from benchmarks.progress import Part


def run(running: dict[SideName, Engine], plan: Plan, part: Part) -> None:
    """Steps of prompt and answer, by length and side, one list a run."""
    for length in plan.short_lengths:
        part.samples[str(length)] = {side: {"prefill": [], "decode": []} for side in running}
    part.plan(plan.short_runs * len(plan.short_lengths) * len(running))
    longest = 0.0
    for turn in range(plan.short_runs):
        if not part.fits(longest):
            part.note(f"{turn} of {plan.short_runs} runs each: the time is spent")
            break
        begin = time.monotonic()
        for length in plan.short_lengths:
            taken = {}
            for side, engine in in_turn(running, turn):
                part.doing(f"{length} tokens, {side}, run {turn + 1}")
                engine.start(length, plan.short_answer + 1)
                taken[side] = {"prefill": engine.prefill(length), "decode": engine.step(plan.short_answer)}
                engine.finish()
                part.advance()
            for side, steps in taken.items():
                for phase, of_run in steps.items():
                    part.samples[str(length)][side][phase].append(of_run)
        longest = max(longest, time.monotonic() - begin)
