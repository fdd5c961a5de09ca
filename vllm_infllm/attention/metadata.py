"""The plan of a step: which execution blocks the ragged batch is processed in."""

from dataclasses import dataclass, field

import torch
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.requests import RequestMemory, RequestTable


@dataclass
class Row:
    """The tokens [start, end) of one request that a step computes."""

    offset: int
    """Where token `start` stands in the batch."""
    start: int
    end: int
    block_table: torch.Tensor
    """[blocks] int64 on the cache's device: physical id of each of the request's blocks; stale for freed ones."""
    first_block: int
    """Physical id of the first block, which names the request."""
    request: RequestMemory | None = None
    execution_blocks: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class InfLLMMetadata(AttentionMetadata):
    """A step of one KV cache group, shared by the group's layers."""

    num_tokens: int
    slot_mapping: torch.Tensor
    """[>= num_tokens] int64: where each token's key and value go in the paged cache."""
    rows: list[Row]
    planned: bool = False
    """Whether the connector has filled in requests and execution blocks; dummy runs stay unplanned."""

    def plan(self, requests: RequestTable, geometry: Geometry) -> None:
        for row in self.rows:
            row.request = requests[row.first_block]
            row.execution_blocks = geometry.execution_blocks(row.start, row.end, row.request.prompt_len)
        self.planned = True


class InfLLMMetadataBuilder(AttentionMetadataBuilder[InfLLMMetadata]):
    """Collects the rows of a batch; the connector completes them into a plan (see memory/connector.py)."""

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
        rows = [
            Row(
                offset=starts[i],
                start=lengths[i] - (starts[i + 1] - starts[i]),
                end=lengths[i],
                block_table=common.block_table_tensor[i].long(),
                first_block=first_blocks[i],
            )
            for i in range(common.num_reqs)
            if starts[i + 1] > starts[i]
        ]
        return InfLLMMetadata(num_tokens=starts[common.num_reqs], slot_mapping=common.slot_mapping, rows=rows)
