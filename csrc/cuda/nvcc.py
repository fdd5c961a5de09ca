"""Where nvcc is, and its command line that builds the CUDA operations: for setup.py and for tests.

They use libtorch's stable ABI only, so that nvcc alone builds them, also beside a torch without CUDA.
"""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

ARCHITECTURES = (80, 90, 100)
"""Machine code for these, which newer chips of the same generation run as well, and PTX of the last for later ones."""
SOURCES = Path(__file__).parent


def find() -> str | None:
    """nvcc of the toolkit that CUDA_HOME names, else the one in PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def common(version: str) -> list[str]:
    """Arguments that the host compiler takes as well."""
    return [
        "-O3",
        "-std=c++20",
        "-shared",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DPy_LIMITED_API=0x030A0000",
        f'-DINFLLM_VERSION="{version}"',
        f"-I{sysconfig.get_path('include')}",
        str(SOURCES / "binding.cu"),
    ]


def torch_libraries() -> list[str]:
    """-ltorch although nothing of it is named: where there is CUDA, it brings the library that knows the streams."""
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def torch_headers() -> str:
    return str(Path(torch.__file__).parent / "include")


def command(nvcc: str, version: str, output: str, *more: str) -> list[str]:
    """Builds `output`, a Python extension module; `more` arguments."""
    targets = [f"arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES[:-1]]
    targets.append(f"arch=compute_{ARCHITECTURES[-1]},code=[sm_{ARCHITECTURES[-1]},compute_{ARCHITECTURES[-1]}]")
    return [
        nvcc,
        *common(version),
        *(f"-gencode={target}" for target in targets),
        "-cudart=static",
        "--expt-relaxed-constexpr",
        "-Xcompiler=-fPIC,-Wall",
        "-DUSE_CUDA",
        "-isystem",
        torch_headers(),
        "-Xlinker=--no-as-needed",
        *torch_libraries(),
        *more,
        "-o",
        output,
    ]
