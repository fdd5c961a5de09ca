"""What a benchmark asks of an engine's worker: what runs there, its processor time, and other modes of a step."""

import time
from typing import Any

from benchmarks.synthetic import Mode, Synthetic


class BenchmarkWorker:
    """Methods that vLLM adds to those of its worker (`worker_extension_cls`), for `collective_rpc`."""

    model_runner: Any

    def begin_benchmark(self) -> dict[str, Any]:
        """Prepare for other modes; names of the attention backend and of InfLLM's operations, None for stock vLLM."""
        self._synthetic = Synthetic(self.model_runner)
        layers = self.model_runner.compilation_config.static_forward_context.values()
        ops = {layer.impl.ops.describe() for layer in layers if hasattr(layer.impl, "ops")}
        backends = {layer.attn_backend.get_name() for layer in layers}
        return {"backend": ", ".join(backends), "ops": ", ".join(ops) or None}

    def switch(self, mode: Mode) -> None:
        """All steps from now on are run in this mode."""
        self._synthetic.mode = mode

    def processor_seconds(self) -> float:
        """That the worker has spent so far, in all its threads."""
        return time.process_time()
