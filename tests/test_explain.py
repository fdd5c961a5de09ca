"""`vllm-infllm explain`: what it counts, what it draws and prints, and what it refuses."""

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import tiny_models
from vllm_infllm.memory.trace import Trace, TracedBlock
from vllm_infllm.tools import cli, explain, heatmap

TRACE = Trace(
    block_size=4,
    n_init=4,
    n_local=8,
    layers=["a", "b"],
    blocks=[
        TracedBlock(0, 16, [[], []]),
        TracedBlock(16, 20, [[0], [0]]),
        TracedBlock(20, 24, [[1], [0]]),
        TracedBlock(24, 25, [[2], [1]]),
        TracedBlock(25, 26, [[2], [2]]),
    ],
)
"""Two layers that retrieve one unit each: of 0, 1, 2, 3 and 3 sealed ones."""


class Words:
    """A tokenizer whose token n is the word wn."""

    def decode(self, tokens: list[int]) -> str:
        return " ".join(f"w{token}" for token in tokens)


def test_layers_are_counted_for_each_block_and_unit() -> None:
    counts = heatmap.layers_by_block_and_unit(TRACE)
    assert counts.tolist() == [[0, 0, 0], [2, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 2]]


def test_the_most_retrieved_units_are_shown_with_their_text() -> None:
    """Counted where there was a choice; of as many times as they could have been retrieved."""
    table = explain.most_retrieved(TRACE, list(range(100, 126)), Words(), most=2)
    columns = [list(column.cells) for column in table.columns]
    assert columns[:4] == [["2", "1"], ["12-15", "8-11"], ["3", "2"], ["4", "6"]]
    assert [str(text) for text in columns[4]] == ["w112 w113 w114 w115", "w108 w109 w110 w111"]


def test_a_prompt_is_explained(
    llama_with_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A tiny model over 1,200 tokens: a picture, the answer, and units whose words stand in the file."""
    words = [f"t{token:03}" for token in tiny_models.tokens(1200)]
    (tmp_path / "prompt.txt").write_text(" ".join(words))
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(explain, "Console", lambda: Console(width=4000))
    monkeypatch.setattr(explain, "demo_dtype", lambda: "float32")
    prompt = tmp_path / "prompt.txt"
    options = {"model": llama_with_tokenizer, "prompt-file": prompt, "output": picture, "n-local": 256, "topk": 2}
    assert cli.main(["explain", *(f"--{name}={value}" for name, value in options.items()), "--max-tokens=4"]) == 0
    signature, width, height = struct.unpack(">8s8xII", picture.read_bytes()[:24])
    assert signature == b"\x89PNG\r\n\x1a\n" and width > 500 and height > 300
    printed = capsys.readouterr().out
    assert "answer: t" in printed
    # Blocks of 256 up to the last token of the prompt, which is one of its own, and three tokens of the answer.
    assert "9 execution blocks, 6 units, 2 layers" in printed.replace(f"{picture}: ", "")
    rows = [line.split("│") for line in printed.splitlines() if "│" in line]
    assert 1 <= len(rows) <= 5
    for _, _unit, at, times, of, text, _ in rows:
        first, last = map(int, at.split("-"))
        assert text.split() == words[first : last + 1] and len(text.split()) == 128
        assert 0 < int(times) <= int(of)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt-file": "/nowhere/prompt.txt"}, "--prompt-file /nowhere/prompt.txt: "),
        ({"max-tokens": 0}, "--max-tokens 0: give 1 or more"),
        ({"topk": -1}, "--topk -1: give 1 or more"),
        ({"n-local": 100}, "--n-local 100: give a multiple of 128"),
        ({"output": "/nowhere/x.png"}, "--output /nowhere/x.png: there is no folder /nowhere"),
        ({"output": "x.jpg"}, "--output x.jpg: give a name that ends with .png"),
        ({"model": "/nowhere"}, "--model /nowhere"),
        ({}, "give a longer text or lower --n-local"),
    ],
)
def test_explain_refuses_what_it_cannot_show(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before anything is run."""
    tiny_models.add_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "prompt.txt").write_text("t5 t6 t7")
    options = {"model": tmp_path, "prompt-file": tmp_path / "prompt.txt", **options}
    assert cli.main(["explain", *(f"--{name}={value}" for name, value in options.items())]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-infllm explain: error: ") and message in error


def test_a_missing_matplotlib_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "vllm_infllm.tools.heatmap")
    assert cli.main(["explain", f"--prompt-file={tmp_path / 'prompt.txt'}"]) == 1
    assert "pip install 'vllm-infllm[explain]'" in capsys.readouterr().err
