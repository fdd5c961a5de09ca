"""`vllm serve` for tests: with all its processes, its log, shared memory and temporary files in sight."""

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

START_SECONDS = 400
SHARED = Path("/dev/shm")


@dataclass
class Server:
    """A running `vllm serve`, the leader of a session that all its descendants belong to.

    log: standard output and error of all of them.
    temporary: their directory for temporary files, sockets included; nobody else's.
    """

    process: subprocess.Popen[bytes]
    model: str
    port: int
    log: Path
    temporary: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self, word: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if word in line]

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
        """Files in /dev/shm that a process of the session has open or mapped."""
        return {path for process in self.processes() for path in _shared_memory(process)}

    def wait_until_up(self) -> None:
        self.wait_for(self._is_up, START_SECONDS)

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def wait_for_line(self, word: str, seconds: float = START_SECONDS) -> None:
        self.wait_for(lambda: bool(self.lines(word)), seconds)

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        """Until `condition` holds; the test fails if the server ends first, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if condition():
                return
            time.sleep(0.2)
        pytest.fail(f"waited in vain; the log of the server ends with\n{self.log.read_text()[-4000:]}")

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels; `name` as in the text, with _total or _count."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.partition("{")[0].split(" ")[0] == name)


@contextlib.contextmanager
def serve(
    model: str,
    folder: Path,
    *flags: str,
    backend: str | None = "infllm",
    wait: bool = True,
    limit: int = resource.RLIM_INFINITY,
) -> Iterator[Server]:
    """Start `vllm serve`, its log in `folder`; whatever is left of it at the end is killed.

    backend: attention backend; None for vLLM's own.
    wait: until it answers; otherwise it is only starting.
    limit: address space of each of its processes, in bytes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The temporary directory is short: paths of sockets have 107 characters at most.
    log, temporary = folder / "log", Path(f"/tmp/infllm-{port}")
    temporary.mkdir()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--port", str(port), *flags]
    # vLLM binds its own threads to cores; let it have all of them.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    own = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "TMPDIR": str(temporary)}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--attention-backend", backend] if backend else command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**inherited, **own},
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
    server = Server(process, model, port, log, temporary)
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
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    server.process.wait(60)
    shutil.rmtree(server.temporary)


def _shared_memory(process: psutil.Process) -> set[Path]:
    with contextlib.suppress(psutil.Error, OSError):
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        return {Path(line.split()[5]) for line in maps if f" {SHARED}/" in line and not line.endswith("(deleted)")}
    return set()
