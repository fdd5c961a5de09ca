"""The worker on CUDA."""

import psutil
from vllm.v1.worker.gpu_worker import Worker

from vllm_infllm.memory.host import within_limits
from vllm_infllm.worker.base import InfLLMWorker


def host_memory() -> tuple[int, int]:
    """Bytes of host memory that a worker may use: all, and what is free."""
    memory = psutil.virtual_memory()
    return within_limits(memory.total, memory.available)


class InfLLMGPUWorker(InfLLMWorker, Worker):
    """vLLM's profiling sizes the paged cache; what InfLLM keeps beside it on the device comes out of the same sum."""

    _shares_host_memory = False

    def _host_memory(self) -> tuple[int, int]:
        return host_memory()

    def determine_available_memory(self) -> int:
        left = super().determine_available_memory() - self.plan.num_units * self.sizes.representative
        return int(left / (1 + self.sizes.received_request / self.sizes.paged_request))
