"""Faults of a real `vllm serve`: processes killed, signals at bad moments, memory that cannot be had.

Each ends with a clear line in the log and an exit status, and leaves no process, no shared memory and no temporary
file, within 15 seconds.
"""

import contextlib
import http.client
import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import tiny_models
from tests.servers import Server, serve

END_SECONDS = 15
INFLLM = {"n_init": 32, "n_local": 256, "topk": 3, "exc_block_size": 64, "host_memory_gib": 0.5}
FLAGS = {
    "dtype": "float32",
    "block-size": 32,
    "max-num-seqs": 4,
    "max-model-len": 32_768,
    "max-num-batched-tokens": 256,
    "kv-cache-memory-bytes": 1 << 26,
}
RUNNING, WAITING, PROMPTS = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:prompt_tokens_total"


def flags(**infllm: float) -> list[str]:
    given = [flag for name, value in FLAGS.items() for flag in (f"--{name}", str(value))]
    return ["--enforce-eager", *given, "--additional-config", json.dumps({"infllm": {**INFLLM, **infllm}})]


@contextlib.contextmanager
def asked(server: Server, prompts: Sequence[int], max_tokens: int = 4000) -> Iterator[list[http.client.HTTPConnection]]:
    """Prompts of these lengths, sent, their answers not yet read; closed at the end."""
    with contextlib.ExitStack() as stack:
        connections = []
        for seed, length in enumerate(prompts):
            connection = http.client.HTTPConnection(urlsplit(server.root).netloc, timeout=60)
            stack.enter_context(contextlib.closing(connection))
            body = {
                "model": server.model,
                "prompt": tiny_models.tokens(length, seed),
                "max_tokens": max_tokens,
                "ignore_eos": True,
            }
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            connections.append(connection)
        yield connections


def refusal(connection: http.client.HTTPConnection) -> int | None:
    """The status with which a request was refused; None for one that ended with a part of its answer, and says so."""
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status == 200:
        assert answer["choices"][0]["finish_reason"] == "abort", answer
        return None
    assert response.status != 503 or answer["error"]["message"].startswith("The server stops"), answer
    return response.status


def assert_gone(server: Server, since: float, *titles: str) -> None:
    """No process with one of these titles, within END_SECONDS of `since`."""
    while left := [process for title in titles for process in server.processes(title)]:
        assert time.monotonic() < since + END_SECONDS, left
        time.sleep(0.1)


def assert_ended(server: Server, status: int, shared_memory: set[Path], since: float) -> None:
    """Within END_SECONDS of `since`: the exit status; no process, none of their shared memory, no temporary file."""
    assert server.process.wait(since + END_SECONDS - time.monotonic()) == status
    # The last one takes away the shared memory that others left.
    assert_gone(server, since, "")
    assert not {path for path in shared_memory if path.exists()}
    assert not list(server.temporary.iterdir())


@pytest.mark.parametrize(
    "title, words",
    [("VLLM::Worker", "died unexpectedly"), ("VLLM::EngineCore", "engine core exited unexpectedly")],
)
def test_a_process_killed_under_load(title: str, words: str, llama_with_tokenizer: str, tmp_path: Path) -> None:
    """Eight clients, four of them running, in prefill or beyond it: each gets an error instead of waiting for ever.

    The status is vLLM's: its API server ends by itself when its engine is dead, with 0.
    """
    with serve(llama_with_tokenizer, tmp_path, *flags()) as server, asked(server, [8000] * 8) as connections:
        server.wait_for(lambda: server.metric(RUNNING) == server.metric(WAITING) == 4)
        (victim,), shared_memory, since = server.processes(title), server.shared_memory(), time.monotonic()
        assert shared_memory
        victim.kill()
        for connection in connections:
            assert refusal(connection) == 500
        assert_ended(server, 0, shared_memory, since)
        assert server.lines(words)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
@pytest.mark.parametrize(
    "prompts, exc, budget", [([8000] * 8, 64, 256), ([28_000], 16, 16)], ids=["under load", "in mid-prefill"]
)
def test_a_signal_while_requests_run(
    signum: signal.Signals, prompts: list[int], exc: int, budget: int, llama_with_tokenizer: str, tmp_path: Path
) -> None:
    """Each client is told, also those that wait in the queue.

    vLLM's engine core ends requests by itself, with "abort", if it comes to it before it is killed. In small steps the
    prefill of one prompt lasts until it has been seen.
    """
    steps = *flags(exc_block_size=exc), "--max-num-batched-tokens", str(budget)
    with serve(llama_with_tokenizer, tmp_path, *steps) as server, asked(server, prompts) as connections:
        shared_memory = server.shared_memory()
        assert shared_memory
        server.wait_for(lambda: server.metric(RUNNING) + server.metric(WAITING) == len(prompts))
        assert len(prompts) > 1 or server.metric(PROMPTS) == 0, "not in mid-prefill"
        since = time.monotonic()
        server.process.send_signal(signum)
        refused = 0
        for connection in connections:
            status = refusal(connection)
            assert status in (503, None)
            refused += status == 503
        assert_ended(server, 0, shared_memory, since)
        assert server.lines("stopping engine client mode=abort")
        assert not refused or server.lines(f"the server stops, {refused} requests end with HTTP 503")


def test_requests_finish_within_the_shutdown_timeout(llama_with_tokenizer: str, tmp_path: Path) -> None:
    """SIGTERM while requests run with vLLM's --shutdown-timeout: complete answers, and then the end at once."""
    with (
        serve(llama_with_tokenizer, tmp_path, *flags(), "--shutdown-timeout", "60") as server,
        asked(server, [20_000, 3000], max_tokens=400) as connections,
    ):
        server.wait_for(lambda: server.metric(RUNNING) >= 1)
        shared_memory = server.shared_memory()
        server.process.send_signal(signal.SIGTERM)
        for connection in connections:
            response = connection.getresponse()
            assert response.status == 200
            assert json.loads(response.read())["usage"]["completion_tokens"] == 400
            connection.close()
        assert_ended(server, 0, shared_memory, time.monotonic())
        assert server.lines("draining in-flight requests")


@pytest.mark.parametrize(
    "signum, moment, status",
    [(signal.SIGTERM, "Starting to load model", 143), (signal.SIGINT, "host units", 130)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_during_startup(
    signum: signal.Signals, moment: str, status: int, llama_with_tokenizer: str, tmp_path: Path
) -> None:
    """Before the memory plan, and after it."""
    with serve(llama_with_tokenizer, tmp_path, *flags(), wait=False) as server:
        server.wait_for(lambda: bool(server.lines(moment)))
        shared_memory, since = server.shared_memory(), time.monotonic()
        server.process.send_signal(signum)
        assert_ended(server, status, shared_memory, since)
        assert server.lines(f"{signum.name} during startup, the server stops")


def test_host_memory_that_cannot_be_had(llama_with_tokenizer: str, tmp_path: Path) -> None:
    """More than `ulimit -v` leaves: one message that names the field, its value and the remedy, and the server ends."""
    message = '--additional-config "infllm": host_memory_gib=15.0 is more than'
    with serve(llama_with_tokenizer, tmp_path, *flags(host_memory_gib=15.0), wait=False, limit=12 << 30) as server:
        server.wait_for(lambda: bool(server.lines(message)))
        shared_memory, since = server.shared_memory(), time.monotonic()
        assert_ended(server, 1, shared_memory, since)
        assert not server.lines("Exception ignored")
