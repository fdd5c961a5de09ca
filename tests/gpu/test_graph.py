"""A CUDA graph of a decode step, played on the CPU: what was launched while it was captured is launched again, with the
same arguments, whatever the steps are that it stands for."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from tests.gpu import build_cuda
from tests.one_layer import Layer, Sequence, Shape
from tests.oracle import OracleConfig
from vllm_infllm.attention import planner
from vllm_infllm.attention.metadata import InfLLMMetadata
from vllm_infllm.memory.selections import Selections, TracedRow

pytestmark = pytest.mark.usefixtures("one_thread")

build_cuda.load_for_cpu()

CONFIG = OracleConfig(block_size=16, n_init=16, n_local=64, topk=2, repr_topk=2, exc=32)


class Graph:
    """Of a decode step of `num_requests` requests in one layer."""

    def __init__(self, layer: Layer, num_requests: int) -> None:
        shape, self.num_requests, layer.impl.number = layer.shape, num_requests, 0
        self.query, self.output = (torch.zeros(num_requests, shape.heads, shape.head_size) for _ in range(2))
        self.key, self.value = (torch.zeros(num_requests, shape.kv_heads, shape.head_size) for _ in range(2))
        self.slots = torch.full((num_requests,), -1)
        self.table = torch.zeros((num_requests, 64), dtype=torch.int32)
        step = InfLLMMetadata(num_requests, self.slots, self.table, [], layer.limits, num_requests)
        step.plan_nothing(shape.geometry(), shape.config.topk, longest=1)
        self.launches: list[Callable[[], Any]] = []
        with pytest.MonkeyPatch.context() as patch:
            self._note(patch, InterpretedFunction, "run")
            self._note(patch, Selections, "note")
            for name in ("topk", "resolve", "gather", "attended"):
                self._note(patch, torch.ops.vllm_infllm_cuda, name)
            layer.impl.forward(None, self.query, self.key, self.value, layer.cache, step, self.output)
        assert self.launches

    def _note(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        launch = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.launches.append(lambda: launch(*args, **kwargs))
            return launch(*args, **kwargs)

        patch.setattr(owner, name, noted)

    def replay(self, query: Tensor, key: Tensor, value: Tensor, slots: Tensor, table: Tensor, output: Tensor) -> None:
        count = len(query)
        self.slots.fill_(-1)
        for kept, new in [(self.query, query), (self.key, key), (self.value, value), (self.slots, slots)]:
            kept[:count] = new
        self.table[:count, : table.shape[1]] = table
        for launch in self.launches:
            launch()
        output[:] = self.output[:count]


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans are those for a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(planner, "_on_host", lambda device: False)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr("vllm_infllm.ops.workspace._buffers", {})
        yield


@pytest.mark.usefixtures("no_host")
@pytest.mark.parametrize("slots, strategy", [(0, "lru"), (3, "lru-s")], ids=["in place", "from slots"])
def test_a_graph_computes_what_its_steps_do(slots: int, strategy: str) -> None:
    """Requests that come and go, shorter and longer than the window; initial blocks and units that leave it; prompts
    between the steps, whose larger tensors take the place of the graph's.
    """
    shape = Shape(CONFIG, max_cached_blocks=slots, cache_strategy=strategy, head_size=32, rotary_dim=32)
    eager, replayed = (Layer(shape, 80, 80, seed=1, ops="triton") for _ in range(2))
    graph = Graph(replayed, 3)
    for layer in (eager, replayed):
        a, b, c = (
            Sequence.random(shape, length, prompt, seed=prompt) for length, prompt in [(120, 60), (60, 6), (210, 170)]
        )
        layer.step([(a, 60), (b, 6)])
        for _ in range(20):
            layer.step([(a, 1), (b, 1)], graph if layer is replayed else None)
        layer.step([(c, 170), (a, 1)])
        for _ in range(12):
            layer.step([(c, 1), (b, 1), (a, 1)], graph if layer is replayed else None)
        layer.finish(b)
        for _ in range(4):
            layer.step([(a, 1), (c, 1)], graph if layer is replayed else None)
        outputs = torch.cat([a.output[: a.computed], b.output[: b.computed], c.output[: c.computed]])
        assert outputs.isfinite().all()
        if layer is eager:
            expected = outputs
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("no_host")
def test_a_graph_notes_what_it_selects() -> None:
    """For traces: in every step, also of requests that did not ask when it was captured."""
    shape = Shape(CONFIG, head_size=32, rotary_dim=32)
    layer = Layer(shape, 40, 40, seed=1, ops="triton")
    graph, sequence = Graph(layer, 2), Sequence.random(shape, 210, 200, seed=1)
    layer.step([(sequence, 200)])
    request = layer.requests[sequence.table[0]]
    request.trace_id = "traced"
    noted = []
    plan = InfLLMMetadata.plan

    def planned(step: InfLLMMetadata, *args: Any) -> None:
        plan(step, *args)
        noted.append(step.rounds[0].selections)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InfLLMMetadata, "plan", planned)
        layer.step([(sequence, 1)], graph)
    request.trace_id = None
    ((layer_number, [chosen]),) = noted[0].by_layer()
    units = request.units.tolist()
    assert layer_number == 0 and isinstance(noted[0].rows[0], TracedRow)
    found = [units.index(unit) for unit in chosen.tolist() if unit >= 0]
    assert len(found) == 1 + CONFIG.topk and found == sorted(found) and found[0] == 0


@pytest.mark.usefixtures("no_host")
@pytest.mark.parametrize("slots, strategy", [(0, "lru"), (3, "lru-s")], ids=["in place", "from slots"])
def test_the_warm_up_launches_every_kernel(slots: int, strategy: str) -> None:
    """What requests launch later has been compiled, and memory is as before."""
    shape = Shape(CONFIG, max_cached_blocks=slots, cache_strategy=strategy, head_size=32, rotary_dim=32)
    layer, launched = Layer(shape, 40, 40, seed=1, ops="triton"), set()
    layer.impl.number = 0
    run = InterpretedFunction.run

    def noted(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.add((kernel.fn.__name__, *sorted((n, x) for n, x in kwargs.items() if isinstance(x, bool))))
        run(kernel, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", noted)
        layer.impl.warm_up(layer.cache, layer.limits)
        assert layer.cache.isnan().all() and all(x.isnan().all() for x in vars(layer.impl.memory).values())
        warm = set(launched)
        launched.clear()
        sequence = Sequence.random(shape, 200, 180, seed=1)
        layer.run(sequence, chunk=90)
    assert launched and launched <= warm
