"""The plan of a step: which execution blocks the ragged batch is processed in."""

from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.requests import RequestMemory, RequestTable
from vllm_infllm.ops.interface import ExecutionBlocks


@dataclass(frozen=True)
class Span:
    """The tokens [start, end) of one request that a step computes."""

    offset: int
    """Where token `start` stands in the batch."""
    start: int
    end: int
    table: int
    """Row of the block table."""
    first_block: int
    """Physical id of the first block, which names the request."""


@dataclass(frozen=True)
class Round:
    """One execution block of each of several requests; the rounds of a step follow one another."""

    blocks: ExecutionBlocks
    requests: list[RequestMemory]


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

    def plan(self, requests: RequestTable, geometry: Geometry, topk: int) -> None:
        """Cut the spans into execution blocks; round i holds the i-th one of every span that has as many."""
        members = [requests[span.first_block] for span in self.spans]
        units = torch.cat([member.units for member in members]) if members else torch.empty(0, dtype=torch.int64)
        first_unit = 0
        rows_of_span = []
        for span, member in zip(self.spans, members, strict=True):
            cuts = geometry.execution_blocks(span.start, span.end, member.prompt_len)
            rows_of_span.append([(span, member, first_unit, s, e) for s, e in cuts])
            first_unit += len(member.units)
        for rows in zip_longest(*rows_of_span):
            present = [row for row in rows if row is not None]
            self.rounds.append(_round(present, self.block_table, units, geometry, topk))
        self.planned = True


def _round(
    members: list[tuple[Span, RequestMemory, int, int, int]],
    block_table: torch.Tensor,
    units: torch.Tensor,
    geometry: Geometry,
    topk: int,
) -> Round:
    """members: (span, request, where its units begin in `units`, start and end of the execution block)."""
    rows, leaving, num_chosen = [], [], 0
    for span, request, first_unit, s, e in members:
        stored, edge = geometry.stored_blocks(s), geometry.edge_start(s)
        rows.append(
            [span.offset + s - span.start, s, e, edge, span.table, stored, first_unit, int(request.outgrows_window)]
        )
        num_chosen = max(num_chosen, min(stored, geometry.init_blocks + topk))
        for block in range(stored, geometry.stored_blocks(e)):
            physical, unit = int(block_table[span.table, block]), int(request.units[block])
            leaving.append([physical, block, unit, int(block >= geometry.init_blocks)])
    blocks = ExecutionBlocks(
        rows=torch.tensor(rows, dtype=torch.int64),
        block_table=block_table,
        units=units,
        leaving=torch.tensor(leaving, dtype=torch.int64).view(-1, 4),
        num_chosen=num_chosen,
    )
    return Round(blocks, [member[1] for member in members])


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
        first_blocks = common.block_table_tensor[:, 0].tolist()
        spans = [
            Span(
                offset=starts[i],
                start=lengths[i] - (starts[i + 1] - starts[i]),
                end=lengths[i],
                table=i,
                first_block=first_blocks[i],
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
