"""Selection rules: which units an execution block retrieves.

`mean` is the paper's (`Ops.select`, with the representatives that `Ops.seal` makes). The others run on the CPU
platform; docs/selection.md compares them. Two score all keys of the units, where they are stored (`Ops.select_peak`).
The rest are for finding out what retrieval lacks, in plain torch: such a rule keeps a few vectors of a unit when it is
sealed, its *summary*, and scores the summaries of all units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from vllm_infllm.selection import rules
from vllm_infllm.selection.rules import UnitShape

RuleName = Literal["mean", "best", "average", "bounds", "zscore", "peak", "peak-last", "peak-repr"]


@dataclass(frozen=True)
class SummaryRule:
    """A rule that scores summaries.

    num_vectors: V, the vectors of a summary.
    summarize: (keys [B, KH, D] un-rotated, received [H, B], sizes) to the summary [V, D]; float32.
    score: (far queries [T, H, D] of an execution block, summaries [U, V, D], sizes, scale of the logits) to [U];
        float32. The units with the highest scores are retrieved, on equal scores the lower one.
    """

    num_vectors: Callable[[UnitShape], int]
    summarize: Callable[[torch.Tensor, torch.Tensor, UnitShape], torch.Tensor]
    score: Callable[[torch.Tensor, torch.Tensor, UnitShape, float], torch.Tensor]


@dataclass(frozen=True)
class PeakRule:
    """`Ops.select_peak`, by the last queries of an execution block; all of a shorter one."""

    last: int


RULES: dict[RuleName, SummaryRule | PeakRule] = {
    "best": SummaryRule(lambda unit: unit.heads * unit.repr_topk, rules.representatives, rules.best),
    "average": SummaryRule(lambda unit: unit.kv_heads, rules.average_key, rules.average),
    "bounds": SummaryRule(lambda unit: 2 * unit.kv_heads, rules.least_and_greatest, rules.bounds),
    "zscore": SummaryRule(lambda unit: unit.heads * unit.repr_topk, rules.representatives, rules.zscore),
    "peak": PeakRule(1 << 30),
    # A question, or its end and the beginning of an answer.
    "peak-last": PeakRule(32),
    "peak-repr": SummaryRule(
        lambda unit: unit.heads * unit.repr_topk, rules.representatives, rules.peak_of_representatives
    ),
}
assert {"mean", *RULES} == set(get_args(RuleName))


def load(name: RuleName) -> SummaryRule | PeakRule | None:
    """The rule of a name; None for the paper's."""
    return None if name == "mean" else RULES[name]
