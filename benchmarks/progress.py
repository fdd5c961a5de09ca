"""The part of the benchmark that is running: its time budget, its progress bar, and what has to be said about it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Part:
    """Counts measurements and seconds of one part."""

    def __init__(self, name: str, seconds: float, console: Console, progress: Progress) -> None:
        self.name = name
        self.notes: list[str] = []
        self.samples: dict[str, Any] = {}
        """What was measured so far; kept even if the part breaks off."""
        self._seconds = seconds
        self._console, self._progress = console, progress
        self._task = progress.add_task(f"{name:<8}", total=None, state="", budget=f"of {seconds / 60:.0f} min")
        self._begin = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def fits(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return self.elapsed + seconds <= self._seconds

    def plan(self, measurements: int) -> None:
        """Say how many measurements there will be."""
        self._progress.update(self._task, total=measurements)

    def doing(self, state: str) -> None:
        self._progress.update(self._task, state=state)

    def advance(self, measurements: int = 1) -> None:
        self._progress.update(self._task, advance=measurements)

    def note(self, text: str) -> None:
        """Say something that the report must say, too."""
        self.notes.append(text)
        self._console.print(f"{self.name}: {text}", style="yellow", highlight=False)

    def end(self) -> None:
        self._progress.update(self._task, state="done")
        self._progress.stop_task(self._task)

    def alternate(
        self, runs: Mapping[str, Callable[[], float]], at_most: int, seconds: float, at_least: int = 3
    ) -> dict[str, list[float]]:
        """Samples of each run (a function that returns seconds), taken in turn after one that does not count.

        Ends after `at_most` turns or when `seconds` are spent, but not before `at_least` turns.
        """
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        begin = time.monotonic()
        for turn in range(at_most):
            if turn >= at_least and time.monotonic() - begin > seconds:
                break
            for name, run in runs.items():
                samples[name].append(run())
        return samples


class Display:
    """The progress bars of a run, on a terminal; elsewhere a line for each part."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[budget]}"),
            TextColumn("{task.fields[state]}"),
            console=console,
        )

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[Part]:
        if not self.console.is_terminal:
            self.console.print(f"{name}: at most {seconds / 60:.0f} min", highlight=False)
        part = Part(name, seconds, self.console, self._progress)
        yield part
        part.end()
