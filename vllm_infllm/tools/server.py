"""`vllm serve` in a process of its own, and vLLM's other commands beside it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from vllm_infllm.tools import CommandError
from vllm_infllm.tools.worker_process import stop

STOP_SECONDS = 60
POLL_SECONDS = 0.2
# vLLM's command by its module: some distributions of vLLM install it under a name that is not on the path.
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")


@dataclass(frozen=True)
class Usage:
    """What a server holds at one moment: resident bytes of its processes, and the share of its KV cache in use."""

    resident: int
    cache: float


class Server:
    """A server on a free port of this machine; a context manager, which waits until it answers.

    However the block is left, the server and its processes are gone afterwards. `CommandError` names the log file,
    which holds all its output and stays.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path, start_seconds: float) -> None:
        self.name, self.log = name, log
        self._arguments, self._start_seconds = arguments, start_seconds
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        command = [*VLLM, "serve", *self._arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        """First by vLLM's own shutdown, which takes its processes and their shared memory along."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        stop(self._process, STOP_SECONDS)

    def check(self) -> None:
        """Raises CommandError if it is gone."""
        if self._process.poll() is not None:
            raise CommandError(
                f"{self.name}: the server ended with exit status {self._process.returncode}: {last_error(self.log)} "
                f"(log: {self.log})"
            )

    def usage(self) -> Usage:
        """What it holds now; zeros for what it does not tell at this moment."""
        return Usage(_resident(self._process.pid), self.metric("vllm:kv_cache_usage_perc"))

    def metric(self, name: str, label: str | None = None) -> float:
        """The sum of a metric of its Prometheus endpoint, or of a label's values; 0 if it is not told."""
        try:
            samples = [sample for sample in self._samples(name) if sample.name == name]
        except OSError:
            return 0.0
        return sum(float(sample.labels[label] if label else sample.value) for sample in samples)

    def metrics(self) -> dict[str, float]:
        """Every metric of its Prometheus endpoint, by the name in the text, summed over labels.

        Raises:
            OSError: if it does not answer.
        """
        found: dict[str, float] = {}
        for sample in self._samples():
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def processes(self, word: str) -> list[psutil.Process]:
        """Those of its processes whose command line or title has `word`."""
        return [p for p in psutil.Process(self._process.pid).children(recursive=True) if word in " ".join(p.cmdline())]

    def _samples(self, prefix: str = "") -> list[Any]:
        """Of all metrics, or of those whose names begin so: to parse all takes longer than to ask."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        families = text_string_to_metric_families("\n".join(line for line in lines if line.startswith(prefix)))
        return [sample for family in families for sample in family.samples]

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self._start_seconds
        while time.monotonic() < deadline:
            self.check()
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(POLL_SECONDS)
        raise CommandError(
            f"{self.name}: the server did not answer within {self._start_seconds:.0f} s (log: {self.log}); "
            "--start-timeout gives it more."
        )


def run_vllm(name: str, arguments: Sequence[str], log: Path, seconds: float, meanwhile: Callable[[], None]) -> None:
    """Run a command of vLLM to its end, calling `meanwhile` again and again; its output is appended to `log`.

    Raises:
        CommandError: if it fails or takes more than so many seconds, naming `name` and the log.
    """
    with log.open("a") as output:
        process = subprocess.Popen(
            [*VLLM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
    deadline = time.monotonic() + seconds
    try:
        while process.poll() is None:
            meanwhile()
            if time.monotonic() > deadline:
                raise CommandError(f"{name}: not done after {seconds:.0f} s (log: {log}); --timeout gives it more.")
            time.sleep(POLL_SECONDS)
    finally:
        stop(process, STOP_SECONDS)
    if process.returncode:
        raise CommandError(f"{name}: exit status {process.returncode}: {last_error(log)} (log: {log})")


def environment() -> dict[str, str]:
    """Of this process, but for settings that would change what is measured."""
    # The first two would bind threads to fewer cores and size KV caches anew. On a CPU vLLM keeps a core free for its
    # other processes; they sleep while it computes.
    left_out = ("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **kept}


def last_error(log: Path) -> str:
    """The last line that names an error, as the reason of a failure; vLLM writes more lines after it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "Engine core initialization failed" not in line]
    return (errors or lines or ["it printed nothing"])[-1][-400:]


def _resident(pid: int) -> int:
    """Bytes of all processes of a tree."""
    total = 0
    try:
        leader = psutil.Process(pid)
        for process in [leader, *leader.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:
        pass  # it has just ended
    return total
