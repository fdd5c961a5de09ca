"""What the machine is, and what it reaches: memory read bandwidth, matrix products."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.plan import Plan
from benchmarks.progress import Part
from vllm_infllm import __version__
from vllm_infllm.memory import pages

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
MATRIX = 2048
"""Rows and columns of the matrices that are multiplied."""


def threads() -> int:
    """Threads to compute with: one a physical core, as vLLM does."""
    return min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)


def describe(dtype: str, ops: str) -> dict[str, Any]:
    """What a reader has to know about the machine and the software on it."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return {
        "cpu": facts.get("model name", platform.processor()),
        "flags": [flag for flag in FLAGS if flag in facts.get("flags", "").split()],
        "threads": threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "last_level_cache_mib": last_level_cache() / (1 << 20),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "dtype": dtype,
        "ops": ops,
        "versions": {
            "vllm-infllm": __version__,
            "vllm": version("vllm"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the kernel does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().rstrip("K")) << 10 for size in sizes), default=32 << 20)


def run(plan: Plan, dtype: str, part: Part) -> None:
    """Samples in GB/s and GFLOP/s, with one thread and with all."""
    counts, dtypes = sorted({1, threads()}), sorted({dtype, "float32"})
    part.plan(len(counts) * (1 + len(dtypes)))
    seconds = plan.seconds["machine"] / len(counts) / (1 + len(dtypes)) / 2
    size = max(plan.kernels_bytes, 4 * last_level_cache()) // 4
    memory = pages.empty((size,), torch.float32).fill_(1)
    part.samples |= {"bandwidth": {}, "product": {name: {} for name in dtypes}}
    for count in counts:
        torch.set_num_threads(count)
        part.doing(f"memory, {count} threads")
        taken = part.alternate({"read": reading(memory)}, plan.samples, seconds)["read"]
        part.samples["bandwidth"][str(count)] = [memory.nbytes / s / 1e9 for s in taken]
        part.advance()
        for name in dtypes:
            part.doing(f"{name} products, {count} threads")
            taken = part.alternate({"product": product(MATRIX, name)}, plan.samples, seconds)["product"]
            part.samples["product"][name][str(count)] = [2 * MATRIX**3 / s / 1e9 for s in taken]
            part.advance()


def reading(memory: torch.Tensor) -> Callable[[], float]:
    """A function that reads all of `memory` (float32) and returns the seconds that it took."""

    def run() -> float:
        begin = time.perf_counter()
        memory.sum()
        return time.perf_counter() - begin

    return run


def product(size: int, dtype: str) -> Callable[[], float]:
    """A function that multiplies two square matrices and returns the seconds that it took."""
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> float:
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        return time.perf_counter() - begin

    return run
