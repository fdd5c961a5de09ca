"""Hit rates of the residency cache on a long real text, by policy and size.

The selections of every layer are recorded once, with the attention that each unit received; they do not depend on what
is resident. The policies then run over the record. Writes its table into docs/performance.md.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import ENV
from benchmarks.tables import fill_in
from vllm_infllm.memory.residency import Residency, Strategy
from vllm_infllm.ops import reference
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings
from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.tables import Table

PAGE = Path("docs/performance.md")
STRATEGIES = ("lru", "fifo", "lru-s")
DECAY = 0.1


@dataclass(frozen=True)
class Use:
    """What one execution block of the request chose in one layer."""

    layer: int
    blocks: ExecutionBlocks
    settings: LayerSettings
    chosen: torch.Tensor
    mass: torch.Tensor

    @property
    def decodes(self) -> bool:
        return self.blocks.longest == 1


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residency", description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="of the prompt (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=512, help="decoded tokens (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 24, 32, 64], help="max_cached_blocks")
    args = parser.parse_args(argv)
    uses = record(args.tokens, args.answer)
    units = max(use.blocks.most_stored for use in uses) - uses[0].settings.init_blocks
    table = Table(
        "Units found resident",
        ("policy", *(f"{size} slots, {phase}" for size in args.sizes for phase in ("prompt", "answer"))),
        [
            [policy, *(f"{rate:.0%}" for size in args.sizes for rate in rates(uses, policy, size))]
            for policy in STRATEGIES
        ],
    )
    heading = f"{args.tokens:,} tokens of prompt, {args.answer} of answer, {units} units, topk {uses[0].settings.topk}:"
    PAGE.write_text(fill_in(PAGE.read_text(), {"residency": f"{heading}\n\n{table.markdown()}"}))
    print(f"{heading}\n{table.markdown()}")


def record(tokens: int, answer: int) -> list[Use]:
    """Run the demo model over the text, with its attention mass kept (strategy lru-s)."""
    os.environ.update(ENV)
    from vllm import LLM, SamplingParams

    from vllm_infllm.ops import cpu

    uses: list[Use] = []
    layers: dict[int, int] = {}
    attended = cpu.attended

    def noted(
        blocks: ExecutionBlocks, settings: LayerSettings, residency: Residency, chosen: torch.Tensor, mass: torch.Tensor
    ) -> None:
        layer = layers.setdefault(residency.unit.data_ptr(), len(layers))
        uses.append(Use(layer, blocks, settings, chosen.clone(), mass.clone()))
        attended(blocks, settings, residency, chosen, mass)

    cpu.attended = noted
    llm = LLM(
        str(demo_model()),
        dtype=demo_dtype(),
        max_model_len=tokens + answer,
        max_num_seqs=1,
        max_num_batched_tokens=2048,
        enforce_eager=True,
        attention_backend="infllm",
        additional_config={"infllm": {"max_cached_blocks": 16, "cache_strategy": "lru-s", "score_decay": DECAY}},
    )
    params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    llm.generate({"prompt_token_ids": _text(llm, tokens)}, params)
    return uses


def _text(llm: Any, tokens: int) -> list[int]:
    """The beginning of Python's language reference."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    ids = llm.get_tokenizer().encode("\n".join(topics[topic] for topic in sorted(topics)))
    if len(ids) < tokens:
        sys.exit(f"the text has {len(ids)} tokens: lower --tokens")
    return list(ids[:tokens])


def rates(uses: Sequence[Use], policy: str, size: int) -> Iterator[float]:
    """Share of the wanted units that are resident, in the prompt's execution blocks and in decoding."""
    layers = 1 + max(use.layer for use in uses)
    caches = Residency.allocate(Strategy.of(policy), DECAY, 1, layers, size, torch.device("cpu"))
    found = {False: torch.zeros(2), True: torch.zeros(2)}
    for use in uses:
        cache = caches.layer(use.layer)
        before = cache.counts[0, :2].clone()
        reference.resolve(use.blocks, use.settings, cache, use.chosen)
        reference.attended(use.blocks, use.settings, cache, use.chosen, use.mass)
        found[use.decodes] += cache.counts[0, :2] - before
    for decodes in (False, True):
        hits, misses = found[decodes].tolist()
        yield hits / (hits + misses)


if __name__ == "__main__":
    main()
