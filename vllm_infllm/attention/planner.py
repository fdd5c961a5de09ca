"""The plan of a step: which execution blocks the ragged batch is processed in."""

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.requests import RequestMemory
from vllm_infllm.memory.selections import Selections, TracedRow
from vllm_infllm.ops import workspace
from vllm_infllm.ops.interface import ExecutionBlocks, Leaving, Row

NO_UNIT = -1
"""Host unit id of a leaving row that stands for nothing."""


@dataclass(frozen=True)
class Limits:
    """The most that plans of one KV cache group can hold.

    On a GPU the plans of decode steps lie in tensors of these sizes, always the same: CUDA graphs read them there.
    """

    max_len: int
    """Tokens of the longest request."""
    requests: int = 1
    units: int = 0
    layers: int = 0
    """Numbers that layers may have."""
    group: str = ""
    """A name of the group among those of the model."""


@dataclass(frozen=True)
class Span:
    """The tokens [start, end) of one request that a step computes."""

    offset: int
    """Where token `start` stands in the batch."""
    start: int
    end: int
    table: int
    """Row of the block table."""


@dataclass(frozen=True)
class Tally:
    """What a round does in each layer, in blocks."""

    stored: int = 0
    """Blocks moved to the store,"""
    sealed: int = 0
    """of which so many are units."""
    chosen: int = 0
    """Stored blocks attended to, over all rows,"""
    retrieved: int = 0
    """of which so many are units."""


@dataclass(frozen=True)
class Round:
    """One execution block of each of several requests; the rounds of a step follow one another.

    initial: [L] int64, host unit ids of the leaving blocks that hold initial tokens, -1 for others; None if none does
        (in a decode step on a GPU, never None: a CUDA graph does the same in each of its steps).
    """

    blocks: ExecutionBlocks
    initial: torch.Tensor | None
    tally: Tally = field(default_factory=Tally)
    selections: Selections | None = None
    """Where layers note what they select, if a request of the round asked for a trace, or a CUDA graph is captured."""


_Member = tuple[Span, RequestMemory, int, int, int]
"""Span, request, where its units begin among all, start and end of the execution block."""


class Planner:
    """Makes the rounds of one step, and puts them where the operations want them.

    block_table, limits, num_requests: as of `InfLLMMetadata`. units: host unit ids of all its requests, in their order.
    decodes: whether every request of the step has one token.
    """

    def __init__(
        self,
        block_table: torch.Tensor,
        limits: Limits,
        num_requests: int,
        units: torch.Tensor,
        geometry: Geometry,
        topk: int,
        decodes: bool,
    ) -> None:
        self.block_table, self.limits, self.num_requests = block_table, limits, num_requests
        self.geometry, self.topk = geometry, topk
        self.on_host = _on_host(block_table.device)
        self.captured = decodes and not self.on_host
        """Whether a CUDA graph may run the step."""
        self.name = f"plan: {limits.group} {'decode ' if decodes else ''}"
        kept = self._keep(units, "units", limits.units)
        # All of it: a graph that was captured when there were none would otherwise read from no address.
        self.units = kept if self.captured else kept[: len(units)]

    def round(self, number: int, members: list[_Member]) -> Round:
        geometry, topk = self.geometry, self.topk
        rows, leaving, tables, num_chosen, most_stored, chosen, retrieved = [], [], [], 0, 0, 0, 0
        traced: list[TracedRow] = []
        longest = max((e - s for _, _, _, s, e in members), default=1)
        for span, request, first_unit, s, e in members:
            stored, edge, accumulate = geometry.stored_blocks(s), geometry.edge_start(s), int(request.outgrows_window)
            offset = span.offset + s - span.start
            rows.append([offset, s, e, edge, span.table, stored, first_unit, accumulate, request.number])
            row_chosen = min(stored, geometry.init_blocks + topk)
            num_chosen, most_stored = max(num_chosen, row_chosen), max(most_stored, stored)
            chosen, retrieved = chosen + row_chosen, retrieved + max(0, row_chosen - geometry.init_blocks)
            if request.trace_id is not None:
                sealed = request.units[geometry.init_blocks : stored]
                traced.append(TracedRow(len(rows) - 1, request.trace_id, s, e, sealed))
            for block in range(stored, geometry.stored_blocks(e)):
                leaving.append([0, block, int(request.units[block]), int(block >= geometry.init_blocks)])
                tables.append(span.table)
        tally = Tally(len(leaving), sum(is_unit for *_, is_unit in leaving), chosen, retrieved)
        if not self.on_host:
            # Launches of decode steps look the same however long the requests are, as CUDA graphs need it.
            num_chosen, most_stored = geometry.init_blocks + topk, geometry.stored_blocks(self.limits.max_len)
            if self.captured or not members:
                rows += [[0] * len(Row)] * (self.num_requests - len(rows))
                padding = len(rows) - len(leaving)
                leaving += [[0, 0, NO_UNIT, 0]] * padding
                tables += [0] * padding
        on_device = self._put(leaving, f"leaving {number}", len(Leaving))
        table = self._put(tables, f"tables {number}")
        # Looked up where the block table is, so that nothing has to come back from a device.
        on_device[:, Leaving.PHYSICAL] = self.block_table[table, on_device[:, Leaving.BLOCK]].long()
        blocks = ExecutionBlocks(
            rows=self._put(rows, f"rows {number}", len(Row)),
            block_table=self.block_table,
            units=self.units,
            leaving=on_device,
            num_chosen=num_chosen,
            longest=longest,
            most_stored=most_stored,
            host_rows=rows if longest > 1 else None,
        )
        selections = self._selections(traced, num_chosen, nobody=not members)
        return Round(blocks, self._initial(on_device, leaving), tally, selections)

    def _initial(self, leaving: torch.Tensor, on_host: list[list[int]]) -> torch.Tensor | None:
        if not self.captured and all(unit == NO_UNIT or is_unit for _, _, unit, is_unit in on_host):
            return None
        initial = leaving[:, Leaving.UNIT].masked_fill(leaving[:, Leaving.IS_UNIT] == 1, NO_UNIT)
        if not self.captured:
            return initial
        return self._kept("initial", (self.limits.requests,))[: len(initial)].copy_(initial)

    def _selections(self, traced: list[TracedRow], num_chosen: int, nobody: bool) -> Selections | None:
        # A graph notes what it selects in each of its steps, and when it is captured, nobody can have asked yet.
        if self.captured and (traced or nobody):
            kept = self._kept("chosen", (self.limits.layers, self.limits.requests, num_chosen))
            return Selections(traced, kept.fill_(NO_UNIT))
        return Selections(traced) if traced else None

    def _put(self, rows: list[Any], name: str, *columns: int) -> torch.Tensor:
        """Rows of the plan, or plain numbers, where the operations want them."""
        tensor = torch.tensor(rows, dtype=torch.int64).view(len(rows), *columns)
        return self._keep(tensor, name, self.limits.requests)[: len(rows)]

    def _keep(self, tensor: torch.Tensor, name: str, most: int) -> torch.Tensor:
        """At the beginning of a tensor that has room for `most`; copied without waiting, always to the same place."""
        if self.on_host:
            return tensor
        kept = self._kept(name, (most if self.captured else len(tensor), *tensor.shape[1:]))
        kept[: len(tensor)].copy_(tensor.pin_memory(), non_blocking=True)
        return kept

    def _kept(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return workspace.take(self.name + name, shape, torch.int64, self.block_table.device)


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu"
