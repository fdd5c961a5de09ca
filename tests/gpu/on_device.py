"""Runs the tests of the kernels on a GPU.

Tests hold their tensors on the CPU, where the reference reads them. Here each operation gets copies of its arguments in
the GPU's memory, what it keeps on the host in pinned memory, and what it wrote is copied back.
"""

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.gpu import build_cuda
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import workspace

DEVICE = "cuda"
ON_HOST = ("keys", "values")
"""Fields of LayerMemory."""


def move() -> None:
    """Let the operations run on the GPU; before a test module imports them."""
    build_cuda.load(Path(os.environ.get(build_cuda.EXTENSION_VARIABLE) or build_cuda.build_real()))
    from vllm_infllm.ops import cuda

    _move(cuda, "topk", "resolve", "gather", "attended")
    ops = importlib.import_module("vllm_infllm.ops.triton")
    _move(ops, "write", "select", "score", "seal", "attend")
    _move(ops.rotate, "far_queries")
    _move(sys.modules["vllm_infllm.ops.triton.attend"], "attend")
    take = workspace.take
    # What tests take from the workspace of the CPU, to look at it or to poison it, is the GPU's.
    workspace.take = lambda name, shape, dtype, device: take(name, shape, dtype, torch.device(DEVICE))


def _move(module: ModuleType, *names: str) -> None:
    for name in names:
        setattr(module, name, _on_device(getattr(module, name)))


class _Copies:
    """Copies of tensors, those of one storage in one storage, with offsets and strides as they are."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, value: Any, on_host: bool = False) -> Any:
        """A tensor, or whatever holds tensors."""
        if isinstance(value, torch.Tensor):
            return value if value.is_cuda else self._of_tensor(value, on_host)
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(self.of(item) for item in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            hosted = ON_HOST if isinstance(value, LayerMemory) else ()
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **{n: self.of(x, n in hosted) for n, x in fields.items()})
        return value

    def _of_tensor(self, tensor: torch.Tensor, on_host: bool) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            all_bytes = torch.empty(0, dtype=torch.uint8).set_(storage)
            copy = all_bytes.pin_memory() if on_host else all_bytes.to(DEVICE)
            self._storages[storage.data_ptr()] = all_bytes, copy
        _, copy = self._storages[storage.data_ptr()]
        same = torch.empty(0, dtype=tensor.dtype, device=copy.device)
        return same.set_(copy.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    def bring_back(self) -> None:
        torch.cuda.synchronize()
        for original, copy in self._storages.values():
            original.copy_(copy)


def _on_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def moved(*args: Any, **kwargs: Any) -> Any:
        copies = _Copies()
        there = [copies.of(arg) for arg in args], {name: copies.of(arg) for name, arg in kwargs.items()}
        result = operation(*there[0], **there[1])
        if not copies._storages:  # called by another operation, which brings back
            return result
        copies.bring_back()
        return _on_cpu(result)

    return moved


def _on_cpu(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_on_cpu(item) for item in result)
    return result.cpu() if isinstance(result, torch.Tensor) else result
