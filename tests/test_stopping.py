"""Where a server's temporary files lie, and what its clients are told; what else stopping does is in test_faults.py."""

import atexit
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tests.processes import engine_core, process_with_garbage, worker
from vllm_infllm import plugin, stopping


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """Makes a directory whose name has so many characters, for temporary files."""
    root = tempfile.mkdtemp(prefix="infllm-", dir="/tmp")

    def make(length: int) -> Path:
        folder = Path(root, "x" * (length - len(root) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.setenv("TMPDIR", str(folder))
        return folder

    yield make
    shutil.rmtree(root)


def test_temporary_files_go_with_the_server(directory: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the longest directory in which a socket, named by a UUID, still fits."""
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr(atexit, "register", lambda run, *args, **kwargs: at_exit.append(lambda: run(*args, **kwargs)))
    folder = directory(stopping.LONGEST_TEMPORARY)
    stopping._keep_temporary_files_together()
    ours = Path(os.environ["TMPDIR"])
    assert ours.parent == folder and tempfile.gettempdir() == str(ours)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(ours / str(uuid.uuid4())))
    assert list(ours.iterdir())
    for run in at_exit:
        run()
    assert not list(folder.iterdir())


def test_no_socket_name_becomes_too_long(directory: Callable[[int], Path]) -> None:
    folder = directory(stopping.LONGEST_TEMPORARY + 1)
    stopping._keep_temporary_files_together()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(folder)
    assert not list(folder.iterdir())


def test_the_end_of_the_engine_core_is_no_failure_while_the_server_stops() -> None:
    """vLLM may notice it before its own shutdown returns; clients are told of the stop, and once."""
    told: list[Exception] = []
    processor = SimpleNamespace(propagate_error=told.append, get_num_unfinished_requests=lambda: 2)
    stopping._errors_are_the_stop(processor)  # type: ignore[arg-type]
    for _ in range(2):
        processor.propagate_error(EngineDeadError())
    (error,) = told
    assert isinstance(error, GracefulHTTPError) and error.http_status == HTTPStatus.SERVICE_UNAVAILABLE


def test_an_engine_that_could_not_start_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM does that to one of which only the configuration was made."""
    monkeypatch.setattr(AsyncLLM, "shutdown", AsyncLLM.shutdown)
    monkeypatch.setattr(AsyncLLM, "__del__", lambda self: None)
    stopping._wrap_shutdown("InfLLMConnector")
    engine = AsyncLLM.__new__(AsyncLLM)
    engine.vllm_config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector="InfLLMConnector"))
    engine.shutdown()


@pytest.mark.parametrize("name, found", [("EngineCore_DP0", False), ("VllmWorker-1", False), ("Process-1", True)])
def test_a_process_of_vllm_ends_without_a_search_for_garbage(name: str, found: bool) -> None:
    """And one of a program that uses vLLM as a library ends as always."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=process_with_garbage, args=(send,), name=name)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert receive.poll() == found


def test_a_process_that_gets_the_configuration_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine core and worker: the backend is a part of what they are started with."""
    asked: list[bool] = []
    monkeypatch.setattr(stopping, "end_soon", lambda: asked.append(True))
    given = pickle.dumps(plugin.backend_member())
    asked.clear()
    assert pickle.loads(given) is plugin.backend_member()
    assert asked


@pytest.mark.parametrize("starting", [True, False])
def test_only_a_server_that_starts_ends_soon(starting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that makes an engine ends as it always did."""
    at_exit: list[object] = []
    monkeypatch.setattr(atexit, "register", lambda run, *args, **kwargs: at_exit.append(run))
    handler = SimpleNamespace(__module__=stopping.STARTING) if starting else signal.default_int_handler
    monkeypatch.setattr(signal, "getsignal", lambda signum: handler)
    monkeypatch.setattr(signal, "signal", lambda signum, run: None)
    monkeypatch.setattr(stopping, "_keep_temporary_files_together", lambda: None)
    monkeypatch.setattr(stopping, "_wrap_shutdown", lambda connector: None)
    stopping.prepare("InfLLMConnector")
    assert at_exit == ([gc.freeze] if starting else [])


def test_a_worker_ends_with_a_killed_engine_core() -> None:
    """At once, though nothing in it looks for that."""
    receive, send = multiprocessing.Pipe(duplex=False)
    core = multiprocessing.get_context("spawn").Process(target=engine_core, args=(send,), name=stopping.ENGINE_CORE)
    core.start()
    started = psutil.Process(receive.recv())
    core.kill()
    started.wait(10)


def test_a_worker_outlives_the_thread_that_started_it() -> None:
    """In a program that uses vLLM as a library, whose engine is in the program's own process."""
    receive, send = multiprocessing.Pipe(duplex=False)
    started = multiprocessing.get_context("spawn").Process(target=worker, args=(send,))
    thread = threading.Thread(target=started.start)
    thread.start()
    thread.join()
    receive.recv()
    time.sleep(1)
    assert started.is_alive()
    started.kill()
    started.join()
    assert started.exitcode == -signal.SIGKILL
