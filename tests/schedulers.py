"""vLLM's scheduler as an engine with InfLLM makes it, without a model: what it would answer is made up."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests import tiny_models
from vllm_infllm.config import KEY, InfLLMConfig
from vllm_infllm.memory.manager import InfLLMManager, InfLLMSpec
from vllm_infllm.memory.plan import GIB, make_plan
from vllm_infllm.worker.base import memory_sizes


def build(model: str, fields: dict[str, Any], flags: dict[str, Any], units: int | None = None) -> Any:
    """The scheduler of an engine with this configuration, on a machine with 20 of 24 GiB of memory free.

    units: instead of the number that the memory plan gives.
    """
    args = EngineArgs(
        model, attention_backend="infllm", additional_config={KEY: fields}, skip_tokenizer_init=True, **flags
    )
    vllm_config = args.create_engine_config()
    config = InfLLMConfig(**vllm_config.additional_config[KEY])
    cache, heads = vllm_config.cache_config, vllm_config.model_config
    full = FullAttentionSpec(
        block_size=cache.block_size,
        num_kv_heads=tiny_models.COMMON["num_key_value_heads"],
        head_size=heads.get_head_size(),
        dtype=heads.dtype,
    )
    impl = SimpleNamespace(
        num_heads=tiny_models.COMMON["num_attention_heads"],
        num_kv_heads=full.num_kv_heads,
        head_size=full.head_size,
        config=config,
    )
    specs = {f"layers.{i}": InfLLMSpec.of(full, config) for i in range(2)}
    needed = memory_sizes(specs, dict.fromkeys(specs, impl), vllm_config)
    plan = make_plan(
        config,
        needed,
        vllm_config.scheduler_config.max_num_seqs,
        heads.max_model_len,
        24 * GIB,
        20 * GIB,
        cache.kv_cache_memory_bytes,
        shares_host_memory=True,
    )
    planned = {name: replace(spec, num_units=units or plan.num_units) for name, spec in specs.items()}
    cache.kv_cache_layout = "LBHNC"
    kv_cache = generate_scheduler_kv_cache_config(get_kv_cache_configs(vllm_config, [planned], [plan.paged_bytes]))
    cache.num_gpu_blocks = kv_cache.num_blocks
    return vllm_config.scheduler_config.get_scheduler_cls()(
        vllm_config=vllm_config,
        kv_cache_config=kv_cache,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=cache.block_size,
        hash_block_size=cache.block_size,
    )


def infllm_manager(scheduler: Any) -> InfLLMManager:
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    assert isinstance(manager, InfLLMManager)
    return manager


def request(request_id: str, length: int, max_tokens: int, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    params.update_from_generation_config({}, eos_token_id=1)
    return Request(request_id, [5] * length, params, None, priority=priority)


def answer(scheduler: Any, output: Any) -> ModelRunnerOutput:
    """What a model that always samples token 5 answers to a step; requests of it may have been aborted meanwhile."""
    ids = list(output.num_scheduled_tokens)
    # A step's tokens count as computed once it is scheduled.
    known = [scheduler.requests.get(i) for i in ids]
    sampled = [[5] if one is None or one.num_computed_tokens >= one.num_tokens else [] for one in known]
    return ModelRunnerOutput(ids, {i: n for n, i in enumerate(ids)}, sampled)


def assert_all_returned(scheduler: Any) -> None:
    """Every unit and every block is free; one block, the null block, is never given out."""
    manager = infllm_manager(scheduler)
    manager.pool.check_integrity()
    assert not manager.units
    assert manager.pool.num_free == manager.pool.num_units
    assert manager.block_pool.get_num_free_blocks() == manager.block_pool.num_gpu_blocks - 1
