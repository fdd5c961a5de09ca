"""A selection rule at work in one layer, in the place of the operation `select`."""

from dataclasses import dataclass

import torch

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory import pages
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import reference
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Leaving, Ops
from vllm_infllm.selection import Rule
from vllm_infllm.selection.rules import UnitShape


@dataclass(frozen=True)
class LayerSelection:
    """A rule and the summaries [num_units, V, D] of a layer's units, by host unit id."""

    rule: Rule
    unit: UnitShape
    summaries: torch.Tensor

    @classmethod
    def allocate(cls, rule: Rule, memory: LayerMemory, repr_topk: int) -> "LayerSelection":
        """Reserve address space for the summaries of all units of `memory`; nothing is touched before it is used."""
        num_units, heads, head_size = memory.representatives.shape
        _, kv_heads, block_size, _ = memory.keys.shape
        unit = UnitShape(heads, kv_heads, block_size, repr_topk)
        return cls(rule, unit, pages.empty((num_units, rule.num_vectors(unit), head_size), memory.keys.dtype))

    def select(
        self, blocks: ExecutionBlocks, settings: LayerSettings, rope: RotaryTable, query: torch.Tensor
    ) -> torch.Tensor:
        """As `Ops.select`, by the scores of the rule."""

        def score(far_query: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
            return self.rule.score(far_query, self.summaries[units].float(), self.unit, settings.scale)

        return reference.select_by(score, blocks, settings, rope, query)

    def summarize(self, blocks: ExecutionBlocks, memory: LayerMemory, ops: Ops) -> None:
        """Keep the summaries of the units that `ops.seal` has just stored."""
        units = blocks.leaving[blocks.leaving[:, Leaving.IS_UNIT] == 1]
        ids = units[:, Leaving.UNIT]
        keys, _ = ops.unpack(memory.keys[ids], memory.values[ids])
        received = memory.received[units[:, Leaving.PHYSICAL]]
        for unit, key, of_tokens in zip(ids.tolist(), keys, received, strict=True):
            self.summaries[unit] = self.rule.summarize(key.transpose(0, 1).float(), of_tokens, self.unit)
