"""The registered backend and the attention of one layer."""

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_infllm import ops
from vllm_infllm.attention.aside import Aside
from vllm_infllm.attention.metadata import InfLLMMetadata, InfLLMMetadataBuilder
from vllm_infllm.attention.planner import Limits, Round
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.config import KEY, ConfigError, InfLLMConfig
from vllm_infllm.memory.residency import Residency, Strategy
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import workspace
from vllm_infllm.ops.interface import LayerSettings, Leaving
from vllm_infllm.selection.layer import LayerSelection

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

    memory: LayerMemory | None = None
    """None until the paged cache is allocated: vLLM tries CUDA graphs before, to see how much memory they take."""
    rope: RotaryTable
    residency: Residency | None
    """If max_cached_blocks is set: which unit is in which slot."""
    selection: LayerSelection | None = None
    """If another selection rule than the paper's is set."""
    number: int
    """Of the layer among those that run InfLLM, in the order of the model."""

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
            local_attention=self.config.local_attention,
        )
        assert self.config.ops  # the effective configuration names them
        self.ops = ops.load(self.config.ops)
        self.aside = Aside()

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
        if attn_metadata is None or not attn_metadata.planned or self.memory is None:
            return output.zero_()  # profiling and warm-up: no request, nothing to attend to
        n = attn_metadata.num_tokens
        self.ops.write(kv_cache, key[:n], value[:n], attn_metadata.slot_mapping[:n])
        for round_ in attn_metadata.rounds:
            self._process(round_, query, kv_cache, output)
        return output

    def warm_up(self, kv_cache: torch.Tensor, limits: Limits) -> None:
        """Run a step of a prompt and one of an answer in which no request has a token, so that kernels are compiled
        before the first request comes."""
        token = {"dtype": kv_cache.dtype, "device": kv_cache.device}
        query = torch.zeros((1, self.num_heads, self.head_size), **token)
        key = torch.zeros((1, self.num_kv_heads, self.head_size), **token)
        no_slot = torch.full((1,), -1, dtype=torch.int64, device=kv_cache.device)
        table = torch.zeros((1, 1), dtype=torch.int32, device=kv_cache.device)
        for longest in (self.config.exc_block_size, 1):
            step = InfLLMMetadata(1, no_slot, table, [], limits, num_requests=1)
            step.plan_nothing(self.geometry, self.config.topk, longest)
            self.forward(None, query, key, key, kv_cache, step, torch.empty_like(query))

    def _process(self, round_: Round, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> None:
        """One execution block of each of several requests: select, resolve, attend, accumulate, seal."""
        ops, blocks, memory, slots, mass = self.ops, round_.blocks, self.memory, None, None
        assert memory is not None
        self.aside.wait(kv_cache.device)
        if self.selection:
            chosen = self.selection.select(blocks, self.settings, self.rope, query)
        else:
            chosen = ops.select(blocks, self.settings, self.rope, query, memory.representatives)
        if round_.selections:
            round_.selections.note(self.number, chosen)
        if self.residency:
            slots, missing = ops.resolve(blocks, self.settings, self.residency, chosen)
            ops.gather(memory, missing, slots, kv_cache)
            if self.residency.strategy is Strategy.LRU_S:
                mass = workspace.take("mass", tuple(chosen.shape), torch.float32, chosen.device)
        ops.attend(blocks, self.settings, self.rope, query, kv_cache, memory, chosen, slots, output, mass)
        if self.residency and mass is not None:
            ops.attended(blocks, self.settings, self.residency, chosen, mass)
        if len(blocks.leaving):
            with self.aside.run(kv_cache.device):
                self._seal(round_, kv_cache)

    def _seal(self, round_: Round, kv_cache: torch.Tensor) -> None:
        """Move the blocks that have left every window into the store."""
        leaving = round_.blocks.leaving
        assert self.memory is not None
        self.ops.seal(round_.blocks, self.settings, self.rope, kv_cache, self.memory)
        if self.selection:
            self.selection.sealed(round_.blocks)
        if self.residency and round_.initial is not None:
            # Kept blocks of initial tokens are slots from now on: their keys lie there un-rotated, too.
            self.ops.gather(self.memory, round_.initial, leaving[:, Leaving.PHYSICAL], kv_cache)
