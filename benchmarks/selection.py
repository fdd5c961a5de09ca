"""Selection rules compared: pass keys found, and the share of layers that retrieve the unit that holds the key.

SmolLM2-135M, the same prompts and the same number of attended tokens for every rule; in one engine, whose layers change
their rule between prompts. What is measured goes to docs/selection.json at once, and a rule that is there already is
not run again; the table goes into docs/selection.md.
"""

import argparse
import json
import os
import pydoc_data.topics
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal, get_args

from rich.progress import track

from benchmarks.engine import ENV
from benchmarks.tables import fill_in
from vllm_infllm import selection
from vllm_infllm.memory.trace import ARGUMENT, Trace
from vllm_infllm.tools.eval.haystack import plays
from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.passkey import FILLER, NEEDLE
from vllm_infllm.tools.sides import engine_arguments
from vllm_infllm.tools.tables import Table

PAGE, SAMPLES = Path("docs/selection.md"), Path("docs/selection.json")
TextName = Literal["grass", "plays", "manual"]
N_LOCAL, TOPK = 1024, 8
QUESTION = "\nThe pass key is"
ANSWER_TOKENS = 6
RULES: tuple[selection.RuleName, ...] = get_args(selection.RuleName)


@dataclass(frozen=True)
class Sample:
    """One prompt under one rule.

    layers: share of the layers that chose a unit with a part of the key sentence, at the last token of the prompt.
    """

    rule: str
    text: str
    length: int
    depth: float
    key: int
    answer: str
    found: bool
    layers: float
    seconds: float

    @property
    def case(self) -> tuple[str, str, int, float]:
        return self.rule, self.text, self.length, self.depth


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--texts", nargs="+", choices=get_args(TextName), default=["plays", "manual"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.2, 0.5, 0.7])
    args = parser.parse_args(argv)
    samples = [Sample(**sample) for sample in json.loads(SAMPLES.read_text())] if SAMPLES.exists() else []
    cases = [(r, t, n, d) for n in args.lengths for r in args.rules for d in args.depths for t in args.texts]
    missing = [case for case in cases if case not in {sample.case for sample in samples}]
    if missing:
        engine = _start(max(args.lengths) + ANSWER_TOKENS)
        for case in track(missing, "Prompts"):
            samples.append(_ask(engine, *case))
            SAMPLES.write_text(json.dumps([asdict(sample) for sample in samples], indent=1) + "\n")
    PAGE.write_text(fill_in(PAGE.read_text(), {"selection": table(samples).markdown()}))


def table(samples: Sequence[Sample]) -> Table:
    """One row a rule, one column a text and length: keys found, and the mean share of layers."""
    columns = sorted({(s.text, s.length) for s in samples})
    rows = []
    for rule in RULES:
        row: list[str] = [f"`{rule}`"]
        for column in columns:
            ours = [s for s in samples if (s.rule, s.text, s.length) == (rule, *column)]
            row.append(
                f"{sum(s.found for s in ours)} of {len(ours)}, {mean(s.layers for s in ours):.0%}" if ours else ""
            )
        ours = [s for s in samples if s.rule == rule]
        rows.append([*row, f"{mean(s.seconds for s in ours):.0f}" if ours else ""])
    heads = [f"{text}, {length:,} tokens" for text, length in columns]
    return Table("Pass keys found, and layers that retrieve the key's unit", ("rule", *heads, "seconds a prompt"), rows)


def _start(max_model_len: int) -> Any:
    """An engine in this process, with host memory for the rule that keeps most."""
    os.environ.update(ENV, VLLM_LOGGING_LEVEL="ERROR")
    from vllm import LLM

    infllm = {"n_local": N_LOCAL, "topk": TOPK, "selection": "peak"}
    return LLM(**engine_arguments("infllm", str(demo_model()), demo_dtype(), max_model_len, infllm))


def _ask(engine: Any, rule: str, text: TextName, length: int, depth: float) -> Sample:
    from vllm import SamplingParams

    from vllm_infllm.selection.layer import LayerSelection
    from vllm_infllm.worker.base import infllm_impls

    the_rule = selection.load(rule)  # type: ignore[arg-type]
    for impl in infllm_impls(engine.llm_engine.vllm_config).values():
        impl.selection = LayerSelection.allocate(the_rule, impl.memory, impl.config.repr_topk) if the_rule else None
    key = random.Random(f"{text} {length} {depth}").randint(10000, 99999)
    prompt, needle = _prompt(engine.get_tokenizer(), text, length, depth, key)
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, extra_args={ARGUMENT: True})
    start = time.monotonic()
    (output,) = engine.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    seconds, answer = time.monotonic() - start, output.outputs[0].text
    trace = Trace.from_json(output.kv_transfer_params[ARGUMENT])
    units = {(token - trace.n_init) // trace.block_size for token in needle}
    (last,) = (block for block in trace.blocks if block.start == len(prompt) - 1)
    share = mean(bool(units & set(of_layer)) for of_layer in last.units)
    return Sample(rule, text, length, depth, key, answer, answer.strip().startswith(str(key)), share, seconds)


def _prompt(tokenizer: Any, text: TextName, length: int, depth: float, key: int) -> tuple[list[int], range]:
    """Token ids, `length` of them, and which of them are the key sentence."""
    lines = _lines(text)
    start = random.Random(key).randrange(len(lines)) if text != "grass" else 0
    needle, question = (tokenizer.encode(part) for part in (NEEDLE.format(key=key), QUESTION))
    filler = [tokenizer.encode(line) for line in (lines[start:] + lines)[: length // 2]]
    before: list[int] = []
    for line in filler:
        before += line
        if len(before) >= depth * length:
            break
    rest = length - len(before) - len(needle) - len(question)
    after = [token for line in filler for token in line][len(before) :][:rest]
    return before + needle + after + question, range(len(before), len(before) + len(needle))


def _lines(text: TextName) -> list[str]:
    """Of a repeated filler, of Shakespeare's plays, and of the manual that Python carries."""
    if text == "grass":
        return [FILLER] * 2000
    if text == "plays":
        return list(plays())
    topics = pydoc_data.topics.topics
    return "".join(topics[topic] for topic in sorted(topics)).splitlines(keepends=True)


if __name__ == "__main__":
    main()
