"""A selection rule at work in one layer, in the place of the operation `select`."""

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory import pages
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import reference
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Leaving, Ops
from vllm_infllm.selection import PeakRule, SummaryRule
from vllm_infllm.selection.rules import UnitShape


class LayerSelection(Protocol):
    """What a layer asks of a rule."""

    def select(
        self, blocks: ExecutionBlocks, settings: LayerSettings, rope: RotaryTable, query: torch.Tensor
    ) -> torch.Tensor:
        """As `Ops.select`, by the scores of the rule."""
        ...

    def sealed(self, blocks: ExecutionBlocks) -> None:
        """`Ops.seal` has just stored the blocks that leave."""
        ...


def allocate(rule: SummaryRule | PeakRule, ops: Ops, memory: LayerMemory, repr_topk: int) -> LayerSelection:
    """Ready for a layer; of the summaries of all units, the address space is reserved."""
    if isinstance(rule, PeakRule):
        return AllKeys(rule, ops, memory)
    num_units, heads, head_size = memory.representatives.shape
    _, kv_heads, block_size, _ = memory.keys.shape
    unit = UnitShape(heads, kv_heads, block_size, repr_topk)
    summaries = pages.empty((num_units, rule.num_vectors(unit), head_size), memory.keys.dtype)
    return Summaries(rule, ops, memory, unit, summaries)


@dataclass(frozen=True)
class AllKeys:
    """A rule that reads the keys where they are stored."""

    rule: PeakRule
    ops: Ops
    memory: LayerMemory

    def select(
        self, blocks: ExecutionBlocks, settings: LayerSettings, rope: RotaryTable, query: torch.Tensor
    ) -> torch.Tensor:
        return self.ops.select_peak(blocks, settings, rope, query, self.memory.keys, self.rule.last)

    def sealed(self, blocks: ExecutionBlocks) -> None:
        """Nothing is kept beside the store."""


@dataclass(frozen=True)
class Summaries:
    """A rule and the summaries [num_units, V, D] of a layer's units, by host unit id."""

    rule: SummaryRule
    ops: Ops
    memory: LayerMemory
    unit: UnitShape
    summaries: torch.Tensor

    def select(
        self, blocks: ExecutionBlocks, settings: LayerSettings, rope: RotaryTable, query: torch.Tensor
    ) -> torch.Tensor:
        def score(far_query: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
            return self.rule.score(far_query, self.summaries[units].float(), self.unit, settings.scale)

        return reference.select_by(score, blocks, settings, rope, query)

    def sealed(self, blocks: ExecutionBlocks) -> None:
        """Keep the summaries of the new units."""
        units = blocks.leaving[blocks.leaving[:, Leaving.IS_UNIT] == 1]
        ids = units[:, Leaving.UNIT]
        keys, _ = self.ops.unpack(self.memory.keys[ids], self.memory.values[ids])
        received = self.memory.received[units[:, Leaving.PHYSICAL]]
        for unit, key, of_tokens in zip(ids.tolist(), keys, received, strict=True):
            self.summaries[unit] = self.rule.summarize(key.transpose(0, 1).float(), of_tokens, self.unit)
