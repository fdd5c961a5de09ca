"""The folder of an evaluation: settings.json, and results.jsonl with a line for each sample that was answered."""

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from vllm_infllm.tools import UsageError


@dataclass(frozen=True)
class Record:
    """One answered sample.

    nll: means of bins of positions, of perplexity only, which has no score.
    retrieved: share of layers and steps that retrieved what is asked for (see retrieval.py), where that is known.
    """

    task: str
    backend: str
    length: int
    depth: float | None
    sample: str
    prompt_tokens: int
    answer: str
    expected: list[str]
    meta: dict[str, Any]
    seconds: float
    first_token_seconds: float
    score: float | None
    nll: list[float] | None = None
    retrieved: float | None = None


class Results:
    """Records of a folder, by backend and sample; every one is on the disk before the next sample's is.

    The folder is this run's alone for as long as the object lives. As a context manager it leaves nothing of a run
    that ended before its first answer, whose settings may have been wrong.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open a folder or make it.

        Raises:
            UsageError: if it cannot be written, holds results of other settings, or another run writes there.
        """
        self.folder = folder
        written = folder / "settings.json"
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if written.exists():
                _compare(folder, json.loads(written.read_text()), settings)
            elif any(folder.iterdir()):
                raise UsageError(f"--output {folder}: holds files of something else; choose a new folder")
            else:
                _write_whole(written, json.dumps(settings, indent=2) + "\n")
            self._file = _open_alone(folder)
            self.records = {
                (record.backend, record.sample): record
                for record in (Record(**json.loads(line)) for line in _whole_lines(self._file))
            }
        except OSError as error:
            raise UsageError(f"--output {folder}: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"--output {folder}: not results of this version ({error})") from error

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        if self.records:
            return
        for name in ("settings.json", "results.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else has put something there
            for path in self._made:
                path.rmdir()

    def has(self, backend: str, sample: str) -> bool:
        return (backend, sample) in self.records

    def add(self, record: Record) -> None:
        """To memory and to the disk."""
        self._file.write(f"{json.dumps(asdict(record))}\n".encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record.backend, record.sample] = record


def _compare(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != (wanted := new.get(name)):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"--output {folder}: holds results of {flag} {json.dumps(old.get(name))}, not {json.dumps(wanted)}; "
                "choose another folder"
            )


def _write_whole(file: Path, text: str) -> None:
    """The file appears with all of its text or not at all."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.rename(file)


def _open_alone(folder: Path) -> IO[bytes]:
    """The file of results, made if there is none; locked until it is closed."""
    file = (folder / "results.jsonl").open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(
            f"--output {folder}: another run writes there; wait for it, or choose another folder"
        ) from None
    except OSError:
        # Some file systems of clusters have no locks, and are what results lie on.
        pass
    return file


def _whole_lines(file: IO[bytes]) -> list[bytes]:
    """Its lines; a last one that a killed run did not finish is cut off."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    return content.split(b"\n")[:-1]
