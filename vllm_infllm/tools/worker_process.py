"""Run a module that speaks JSON lines in a process of its own, and never leave anything of it behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_infllm.tools import CommandError

STOP_SECONDS = 10


class WorkerProcess:
    """`python -m module`: JSON lines in on its standard input, JSON lines out on its standard output.

    A context manager: however the block is left, the process and its children are gone afterwards.

    A line `{"error": message}` is not handed out: the process gives it as the reason before it exits with a status
    other than 0. Then `CommandError` quotes it and names the log file, which holds the standard error and is otherwise
    removed.
    """

    def __init__(self, module: str, name: str, env: Mapping[str, str]) -> None:
        self.name = name
        with tempfile.NamedTemporaryFile("w", prefix=f"vllm-infllm-{name}-", suffix=".log", delete=False) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **env},
                start_new_session=True,
            )
        self._log = Path(log.name)
        self._keep_log = False

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop(self._process, STOP_SECONDS)
        self.end_input()
        if self._process.stdout:
            self._process.stdout.close()
        if not self._keep_log:
            self._log.unlink(missing_ok=True)

    def send(self, message: Any) -> None:
        """Write one line. A process that is gone already says why when it is listened to."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def end_input(self) -> None:
        """Nothing more will be sent."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def receive(self) -> Any:
        """Wait for one line.

        Raises:
            CommandError: if the process ends instead.
        """
        for line in self.lines():
            return line
        raise self._failure("it ended without an answer")

    def ask(self, message: Any) -> Any:
        """Send one line and wait for one, like `receive`."""
        self.send(message)
        return self.receive()

    def lines(self) -> Iterator[Any]:
        """The lines it writes from now on, until it ends.

        Raises:
            CommandError: if its exit status is not 0.
        """
        assert self._process.stdout
        reason = "it gave no reason"
        for line in iter(self._process.stdout.readline, ""):
            event = json.loads(line)
            if isinstance(event, dict) and "error" in event:
                reason = event["error"]
            else:
                yield event
        if self._process.wait():
            raise self._failure(reason)

    def _failure(self, reason: str) -> CommandError:
        self._keep_log = True
        return CommandError(f"{self.name}: {reason} (exit status {self._process.wait()}, log: {self._log})")


def json_lines(module: str, job: Any, name: str, env: Mapping[str, str]) -> Iterator[Any]:
    """Run `python -m module` with `job` as its whole input; yields each line that it writes (see `WorkerProcess`)."""
    with WorkerProcess(module, name, env) as process:
        process.send(job)
        process.end_input()
        yield from process.lines()


@contextlib.contextmanager
def json_output() -> Iterator[Callable[[Any], None]]:
    """In the process itself: hands out a function that writes one JSON line to standard output.

    Everything else that is printed goes to standard error. An exception that leaves the block is given as the reason.
    """
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as output:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def write(event: Any) -> None:
            print(json.dumps(event), file=output, flush=True)

        try:
            yield write
        except Exception as error:
            write({"error": str(error)})
            raise


def stop(process: subprocess.Popen[Any], seconds: float) -> None:
    """End the process, the leader of a session, and all others of it: politely, and after so many seconds not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
