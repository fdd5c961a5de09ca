"""`vllm-infllm eval` but for the engine: runs that are killed and resumed, folders, bad input, tables and pictures."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.eval.solvers import solve
from vllm_infllm.tools import UsageError, cli
from vllm_infllm.tools.eval import answers, report
from vllm_infllm.tools.eval.results import Record, Results
from vllm_infllm.tools.model import demo_model
from vllm_infllm.tools.sides import BACKENDS, load_tokenizer

pictures = pytest.importorskip("vllm_infllm.tools.eval.pictures")
ROOT = Path(__file__).parents[2]
SHORT = ["passkey", "perplexity", "--lengths", "600,1k", "--depths", "3"]


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "WORKER", "tests.eval.fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def table(shown: str) -> list[str]:
    """The lines of the score table in what was printed."""
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if "Scores of 100" in line)
    return [line for line in lines[start:] if not line.startswith(("eval", "/", "out"))]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The results without what depends on the clock, in the order of their names."""
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for one in found:
        del one["seconds"], one["first_token_seconds"]
    return sorted(found, key=lambda one: (one["backend"], one["sample"]))


def test_a_run_gives_results_tables_and_pictures(
    no_engine: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    assert cli.main(["eval", *SHORT, "--backends", "streaming,infllm", "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    found = lines(out)
    assert len(found) == 2 * 2 * (3 + 1)
    asked = [one for one in found if one["task"] == "passkey"]
    assert {one["score"] for one in asked} == {0.0, 1.0}
    assert all((one["score"] == 1.0) == (one["answer"] == one["expected"][0]) for one in asked)
    assert {one["depth"] for one in asked} == {0.0, 0.5, 1.0} and {one["length"] for one in found} == {600, 1024}
    assert all(0 < one["prompt_tokens"] <= one["length"] for one in found)
    mean = 100 * sum(one["score"] for one in asked if one["length"] == 600) / 6
    assert f"{mean:.1f} (3)" in shown and "2.72" in shown
    drawn = {"passkey-infllm.png", "passkey-streaming.png", "passkey-lengths.png", "perplexity.png"}
    assert {file.name for file in out.glob("*.png")} == drawn
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in out.glob("*.png"))


def test_a_killed_run_ends_as_an_undisturbed_one(
    no_engine: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle, and a line torn off: the second start asks only what is missing, the table is the same."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["eval", *SHORT, "--samples", "2", "--output"]
    assert cli.main([*arguments, str(whole)]) == 0
    expected = table(capsys.readouterr().out)

    start = (
        "from vllm_infllm.tools import cli; from vllm_infllm.tools.eval import answers;"
        f"answers.WORKER = 'tests.eval.fake_worker'; cli.main({[*arguments, str(killed)]})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start],
        env={**os.environ, "INFLLM_TEST_SLOW": "0.3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    results = killed / "results.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not results.exists() or results.read_bytes().count(b"\n") < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = results.read_text().splitlines()
    assert 4 <= len(before) < 14
    with results.open("a") as file:
        file.write('{"task": "passkey", "backe')

    assert cli.main([*arguments, str(killed)]) == 0
    assert table(capsys.readouterr().out) == expected
    assert results.read_text().splitlines()[: len(before)] == before
    assert lines(killed) == lines(whole)
    # Once more: nothing is left to ask.
    monkeypatch.setattr(answers, "WORKER", "no_such_module")
    assert cli.main([*arguments, str(killed)]) == 0
    shown = capsys.readouterr().out
    assert "all 16 prompts were answered before" in shown and table(shown) == expected


def test_order_and_neighbours_do_not_matter(no_engine: None, tmp_path: Path) -> None:
    """The prompts of a task are the same alone as among others, with several in flight, and for every backend."""
    for name, arguments in {
        "alone": ["passkey", "--lengths", "600"],
        "among": ["kv", "passkey", "--lengths", "1k,600", "--concurrency", "3"],
    }.items():
        assert cli.main(["eval", *arguments, "--depths", "2", "--output", str(tmp_path / name)]) == 0
    among = [one for one in lines(tmp_path / "among") if one["task"] == "passkey" and one["length"] == 600]
    assert lines(tmp_path / "alone") == among


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal; its exit status is 2."""
    assert cli.main(["eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no task 'nothing'; the tasks are passkey,"),
        (["infinitebench_longbook_qa_en"], "xinrongzhang2022/InfiniteBench needs the package datasets: pip install"),
        (["passkey", "--lengths", "4k,long"], "--lengths 4k,long: 'long' is no number of tokens"),
        (["passkey", "--lengths", "0"], "--lengths 0"),
        (
            ["passkey", "--lengths", "4k", "--max-model-len", "4096"],
            "up to 4106 tokens, and max_model_len is 4096",
        ),
        (["passkey", "--engine", '{"max_model_len": 8192}'], "--engine: give --max-model-len instead of max_model_len"),
        (
            ["passkey", "--engine", '{"model": "m", "attention_backend": "infllm"}'],
            "--engine: give --backends instead of attention_backend, --model instead of model",
        ),
        (["passkey", "--lengths", "50"], "--lengths 50: a prompt of this task takes at least"),
        (["passkey", "--backends", "infllm,flash"], "--backends: there is no backend 'flash'"),
        (
            ["passkey", "--backends", "infllm-mean"],
            "'infllm-mean'; the backends are infllm, streaming, full, infllm-",
        ),
        (["passkey", "--model", "/nowhere"], "--model /nowhere: there is no such folder"),
        (["passkey", "--model", "no-such/model"], "--model no-such/model: "),
        (["passkey", "--base-url", "http://127.0.0.1:9/v1"], "--base-url http://127.0.0.1:9/v1: Connection error."),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert message in refused([*arguments, "--output", str(out)], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples: '0' is not a positive number"),
        (["--depths", "0"], "--depths: '0': give a number of depths, or depths from 0 to 1 as 0.2,0.5"),
        (["--depths", "0.5,1.5"], "--depths: '0.5,1.5': give a number of depths"),
        (["--depths", "half"], "--depths: 'half': give a number of depths"),
        (["--infllm", "{"], "--infllm: '{' is not JSON"),
        (["--engine", "[]"], "--engine: '[]' is not a JSON object"),
    ],
)
def test_mistyped_options_end_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "passkey", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("before", [False, True])
def test_an_engine_that_does_not_start_leaves_nothing(
    before: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither files, nor settings that would be held against the next run, nor folders but those that were there."""
    monkeypatch.setattr(answers, "WORKER", "no_such_module")
    out = tmp_path / "new" / "out"
    if before:
        out.mkdir(parents=True)
    assert cli.main(["eval", "passkey", "--lengths", "600", "--output", str(out)]) == 1
    assert capsys.readouterr().err.startswith("vllm-infllm eval: error: infllm: ")
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "out"] if before else [])


def test_folders_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in the way, something else's folder, results of other settings: the difference is named."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    message = refused(["passkey", "--lengths", "600", "--output", str(blocked)], capsys)
    assert f"--output {blocked}: File exists" in message
    assert "Not a directory" in refused(["passkey", "--lengths", "600", "--output", str(blocked / "x")], capsys)
    assert "holds files of something else" in refused(
        ["passkey", "--lengths", "600", "--output", str(tmp_path)], capsys
    )
    assert [file.name for file in tmp_path.iterdir()] == ["file"]

    open_ = Results(tmp_path / "out", {"model": "m", "seed": 0})
    with pytest.raises(UsageError, match="another run writes there"):
        Results(tmp_path / "out", {"model": "m", "seed": 0})
    del open_
    with pytest.raises(UsageError, match="holds results of --seed 0, not 1; choose another folder"):
        Results(tmp_path / "out", {"model": "m", "seed": 1})
    (tmp_path / "out" / "results.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="not results of this version"):
        Results(tmp_path / "out", {"model": "m", "seed": 0})


class Handler(BaseHTTPRequestHandler):
    """Enough of vLLM's completion API: a solver answers, streamed; log-probabilities of -1."""

    max_model_len = 2048
    tokenizer: Any = None

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, kind: str, body: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        model = {"id": "served", "object": "model", "created": 0, "owned_by": "", "max_model_len": self.max_model_len}
        self._send("application/json", json.dumps({"object": "list", "data": [model]}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "served" and asked["temperature"] == 0
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
        reply = {"id": "", "object": "text_completion", "created": 0, "model": "served"}
        if asked.get("stream"):
            half = solve(self.tokenizer.decode(asked["prompt"]))
            events = [reply | {"choices": [choice | {"text": text}]} for text in (half[:2], half[2:])]
            body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            self._send("text/event-stream", body)
        else:
            assert asked["prompt_logprobs"] == 0
            steps = [None, *({str(token): {"logprob": -1.0, "rank": 1}} for token in asked["prompt"][1:])]
            choice |= {"text": "", "prompt_logprobs": steps}
            self._send("application/json", json.dumps(reply | {"choices": [choice]}))


@pytest.fixture
def server() -> Iterator[str]:
    Handler.tokenizer = load_tokenizer(str(demo_model()))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


def test_a_server_is_asked(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Streamed answers and log-probabilities, two at a time; longer prompts than it takes are refused."""
    arguments = ["eval", *SHORT, "--base-url", server, "--concurrency", "2", "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    found = lines(tmp_path / "out")
    assert [one["score"] for one in found if one["task"] == "passkey"] == [1.0] * 6
    assert [one["nll"] for one in found if one["task"] == "perplexity"] == [[1.0] * 4, [1.0] * 3]
    assert {one["backend"] for one in found} == {"server"}
    message = refused(["passkey", "--lengths", "4k", "--base-url", server, "--output", str(tmp_path / "no")], capsys)
    assert "max_model_len is 2048" in message and not (tmp_path / "no").exists()


def test_a_server_of_another_kind_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    message = refused(["passkey", "--base-url", f"http://127.0.0.1:{port}/v1"], capsys)
    assert f"--base-url http://127.0.0.1:{port}/v1: Connection error." in message


def test_every_backend_has_a_line_of_its_own() -> None:
    styles = [tuple(pictures._style(backend).items()) for backend in (*BACKENDS, "my server")]
    assert len(set(styles)) == len(BACKENDS) + 1


def record(length: int, depth: float | None, score: float | None, nll: list[float] | None = None) -> Record:
    sample = f"{length}/{depth}/{score}"
    return Record("t", "infllm", length, depth, sample, length, "", [], {}, 2.0, 1.0, score, nll)


def test_numbers_of_tables_and_pictures_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(1024, 0.0, 1.0), record(1024, 0.0, 0.0), record(1024, 1.0, 1.0), record(2048, 1.0, 0.25)]
    lengths, depths, cells = pictures.grid(records)
    assert (lengths, depths) == ([1024, 2048], [0.0, 1.0])
    assert cells[0][0] == 0.5 and cells[0][1] != cells[0][1] and cells[1] == [1.0, 0.25]
    assert report.scores(records).rows == [["t, infllm", "66.7 (3)", "25.0 (1)"]]
    assert report.scores([record(512, None, None, [0.0, 2.0])]).rows == [["t, infllm", "2.72"]]

    written: dict[str, list[str]] = {}
    really_save = pictures._save

    def save(figure: Any, file: Path) -> Path:
        written[file.name] = [text.get_text() for text in figure.axes[0].texts]
        return really_save(figure, file)

    monkeypatch.setattr(pictures, "_save", save)
    pictures.draw(records, tmp_path)
    assert written["t-infllm.png"] == ["50", "100", "25"], "a cell without an answer is left empty"
