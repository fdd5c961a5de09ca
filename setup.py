"""Builds the C++ kernels; everything else is said in pyproject.toml."""

import os
import shutil
from pathlib import Path

from setuptools import setup

NO_TORCH = (
    "vllm-infllm builds its C++ kernels against the torch that vLLM runs with, and this Python has none: install vLLM "
    "first, then `pip install --no-build-isolation vllm-infllm`."
)
NO_COMPILER = (
    "vllm-infllm builds C++ kernels and found no C++ compiler ({compiler}): install one (Debian, Ubuntu: `apt install "
    "g++`; Fedora: `dnf install gcc-c++`), or name yours in the environment variable CXX."
)

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(NO_TORCH) from error


class BuildKernels(BuildExtension):
    """Says what to install where the compiler is missing."""

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "g++")
        if not shutil.which(compiler.split()[0]):
            raise SystemExit(NO_COMPILER.format(compiler=compiler))
        super().build_extensions()


def version() -> str:
    line = Path(__file__).with_name("vllm_infllm").joinpath("__init__.py").read_text().split("__version__ = ")[1]
    return line.split('"')[1]


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
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f'-DINFLLM_VERSION="{version()}"',
        *os.environ.get("INFLLM_CXXFLAGS", "").split(),
    ],
    extra_link_args=os.environ.get("INFLLM_LDFLAGS", "").split(),
)

setup(
    ext_modules=[cpu_kernels],
    cmdclass={"build_ext": BuildKernels.with_options(use_ninja=True, no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
