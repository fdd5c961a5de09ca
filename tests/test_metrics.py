"""A running server: its metrics, recomputed from what was sent, the dashboard that shows them, and traces over HTTP."""

import asyncio
import functools
import itertools
import json
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import tiny_models
from tests.servers import Server, serve
from vllm_infllm.memory.trace import ARGUMENT, Trace

BLOCK, N_INIT, N_LOCAL, TOPK, EXC, SLOTS = 32, 32, 128, 3, 64, 5
MAX_LEN, LAYERS = 2048, 2
BLOCK_BYTES = 2 * 2 * BLOCK * 32 * 4
"""Keys and values of one block in one layer: 2 kv heads of 32 dimensions in float32."""
REPRESENTATIVE_BYTES = 4 * 32 * 4
CAPACITY = 75
DASHBOARD = Path(__file__).parents[1] / "examples" / "grafana" / "infllm.json"


@pytest.fixture(scope="module")
def server(llama_with_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny model with residency caches and 75 units: enough for one request of 2048 tokens, and some more."""
    gib = (CAPACITY + 0.5) * LAYERS * (BLOCK_BYTES + REPRESENTATIVE_BYTES) / 2**30
    infllm = {
        "n_init": N_INIT,
        "n_local": N_LOCAL,
        "topk": TOPK,
        "exc_block_size": EXC,
        "max_cached_blocks": SLOTS,
        "host_memory_gib": gib,
    }
    sizes = {"block-size": BLOCK, "max-model-len": MAX_LEN, "max-num-batched-tokens": 256, "max-num-seqs": 4}
    flags = [flag for name, value in sizes.items() for flag in (f"--{name}", str(value))]
    with serve(
        llama_with_tokenizer,
        tmp_path_factory.mktemp("server"),
        *flags,
        "--dtype=float32",
        "--enforce-eager",
        f"--additional-config={json.dumps({'infllm': infllm})}",
        env={"VLLM_LOG_STATS_INTERVAL": "1"},
    ) as server:
        yield server


def metrics(server: Server) -> dict[str, float]:
    """Every metric of InfLLM, as `curl /metrics` shows it, by its name without the prefix."""
    with urllib.request.urlopen(f"{server.root}/metrics", timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    prefix = "vllm:infllm_"
    return {
        s.name.removeprefix(prefix): s.value for s in samples if s.name.startswith(prefix) and "_created" not in s.name
    }


def settled(server: Server) -> dict[str, float]:
    """Metrics when all requests are gone; an answer can arrive before the numbers of its last step."""
    deadline = time.monotonic() + 10
    while (found := metrics(server))["units_in_use"] or found["blocks_held"]:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url, api_key="none", timeout=120, max_retries=0)


async def stream(api: openai.AsyncOpenAI, prompt_len: int, max_tokens: int, seed: int = 0) -> AsyncIterator[Any]:
    (model,) = (await api.models.list()).data
    prompt = tiny_models.tokens(prompt_len, seed)
    chunks = await api.completions.create(
        model=model.id,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for chunk in chunks:
        yield chunk


async def answer(api: openai.AsyncOpenAI, prompt_len: int, max_tokens: int, seed: int = 0) -> int:
    """Number of tokens answered."""
    return sum([len(chunk.choices[0].token_ids) async for chunk in stream(api, prompt_len, max_tokens, seed)])


# What a request must cause, by the formulas of docs/architecture.md.


def stored_blocks(s: int) -> int:
    return max(0, (s - N_LOCAL) // BLOCK)


def execution_blocks(prompt_len: int, computed: int) -> list[tuple[int, int]]:
    """Cut at multiples of EXC and before the last token of the prompt, then token by token."""
    prompt = [*range(0, prompt_len - 1, EXC), prompt_len - 1, prompt_len]
    return list(itertools.pairwise(prompt)) + [(t, t + 1) for t in range(prompt_len, computed)]


def gained(prompt_len: int, answer_len: int) -> dict[str, int]:
    """Counters of a request; the last token of its answer is not computed."""
    computed = prompt_len + answer_len - 1
    retrieved = sum(min(TOPK, max(0, stored_blocks(s) - 1)) for s, _ in execution_blocks(prompt_len, computed))
    return {
        "units_sealed_total": max(0, stored_blocks(computed) - N_INIT // BLOCK),
        "units_retrieved_total": retrieved * LAYERS,
        "bytes_to_host_total": stored_blocks(computed) * BLOCK_BYTES * LAYERS,
    }


def held(start: int, end: int) -> tuple[int, int]:
    """Units and blocks that a request holds in the step that computes its tokens [start, end)."""
    kept = N_INIT // BLOCK + SLOTS
    return stored_blocks(end), -(-end // BLOCK) - max(0, stored_blocks(start) - kept)


def test_counters_are_those_of_the_requests_sent(server: Server) -> None:
    """Requests inside the window, just beyond it and far beyond it, in one batch: sealed, retrieved, bytes."""
    sent = [(700, 20), (33, 5), (160, 40), (1000, 8), (128, 1)]

    async def ask() -> list[int]:
        async with client(server) as api:
            return await asyncio.gather(*(answer(api, *lengths, seed=lengths[0]) for lengths in sent))

    before = settled(server)
    assert asyncio.run(ask()) == [max_tokens for _, max_tokens in sent]
    after = settled(server)
    for name in gained(1, 1):
        expected = sum(gained(*lengths)[name] for lengths in sent)
        assert expected and after[name] - before[name] == expected, name
    hits, misses, evictions, to_device = (
        after[f"{name}_total"] - before[f"{name}_total"]
        for name in ("residency_hits", "residency_misses", "residency_evictions", "bytes_to_device")
    )
    assert hits + misses == after["units_retrieved_total"] - before["units_retrieved_total"]
    assert misses > evictions > 0 and hits > 0
    # What is copied: each miss, and the initial tokens of requests that outgrew the window by a block.
    outgrown = sum(stored_blocks(prompt + answered - 1) > 0 for prompt, answered in sent)
    assert to_device == (misses + outgrown * LAYERS) * BLOCK_BYTES
    assert after["unit_capacity"] == CAPACITY
    assert after["requests_waiting_for_units"] == 0


def test_gauges_follow_a_running_request(server: Server) -> None:
    """Units in use and blocks held are those of one of the request's steps, in the order of its steps."""
    prompt_len, answer_len = 300, 600
    chunks = [(0, 256), (256, 300)] + [(token, token + 1) for token in range(300, 300 + answer_len - 1)]
    steps = [held(start, end) for start, end in chunks]

    async def ask() -> list[tuple[float, float]]:
        async with client(server) as api:
            running, seen = asyncio.create_task(answer(api, prompt_len, answer_len)), []
            while not running.done():
                read = await asyncio.to_thread(metrics, server)
                seen.append((read["units_in_use"], read["blocks_held"]))
            assert await running == answer_len
        return [pair for pair in seen if pair != (0, 0)]

    # How many steps are seen of one request depends on how busy the machine is.
    all_seen, deadline = set(), time.monotonic() + 120
    while len(all_seen) < 3:
        assert time.monotonic() < deadline, all_seen
        seen = asyncio.run(ask())
        assert set(seen) <= set(steps)
        assert [units for units, _ in seen] == sorted(units for units, _ in seen)
        all_seen |= set(seen)
    assert settled(server)["units_in_use"] == 0


def least_recently_used(trace: Trace) -> tuple[int, int, int]:
    """Hits, misses and evictions of the residency caches while a request retrieved what its trace says."""
    hits = misses = evictions = 0
    for layer in range(LAYERS):
        resident: dict[int, tuple[int, int]] = {}  # unit: when last used, when it came
        for now, block in enumerate(trace.blocks):
            wanted, slots = block.units[layer], min(SLOTS, max(0, stored_blocks(block.start) - 1))
            for place, unit in enumerate(wanted):
                if unit in resident:
                    hits += 1
                    continue
                misses += 1
                if len(resident) == slots:
                    evictions += 1
                    del resident[min(resident.keys() - set(wanted), key=lambda unit: resident[unit])]
                resident[unit] = now, now * 1000 + place
            resident.update({unit: (now, resident[unit][1]) for unit in wanted})
    return hits, misses, evictions


def test_a_trace_over_http_explains_the_residency_counters(server: Server) -> None:
    """What the answer says was retrieved, replayed through caches of 5 slots, gives the hits, misses and evictions."""
    before = settled(server)
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as api:
        answered = api.completions.create(
            model=api.models.list().data[0].id,
            prompt=tiny_models.tokens(900),
            max_tokens=30,
            temperature=0,
            extra_body={"ignore_eos": True, "vllm_xargs": {ARGUMENT: True}},
        )
    after = settled(server)
    trace = Trace.from_json(answered.model_extra["kv_transfer_params"][ARGUMENT])
    assert [(block.start, block.end) for block in trace.blocks] == execution_blocks(900, 929)
    names = ("residency_hits_total", "residency_misses_total", "residency_evictions_total")
    assert tuple(after[name] - before[name] for name in names) == least_recently_used(trace)
    assert trace.retrievals().total() == after["units_retrieved_total"] - before["units_retrieved_total"]


def test_a_mistyped_trace_argument_is_refused_over_http(server: Server) -> None:
    """HTTP 400 with the reason; a request that does not ask gets none."""
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as api:
        ask = functools.partial(api.completions.create, model=api.models.list().data[0].id, prompt=[5], max_tokens=1)
        for value in ("true", 2, [1]):
            with pytest.raises(openai.BadRequestError, match=r"infllm_trace=.*true or false is expected"):
                ask(extra_body={"vllm_xargs": {ARGUMENT: value}})
        for xargs in ({}, {ARGUMENT: False}, {"something": "else"}):
            assert ask(extra_body={"vllm_xargs": xargs}).model_extra["kv_transfer_params"] is None


def test_requests_that_wait_for_units_are_counted(server: Server) -> None:
    """Three requests of 1500 tokens need 42 units each and more while they answer; of 75, one can run."""

    async def ask() -> set[float]:
        async with client(server) as api:
            answers = [asyncio.create_task(answer(api, 1500, 400, seed)) for seed in range(3)]
            waiting = set()
            while not any(answer.done() for answer in answers):
                read = await asyncio.to_thread(metrics, server)
                if read["units_in_use"] > CAPACITY - stored_blocks(1500):
                    waiting.add(read["requests_waiting_for_units"])
            assert await asyncio.gather(*answers) == [400] * 3
        return waiting

    # On a busy machine all can be over between two looks, or the last come when the first is nearly done.
    seen, deadline = set[float](), time.monotonic() + 120
    while 2 not in seen:
        assert time.monotonic() < deadline, seen
        seen |= asyncio.run(ask())
        assert seen <= {0, 1, 2}
    assert settled(server)["requests_waiting_for_units"] == 0


def test_the_stats_line_of_vllm_shows_them(server: Server) -> None:
    """vLLM's periodic line, with what was counted since the last one."""
    lines = server.lines("KV Transfer metrics: ")
    sealed = [int(n) for line in lines for n in re.findall(r"infllm_units_sealed=(\d+)", line)]
    assert 0 < sum(sealed) <= metrics(server)["units_sealed_total"]
    assert all(f"infllm_unit_capacity={CAPACITY}" in line for line in lines)


def test_the_dashboard_shows_every_metric_and_no_other(server: Server) -> None:
    """Names in the dashboard's queries are names that the server exports, and all of InfLLM's are there."""
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"vllm:\w+", query)}
    with urllib.request.urlopen(f"{server.root}/metrics", timeout=10) as response:
        exported = set(re.findall(r"^(vllm:\w+)\{", response.read().decode(), re.MULTILINE))
    assert shown <= exported
    assert {f"vllm:infllm_{name}" for name in metrics(server)} <= shown
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places: list[Callable[[int, int], bool]] = [_inside(panel["gridPos"]) for panel in board["panels"]]
    assert all(sum(inside(x, y) for inside in places) <= 1 for x in range(24) for y in range(64)), "panels overlap"
    (model,) = [variable for variable in board["templating"]["list"] if variable["name"] == "model_name"]
    assert re.findall(r"vllm:\w+", model["definition"])[0] in exported


def _inside(grid: dict[str, int]) -> Callable[[int, int], bool]:
    return lambda x, y: grid["x"] <= x < grid["x"] + grid["w"] and grid["y"] <= y < grid["y"] + grid["h"]
