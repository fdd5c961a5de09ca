"""Runs vLLM's commands for `vllm-infllm bench` and collects what they measured."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_infllm.tools import CommandError
from vllm_infllm.tools.bench_report import latency_figures, serve_figures, throughput_figures, write_json
from vllm_infllm.tools.server import Server, Usage, run_vllm

WATCHING = 0.02
"""Largest share of the time of a run in which a server is asked what it holds. Five times a second, on two cores that
also computed, made a token take 8 to 15% longer."""


@dataclass(frozen=True)
class Cell:
    """One place of the grid: tokens of a prompt, and requests at once."""

    length: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.length:,} tokens x {self.concurrency}"


@dataclass(frozen=True)
class Turn:
    """One side's part of a round."""

    side: str
    round: int

    def __str__(self) -> str:
        return f"round {self.round + 1}, {self.side}"


class Bench:
    """Measures one turn after the other; every sample goes into the record, and the record to disk, at once.

    step: is told a state, and how many runs have been completed with it.
    """

    def __init__(
        self,
        record: dict[str, Any],
        cells: Sequence[Cell],
        args: argparse.Namespace,
        step: Callable[[str, int], None],
    ) -> None:
        self._record, self._cells, self._args, self._step = record, cells, args, step

    def measure(self, turn: Turn) -> None:
        """All commands, all cells, small ones first."""
        for command in self._args.commands:
            if command == "serve":
                self._serve(turn)
            else:
                for cell in self._cells:
                    self._step(f"{turn}: {command}, {cell}", 0)
                    self._add(turn, command, cell, self._offline(turn, command, cell))

    def _serve(self, turn: Turn) -> None:
        """On a server of its own, warmed up with the smallest cell."""
        self._step(f"{turn}: starting the server", 0)
        arguments = [self._args.model, *self._record["engine"][turn.side]]
        with Server(turn.side, arguments, self._log(turn, "server"), self._args.start_timeout) as server:
            self._step(f"{turn}: warm-up", 0)
            self._ask(server, turn, self._cells[0], seed=0)
            for cell in self._cells:
                self._step(f"{turn}: serve, {cell}", 0)
                self._add(turn, "serve", cell, self._ask(server, turn, cell, seed=turn.round + 1))

    def _ask(self, server: Server, turn: Turn, cell: Cell, seed: int) -> dict[str, Any]:
        """One run of `vllm bench serve`, and what the server held at its peak."""
        watch = Watch(server)
        measured = self._run(
            turn,
            "serve",
            cell,
            lambda result: [
                *("--base-url", server.url, "--ignore-eos", "--temperature", "0"),
                *("--dataset-name", "random", "--num-prompts", str(cell.concurrency)),
                *("--max-concurrency", str(cell.concurrency), "--seed", str(seed)),
                *("--ready-check-timeout-sec", "0", "--disable-tqdm", "--save-result", "--save-detailed"),
                *("--result-dir", str(result.parent), "--result-filename", result.name),
            ],
            watch,
        )
        server.check()
        if measured["completed"] != cell.concurrency:
            reason = next(filter(None, measured.get("errors", [])), "no reason was given").splitlines()[-1]
            raise CommandError(
                f"{turn.side}: {cell.concurrency - measured['completed']} of {cell.concurrency} requests of "
                f"{cell.length} tokens failed: {reason} (log: {server.log})"
            )
        # One block, the null block, is never given to a request and not counted by the gauge.
        blocks = server.metric("vllm:cache_config_info", "num_gpu_blocks") - 1
        block_size = server.metric("vllm:cache_config_info", "block_size")
        held = {
            "resident_bytes": watch.peak.resident,
            "kv_tokens": round(watch.peak.cache * blocks) * round(block_size),
        }
        return {**serve_figures(measured), **held}

    def _offline(self, turn: Turn, command: str, cell: Cell) -> dict[str, Any]:
        """One run of `vllm bench throughput` or `latency`, each with an engine of its own and a warm-up."""
        flags = self._record["engine"][turn.side]
        requests = str(cell.concurrency)
        options = {
            "throughput": ["--dataset-name", "random", "--num-prompts", requests, "--num-warmups", "1"],
            "latency": ["--batch-size", requests, "--num-iters-warmup", "1", "--num-iters", "1"],
        }[command]
        measured = self._run(
            turn, command, cell, lambda result: [*options, *flags, "--output-json", str(result)], lambda: None
        )
        return throughput_figures(measured) if command == "throughput" else latency_figures(measured)

    def _run(
        self,
        turn: Turn,
        command: str,
        cell: Cell,
        options: Callable[[Path], list[str]],
        meanwhile: Callable[[], None],
    ) -> dict[str, Any]:
        """The JSON that a command of `vllm bench` writes to the file that `options` takes."""
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "result.json")
            lengths = ["--input-len", str(cell.length), "--output-len", str(self._args.output_len)]
            run_vllm(
                f"vllm bench {command}, {turn.side}, {cell}",
                ["bench", command, "--model", self._args.model, *lengths, *options(result)],
                self._log(turn, command),
                self._args.timeout,
                meanwhile,
            )
            return json.loads(result.read_text())

    def _log(self, turn: Turn, what: str) -> Path:
        return self._args.output / "logs" / f"{turn.side}-{turn.round + 1}-{what}.log"

    def _add(self, turn: Turn, command: str, cell: Cell, figures: dict[str, Any]) -> None:
        self._record["samples"].append({**asdict(turn), **asdict(cell), **figures})
        write_json(self._record, self._args.output)
        self._step(f"{turn}: {command}, {cell}: done", 1)


class Watch:
    """Called again and again, looks at what a server holds: seldom enough to leave it the cores it computes on."""

    def __init__(self, server: Server) -> None:
        self.peak = Usage(0, 0.0)
        self._server, self._next = server, 0.0

    def __call__(self) -> None:
        self._server.check()
        begin = time.monotonic()
        if begin < self._next:
            return
        now = self._server.usage()
        self.peak = Usage(max(self.peak.resident, now.resident), max(self.peak.cache, now.cache))
        self._next = begin + (time.monotonic() - begin) / WATCHING
