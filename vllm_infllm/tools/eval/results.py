"""The folder of an evaluation: settings.json, and results.jsonl with a line for each sample that was answered."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """Records of a folder, by backend and sample; every one is on the disk before the next sample's is."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open a folder or make it.

        Raises:
            UsageError: if it cannot be written, or holds results of other settings.
        """
        self.folder = folder
        self._file = folder / "results.jsonl"
        written = folder / "settings.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if written.exists():
                _compare(folder, json.loads(written.read_text()), settings)
            elif any(folder.iterdir()):
                raise UsageError(f"--output {folder}: holds files of something else; choose a new folder")
            else:
                _write_whole(written, json.dumps(settings, indent=2) + "\n")
            _drop_torn_line(self._file)
            self.records = {
                (record.backend, record.sample): record
                for record in (Record(**json.loads(line)) for line in self._file.read_text().splitlines())
            }
        except OSError as error:
            raise UsageError(f"--output {folder}: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"--output {folder}: not results of this version ({error})") from error

    def has(self, backend: str, sample: str) -> bool:
        return (backend, sample) in self.records

    @contextlib.contextmanager
    def append(self) -> Iterator[Any]:
        """Hands out a function that adds one record, to memory and to the disk."""
        with self._file.open("a") as file:

            def add(record: Record) -> None:
                file.write(json.dumps(asdict(record)) + "\n")
                file.flush()
                os.fsync(file.fileno())
                self.records[record.backend, record.sample] = record

            yield add


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


def _drop_torn_line(file: Path) -> None:
    """Cut off a last line that a killed run did not finish; makes the file if there is none."""
    with file.open("a+b") as raw:
        raw.seek(0)
        content = raw.read()
        raw.truncate(content.rfind(b"\n") + 1)
