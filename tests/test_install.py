"""A C++ extension that cannot be built, is missing, or belongs to another version: a message that says what to do."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests import extensions, tiny_models
from tests.test_refusals import engine_config
from vllm_infllm.config import ConfigError

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext']; "


def run(*command: str, **env: str) -> tuple[int, str]:
    """Exit status, and what a Python process printed."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=8192)


def test_no_compiler(tmp_path: Path) -> None:
    """The build names the compiler that it looked for, and how to install one."""
    status, printed = run("setup.py", "build_ext", "--build-temp", str(tmp_path), CXX="no-such-compiler")
    assert status == 1 and "found no C++ compiler (no-such-compiler)" in printed and "apt install g++" in printed


def test_no_torch() -> None:
    """Without torch there is nothing to build against; the message says what to install first."""
    status, printed = run("-c", WITHOUT_TORCH + "runpy.run_path('setup.py')")
    assert status == 1 and "install vLLM first, then `pip install --no-build-isolation vllm-infllm`" in printed


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        (None, "operations of vllm-infllm cannot be loaded"),
        (extensions.older("cpu"), "are those of vllm-infllm 0.0.1, and this is"),
    ],
    ids=["missing", "mismatched"],
)
def test_unusable_extension_stops_startup(
    extension: types.ModuleType | None, reason: str, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs on the slow operations unasked; asked for by name, they need no extension."""
    extensions.replace(monkeypatch, "cpu", extension)
    with pytest.raises(ConfigError, match=reason) as refusal:
        engine_config(llama)
    assert "--no-build-isolation --force-reinstall" in str(refusal.value) and 'ops="reference"' in str(refusal.value)
    assert engine_config(llama, {"ops": "reference"}).additional_config["infllm"]["ops"] == "reference"


def test_unknown_instruction_set_stops_startup(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable that forces one is checked against what the machine can run."""
    monkeypatch.setenv("VLLM_INFLLM_CPU_ISA", "mmx")
    monkeypatch.delitem(sys.modules, "vllm_infllm.ops.cpu", raising=False)
    with pytest.raises(ConfigError, match="VLLM_INFLLM_CPU_ISA=mmx: this machine can run portable"):
        engine_config(llama)
