"""A model as the memory plan sees it, built without its weights and without an engine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

from vllm_infllm.memory.plan import MemoryPlan
from vllm_infllm.tools.synthetic import Heads
from vllm_infllm.worker.base import ModelLayers, bind_rope, infllm_impls, is_rope


@dataclass(frozen=True)
class Blueprint:
    """What a worker knows once its model is loaded."""

    layers: ModelLayers
    weight_bytes: int
    plan: MemoryPlan
    """Of an engine that starts now: free is what is free at this moment, on a CPU less the weights."""

    @property
    def vllm_config(self) -> VllmConfig:
        return self.layers.vllm_config

    @property
    def num_layers(self) -> int:
        """Layers that run InfLLM."""
        return len(infllm_impls(self.vllm_config))

    @property
    def heads(self) -> Heads:
        """Of a layer that runs InfLLM."""
        impl = next(iter(infllm_impls(self.vllm_config).values()))
        return Heads(impl.num_heads, impl.num_kv_heads, impl.head_size)


def draw(args: EngineArgs) -> Blueprint:
    """The blueprint of the engine that `args` would start.

    Raises:
        ConfigError: for everything that would stop its startup, a request of max_model_len that can never fit among it.
        ValueError, OSError: what vLLM refuses by itself, a model that is not there among it.
    """
    vllm_config = args.create_engine_config()
    with _alone(vllm_config):
        with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
            model = initialize_model(vllm_config)
        # Their tables are computed, not loaded: what a worker checks when it extends them can be checked here.
        for module in filter(is_rope, model.modules()):
            if hasattr(module, "cos_sin_cache"):
                module.cos_sin_cache = module._compute_cos_sin_cache().to("cpu", module.cos_sin_cache.dtype)
        bind_rope(model, vllm_config)
        current_platform.update_block_size_for_backend(vllm_config)
        layers = ModelLayers.of(get_kv_cache_spec(vllm_config), vllm_config)
    weight_bytes = sum(weight.nbytes for weight in model.parameters())
    on_cpu = current_platform.is_cpu()
    total, free = _host_memory()
    free = max(0, free - weight_bytes) if on_cpu else free
    plan = layers.plan(total, free, vllm_config.cache_config.kv_cache_memory_bytes, on_cpu)
    return Blueprint(layers, weight_bytes, plan)


@contextmanager
def _alone(vllm_config: VllmConfig) -> Iterator[None]:
    """vLLM builds a model only inside a group of processes; this one is a group of its own."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, Path(folder, "store").as_uri(), 0, "gloo")
        try:
            ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            cleanup_dist_env_and_memory()


def _host_memory() -> tuple[int, int]:
    if current_platform.is_cpu():
        from vllm_infllm.worker import cpu

        return cpu.host_memory()
    from vllm_infllm.worker import gpu

    return gpu.host_memory()
