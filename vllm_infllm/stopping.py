"""Stopping a server: clients are told, signals during startup take effect, temporary files and workers go. What vLLM
leaves undone.

But for the worker's part it is set up where an engine's configuration is made, so only in the process that serves.
"""

import atexit
import ctypes
import functools
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from http import HTTPStatus
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

STARTING = "vllm.entrypoints.launchers.api_server.entry"
"""The module of `vllm serve` whose signal handler is there until the server answers."""
ENGINE_CORE, WORKER = "EngineCore", "VllmWorker"
"""How the names of vLLM's processes begin."""
PR_SET_PDEATHSIG = 1
LONGEST_TEMPORARY = 107 - len("/vllm-12345678/") - 36
"""Length of a directory for temporary files in which one of ours can hold a socket, which vLLM names by a UUID."""


def prepare(connector: str) -> None:
    """Before an engine is made that has this KV connector; once or again."""
    _wrap_shutdown(connector)
    if getattr(signal.getsignal(signal.SIGTERM), "__module__", None) == STARTING:
        _heed_signals()
        _keep_temporary_files_together()
        _leave_memory_to_the_system()


def _wrap_shutdown(connector: str) -> None:
    """Let the shutdown of an engine with this KV connector end the requests that it leaves behind, with HTTP 503.

    vLLM's API server waits for its clients without limit, and they for answers that no engine gives any more.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    original = AsyncLLM.shutdown
    if getattr(original, "_infllm", False):
        return

    @functools.wraps(original)
    def shutdown(self: "AsyncLLM", timeout: float | None = None) -> None:
        # vLLM shuts down an engine that could not start as well, from where it is collected.
        transfer, handler = self.vllm_config.kv_transfer_config, getattr(self, "output_handler", None)
        if transfer is None or transfer.kv_connector != connector:
            handler = None
        if handler is not None:
            _errors_are_the_stop(self.output_processor)
        original(self, timeout=timeout)
        if handler is not None and not (loop := handler.get_loop()).is_closed():
            # vLLM calls this from a thread.
            loop.call_soon_threadsafe(self.output_processor.propagate_error, EngineDeadError())

    shutdown._infllm = True  # type: ignore[attr-defined]
    AsyncLLM.shutdown = shutdown


def _errors_are_the_stop(processor: "OutputProcessor") -> None:
    """From now on, whatever ends the requests of `processor` ends them with HTTP 503; those that still come are refused
    by vLLM.

    Also if vLLM notices the end of its engine core by itself and takes it for a failure (HTTP 500).
    """
    from vllm.exceptions import GracefulHTTPError
    from vllm.logger import init_logger

    propagate, told = processor.propagate_error, False

    def stop(error: Exception) -> None:
        nonlocal told
        left = 0 if told else processor.get_num_unfinished_requests()
        if left:
            told = True
            init_logger(f"vllm.{__name__}").info("InfLLM: the server stops, %d requests end with HTTP 503.", left)
            message = "The server stops and cannot finish this request: send it again later, or to another one."
            propagate(GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE))

    processor.propagate_error = stop


def _heed_signals() -> None:
    """Let SIGTERM and SIGINT end the server while it waits for its engine, with status 128 + signal.

    vLLM raises KeyboardInterrupt at SIGTERM, which its wait for the engine takes for its own, and leaves SIGINT to the
    event loop, which looks at it when the engine is ready. Once the server answers, its own handlers replace these.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _end_startup)


def _end_startup(signum: int, frame: FrameType | None) -> NoReturn:
    from vllm.logger import init_logger

    init_logger(f"vllm.{__name__}").info("InfLLM: %s during startup, the server stops.", signal.Signals(signum).name)
    raise SystemExit(128 + signum)


def _keep_temporary_files_together() -> None:
    """Give this process and those that it starts a directory for temporary files that goes with this process.

    vLLM kills its engine core even when it stops in order, and leaves the sockets and files of all of them.
    """
    if len(tempfile.gettempdir()) <= LONGEST_TEMPORARY:
        folder = tempfile.mkdtemp(prefix="vllm-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TMPDIR"] = tempfile.tempdir = folder


def end_soon() -> None:
    """Let this process end without a search for garbage, if it is an engine core or a worker of vLLM."""
    if multiprocessing.current_process().name.startswith((ENGINE_CORE, WORKER)):
        _leave_memory_to_the_system()


def _leave_memory_to_the_system() -> None:
    """Python looks for garbage among all objects as it ends: 1.5 s of work after vLLM's imports. The three processes of
    a server that cannot start end one after another, on a busy machine in more time than an operator's patience.
    """
    atexit.register(gc.freeze)


def end_with_engine_core() -> None:
    """Let the kernel end this worker with its engine core, whatever it is doing and however busy the machine is.

    A worker of vLLM notices the end by itself and then winds up: seconds, in which its memory is not free for the next
    server. On Linux, and only below a process of vLLM's own: the kernel takes the end of the thread that started a
    worker for the end of its parent, and in a program that uses vLLM as a library that may be any thread.
    """
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None and parent.name.startswith(ENGINE_CORE):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
