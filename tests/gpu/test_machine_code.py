"""The machine code of the kernels: what is claimed of it in docs/gpu.md, and that faults in it are found."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import build_cuda
from tests.gpu.machine_code import Code

GOOD = """
LDGSTS.E.BYPASS.LTC128B.128 [R9+0x2000], desc[UR6][R2.64] ;
LDG.E.64 R4, desc[UR4][R2.64] ;
HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
UTCHMMA gdesc[UR10], gdesc[UR12], tmem[UR4], tmem[UR6], idesc[UR7], UP0 ;
"""


def code(**different: Any) -> Code:
    usual: dict[str, Any] = {
        "kernel": "attend_prefill",
        "head_size": 128,
        "dtype": torch.bfloat16,
        "arch": 90,
        "warps": 8,
        "registers": 128,
        "stack": 0,
        "shared": 65536,
        "assembly": GOOD,
    }
    return Code(**{**usual, **different})


def test_instructions_are_counted() -> None:
    """By what they do, in all their forms."""
    good = code()
    assert (good.tensor_core, good.wide_loads, good.spills) == (3, 1, 0) and not good.faults()
    assert code(assembly="STL.64 [R1+0x8], R4 ;\nLDL.LU R4, [R1] ;\nLDG.E.ENL2.256 R4, R8, [R2.64] ;").spills == 2
    assert code(assembly="LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;").wide_loads == 1


@pytest.mark.parametrize(
    ("different", "fault"),
    [
        ({"assembly": GOOD + "STL [R1], R4 ;"}, "1 spills"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"shared": 232449}, "232449 bytes of shared memory are too much"),
        ({"arch": 80, "shared": 166913}, "166913 bytes of shared memory are too much"),
        ({"registers": 255, "warps": 16}, "255 registers"),
        ({"assembly": "LDG.E.128 R4, [R2.64] ;"}, "no tensor-core"),
        ({"assembly": "HMMA.16816.F32 R4, R8, R12, R4 ;"}, "no 128-bit"),
    ],
    ids=str,
)
def test_faults_are_named(different: dict[str, Any], fault: str) -> None:
    """Spills, stack, a block of threads that does not fit, and instructions that are missing."""
    (found,) = code(**different).faults()
    assert found.startswith("attend_prefill, head size 128, bfloat16, sm_") and fault in found


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "share"),
    [(4, 32, 0, 1.0), (4, 72, 0, 28 / 64), (8, 128, 0, 16 / 64), (1, 32, 0, 32 / 64), (4, 32, 65536, 12 / 64)],
)
def test_occupancy(warps: int, registers: int, shared: int, share: float) -> None:
    """By registers, by shared memory, or by the number of blocks: worked out by hand for compute capability 9.0."""
    assert code(warps=warps, registers=registers, shared=shared).occupancy == share


@pytest.mark.skipif(build_cuda.nvcc["find"]() is None, reason="no nvcc")
@pytest.mark.timeout(1800)
def test_the_kernels_are_as_documented() -> None:
    """In a process of its own: here, Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.machine_code", "--check"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
