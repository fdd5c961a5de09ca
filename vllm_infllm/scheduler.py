"""vLLM's scheduler with prefill chunks that end where results do not depend on the token budget."""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_infllm.config import KEY, InfLLMConfig

if TYPE_CHECKING:
    from vllm_infllm.memory.connector import InfLLMConnector


class _ExecutionBlockAligned:
    """Cuts prefill chunks at multiples of exc_block_size or at the end of the prompt.

    vLLM's scheduler has one place where a prefill chunk is clipped, for running and for waiting requests: the
    alignment of Mamba states. It is switched on by a flag; models with Mamba layers are refused at startup.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.need_mamba_block_aligned_split = True
        self._geometry = InfLLMConfig(**self.vllm_config.additional_config[KEY]).geometry  # type: ignore[attr-defined]

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        return self._geometry.chunk_end(start, start + num_new_tokens, request.num_tokens) - start

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """Tell the connector first: in here it is asked for traces of requests that end, and for the step's stats."""
        connector: InfLLMConnector = self.connector  # type: ignore[attr-defined]
        _, num_waiting = self.get_request_counts()  # type: ignore[attr-defined]
        connector.take_step(model_runner_output.kv_connector_output, num_waiting)
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]


class InfLLMScheduler(_ExecutionBlockAligned, Scheduler):
    """For synchronous scheduling (CPU)."""


class InfLLMAsyncScheduler(_ExecutionBlockAligned, AsyncScheduler):
    """For asynchronous scheduling (vLLM's default on accelerators)."""
