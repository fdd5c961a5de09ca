"""`vllm-infllm doctor --model`: what a started engine would log, without starting one."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.engines import infllm_engine, plan
from vllm_infllm.tools import cli
from vllm_infllm.worker import cpu

MIB = 1 << 20
TOTAL, FREE = 1024 * MIB, 250 * MIB
"""Of a machine on which units are short: 45 MiB are left beside the reserve."""


def weight_bytes(model: str, dtype: torch.dtype) -> int:
    from safetensors.torch import load_file

    return sum(tensor.numel() * dtype.itemsize for tensor in load_file(Path(model, "model.safetensors")).values())


def doctor(model: str, *options: str) -> int:
    return cli.main(["doctor", "--model", model, *options])


@pytest.mark.parametrize(
    ("family", "options", "engine", "infllm"),
    [
        (
            # The doctor speaks of a server; offline vLLM's default token budget is another.
            "llama",
            ["--max-num-seqs", "3", "--max-num-batched-tokens", "2k"],
            {"max_num_seqs": 3, "max_num_batched_tokens": 2048},
            {"host_memory_gib": None},
        ),
        (
            "gemma3",  # layers with sliding windows beside
            ["--max-num-seqs", "2", "--max-num-batched-tokens", "1k", "--kv-cache-memory-bytes", str(64 * MIB)],
            {"max_num_seqs": 2, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 64 * MIB},
            {"host_memory_gib": 0.05, "n_local": 512, "topk": 2},
        ),
    ],
)
def test_doctor_says_what_the_engine_says(
    family: str,
    options: list[str],
    engine: dict[str, Any],
    infllm: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Word for word, on a machine with as much free memory; the engine finds it after its weights are loaded."""
    model = tiny_models.make(family, tmp_path)
    free = FREE + weight_bytes(model, torch.float32)
    monkeypatch.setattr(cpu, "host_memory", lambda: (TOTAL, free))
    common = ["--dtype", "float32", "--max-model-len", "20000", "--infllm", json.dumps(infllm)]
    assert doctor(model, *common, *options) == 0
    said = capsys.readouterr().out.splitlines()

    monkeypatch.setattr(cpu, "host_memory", lambda: (TOTAL, FREE))
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_infllm.worker.base")
    monkeypatch.setattr(logger, "level", logging.INFO)  # the command has silenced vLLM in this process
    logger._cache.clear()  # type: ignore[attr-defined]
    logger.addHandler(handler)
    try:
        with infllm_engine(model, infllm, max_model_len=20000, **engine) as llm:
            made = plan(llm)
    finally:
        logger.removeHandler(handler)
    assert len(logged) == 2 and said[-2:] == logged
    assert str(made) in said[-2]
    assert made.num_units < engine["max_num_seqs"] * (20000 // 128), "the plan is limited by memory"


@pytest.mark.parametrize(
    ("overrides", "options", "said"),
    [
        ({}, ["--infllm", '{"n_locl": 512}'], 'n_locl=512: unknown field. Did you mean "n_local"?'),
        ({}, ["--infllm", '{"host_memory_gib": 0.001}'], "host units = "),
        ({}, ["--dtype", "floaty"], "--dtype floaty: "),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            [],
            "InfLLM does not support the rope type DynamicNTKScalingRotaryEmbedding",
        ),
    ],
)
def test_a_refusal_is_the_engines(
    overrides: dict[str, Any], options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the configuration, of the memory plan, of vLLM, and of what is only known once the model is built."""
    model = tiny_models.make("llama", tmp_path, **overrides)
    assert doctor(model, "--max-model-len", "20000", *options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vllm-infllm doctor: error: ") and said in error


def test_weights_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the model's configuration is there; so are figures for its weights."""
    model = tiny_models.make("qwen2-yarn", tmp_path)
    size = weight_bytes(model, torch.bfloat16)
    Path(model, "model.safetensors").unlink()
    assert doctor(model, "--dtype", "bfloat16", "--max-model-len", "8k", "--max-num-seqs", "1") == 0
    said = capsys.readouterr().out
    assert f"{size / (1 << 30):.2f} GiB of weights, torch.bfloat16, at most 8192 tokens" in said
    assert "InfLLM runs 2 of 2 attention layers" in said


def test_options_of_an_engine_need_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--max-model-len", "8k"])
    assert end.value.code == 2
    assert "options of an engine need --model" in capsys.readouterr().err


def test_a_missing_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(str(tmp_path / "none")) == 2
    assert f"--model {tmp_path / 'none'}: no model is there" in capsys.readouterr().err
