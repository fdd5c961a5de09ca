"""Run a module that writes JSON lines in a process of its own, and never leave anything of it behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_infllm.tools import CommandError

STOP_SECONDS = 10


def json_lines(module: str, job: Any, name: str, env: Mapping[str, str]) -> Iterator[Any]:
    """Run `python -m module` with `job` as JSON on its standard input; yields each JSON line of its standard output.

    A line `{"error": message}` is not yielded: the process gives it as the reason before it exits with a status other
    than 0. Then `CommandError` quotes it and names the log file, which holds the standard error and is otherwise
    removed. However this ends (failure, Ctrl-C, a generator that is closed early), the process and its children are
    gone afterwards.
    """
    with tempfile.NamedTemporaryFile("w", prefix=f"vllm-infllm-{name}-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,
        )
    assert process.stdin and process.stdout
    path, reason = Path(log.name), "it gave no reason"
    try:
        # A process that dies before it has read its job says why in its log.
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            json.dump(job, stdin)
        for event in map(json.loads, process.stdout):
            if "error" in event:
                reason = event["error"]
            else:
                yield event
        status = process.wait()
    except (KeyboardInterrupt, GeneratorExit):
        path.unlink()
        raise
    finally:
        _stop(process)
    if status:
        raise CommandError(f"{name}: {reason} (exit status {status}, log: {path})")
    path.unlink()


def _stop(process: subprocess.Popen[str]) -> None:
    """End the process and all others of its session: politely, then not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
