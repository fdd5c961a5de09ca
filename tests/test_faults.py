"""Faults of a real `vllm serve`: processes killed, signals at bad moments, memory that cannot be had.

Each ends with a clear line in the log and an exit status, and leaves no process and no shared memory, within 15
seconds.
"""

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests import tiny_models
from tests.servers import Server, serve

END_SECONDS = 15
INFLLM = {"n_init": 32, "n_local": 256, "topk": 3, "exc_block_size": 64, "host_memory_gib": 0.5}
FLAGS = ["--enforce-eager", "--dtype", "float32", "--block-size", "32", "--max-num-seqs", "4"]
LENGTHS = ["--max-model-len", "32768", "--max-num-batched-tokens", "256", "--kv-cache-memory-bytes", str(1 << 26)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make_with_tokenizer(tmp_path_factory.mktemp("llama"))


def flags(**infllm: float) -> list[str]:
    return [*FLAGS, *LENGTHS, "--additional-config", json.dumps({"infllm": {**INFLLM, **infllm}})]


def kill_worker(server: Server) -> None:
    (worker,) = server.processes("VLLM::Worker")
    worker.kill()


def kill_engine_core(server: Server) -> None:
    (core,) = server.processes("VLLM::EngineCore")
    core.kill()


def terminate(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)


def interrupt(server: Server) -> None:
    server.process.send_signal(signal.SIGINT)


def assert_nothing_is_left(server: Server, shared_memory: set[Path], since: float) -> None:
    """No process, and no shared memory that one of them had; that within END_SECONDS."""
    while server.processes() and time.monotonic() < since + END_SECONDS:
        time.sleep(0.1)
    assert not server.processes(), "processes without a parent"
    assert not {path for path in shared_memory if path.exists()}
    assert time.monotonic() < since + END_SECONDS


FAULTS: dict[str, tuple[Callable[[Server], None], int, str]] = {
    # name: (what happens, exit status, words of the log)
    # With a dead engine vLLM's API server ends by itself, with status 0: a service needs Restart=always.
    "worker killed": (kill_worker, 0, "died unexpectedly"),
    "engine core killed": (kill_engine_core, 0, "engine core exited unexpectedly"),
    "terminated": (terminate, 0, "stopping engine client mode=abort"),
    "interrupted": (interrupt, 0, "stopping engine client mode=abort"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_under_load(fault: str, llama: str, tmp_path: Path) -> None:
    """Eight clients, four of them running, some in mid-prefill: all get an error instead of waiting for ever."""
    act, status, words = FAULTS[fault]
    with serve(llama, tmp_path, *flags()) as server, ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(ask, server, seed) for seed in range(8)]
        server.wait_for(lambda: server.metric("vllm:num_requests_running") == 4, 60)
        shared_memory, since = server.shared_memory(), time.monotonic()
        assert shared_memory
        act(server)
        assert server.process.wait(END_SECONDS) == status
        assert_nothing_is_left(server, shared_memory, since)
        assert server.lines(words)
        for answer in asked:
            assert isinstance(answer.exception(END_SECONDS), openai.APIError)


def ask(server: Server, seed: int) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    client.completions.create(
        model=server.model, prompt=tiny_models.tokens(20_000, seed), max_tokens=4000, extra_body={"ignore_eos": True}
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_startup(signum: signal.Signals, llama: str, tmp_path: Path) -> None:
    """Between the memory plan, which the worker logs, and the first request."""
    with serve(llama, tmp_path, *flags(), wait=False) as server:
        server.wait_for_line("host units")
        shared_memory, since = server.shared_memory(), time.monotonic()
        server.process.send_signal(signum)
        assert server.process.wait(END_SECONDS) != 0
        assert_nothing_is_left(server, shared_memory, since)


def test_host_memory_that_cannot_be_had(llama: str, tmp_path: Path) -> None:
    """More than `ulimit -v` leaves: one message that names the field, its value and the remedy, and the server ends."""
    with serve(llama, tmp_path, *flags(host_memory_gib=15.0), wait=False, limit=12 << 30) as server:
        assert server.process.wait(300) != 0
        since = time.monotonic()
        assert server.lines('--additional-config "infllm": host_memory_gib=15.0 is more than')
        assert_nothing_is_left(server, set(), since)
