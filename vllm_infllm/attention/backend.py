"""The registered backend and the attention of one layer."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_infllm import ops
from vllm_infllm.attention.metadata import InfLLMMetadata, InfLLMMetadataBuilder, Round
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.config import KEY, ConfigError, InfLLMConfig
from vllm_infllm.memory.requests import RequestMemory
from vllm_infllm.memory.residency import ResidencyCache
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops.interface import LayerSettings, Row, gather

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
    """Attention of one layer: write K and V; for each execution block select, resolve, attend, accumulate, seal."""

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
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.config = InfLLMConfig(**get_current_vllm_config().additional_config[KEY])
        self.geometry = self.config.geometry
        self.settings = LayerSettings(
            n_local=self.config.n_local,
            init_blocks=self.geometry.init_blocks,
            topk=self.config.topk,
            repr_topk=self.config.repr_topk,
            scale=float(scale),
        )
        assert self.config.ops  # the effective configuration names them
        self.ops = ops.load(self.config.ops)

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
        self.ops.write(kv_cache, key[:n], value[:n], attn_metadata.slot_mapping[:n])
        for round_ in attn_metadata.rounds:
            self._process(round_, query, kv_cache, output)
        return output

    def _process(self, round_: Round, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> None:
        """One execution block of each of several requests: select, resolve, attend, accumulate, seal."""
        ops, blocks, slots, mass = self.ops, round_.blocks, None, None
        chosen = ops.select(blocks, self.settings, self.rope, query, self.memory.representatives)
        if self.config.max_cached_blocks:
            slots = self._resident(chosen, round_, kv_cache)
            if self.config.cache_strategy == "lru-s":
                mass = torch.empty(chosen.shape, dtype=torch.float32, device=query.device)
        ops.attend(blocks, self.settings, self.rope, query, kv_cache, self.memory, chosen, slots, output, mass)
        if mass is not None:
            self._rank(chosen, mass, round_)
        if len(blocks.leaving):
            ops.seal(blocks, self.settings, self.rope, kv_cache, self.memory)
            if self.config.max_cached_blocks:
                self._add_slots(round_, kv_cache)

    # ---- residency cache: retrieved units in slots of the request's own blocks ---------------------------------------

    def _resident(self, chosen: torch.Tensor, round_: Round, kv_cache: torch.Tensor) -> torch.Tensor:
        """Physical blocks [R, num_chosen] of the slots that hold the chosen units, after copying what misses."""
        slots = torch.full_like(chosen, -1)
        init = self.geometry.init_blocks
        for i, (units, table, cache) in enumerate(self._residency(chosen, round_)):
            for unit, slot in cache.resolve(units[init:]):
                self._copy_to_slot(unit, int(table[slot]), kv_cache)
            where = [*range(min(init, len(units))), *(cache.slot_of[unit] for unit in units[init:])]
            slots[i, : len(units)] = table[torch.tensor(where, dtype=torch.int64)].long()
        return slots

    def _rank(self, chosen: torch.Tensor, mass: torch.Tensor, round_: Round) -> None:
        """Tell the residency caches the attention that the chosen units received."""
        init = self.geometry.init_blocks
        for i, (units, _, cache) in enumerate(self._residency(chosen, round_)):
            cache.attended(dict(zip(units[init:], mass[i, init : len(units)].tolist(), strict=True)))

    def _residency(
        self, chosen: torch.Tensor, round_: Round
    ) -> Iterator[tuple[list[int], torch.Tensor, ResidencyCache]]:
        """Of each request: chosen units, those of the initial tokens first; block table; residency cache."""
        for row, units, request in zip(round_.blocks.rows.tolist(), chosen.tolist(), round_.requests, strict=True):
            table = round_.blocks.block_table[row[Row.TABLE]]
            yield [unit for unit in units if unit >= 0], table, self._cache_of(request)

    def _cache_of(self, request: RequestMemory) -> ResidencyCache:
        new = ResidencyCache(self.config.cache_strategy, self.config.score_decay)
        return request.residency.setdefault(self.layer, new)

    def _add_slots(self, round_: Round, kv_cache: torch.Tensor) -> None:
        """A kept block whose own tokens are stored is a slot from now on: of its initial tokens, or empty."""
        for row, request in zip(round_.blocks.rows.tolist(), round_.requests, strict=True):
            left = range(row[Row.STORED], self.geometry.stored_blocks(row[Row.END]))
            for block in (block for block in left if block < self.config.kept_blocks):
                if block < self.geometry.init_blocks:
                    physical = int(round_.blocks.block_table[row[Row.TABLE], block])
                    self._copy_to_slot(int(request.units[block]), physical, kv_cache)
                else:
                    self._cache_of(request).add_slot(block)

    def _copy_to_slot(self, unit: int, physical: int, kv_cache: torch.Tensor) -> None:
        gather(self.memory, torch.tensor([unit]), kv_cache, torch.tensor([physical]))
