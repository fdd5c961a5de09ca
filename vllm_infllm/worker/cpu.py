"""The worker on CPU."""

from typing import Any

from vllm.config import VllmConfig
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_infllm.memory.host import within_limits
from vllm_infllm.worker.base import InfLLMWorker


def host_memory() -> tuple[int, int]:
    """Bytes of host memory that a worker may use: all, and what is free."""
    # vLLM binds the worker to the memory node of its first core; limits of a container are taken into account.
    node = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
    return within_limits(node.total_memory, node.available_memory)


class InfLLMCPUWorker(InfLLMWorker, CPUWorker):
    """Paged cache and host pool share the machine's memory, so the plan sizes both."""

    _shares_host_memory = True

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        cache = vllm_config.cache_config
        self._given_paged_bytes = cache.kv_cache_memory_bytes
        # Without a size, vLLM 0.32 wants 92% of the machine's memory to be free, and then takes it. Any size says
        # that the cache is not to be sized by that; the plan replaces it before it is used.
        cache.kv_cache_memory_bytes = cache.kv_cache_memory_bytes or 1
        super().__init__(vllm_config, *args, **kwargs)

    def _host_memory(self) -> tuple[int, int]:
        return host_memory()

    def _user_paged_bytes(self) -> int | None:
        return self._given_paged_bytes

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Without the generators of requests whose prompt is not complete; what is sampled for them is thrown away.

        vLLM would set those back afterwards, which generators on a CPU cannot: a seed with a prompt of several chunks
        would end the engine. Here they are not advanced at all, so that answers do not depend on chunks either.
        """
        runner = self.model_runner
        generators, unfinished = runner.input_batch.generators, runner.discard_request_mask.np
        held = {index: generators.pop(index) for index in list(generators) if unfinished[index]}
        try:
            return super().sample_tokens(*args, **kwargs)
        finally:
            generators.update(held)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        self.vllm_config.cache_config.kv_cache_memory_bytes = self.plan.paged_bytes
        return specs
