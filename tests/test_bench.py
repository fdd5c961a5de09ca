"""`vllm-infllm bench`: what it computes from figures, and how it drives vLLM's commands (here a stand-in for them)."""

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from tests import fake_vllm, tiny_models
from vllm_infllm.tools import bench_report, bench_run, cli, server
from vllm_infllm.tools.bench_report import METRICS, crossover, crossovers, gain, tables
from vllm_infllm.tools.engine_options import list_of, tokens

TTFT, TPOT, THROUGHPUT = METRICS[:3]


class Asked:
    """A server that takes 50 ms to say what it holds, on a clock that only its answers and the test move."""

    clock, seconds, held = 100.0, 0.0, 0.0

    def check(self) -> None:
        pass

    def usage(self) -> server.Usage:
        self.clock += 0.05
        self.seconds += 0.05
        return server.Usage(int(self.held), self.held / 100)


def test_watching_takes_little_of_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundredths of a run at most, but for the first look; what is held for some seconds is seen."""
    asked = Asked()
    monkeypatch.setattr("vllm_infllm.tools.bench_run.time.monotonic", lambda: asked.clock)
    watch = bench_run.Watch(asked)  # type: ignore[arg-type]
    for held in (0.0, 7.0, 3.0):
        asked.held = held
        for _ in range(20):
            watch()
            asked.clock += 0.2
    assert 0.1 <= asked.seconds <= 0.05 + bench_run.WATCHING * (asked.clock - 100)
    assert watch.peak == server.Usage(7, 0.07)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def served(ttft_ms: float, tpot_ms: float, throughput: float) -> dict[str, Any]:
    """The fields of the JSON of `vllm bench serve` that are read, and some that are not."""
    measured = {
        "date": "20261123-033000",
        "completed": 1,
        "mean_ttft_ms": 1.0,
        "median_ttft_ms": ttft_ms,
        "median_tpot_ms": tpot_ms,
        "total_token_throughput": throughput,
        "total_input_tokens": 10,
        "total_output_tokens": 2,
    }
    return bench_report.serve_figures(measured)


def sample(side: str, round_: int, length: int, figures: dict[str, Any]) -> dict[str, Any]:
    place = {"side": side, "round": round_, "length": length, "concurrency": 1}
    return {**place, **figures, "resident_bytes": length << 20, "kv_tokens": length}


@pytest.fixture
def record() -> dict[str, Any]:
    """Three rounds of two lengths."""
    samples = []
    for round_, slow in enumerate((1.0, 1.5, 0.5)):
        samples += [
            sample("stock", round_, 1024, served(1000 * slow, 40, 1024)),
            sample("infllm", round_, 1024, served(2000, 50, 512)),
            sample("stock", round_, 4096, served(16000 * slow, 80, 256)),
            sample("infllm", round_, 4096, served(8000, 40, 512)),
        ]
    engine = {"stock": ["--dtype", "float32"], "infllm": ["--attention-backend", "infllm"]}
    return {
        "model": "tiny",
        "dtype": "float32",
        "environment": {"vLLM": "0.32"},
        "infllm": {"topk": 16},
        "layers": "InfLLM runs 2 of 2 attention layers",
        "kv_bytes_per_token": 1 << 20,
        "engine": engine,
        "output_len": 8,
        "rounds": 3,
        "samples": samples,
    }


def test_a_gain_is_of_medians_and_its_spread_of_rounds(record: dict[str, Any]) -> None:
    """Medians 1,000 and 2,000 ms; rounds of 1,500, 1,000 and 500 over 2,000. Throughput counts the other way round."""
    ttft = gain(record, TTFT, 1024, 1)
    assert (ttft.value, ttft.low, ttft.high) == (0.5, 0.25, 0.75)
    assert gain(record, TPOT, 1024, 1).value == 0.8 and gain(record, TPOT, 4096, 1).value == 2
    assert gain(record, THROUGHPUT, 1024, 1).value == 0.5 and gain(record, THROUGHPUT, 4096, 1).value == 2


def test_crossovers_by_hand(record: dict[str, Any]) -> None:
    """Gains of 1/2 at 1K and 2 at 4K cross in the middle of the logarithms, at 2K; 0.8 and 2 nearer to 1K."""
    assert crossovers(record, TTFT) == {1: pytest.approx(2048)}
    # log(1/0.8) / log(2/0.8) = 0.24353 of the way from 1K to 4K
    assert crossovers(record, TPOT) == {1: pytest.approx(1024 * 4**0.24353, rel=1e-4)}


def test_no_figure_is_cut_off_in_a_narrow_terminal(record: dict[str, Any]) -> None:
    for sample_ in record["samples"]:
        sample_["tokens_per_s"] *= 1000
    shown = io.StringIO()
    for table in tables(record):
        Console(width=80, file=shown).print(table.rich())
    assert "1,024,000.00" in shown.getvalue() and "…" not in shown.getvalue()


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({1024: 1.2, 2048: 3.0}, 1024),  # better everywhere
        ({1024: 0.5, 2048: 0.9}, None),  # nowhere
        ({1024: 2.0, 2048: 0.5}, None),  # not for long prompts
        ({1024: 2.0, 2048: 0.5, 4096: 2.0}, 2048 * 2**0.5),  # the last crossing counts
        ({2048: 1.0, 4096: 2.0}, 2048),  # equal is not better; from there on it is
        ({1024: 1.0}, None),
    ],
)
def test_a_crossover_holds_for_all_longer_prompts(gains: dict[int, float], expected: float | None) -> None:
    assert crossover(gains) == (None if expected is None else pytest.approx(expected))


def test_tables_show_medians_in_their_units(record: dict[str, Any]) -> None:
    ttft, tpot, throughput, memory = tables(record)
    assert ttft.title == "time to first token, s; requests at once: 1"
    assert ttft.rows[0] == ["1,024", "1.00", "2.00", "0.50 (0.25 to 0.75)"]
    assert tpot.rows[0] == ["1,024", "40.00", "50.00", "0.80 (0.80 to 0.80)"]
    assert throughput.rows[0][:2] == ["1,024", "1,024.00"]
    assert memory.rows[1] == ["4,096 x 1", "4.00", "4.00", "4.00", "4.00"]  # GiB: 4,096 MiB, 4,096 tokens of 1 MiB


def test_the_report_names_crossovers_and_draws_what_was_measured(record: dict[str, Any], tmp_path: Path) -> None:
    bench_report.write(record, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "time to first token, s, requests at once: 1: InfLLM is better from 2,048 tokens on" in text
    drawn = {file.name for file in tmp_path.glob("*.svg")}
    assert drawn == {"ttft_ms.svg", "tpot_ms.svg", "tokens_per_s.svg", "resident_bytes.svg"}
    assert all(f"]({name})" in text for name in drawn)
    assert "<!-- 2,048 -->" in (tmp_path / "ttft_ms.svg").read_text(), "the crossover is marked"


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=1024)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stand-in for vLLM's command."""
    folder = tmp_path / "vllm"
    folder.mkdir()
    monkeypatch.setattr(server, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(server, "VLLM", (sys.executable, str(Path(fake_vllm.__file__)), str(folder)))
    return folder


def calls(folder: Path, *start: str) -> list[list[str]]:
    found = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    return [call for call in found if tuple(call[: len(start)]) == start]


def started(folder: Path) -> list[int]:
    """Process ids of all servers and their children."""
    return [int(pid) for line in (folder / "pids").read_text().splitlines() for pid in line.split()]


def left(pids: list[int]) -> list[int]:
    """Those that are alive, a moment after they were killed."""
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command(model: str, output: Path, *more: str) -> list[str]:
    sizes = ["--lengths", "512,2k", "--output-len", "8", "--rounds", "2", "--infllm", '{"host_memory_gib": 0.5}']
    return ["bench", "--model", model, "--dtype", "float32", "--output", str(output), *sizes, *more]


def test_sides_take_turns_over_the_whole_grid(model: str, vllm: Path, tmp_path: Path) -> None:
    """Two rounds, the second in the other order; each server is warmed up and then asked for every cell; nothing of it
    is left."""
    output = tmp_path / "new" / "folder"
    assert cli.main(command(model, output, "--concurrency", "1,2")) == 0
    sides = ["infllm" if "infllm" in call else "stock" for call in calls(vllm, "serve")]
    assert sides == ["stock", "infllm", "infllm", "stock"]
    asked = [
        (fake_vllm.option(call, "--input-len"), fake_vllm.option(call, "--num-prompts"))
        for call in calls(vllm, "bench", "serve")
    ]
    assert asked == [("512", "1"), ("512", "1"), ("512", "2"), ("2048", "1"), ("2048", "2")] * 4
    samples = json.loads((output / "results.json").read_text())["samples"]
    places = {(s["side"], s["round"], s["length"], s["concurrency"]) for s in samples}
    assert len(samples) == len(places) == 16
    assert samples[3]["ttft_ms"] == 4096 and samples[3]["answer_tokens"] == 16
    assert samples[3]["kv_tokens"] == 20 * 128, "half of 41 blocks, without the null block"
    assert samples[3]["resident_bytes"] > 1 << 20
    assert not left(started(vllm))


def test_engines_of_their_own_for_throughput_and_latency(model: str, vllm: Path, tmp_path: Path) -> None:
    """Both commands are given the sides' settings, and their figures are in the report."""
    output = tmp_path / "out"
    only = ["--lengths", "512", "--rounds", "1", "--commands", "throughput,latency"]
    assert cli.main([*command(model, output), *only]) == 0
    for name in ("throughput", "latency"):
        stock, ours = calls(vllm, "bench", name)
        assert fake_vllm.option(ours, "--attention-backend") == "infllm" and "--attention-backend" not in stock
        assert fake_vllm.option(stock, "--max-model-len") == fake_vllm.option(ours, "--max-model-len")
    assert not calls(vllm, "serve")
    samples = json.loads((output / "results.json").read_text())["samples"]
    assert [s.get("offline_tokens_per_s") for s in samples] == [700, None, 700, None]
    assert [s.get("latency_s") for s in samples] == [None, 2, None, 2], "the median"
    assert "seconds a batch" in (output / "report.md").read_text()


def test_stock_is_given_what_long_prompts_need(model: str, vllm: Path, tmp_path: Path) -> None:
    """More than it was trained for, and on a CPU a KV cache that holds all requests; both sides the same sizes."""
    more = ["--concurrency", "2", "--rounds", "1"]
    assert cli.main([*command(model, tmp_path / "out"), *more]) == 0
    stock, ours = calls(vllm, "serve")
    for call in (stock, ours):
        assert fake_vllm.option(call, "--max-model-len") == str(2048 + 8 + 16)
        assert fake_vllm.option(call, "--max-num-seqs") == "2" and "--no-enable-prefix-caching" in call
    assert json.loads(fake_vllm.option(stock, "--hf-overrides")) == {"max_position_embeddings": 2072}
    # 17 blocks and two spare ones, 128 tokens each, 2 layers, K and V, 2 heads of 32, float32; two requests
    assert int(fake_vllm.option(stock, "--kv-cache-memory-bytes")) == 2 * 19 * 128 * 2 * 2 * 2 * 32 * 4
    assert "--hf-overrides" not in ours and "--attention-backend" not in stock
    assert json.loads(fake_vllm.option(ours, "--additional-config")) == {"infllm": {"host_memory_gib": 0.5}}


ENDED = "the server ended with exit status"


@pytest.mark.parametrize(
    ("mood", "said"),
    [
        ("never", f"stock: {ENDED} 3: ValueError: out of luck (log: {{logs}}/stock-1-server.log)"),
        ("die", f"stock: {ENDED} 7: ValueError: out of luck (log: {{logs}}/stock-1-server.log)"),
        ("hang", "vllm bench serve, stock, 512 tokens x 1: not done after 2 s (log: {logs}/stock-1-serve.log)"),
        ("fail", "stock: 1 of 1 requests of 512 tokens failed: KeyError: 'usage' (log: {logs}/stock-1-server.log)"),
    ],
)
def test_a_failure_is_one_line_with_its_log(
    mood: str, said: str, model: str, vllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no process is left."""
    (vllm / "mood").write_text(mood)
    output = tmp_path / "out"
    assert cli.main(command(model, output, "--timeout", "2")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm-infllm bench: error: ")]
    assert said.format(logs=output / "logs") in line
    assert Path(line.partition("log: ")[2].partition(")")[0]).is_file()
    assert not left(started(vllm))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_nothing(number: signal.Signals, model: str, vllm: Path, tmp_path: Path) -> None:
    """Ctrl-C, or a signal to end, while a run is going on: server, its child and the run are gone."""
    (vllm / "mood").write_text("hang")

    def interrupt() -> None:
        while not (vllm / "dead").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    assert cli.main(command(model, tmp_path / "out")) == 130
    assert not left(started(vllm))
    runs = [p.pid for p in psutil.process_iter() if str(vllm) in _command_line(p)]
    assert not left(runs)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1k,", "k", "0", "-5", "1.5k", "8x", ""])
def test_malformed_lengths_are_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", f"--lengths={text}"])
    assert end.value.code == 2
    assert "is not a number of tokens like 8192, 8k or 1m" in capsys.readouterr().err


def test_lengths_are_numbers_of_tokens() -> None:
    assert list_of(tokens)("512, 1k,8K,1m,1k") == [512, 1024, 8192, 1 << 20]


def test_wrong_input_stops_before_anything_starts(
    model: str, vllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing model, a folder that is a file, and settings that an engine would refuse: one line, nothing written."""
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    refused: dict[str, tuple[int, list[str]]] = {
        "--model /nowhere: no model is there": (2, command("/nowhere", out)),
        f"--output {tmp_path / 'file'} cannot be written": (2, command(model, tmp_path / "file")),
        "n_local=100 is not a multiple": (1, [*command(model, out), "--infllm", '{"n_local": 100}']),
    }
    for said, (status, arguments) in refused.items():
        assert cli.main(arguments) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not (vllm / "calls").exists() and not out.exists()
