"""Builds the C++ kernels; everything else is said in pyproject.toml."""

import os
import runpy
import shutil
from pathlib import Path

from setuptools import Extension, setup

NO_TORCH = (
    "vllm-infllm builds its C++ kernels against the torch that vLLM runs with, and this Python has none: install vLLM "
    "first, then `pip install --no-build-isolation vllm-infllm`."
)
NO_COMPILER = (
    "vllm-infllm builds C++ kernels and found no C++ compiler ({compiler}): install one (Debian, Ubuntu: `apt install "
    "g++`; Fedora: `dnf install gcc-c++`), or name yours in the environment variable CXX."
)
NO_NVCC = (
    "vllm-infllm builds CUDA kernels because {reason}, and found no nvcc in {where}: install the CUDA toolkit{version} "
    "and put its bin folder into PATH, or name the toolkit's folder in the environment variable CUDA_HOME. To do "
    "without, on a machine where InfLLM runs on the CPU only, set the environment variable INFLLM_CUDA=0."
)

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(NO_TORCH) from error


class BuildKernels(BuildExtension):
    """Says what to install where a compiler is missing; builds the CUDA kernels by nvcc alone."""

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "g++")
        if not shutil.which(compiler.split()[0]):
            raise SystemExit(NO_COMPILER.format(compiler=compiler))
        every = self.extensions
        if cuda_kernels in every:
            self.spawn(nvcc_command(self.get_ext_fullpath(cuda_kernels.name)))
        self.extensions = [extension for extension in every if extension is not cuda_kernels]
        super().build_extensions()
        self.extensions = every


def version() -> str:
    line = Path(__file__).with_name("vllm_infllm").joinpath("__init__.py").read_text().split("__version__ = ")[1]
    return line.split('"')[1]


def cuda_wanted() -> bool:
    """By default where torch has CUDA; otherwise as the environment variable INFLLM_CUDA says, 1 or 0."""
    return os.environ.get("INFLLM_CUDA", "1" if torch.version.cuda else "0") == "1"


def nvcc_command(output: str) -> list[str]:
    """Builds the CUDA kernels into `output`."""
    nvcc = runpy.run_path("csrc/cuda/nvcc.py")
    compiler = nvcc["find"]()
    if not compiler:
        cuda, home = torch.version.cuda, os.environ.get("CUDA_HOME")
        raise SystemExit(
            NO_NVCC.format(
                reason=f"torch is built for CUDA {cuda}" if cuda else "INFLLM_CUDA=1",
                where=f"CUDA_HOME={home}" if home else "PATH",
                version=f" {cuda}" if cuda else "",
            )
        )
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    command: list[str] = nvcc["command"](compiler, version(), output)
    return command


cpu_kernels = CppExtension(
    "vllm_infllm._cpu",
    sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
    py_limited_api=True,
    extra_compile_args=[
        "-O3",
        "-std=c++20",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",  # of intrinsics that begin with any value, in GCC 12's own header
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f'-DINFLLM_VERSION="{version()}"',
        *os.environ.get("INFLLM_CXXFLAGS", "").split(),
    ],
    extra_link_args=os.environ.get("INFLLM_LDFLAGS", "").split(),
)
cuda_kernels = Extension(
    "vllm_infllm._cuda",
    ["csrc/cuda/binding.cu"],
    depends=["csrc/cpu/problem.h", *sorted(str(path) for path in Path("csrc/cuda").iterdir())],
    py_limited_api=True,
)

setup(
    ext_modules=[cpu_kernels, cuda_kernels] if cuda_wanted() else [cpu_kernels],
    cmdclass={"build_ext": BuildKernels.with_options(use_ninja=True, no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
