"""Selection rules: which units an execution block retrieves, by what was kept of each.

`mean` is the paper's and part of the operations (ops/interface.py: `seal` makes its representatives, `select` scores
them). The others are for finding out what retrieval lacks: plain torch, on the CPU platform. A rule keeps a few vectors
of a unit when it is sealed, its *summary*, and scores the summaries of all units; docs/selection.md compares them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from vllm_infllm.selection import rules
from vllm_infllm.selection.rules import UnitShape

RuleName = Literal["mean", "best", "average", "bounds", "zscore", "peak", "peak-last", "peak-repr"]


@dataclass(frozen=True)
class Rule:
    """A selection rule other than the paper's.

    num_vectors: V, the vectors of a summary.
    summarize: (keys [B, KH, D] un-rotated, received [H, B], sizes) to the summary [V, D]; float32.
    score: (far queries [T, H, D] of an execution block, summaries [U, V, D], sizes, scale of the logits) to [U];
        float32. The units with the highest scores are retrieved, on equal scores the lower one.
    """

    num_vectors: Callable[[UnitShape], int]
    summarize: Callable[[torch.Tensor, torch.Tensor, UnitShape], torch.Tensor]
    score: Callable[[torch.Tensor, torch.Tensor, UnitShape, float], torch.Tensor]


RULES: dict[RuleName, Rule] = {
    "best": Rule(lambda unit: unit.heads * unit.repr_topk, rules.representatives, rules.best),
    "average": Rule(lambda unit: unit.kv_heads, rules.average_key, rules.average),
    "bounds": Rule(lambda unit: 2 * unit.kv_heads, rules.least_and_greatest, rules.bounds),
    "zscore": Rule(lambda unit: unit.heads * unit.repr_topk, rules.representatives, rules.zscore),
    "peak": Rule(lambda unit: unit.kv_heads * unit.block_size, rules.all_keys, rules.peak),
    "peak-last": Rule(lambda unit: unit.kv_heads * unit.block_size, rules.all_keys, rules.peak_of_last),
    "peak-repr": Rule(lambda unit: unit.heads * unit.repr_topk, rules.representatives, rules.peak_of_representatives),
}
assert {"mean", *RULES} == set(get_args(RuleName))


def load(name: RuleName) -> Rule | None:
    """The rule of a name; None for the paper's, which the operations run themselves."""
    return None if name == "mean" else RULES[name]
