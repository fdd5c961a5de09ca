"""How the CUDA operations are loaded and built: refusals, what nvcc makes of them, and the library without a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import vllm_infllm
from tests import extensions
from tests.gpu import build_cuda
from vllm_infllm.config import ConfigError
from vllm_infllm.ops import load

needs_nvcc = pytest.mark.skipif(build_cuda.nvcc["find"]() is None, reason="no nvcc")


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        (None, "operations of vllm-infllm cannot be loaded"),
        (extensions.older("cuda"), "are those of vllm-infllm 0.0.1, and this is"),
    ],
    ids=["missing", "mismatched"],
)
def test_unusable_extension(extension: ModuleType | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extensions.replace(monkeypatch, "cuda", extension)
    with pytest.raises(ConfigError, match=reason) as refusal:
        load("cuda")  # type: ignore[arg-type]
    assert "with nvcc" in str(refusal.value) and "pip install .[cuda] --no-build-isolation" in str(refusal.value)


def run(*command: str, **env: str) -> tuple[int, str]:
    """Exit status, and what a Python process printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=build_cuda.ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


WITH_CUDA_TORCH = "import runpy, sys, torch; torch.version.cuda = '12.9'; sys.argv = ['setup.py', 'build_ext']; "
SETUP = "runpy.run_path('setup.py', run_name='__main__')"


def test_no_nvcc_though_asked_for(tmp_path: Path) -> None:
    """The build says why it needs nvcc, where it looked, and how to do without."""
    status, printed = run("setup.py", "build_ext", "-b", str(tmp_path), INFLLM_CUDA="1", CUDA_HOME=str(tmp_path))
    assert status == 1 and f"because INFLLM_CUDA=1, and found no nvcc in CUDA_HOME={tmp_path}" in printed
    assert "install the CUDA toolkit and put its bin folder into PATH" in printed and "INFLLM_CUDA=0" in printed


def test_no_nvcc_for_a_torch_with_cuda(tmp_path: Path) -> None:
    """The toolkit has torch's version."""
    status, printed = run("-c", WITH_CUDA_TORCH + SETUP, CUDA_HOME=str(tmp_path))
    assert status == 1 and "because torch is built for CUDA 12.9, and found no nvcc" in printed
    assert "install the CUDA toolkit 12.9 and put its bin folder" in printed


def test_cuda_left_out(tmp_path: Path) -> None:
    """With INFLLM_CUDA=0 nothing asks for nvcc, whatever torch is there."""
    names = "print([x.name for x in sys.modules['distutils.core']._setup_distribution.ext_modules])"
    script = "import setuptools; " + WITH_CUDA_TORCH.replace("'build_ext'", "'--name'") + SETUP + "; " + names
    assert "['vllm_infllm._cpu']" in run("-c", script, INFLLM_CUDA="0")[1]
    assert "['vllm_infllm._cpu', 'vllm_infllm._cuda']" in run("-c", script)[1]


@pytest.fixture(scope="module")
def real() -> Iterator[Path]:
    yield build_cuda.build_real()


@needs_nvcc
def test_no_kernel_spills(real: Path) -> None:
    """On any of the architectures."""
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", real.with_suffix(".log").read_text()
    )
    assert len(spills) == 4 * len(build_cuda.nvcc["ARCHITECTURES"]) and set(spills) == {("0", "0", "0")}


WITHOUT_GPU = """
import sys, torch
from pathlib import Path
from tests.gpu import build_cuda

print("version", build_cuda.load(Path(sys.argv[1])).version())
operator = torch.ops.vllm_infllm_cuda.topk.default
tensors = torch.empty((1, 3), dtype=torch.int64), torch.empty((1, 3)), torch.zeros((1, 9), dtype=torch.int64)
arguments = *tensors, torch.empty(0, dtype=torch.int64), 0, 3
for call in (operator, lambda *x: operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *x)):
    try:
        call(*arguments)
    except (NotImplementedError, RuntimeError) as error:
        print(type(error).__name__, error)
"""


@needs_nvcc
def test_without_a_gpu_the_library_loads_and_refuses_to_run(real: Path) -> None:
    """There is no operator for CPU tensors, and that for CUDA finds no CUDA in this torch."""
    status, printed = run("-c", WITHOUT_GPU, str(real))
    assert status == 0 and f"version {vllm_infllm.__version__}" in printed
    assert "NotImplementedError Could not run 'vllm_infllm_cuda::topk' with arguments from the 'CPU' backend" in printed
    assert "RuntimeError" in printed and "need a torch with CUDA, and tensors on a GPU" in printed
