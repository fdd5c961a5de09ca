"""The plan of a step: which execution blocks the ragged batch is processed in."""

from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.requests import RequestMemory
from vllm_infllm.memory.selections import Selections, TracedRow
from vllm_infllm.ops import workspace
from vllm_infllm.ops.interface import ExecutionBlocks, Leaving

NO_UNIT = -1
"""Host unit id of a leaving row that stands for nothing."""


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

    initial: [L] int64, host unit ids of the leaving blocks that hold initial tokens, -1 for others; None if none does.
    """

    blocks: ExecutionBlocks
    initial: torch.Tensor | None
    tally: Tally = field(default_factory=Tally)
    selections: Selections | None = None
    """Where layers note what they select, if a request of the round asked for a trace."""


@dataclass
class InfLLMMetadata(AttentionMetadata):
    """A step of one KV cache group, shared by the group's layers."""

    num_tokens: int
    slot_mapping: torch.Tensor
    """[>= num_tokens] int64: where each token's key and value go in the paged cache."""
    block_table: torch.Tensor
    """[requests, blocks] int32: physical id of each block of each request; stale for freed ones."""
    spans: list[Span]
    planned: bool = False
    """Whether the connector has filled in the rounds; dummy runs stay unplanned."""
    rounds: list[Round] = field(default_factory=list)

    def plan(self, requests: list[RequestMemory], geometry: Geometry, topk: int, max_len: int) -> None:
        """Cut the spans into execution blocks; round i holds the i-th one of every span that has as many.

        requests: of the spans. max_len: longest request in tokens.
        """
        units = torch.cat([request.units for request in requests]) if requests else torch.empty(0, dtype=torch.int64)
        units = _on_device(units, self.block_table.device, "units")
        first_unit = 0
        rows_of_span = []
        for span, request in zip(self.spans, requests, strict=True):
            cuts = geometry.execution_blocks(span.start, span.end, request.prompt_len)
            rows_of_span.append([(span, request, first_unit, s, e) for s, e in cuts])
            first_unit += len(request.units)
        for number, rows in enumerate(zip_longest(*rows_of_span)):
            present = [row for row in rows if row is not None]
            self.rounds.append(_round(number, present, self.block_table, units, geometry, topk, max_len))
        self.planned = True


def _round(
    number: int,
    members: list[tuple[Span, RequestMemory, int, int, int]],
    block_table: torch.Tensor,
    units: torch.Tensor,
    geometry: Geometry,
    topk: int,
    max_len: int,
) -> Round:
    """members: (span, request, where its units begin in `units`, start and end of the execution block)."""
    rows, leaving, tables, num_chosen, most_stored, chosen, retrieved = [], [], [], 0, 0, 0, 0
    traced: list[TracedRow] = []
    longest = max(e - s for _, _, _, s, e in members)
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
    device = block_table.device
    if device.type != "cpu":
        # Launches of decode steps look the same however long the requests are, as CUDA graphs need it.
        num_chosen, most_stored = geometry.init_blocks + topk, geometry.stored_blocks(max_len)
        padding = len(members) - len(leaving) if longest == 1 else 0
        leaving += [[0, 0, NO_UNIT, 0]] * padding
        tables += [0] * padding
    on_device = _on_device(torch.tensor(leaving, dtype=torch.int64).view(-1, len(Leaving)), device, f"leaving {number}")
    table = _on_device(torch.tensor(tables, dtype=torch.int64), device, f"leaving table {number}")
    # Looked up where the block table is, so that nothing has to come back from a device.
    on_device[:, Leaving.PHYSICAL] = block_table[table, on_device[:, Leaving.BLOCK]].long()
    blocks = ExecutionBlocks(
        rows=_on_device(torch.tensor(rows, dtype=torch.int64), device, f"rows {number}"),
        block_table=block_table,
        units=units,
        leaving=on_device,
        num_chosen=num_chosen,
        longest=longest,
        most_stored=most_stored,
        host_rows=rows if longest > 1 else None,
    )
    initial = None
    if any(unit != NO_UNIT and not is_unit for _, _, unit, is_unit in leaving):
        initial = on_device[:, Leaving.UNIT].masked_fill(on_device[:, Leaving.IS_UNIT] == 1, -1)
    return Round(blocks, initial, tally, Selections(traced) if traced else None)


def _on_device(tensor: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
    """A tensor of the plan where the operations want it; copied without waiting, always to the same place."""
    if device.type == "cpu":
        return tensor
    kept = workspace.take(f"plan: {name}", tuple(tensor.shape), tensor.dtype, device)
    return kept.copy_(tensor.pin_memory(), non_blocking=True)


class InfLLMMetadataBuilder(AttentionMetadataBuilder[InfLLMMetadata]):
    """Collects the spans of a batch; the connector completes them into a plan (see memory/connector.py)."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:  # type: ignore[no-untyped-def]
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> InfLLMMetadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        # Exact here: the upper bound differs from the length only with speculative decoding, which is refused.
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        spans = [
            Span(
                offset=starts[i],
                start=lengths[i] - (starts[i + 1] - starts[i]),
                end=lengths[i],
                table=i,
            )
            for i in range(common.num_reqs)
            if starts[i + 1] > starts[i]
        ]
        return InfLLMMetadata(
            num_tokens=starts[common.num_reqs],
            slot_mapping=common.slot_mapping,
            block_table=common.block_table_tensor,
            spans=spans,
        )
