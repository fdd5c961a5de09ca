"""A small server under more load than its host pool has room for (`make load` in small), and malformed requests."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.load import Load, put, server_flags
from tests import tiny_models
from tests.servers import Server, serve

UNIT = (2 * 2 * 32 * 32 + 4 * 32) * 4 * 2
"""Bytes of a unit: keys and values of 2 heads, 32 tokens of size 32, representatives of 4 heads; 2 layers."""
UNITS = 80
"""For one request of max_model_len, and a few more."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tiny_models.make_with_tokenizer(tmp_path_factory.mktemp("llama"))
    sizes = {"n_init": 32, "n_local": 128, "topk": 3, "exc_block_size": 64}
    flags = server_flags(2304, UNITS * UNIT / 2**30, **sizes)
    flags += ["--block-size", "32", "--max-num-batched-tokens", "512", "--enforce-eager"]
    with serve(model, tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


def test_under_load(server: Server) -> None:
    """Waiting, preempted and left alone: all complete, answer as alone, and give everything back; memory is flat."""
    load = Load(requests=40, longest=2000, answer=200)
    report = asyncio.run(put(server, load, rounds=3, samples=10))
    assert not report.broken()
    assert any(one.leaves_after is not None for one in report.rounds[0])


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_requests_are_the_clients_fault(server: Server, route: str) -> None:
    """Requests made from the schema that the server publishes, sampling extras included: answered or refused."""
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[route]["POST"]

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(), sound=st.booleans())
    def check(case: Any, sound: bool) -> None:
        if isinstance(case.body, dict):
            keep_small(case.body, server.model if sound else None)
        response = case.call(timeout=60)
        assert response.status_code < 500, (case.body, response.text)

    check()
    assert server.processes("VLLM::Worker"), "the engine is gone"


def keep_small(body: dict[str, Any], model: str | None) -> None:
    """Short answers; and a model that is there, without which nothing else of the request is looked at."""
    if model is not None:
        body["model"] = model
    for name in ("max_tokens", "max_completion_tokens", "min_tokens", "n"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], 4)
    body.setdefault("max_tokens", 4)


def test_what_a_round_asks_is_seeded() -> None:
    """The same requests each time: prompts over the orders of magnitude, one in ten clients disconnecting."""
    asked = Load().asked()
    lengths = sorted(len(one.prompt) for one in asked)
    assert asked == Load().asked() != Load(seed=1).asked()
    assert lengths[0] >= 64 and lengths[-1] <= 12_000 and 600 < lengths[100] < 1300
    assert 10 <= sum(one.leaves_after is not None for one in asked) <= 30
