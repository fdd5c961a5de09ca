"""`vllm serve` in a process of its own, as an operator starts it; gone afterwards."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = 400


@dataclass
class Server:
    root: str
    log: Path

    @property
    def url(self) -> str:
        """Of the OpenAI API."""
        return f"{self.root}/v1"

    def lines(self, word: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if word in line]


@contextlib.contextmanager
def serve(model: str, log: Path, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`vllm serve MODEL FLAGS` with InfLLM; yields when it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--attention-backend", "infllm", *flags]
    # vLLM binds its own threads to cores; let it have all of them.
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**own, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **(env or {})},
        )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
        yield Server(f"http://127.0.0.1:{port}", log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"the server did not come up; its log ends with\n{log.read_text()[-4000:]}")
