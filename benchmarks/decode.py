"""Decoding at long contexts, which a synthetic fill makes (see synthetic.py): blocks of steps in turn."""

import time
from typing import Any

from benchmarks.engine import Engine, SideName, in_turn
from benchmarks.plan import Plan
from benchmarks.progress import Part

IDLE_BLOCKS = 3
TAIL = 16
"""Last tokens of a prompt, which are computed, not filled. Where three heads share a kv head, vLLM's attention on a CPU
computes a token for four, and reads the fourth from scratch memory that a prompt has written and a fill has not. If
denormal numbers happen to be there, a token takes twice as long."""


def run(running: dict[SideName, Engine], plan: Plan, part: Part) -> None:
    """Steps by context and side: "real" ones, and "idle" ones without attention; one list a block."""
    part.plan(len(plan.decode_contexts) * (plan.decode_blocks + IDLE_BLOCKS))
    longest = 0.0
    for index, context in enumerate(plan.decode_contexts):
        if not part.fits(2 * longest):
            part.note(f"{context} tokens: not measured, the time is spent")
            break
        begin = time.monotonic()
        blocks: dict[str, Any] = {side: {"real": [], "idle": []} for side in running}
        for side, engine in running.items():
            part.doing(f"{context} tokens, {side} is filled")
            engine.start(context + TAIL, answer=(plan.decode_blocks + IDLE_BLOCKS) * plan.decode_steps + 8)
            engine.prefill(context, "fill")
            assert [step.tokens for step in engine.step(3)] == [TAIL, 1, 1], "contexts are whole steps of a prompt"
        for mode, count in (("real", plan.decode_blocks), ("idle", IDLE_BLOCKS)):
            for turn in range(count):
                if len(blocks["infllm"][mode]) and not part.fits(0):
                    part.note(f"{context} tokens: {turn} of {count} {mode} blocks, the time is spent")
                    break
                for side, engine in in_turn(running, turn + index):
                    part.doing(f"{context} tokens, {side}, {mode} block {turn + 1}")
                    blocks[side][mode].append(engine.step(plan.decode_steps, mode))
                part.advance()
        for engine in running.values():
            engine.finish()
        part.samples[str(context)] = blocks
        longest = max(longest, time.monotonic() - begin)
