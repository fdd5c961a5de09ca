"""The registered backend and the attention of one layer."""

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_infllm.attention.metadata import InfLLMMetadata, InfLLMMetadataBuilder, Row
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.config import KEY, ConfigError, InfLLMConfig
from vllm_infllm.memory.requests import RequestMemory
from vllm_infllm.memory.residency import ResidencyCache
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import reference as ops

NAME = "INFLLM"


class InfLLMBackend(AttentionBackend):
    """`--attention-backend infllm`."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "float32"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["InfLLMImpl"]:
        return InfLLMImpl

    @staticmethod
    def get_builder_cls() -> type[InfLLMMetadataBuilder]:
        return InfLLMMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Blocks of one layer are dense: [num_blocks, KH, B, 2D].
        return (KVCacheLayout.LBHNC,)


class InfLLMImpl(AttentionImpl[InfLLMMetadata]):
    """Attention of one layer: write K and V, then for each execution block select, attend, accumulate, seal."""

    memory: LayerMemory
    rope: RotaryTable
    layer: int
    """Number of the layer among those that run InfLLM."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **other: Any,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes,
            "soft-capped attention scores": logits_soft_cap,
            "KV sharing between layers": kv_sharing_target_layer_name,
            **other,
        }
        for feature, value in unsupported.items():
            if value is not None:
                raise ConfigError(
                    f"InfLLM does not support {feature} ({value!r}), which this model uses: "
                    "remove --attention-backend infllm."
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.config = InfLLMConfig(**get_current_vllm_config().additional_config[KEY])
        self.geometry = self.config.geometry

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: InfLLMMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output [tokens, H, D]; key, value [tokens, KH, D]; kv_cache [num_blocks, KH, B, 2D]."""
        if attn_metadata is None or not attn_metadata.planned:
            return output.zero_()  # profiling and warm-up: no request, nothing to attend to
        n = attn_metadata.num_tokens
        ops.write(kv_cache, key[:n], value[:n], attn_metadata.slot_mapping[:n])
        for row in attn_metadata.rows:
            for s, e in row.execution_blocks:
                tokens = slice(row.offset + s - row.start, row.offset + e - row.start)
                output[tokens] = self._execution_block(query[tokens], s, e, row, kv_cache)
        return output

    def _execution_block(self, query: torch.Tensor, s: int, e: int, row: Row, kv_cache: torch.Tensor) -> torch.Tensor:
        assert row.request is not None
        geometry, block_size = self.geometry, self.config.block_size
        positions = torch.arange(s, e, device=query.device)
        leaves_window = e > self.config.n_local
        far_query = self.rope.far(query, positions, self.config.n_local) if leaves_window else None
        chosen = self._select(far_query, s, row.request)
        stored_key, stored_value = self._fetch(chosen, row, kv_cache)
        stored_received = self._mass_buffer(stored_key)

        paged_start = geometry.edge_start(s)
        blocks = row.block_table[paged_start // block_size : -(-e // block_size)]
        paged_key, paged_value = ops.read(kv_cache, blocks)
        output, received = ops.attend(
            query,
            s,
            paged_key[: e - paged_start],
            paged_value[: e - paged_start],
            paged_start,
            self.config.n_local,
            self.scale,
            self.rope,
            far_query,
            stored_key,
            stored_value,
            stored_received,
        )
        if stored_received is not None:
            mass = stored_received.sum(0).unflatten(0, (len(chosen), block_size)).sum(1).tolist()
            row.request.residency[self.layer].attended(dict(zip(chosen, mass, strict=True)))
        if row.request.outgrows_window:
            ops.accumulate(self.memory.received, blocks, paged_start, s, received)
            for block in range(geometry.stored_blocks(s), geometry.stored_blocks(e)):
                self._store(block, row, kv_cache)
        return output

    def _select(self, far_query: torch.Tensor | None, s: int, request: RequestMemory) -> list[int]:
        """Stored blocks to attend to: those of the initial tokens, then the selected units, both ascending."""
        stored, init = self.geometry.stored_blocks(s), self.geometry.init_blocks
        units = self.geometry.sealed_units(s)
        if units <= self.config.topk:
            return list(range(stored))
        assert far_query is not None
        ids = torch.tensor(request.units[init:stored])
        best = ops.select(ops.score(far_query, self.memory.representatives[ids]), self.config.topk)
        return [*range(init), *(init + unit for unit in best.tolist())]

    def _fetch(
        self, chosen: list[int], row: Row, kv_cache: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Un-rotated keys and values [M, KH, D] of the chosen stored blocks, from the host store or from slots."""
        assert row.request is not None
        if not chosen:
            return None, None
        if self.config.max_cached_blocks:
            return ops.read(kv_cache, self._resident(chosen, row, kv_cache))
        units = torch.tensor([row.request.units[block] for block in chosen])
        key, value = self.memory.keys[units], self.memory.values[units]
        device = kv_cache.device
        return key.to(device).transpose(1, 2).flatten(0, 1), value.to(device).transpose(1, 2).flatten(0, 1)

    def _resident(self, chosen: list[int], row: Row, kv_cache: torch.Tensor) -> torch.Tensor:
        """Physical blocks [len(chosen)] of the slots that hold the chosen stored blocks, after copying what misses."""
        assert row.request is not None
        init = self.geometry.init_blocks
        cache = row.request.residency[self.layer]
        for block, slot in cache.resolve([block for block in chosen if block >= init]):
            self._copy_to_slot(row.request.units[block], slot, row, kv_cache)
        slots = [block if block < init else cache.slot_of[block] for block in chosen]
        return row.block_table[torch.tensor(slots)]

    def _mass_buffer(self, stored_key: torch.Tensor | None) -> torch.Tensor | None:
        """[H, M] float32 for the attention that stored tokens receive, if the residency cache ranks by it."""
        if stored_key is None or not self.config.max_cached_blocks or self.config.cache_strategy != "lru-s":
            return None
        return torch.empty((self.num_heads, stored_key.shape[0]), dtype=torch.float32, device=stored_key.device)

    def _store(self, block: int, row: Row, kv_cache: torch.Tensor) -> None:
        """Move a block that has left every window into the host store; seal it if it is a unit."""
        assert row.request is not None
        unit, block_size = row.request.units[block], self.config.block_size
        physical = row.block_table[block : block + 1]
        key, value = ops.read(kv_cache, physical)
        positions = torch.arange(block * block_size, (block + 1) * block_size, device=key.device)
        key = self.rope.unrotate(key, positions)
        self.memory.keys[unit] = key.transpose(0, 1)
        self.memory.values[unit] = value.transpose(0, 1)
        if block >= self.geometry.init_blocks:
            received = self.memory.received[physical[0]]
            self.memory.representatives[unit] = ops.represent(key, received, self.config.repr_topk)
        if self.config.max_cached_blocks and block < self.config.kept_blocks:
            self._become_slot(block, row, kv_cache)

    def _become_slot(self, block: int, row: Row, kv_cache: torch.Tensor) -> None:
        """A kept block whose own tokens are stored is a slot from now on: of its initial tokens, or empty."""
        assert row.request is not None
        config = self.config
        cache = row.request.residency.setdefault(self.layer, ResidencyCache(config.cache_strategy, config.score_decay))
        if block < self.geometry.init_blocks:
            self._copy_to_slot(row.request.units[block], block, row, kv_cache)
        else:
            cache.add_slot(block)

    def _copy_to_slot(self, unit: int, slot: int, row: Row, kv_cache: torch.Tensor) -> None:
        physical = row.block_table[slot]
        kv_cache[physical, :, :, : self.head_size] = self.memory.keys[unit].to(kv_cache.device)
        kv_cache[physical, :, :, self.head_size :] = self.memory.values[unit].to(kv_cache.device)
