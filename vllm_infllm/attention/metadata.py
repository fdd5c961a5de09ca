"""What vLLM builds of a step, and the connector completes into its plan (planner.py)."""

from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_infllm.attention.planner import Limits, Planner, Round, Span
from vllm_infllm.config import KEY, InfLLMConfig
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.requests import RequestMemory

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


@dataclass
class InfLLMMetadata(AttentionMetadata):
    """A step of one KV cache group, shared by the group's layers."""

    num_tokens: int
    slot_mapping: torch.Tensor
    """[>= num_tokens] int64: where each token's key and value go in the paged cache."""
    block_table: torch.Tensor
    """[requests, blocks] int32: physical id of each block of each request; stale for freed ones."""
    spans: list[Span]
    limits: Limits
    num_requests: int = 0
    """With those that only fill up a CUDA graph."""
    planned: bool = False
    """Whether the connector has filled in the rounds; dummy runs stay unplanned."""
    rounds: list[Round] = field(default_factory=list)

    def plan(self, requests: list[RequestMemory], geometry: Geometry, topk: int) -> None:
        """Cut the spans into execution blocks; round i holds the i-th one of every span that has as many.

        requests: of the spans.
        """
        units = torch.cat([request.units for request in requests]) if requests else torch.empty(0, dtype=torch.int64)
        first_unit = 0
        rows_of_span = []
        for span, request in zip(self.spans, requests, strict=True):
            cuts = geometry.execution_blocks(span.start, span.end, request.prompt_len)
            rows_of_span.append([(span, request, first_unit, s, e) for s, e in cuts])
            first_unit += len(request.units)
        decodes = all(span.end - span.start == 1 for span in self.spans)
        planner = Planner(self.block_table, self.limits, self.num_requests, units, geometry, topk, decodes)
        for number, rows in enumerate(zip_longest(*rows_of_span)):
            self.rounds.append(planner.round(number, [row for row in rows if row is not None]))
        self.planned = True

    def plan_nothing(self, geometry: Geometry, topk: int, longest: int) -> None:
        """One round in which no request has a token, for execution blocks of at most `longest` tokens: what is launched
        for it can be compiled, or captured."""
        units = torch.empty(0, dtype=torch.int64)
        planner = Planner(self.block_table, self.limits, self.num_requests, units, geometry, topk, longest == 1)
        nothing = planner.round(0, [])
        blocks = replace(
            nothing.blocks, longest=longest, host_rows=nothing.blocks.rows.tolist() if longest > 1 else None
        )
        self.rounds = [replace(nothing, blocks=blocks)]
        self.planned = True


class InfLLMMetadataBuilder(AttentionMetadataBuilder[InfLLMMetadata]):
    """Collects the spans of a batch; the connector completes them into a plan (see memory/connector.py)."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:  # type: ignore[no-untyped-def]
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = InfLLMConfig(**vllm_config.additional_config[KEY])
        self.limits = Limits(
            max_len=vllm_config.model_config.max_model_len,
            requests=vllm_config.scheduler_config.max_num_seqs,
            units=getattr(kv_cache_spec, "num_units", 0),
            layers=len(vllm_config.compilation_config.static_forward_context),
            group=layer_names[0],
        )

    @classmethod
    def get_cudagraph_support(cls, vllm_config: "VllmConfig", kv_cache_spec: "KVCacheSpec") -> AttentionCGSupport:
        """Decode steps only: the rounds of a prompt depend on its length. The reference reads tensors on the host."""
        captures = vllm_config.additional_config[KEY]["ops"] == "triton"
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if captures else AttentionCGSupport.NEVER

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
            limits=self.limits,
            num_requests=common.num_reqs,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> InfLLMMetadata:
        """A step in which no request has a token, planned, since no connector plans it."""
        metadata = self.build(0, common_attn_metadata)
        metadata.spans = []
        metadata.plan_nothing(self.config.geometry, self.config.topk, longest=1)
        return metadata
