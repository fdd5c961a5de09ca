"""Tensors that operations keep from call to call, so that a steady state allocates nothing and addresses stay fixed."""

import math

import torch

_buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
_captured: dict[int, torch.Tensor] = {}
"""Tensors that CUDA graphs use, by address: they stay even when a larger one takes their place."""


def take(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialized tensor; what was taken under the same name before shares its memory."""
    count = math.prod(shape)
    buffer = _buffers.get((name, dtype, device))
    if buffer is None or buffer.numel() < count:
        # A tensor made in inference mode, in which vLLM runs, could not be written outside of it.
        with torch.inference_mode(False):
            buffer = _buffers[name, dtype, device] = torch.empty(count, dtype=dtype, device=device)
    if capturing(device):
        _captured[buffer.data_ptr()] = buffer
    return buffer.narrow(0, 0, count).view(shape)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
