"""Sealing beside the model's stream on a GPU: units go over the link to the host while the model computes on.

Three things must not overtake a seal, and each waits for it on the device, never on the host:

- the layer's next execution block, which may select the new unit: `Aside.wait` at its beginning;
- the next step, which writes new tokens into blocks that were freed and new plans into the tensors that the seal reads:
  `wait_all` at the end of each step, before anything of the next one is in the model's stream;
- the seal itself must not overtake the attention that adds to what its tokens received: it begins with the work that
  the model's stream held when it was started.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_infllm.ops import workspace

_streams: dict[torch.device, Any] = {}


class Aside:
    """The seals of one layer. On a CPU, and while a CUDA graph is captured, they run where they are called."""

    def __init__(self) -> None:
        self._done: Any = None

    @contextmanager
    def run(self, device: torch.device) -> Iterator[None]:
        """What is done inside goes to the other stream."""
        if not _uses_stream(device):
            yield
            return
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        stream = _streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
            self._done = stream.record_event()

    def wait(self, device: torch.device) -> None:
        """The model's stream goes on when the layer's last seal is done; a CUDA graph starts when all are."""
        if self._done is not None and not workspace.capturing(device):
            torch.cuda.current_stream(device).wait_event(self._done)
        self._done = None


def wait_all() -> None:
    """The model's stream goes on when all seals are done."""
    for device, stream in _streams.items():
        torch.cuda.current_stream(device).wait_stream(stream)


def _uses_stream(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and not workspace.capturing(device)
