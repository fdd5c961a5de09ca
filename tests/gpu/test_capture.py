"""A decode step on fake CUDA tensors: nothing comes back to the host, nothing is allocated, and every launch looks the
same from step to step, so that it can be captured in a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from tests.gpu import build_cuda
from tests.one_layer import Shape, make_impl
from tests.oracle import OracleConfig
from vllm_infllm.attention.metadata import InfLLMMetadata
from vllm_infllm.attention.planner import Limits, Round, Span
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.requests import RequestMemory
from vllm_infllm.memory.residency import Residency, Strategy
from vllm_infllm.memory.store import LayerMemory

build_cuda.load_for_cpu()

BLOCK, REQUESTS, MAX_LEN = 16, 3, 4096
LIMITS = Limits(MAX_LEN, REQUESTS, units=REQUESTS * MAX_LEN // BLOCK, layers=2)
SHAPE = Shape(OracleConfig(BLOCK, 16, 64, 4, 2, 32), head_size=64, rotary_dim=64, max_cached_blocks=6)
VIEWS = {"view", "slice", "select", "as_strided", "expand", "unbind", "detach", "alias", "device"}
"""Operators of torch that compute nothing."""


def planned(position: int, monkeypatch: pytest.MonkeyPatch, device: str = "meta") -> Round:
    """The round of a decode step of requests at and around a position, planned for a device that is not the host."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    spans = [Span(i, position + 7 * i, position + 7 * i + 1, i) for i in range(REQUESTS)]
    table = torch.empty((REQUESTS, MAX_LEN // BLOCK), dtype=torch.int32, device=device)
    metadata = InfLLMMetadata(REQUESTS, torch.empty(REQUESTS, device=device), table, spans, LIMITS, REQUESTS)
    units = torch.arange(MAX_LEN // BLOCK)
    requests = [RequestMemory(100, True, i, units) for i in range(REQUESTS)]
    metadata.plan(requests, SHAPE.geometry(), SHAPE.config.topk)
    (only,) = metadata.rounds
    return only


def shapes(round_: Round) -> list[Any]:
    return [getattr(x, "shape", x) for name, x in vars(round_.blocks).items() if name != "units"]


def test_plans_of_decode_steps_have_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether blocks leave a window or not, and however many units there are."""
    first = planned(200, monkeypatch)
    for position in (201, 215, 216, 3000):
        assert shapes(planned(position, monkeypatch)) == shapes(first)
    assert len(first.blocks.leaving) == REQUESTS


class Recorder(TorchDispatchMode):
    """Every operator of torch that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(operator))
        return operator(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Launches of Triton kernels: name, grid, and the arguments; tensors by the memory that they show."""
    made: list[Any] = []

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        shown = [_shown(arg) for arg in (*args, *kwargs.values())]
        made.append((kernel.fn.__name__, grid if not callable(grid) else grid(kwargs), shown))

    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", launch)
        yield made


def _shown(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.untyped_storage()._cdata, argument.storage_offset(), argument.shape, argument.stride()


def test_a_decode_step_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of three requests, with residency and attention mass: the second one does as the first, to the byte."""
    impl = make_impl(SHAPE, ops="triton")
    impl.ops = impl.ops.ops  # no recording of what is sealed: that would read tensors
    far_behind_the_window = planned(3000, monkeypatch)
    with FakeTensorMode(), monkeypatch.context() as patch:
        patch.setattr("vllm_infllm.ops.workspace._buffers", {})
        # A torch without CUDA has no device guard for it, which indexing asks for.
        patch.setattr(torch.Tensor, "__getitem__", lambda tensor, first: tensor.narrow(0, 0, first.stop))
        query, key, value, cache = _model_output(), _kv(), _kv(), _cache()
        impl.rope = RotaryTable(_empty((MAX_LEN, 64), torch.float32), neox=True)
        impl.memory = _memory()
        residency = Residency.allocate(Strategy.LRU_S, 0.1, REQUESTS, 1, SHAPE.max_cached_blocks, torch.device("cuda"))
        impl.residency = residency.layer(0)
        output, slots = torch.empty_like(query), _empty((REQUESTS,), torch.int64)
        metadata = _on_fake_device(far_behind_the_window, slots)
        steps = []
        for _ in range(3):
            with launches(monkeypatch) as made, Recorder() as recorder:
                impl.forward(None, query, key, value, cache, metadata, output)
            steps.append((made, recorder.operators))
    (_, _), (second, operators), (third, _) = steps
    assert second == third, "a launch depends on the step"
    launched = " ".join(name.removesuffix("_kernel") for name, _, _ in second)
    assert launched == "write mean_far_query score far_queries attend_split join sum_heads store represent"
    others = {name for name in operators if not name.startswith("vllm_infllm_cuda.")}
    computing = {name for name in others if name.split(".")[1] not in VIEWS}
    assert not computing, f"operators of torch in the decode path: {computing}"
    assert {name.split(".")[1] for name in set(operators) - others} == {"topk", "resolve", "gather", "attended"}


def _empty(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _model_output() -> torch.Tensor:
    return _empty((REQUESTS, SHAPE.heads, SHAPE.head_size))


def _kv() -> torch.Tensor:
    return _empty((REQUESTS, SHAPE.kv_heads, SHAPE.head_size))


def _cache() -> torch.Tensor:
    return _empty((64, SHAPE.kv_heads, BLOCK, 2 * SHAPE.head_size))


def _memory() -> LayerMemory:
    units = (500, SHAPE.kv_heads, BLOCK, SHAPE.head_size)
    host = [torch.empty(units, dtype=torch.bfloat16) for _ in range(2)]
    representatives = _empty((500, SHAPE.heads, SHAPE.head_size))
    return LayerMemory(*host, representatives, _empty((64, SHAPE.heads, BLOCK), torch.float32))


def _on_fake_device(round_: Round, slots: torch.Tensor) -> InfLLMMetadata:
    tensors = {name: x for name, x in vars(round_.blocks).items() if isinstance(x, torch.Tensor)}
    on_device = {name: _empty(tuple(x.shape), x.dtype) for name, x in tensors.items()}
    blocks = replace(round_.blocks, **on_device)
    return InfLLMMetadata(REQUESTS, slots, blocks.block_table, [], LIMITS, REQUESTS, True, [Round(blocks, None)])
