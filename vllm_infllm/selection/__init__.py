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

RuleName = Literal["mean", "best", "average", "bounds", "zscore", "peak"]


@dataclass(frozen=True)
class Rule:
    """A selection rule other than the paper's.

    num_vectors: (H, KH, repr_topk) to V, the vectors of a summary.
    summarize: (keys [B, KH, D] un-rotated, received [H, B], repr_topk) to the summary [V, D]; float32.
    score: (far queries [T, H, D] of an execution block, summaries [U, V, D], scale of the logits) to [U]; float32. The
        units with the highest scores are retrieved, on equal scores the lower one.
    """

    num_vectors: Callable[[int, int, int], int]
    summarize: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    score: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


RULES: dict[RuleName, Rule] = {
    "best": Rule(rules.representatives_of_heads, rules.representatives, rules.best),
    "average": Rule(rules.one_of_kv_heads, rules.average_key, rules.average),
    "bounds": Rule(rules.two_of_kv_heads, rules.least_and_greatest, rules.bounds),
    "zscore": Rule(rules.representatives_of_heads, rules.representatives, rules.zscore),
    "peak": Rule(rules.representatives_of_heads, rules.representatives, rules.peak),
}
assert {"mean", *RULES} == set(get_args(RuleName))


def load(name: RuleName) -> Rule | None:
    """The rule of a name; None for the paper's, which the operations run themselves."""
    return None if name == "mean" else RULES[name]
