"""The programs of examples/, as a user starts them."""

import subprocess
import sys

from tests.messages import ROOT


def run(program: str, *arguments: str) -> list[str]:
    """The lines that an example prints on standard output; it must succeed."""
    command = [sys.executable, str(ROOT / "examples" / program), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_offline_batch_finds_its_keys() -> None:
    """One prompt inside the window and one beyond it, in one batch."""
    printed = run("offline_batch.py", "--lengths", "300", "1600")
    for key in ("31415", "31416"):
        (line,) = [line for line in printed if f"key {key}: " in line]
        assert key in line.partition("key ")[2].partition(": ")[2]


def test_long_chat_remembers_its_beginning() -> None:
    """What the first message says is outside the window when the last one asks."""
    last = run("long_chat.py", "--turns", "2")[-1]
    history, _, answer = last.partition(" tokens of history: ")
    assert int(history) > 1024 + 512 and "27182" in answer
