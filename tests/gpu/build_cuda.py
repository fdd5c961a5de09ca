"""Builds of the CUDA operations: by nvcc for GPUs, and by g++ for the CPU (cuda_shim.h).

Whatever was built before from the same sources by the same command is not built again.
"""

import hashlib
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import vllm_infllm

ROOT = Path(__file__).parent.parent.parent
SOURCES = [*(ROOT / "csrc/cuda").iterdir(), ROOT / "csrc/cpu/problem.h", Path(__file__).with_name("cuda_shim.h")]
EXTENSION_VARIABLE = "INFLLM_TEST_CUDA_EXTENSION"
"""Names a build of the operations to test, instead of the one that is made here."""

nvcc: dict[str, Any] = runpy.run_path(str(ROOT / "csrc/cuda/nvcc.py"))


def build_real() -> Path:
    """What setup.py builds: machine code for GPUs. The compiler's report lies beside it, *.log."""
    output = ROOT / "build/cuda/_cuda.so"
    compiler = nvcc["find"]()
    _build(output, nvcc["command"](compiler, vllm_infllm.__version__, str(output), "-Xptxas=-v"))
    return output


def build_shim() -> Path:
    """The same sources for the CPU."""
    output = ROOT / "build/cuda_shim/_cuda.so"
    command = [
        os.environ.get("CXX", "g++"),
        "-xc++",
        *nvcc["common"](vllm_infllm.__version__),
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-fno-strict-aliasing",
        "-DCUDA_ON_CPU",
        f"-I{ROOT / 'tests/gpu'}",
        "-isystem",
        nvcc["torch_headers"](),
        *nvcc["torch_libraries"](),
        "-o",
        str(output),
    ]
    _build(output, command)
    return output


def load(path: Path) -> ModuleType:
    """Import a build under the name that the package imports."""
    spec = importlib.util.spec_from_file_location("vllm_infllm._cuda", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_for_cpu() -> ModuleType:
    """The operations on CPU tensors; to be called before vllm_infllm.ops.cuda is imported, and again without effect.

    Without effect, too, where the tests run on a GPU.
    """
    loaded = sys.modules.get("vllm_infllm._cuda")
    return loaded or load(Path(os.environ.get(EXTENSION_VARIABLE) or build_shim()))


def _build(output: Path, command: list[str]) -> None:
    stamp, text = output.with_suffix(".stamp"), _fingerprint(command)
    if output.exists() and stamp.exists() and stamp.read_text() == text:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    output.with_suffix(".log").write_text(done.stdout + done.stderr)
    stamp.write_text(text)


def _fingerprint(command: list[str]) -> str:
    contents = b"".join(path.read_bytes() for path in sorted(SOURCES) if path.is_file())
    return hashlib.sha256(repr((command, torch.__version__)).encode() + contents).hexdigest()
