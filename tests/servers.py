"""`vllm serve` for tests, as an operator starts it: its processes, log, shared memory and temporary files in sight."""

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 400
SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Server:
    """A `vllm serve`: the leader of a session that all its descendants belong to.

    log: standard output and error of all of them.
    temporary: their directory for temporary files and sockets; nobody else's.
    """

    process: subprocess.Popen[bytes]
    model: str
    root: str
    log: Path
    temporary: Path

    @property
    def url(self) -> str:
        """Of the OpenAI API."""
        return f"{self.root}/v1"

    def lines(self, word: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if word in line]

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels; `name` as in the text, with _total or _count."""
        with urllib.request.urlopen(f"{self.root}/metrics", timeout=60) as response:
            families = text_string_to_metric_families(response.read().decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Live processes of the session whose command line or title has `word`; children of dead ones belong to it."""
        return [process for process in psutil.process_iter() if self._owns(process, word)]

    def _owns(self, process: psutil.Process, word: str) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) != self.process.pid or process.status() == psutil.STATUS_ZOMBIE:
                return False
            return word in " ".join(process.cmdline())
        return False

    def shared_memory(self) -> set[Path]:
        """Files in /dev/shm that a process of the session has mapped."""
        return {path for process in self.processes() for path in _shared_memory(process)}

    def wait_until_up(self) -> None:
        self.wait_for(self._is_up, START_SECONDS)

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.root}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def wait_for(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Until `condition` holds; the test fails if the server ends first, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if condition():
                return
            time.sleep(0.2)
        how = "ended" if self.process.poll() is not None else f"was waited for {seconds:.0f} s"
        pytest.fail(f"the server {how}; its log ends with\n{self.log.read_text()[-4000:]}")


@contextlib.contextmanager
def serve(
    model: str,
    folder: Path,
    *flags: str,
    env: Mapping[str, str] | None = None,
    backend: str | None = "infllm",
    wait: bool = True,
    limit: int = resource.RLIM_INFINITY,
) -> Iterator[Server]:
    """Start `vllm serve MODEL FLAGS`, its log in `folder`; whatever is left of it at the end is killed.

    env: environment variables beside those of this process.
    backend: attention backend; None for vLLM's own.
    wait: until it answers; otherwise it is only starting.
    limit: address space of each of its processes, in bytes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--port", str(port), *flags]
    # vLLM binds its own threads to cores, let it have all of them; and tests with engines keep theirs in one process.
    ours = ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    # A short path, not one of pytest's: that of a socket has 107 characters at most.
    log, temporary = folder / "log", Path(tempfile.mkdtemp(prefix="infllm-", dir="/tmp"))
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--attention-backend", backend] if backend else command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**inherited, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "TMPDIR": str(temporary), **(env or {})},
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
    server = Server(process, model, f"http://127.0.0.1:{port}", log, temporary)
    try:
        if wait:
            server.wait_until_up()
        yield server
    finally:
        _stop(server)


def _stop(server: Server) -> None:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(60)
    # Python's resource tracker last: it ends by itself, and takes the shared memory of the others away.
    trackers = server.processes("resource_tracker")
    others = [process for process in server.processes() if process not in trackers]
    for processes, seconds in ((others, 0), (trackers, 10)):
        for process in psutil.wait_procs(processes, seconds)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    server.process.wait(60)
    shutil.rmtree(server.temporary)


def _shared_memory(process: psutil.Process) -> set[Path]:
    with contextlib.suppress(psutil.Error, OSError):
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        return {Path(line.split()[5]) for line in maps if f" {SHARED}/" in line and not line.endswith("(deleted)")}
    return set()
