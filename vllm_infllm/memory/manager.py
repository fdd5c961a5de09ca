"""The block manager (scheduler side): bounded blocks for each request, unit ids as it grows.

The spec is made in the worker and travels to the engine core by pickle; importing this module registers both, so that
unpickling is enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_infllm.config import InfLLMConfig
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.memory.pool import UnitPool


@dataclass(frozen=True, kw_only=True)
class InfLLMSpec(SlidingWindowSpec):
    """KV cache of a layer that runs InfLLM: a sliding window of n_local tokens and the request's kept blocks.

    A subclass of SlidingWindowSpec, because only those get an admission cap that knows of recycled blocks.
    """

    geometry: Geometry
    kept_blocks: int
    num_units: int = 0
    """Units of the host pool; filled in by the memory plan."""

    @classmethod
    def of(cls, spec: AttentionSpec, config: InfLLMConfig) -> "InfLLMSpec":
        """The InfLLM spec of a layer that vLLM gave a full-attention spec."""
        return cls(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            dtype=spec.dtype,
            # Keeps vLLM from merging these layers with sliding-window layers whose window happens to be n_local.
            dcp_sharded=False,
            sliding_window=config.n_local,
            geometry=config.geometry,
            kept_blocks=config.kept_blocks,
        )

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The bound on the blocks that one request holds, whatever its length."""
        bound = self.kept_blocks + self.geometry.window_blocks(max_in_flight_tokens)
        return min(bound, -(-max_model_len // self.block_size))

    @property
    def num_retained_tokens(self) -> int:
        """Tokens whose block-table entries the worker must not null (vLLM 0.33): all, the first block's id is the
        request's name. vLLM keeps the number in 32 bits."""
        return (1 << 31) - 1


class InfLLMManager(SlidingWindowManager):
    """Frees blocks that have been stored, gives units to a request as it grows, takes both back when it ends."""

    kv_cache_spec: InfLLMSpec

    def __init__(self, kv_cache_spec: InfLLMSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        if self.enable_caching:
            raise ValueError("InfLLM does not support prefix caching: pass --no-enable-prefix-caching.")
        if self.block_size != kv_cache_spec.geometry.block_size:
            raise ValueError(
                f"vLLM changed the block size of the InfLLM layers from {kv_cache_spec.geometry.block_size} to "
                f"{self.block_size} to match other layers of the model: set --block-size {self.block_size}."
            )
        self.geometry = kv_cache_spec.geometry
        self.pool = UnitPool(kv_cache_spec.num_units)
        self.units: dict[str, list[int]] = {}
        self.num_blocks_held = 0
        """Paged blocks that requests hold now."""
        self._new_units: dict[str, list[int]] = {}
        self._refused: dict[str, int] = {}
        self._ended: list[str] = []

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens that are stored, so that their paged blocks can go."""
        return self.geometry.edge_start(num_computed_tokens)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        stored, free = self.geometry.stored_blocks(processed_computed_tokens), self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, self.kv_cache_spec.kept_blocks, stored)
        self.num_blocks_held -= self.block_pool.get_num_free_blocks() - free

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        """As for a sliding window; more than there are when units are short, so that the request waits or another is
        preempted."""
        short = self._units_short(request_id, num_tokens)
        if short > self.pool.num_free:
            self._refused[request_id] = short
            return self.block_pool.get_num_free_blocks() + 1
        self._refused.pop(request_id, None)
        return super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        new = self.pool.take(self._units_short(request_id, num_tokens))
        self.units.setdefault(request_id, []).extend(new)
        if new:
            self._new_units.setdefault(request_id, []).extend(new)
        blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self.num_blocks_held += len(blocks)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.pool.give_back(self.units.pop(request_id, []))
        self._new_units.pop(request_id, None)
        self._refused.pop(request_id, None)
        self._ended.append(request_id)
        blocks = super().pop_blocks_for_free(request_id)
        self.num_blocks_held -= sum(not block.is_null for block in blocks)
        return blocks

    @property
    def short_of_units(self) -> bool:
        """Whether a request was refused more units than there are now."""
        return any(short > self.pool.num_free for short in self._refused.values())

    def take_new_units(self) -> dict[str, list[int]]:
        """Units given since the last call, by request."""
        new, self._new_units = self._new_units, {}
        return new

    def take_ended(self) -> list[str]:
        """Requests whose blocks and units were taken back since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def first_block(self, request_id: str) -> int:
        """Physical id of the request's first block, its name on the worker."""
        return self.req_to_blocks[request_id][0].block_id

    def blocks_held(self, request_id: str) -> int:
        """Paged blocks that the request holds now."""
        return sum(not block.is_null for block in self.req_to_blocks[request_id])

    def _units_short(self, request_id: str, num_tokens: int) -> int:
        return max(0, self.geometry.stored_blocks(num_tokens) - len(self.units.get(request_id, ())))


# Registering first would switch vLLM's own registration off.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(InfLLMSpec, InfLLMManager, uniform_type_base_spec=InfLLMSpec)
