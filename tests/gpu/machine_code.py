"""The machine code of every kernel for NVIDIA GPUs: registers, shared memory, spills, instructions. Needs no GPU.

`python -m tests.gpu.machine_code` compiles each kernel as the ops launch it and writes the table in docs/gpu.md; with
--check it compiles most of them and fails where that table, written with the same compilers, differs. It also fails
where a kernel spills, takes more shared memory than there is, or lacks the instructions that make it fast.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.gpu import build_cuda
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Leaving, Row

DOCUMENT = Path(__file__).parents[2] / "docs/gpu.md"
BEGIN, END = "<!-- machine-code -->", "<!-- /machine-code -->"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
HEAD_SIZES = (64, 128)
OTHER_DTYPES = (torch.float16, torch.float32)
"""Beside bfloat16: of these, the kernels with products."""
WITH_PRODUCTS = ("attend_prefill", "attend_split", "received", "weigh")
CHECKED_ARCH = 80
"""The one with the fewest registers to spare; --check compiles other dtypes for no other."""
IN_WIDE_LOADS = ("attend_prefill", "attend_split", "gather")
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
"""Bytes of shared memory of a multiprocessor, by architecture."""
RESERVED = 1 << 10
"""What a block of threads takes of it beside its own."""
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
"""What else there is in a multiprocessor."""
MOST_THREADS = r"\.nv\.info\.(\S+)\n(?:(?!\.nv\.info)[\s\S])*?EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x\w+)"


# --- Code ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """One kernel for one architecture. head_size, dtype: None for code that serves any."""

    kernel: str
    head_size: int | None
    dtype: torch.dtype | None
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    assembly: str

    def count(self, pattern: str) -> int:
        """Instructions that match."""
        return len(re.findall(pattern, self.assembly))

    @property
    def spills(self) -> int:
        return self.count(r"\b(?:STL|LDL)\b")

    @property
    def tensor_core(self) -> int:
        return self.count(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")

    @property
    def wide_loads(self) -> int:
        """Loads of 128 bits or more, to registers or to shared memory."""
        return self.count(r"\b(?:LDG|LDGSTS)\b\S*\.(?:128|256)")

    @property
    def occupancy(self) -> float:
        """Bound of the share of a multiprocessor's warps that can be resident at once."""
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // of_warp // 4 * 4 // self.warps
        by_shared = SHARED[self.arch] // (-(-self.shared // 128) * 128 + RESERVED)
        return min(BLOCKS, WARPS // self.warps, by_registers, by_shared) * self.warps / WARPS

    def faults(self) -> list[str]:
        """Why this code must not be shipped."""
        name = f"{self.kernel}, head size {self.head_size or 'any'}, {_name(self.dtype)}, sm_{self.arch}"
        found = {
            f"{self.spills} spills, {self.stack} bytes of stack": self.spills or self.stack,
            f"{self.registers} registers, {self.shared} bytes of shared memory are too much": self.occupancy == 0,
            "no tensor-core instructions": self.kernel.startswith(WITH_PRODUCTS) and not self.tensor_core,
            "no 128-bit loads": self.kernel.startswith(IN_WIDE_LOADS) and not self.wide_loads,
        }
        return [f"{name}: {fault}" for fault, present in found.items() if present]

    def line(self) -> str:
        cells = (
            self.kernel,
            self.head_size or "any",
            _name(self.dtype),
            f"sm_{self.arch}",
            self.registers,
            self.shared,
            self.spills,
            self.tensor_core,
            self.wide_loads,
            f"{self.occupancy:.0%}",
        )
        return f"| {' | '.join(map(str, cells))} |"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.") if dtype else "any"


def tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def functions_of(cubin: Path) -> dict[str, dict[str, Any]]:
    """Registers, stack (with local memory), static shared memory and assembly of each function."""
    usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    assembly = re.split(r"\n\.text\.(\S+):\n", tool("nvdisasm", "-c", cubin))
    bodies = dict(zip(assembly[1::2], assembly[2::2], strict=True))
    return {
        name: {
            "registers": int(registers),
            "stack": int(stack) + int(local),
            "shared": int(shared),
            "assembly": bodies[name],
        }
        for name, registers, stack, shared, local in re.findall(usage, tool("cuobjdump", "-res-usage", cubin))
    }


# --- Triton ----------------------------------------------------------------------------------------------------------


class Launch:
    """A kernel and the arguments that an op gave it."""

    def __init__(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kernel, self.kwargs = kernel, kwargs
        bind = create_function_from_signature(kernel.signature, kernel.params, _backend(80))
        self.bound, self.specialization, self.options = bind(*args, **kwargs)

    def compile(self, arch: int) -> CompiledKernel:
        """As Triton does for this launch: specialized to the alignment and divisibility of the arguments."""
        options, *source = self.kernel._pack_args(_backend(arch), self.kwargs, self.bound, self.specialization, None)
        return triton.compile(ASTSource(self.kernel, *source), target=_target(arch), options=options.__dict__)

    @property
    def variant(self) -> dict[str, Any]:
        """What the code depends on: compile-time arguments, what is known of the others, and options."""
        return dict(zip(self.bound, self.specialization, strict=True)) | self.options


def _target(arch: int) -> GPUTarget:
    return GPUTarget("cuda", arch, 32)


def _backend(arch: int) -> BaseBackend:
    return make_backend(_target(arch))


def launches_of(op: Callable[[], object]) -> list[Launch]:
    """What an op launches; nothing is run."""
    launches = []

    def keep(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", keep):
        op()
    return launches


def launches_of_layer(head_size: int, dtype: torch.dtype, longest: int) -> list[Launch]:
    """Every launch for a batch whose longest row has this many tokens, in a layer of the usual sizes."""
    # Not before main has loaded the CUDA operations, which their package imports.
    from vllm_infllm.ops.triton import attend, attend_prefill, seal, write
    from vllm_infllm.ops.triton.score import score
    from vllm_infllm.ops.triton.tiles import Call

    requests, kv_heads, heads, block_size, settings = 4, 8, 32, 128, LayerSettings(4096, 1, 16, 4, head_size**-0.5)
    num_chosen, units = settings.init_blocks + settings.topk, 100
    blocks = ExecutionBlocks(
        rows=torch.zeros(requests, len(Row), dtype=torch.int64),
        block_table=torch.zeros(requests, 256, dtype=torch.int32),
        units=torch.zeros(requests * units, dtype=torch.int64),
        leaving=torch.zeros(requests, len(Leaving), dtype=torch.int64),
        num_chosen=num_chosen,
        longest=longest,
        most_stored=units,
    )
    rope = RotaryTable(torch.ones(8192, head_size), neox=True)
    tokens, cache = requests * longest, torch.empty(2, kv_heads, block_size, 2 * head_size, dtype=dtype)
    # Parts of one row of the model's, as there.
    widths = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
    query, key, value = (
        part.unflatten(1, (-1, head_size)) for part in torch.empty(tokens, sum(widths), dtype=dtype).split(widths, 1)
    )
    memory = LayerMemory.allocate(2, 2, heads, cache, head_size)
    chosen, mass = (torch.zeros(requests, num_chosen, dtype=kind) for kind in (torch.int64, torch.float32))
    output = torch.empty(tokens, heads, head_size, dtype=dtype)
    plan = (blocks, settings, rope)
    ops: list[Callable[[], object]] = [
        lambda: write(cache, key, value, torch.zeros(tokens, dtype=torch.int64)),
        lambda: score(*plan, query, memory.representatives),
        lambda: attend(*plan, query, cache, memory, chosen, None, output, None),
        lambda: attend(*plan, query, cache, memory, chosen, chosen, output, mass),
        lambda: seal(*plan, cache, memory),
    ]
    if longest > 1:
        # As behind xformers' part of the window: heads and queries in another order.
        group = heads // kv_heads
        found = torch.empty(kv_heads * tokens, group, head_size, dtype=dtype), torch.empty(group, kv_heads * tokens)
        begun = attend_prefill.Found(*found, torch.zeros(requests, 3, dtype=torch.int64))
        halves_of = memory.keys, memory.values
        call = Call(*plan, query, query.contiguous(), cache, *halves_of, chosen, memory.received, output)
        ops.append(lambda: attend_prefill.attend(call, torch.empty(tokens, heads), begun))
    return [launch for op in ops for launch in launches_of(op)]


def named(launches: list[Launch]) -> dict[str, Launch]:
    """One launch of each code; where a kernel has several, what they differ in is a part of their names."""
    of_kernel: dict[str, list[Launch]] = {}
    for launch in launches:
        known = of_kernel.setdefault(launch.kernel.__name__.removesuffix("_kernel"), [])
        if all(launch.variant != other.variant for other in known):
            known.append(launch)
    names = {}
    for kernel, known in of_kernel.items():
        variants = [launch.variant for launch in known]
        differing = [name for name in variants[0] if any(v.get(name) != variants[0][name] for v in variants)]
        for launch in known:
            values = [f"{name}={launch.bound.get(name, launch.options.get(name))}" for name in differing]
            names[f"{kernel} ({', '.join(values)})" if values else kernel] = launch
    return names


def triton_codes(
    head_size: int, dtype: torch.dtype, archs: Iterable[int] = SHARED, only: str | tuple[str, ...] = ""
) -> Iterator[Code]:
    """only: the kernels whose names begin so."""
    launches = [launch for longest in (512, 1) for launch in launches_of_layer(head_size, dtype, longest)]
    chosen = {name: launch for name, launch in named(launches).items() if name.startswith(only)}
    for name, launch in chosen.items():
        for arch in archs:
            compiled = launch.compile(arch)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled.asm["cubin"])
                cubin.flush()
                (function,) = functions_of(Path(cubin.name)).values()
            function["shared"] = compiled.metadata.shared
            yield Code(name, head_size, dtype, arch, compiled.metadata.num_warps, **function)


# --- CUDA C++ --------------------------------------------------------------------------------------------------------


def cuda_codes(library: Path) -> Iterator[Code]:
    """The kernels of csrc/cuda, as they were built."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", "all", library], cwd=folder, capture_output=True, check=True)
        for arch in SHARED:
            for cubin in Path(folder).glob(f"*sm_{arch}.cubin"):
                threads = dict(re.findall(MOST_THREADS, tool("cuobjdump", "-elf", cubin)))
                for symbol, function in functions_of(cubin).items():
                    name = re.search(r"\d([a-z]+)_kernel", symbol)
                    assert name, symbol
                    if arch >= 90 and function["shared"]:  # counted there with what every block of threads takes
                        function["shared"] -= RESERVED
                    yield Code(name[1], None, None, arch, int(threads[symbol], 16) // 32, **function)


# --- The table -------------------------------------------------------------------------------------------------------

HEADING = """\
| kernel | D | dtype | | registers | shared memory | spills | tensor-core instructions | 128-bit loads | occupancy <= |
| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def section(codes: list[Code]) -> str:
    """What stands between BEGIN and END."""
    return HEADING + "".join(f"{code.line()}\n" for code in codes) + f"\n{compilers()}\n"


def compilers() -> str:
    nvcc = subprocess.run([build_cuda.nvcc["find"](), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V([\d.]+)", nvcc)
    assert version
    return f"Compiled by Triton {triton.__version__} and nvcc {version[1]}."


def document_with(section: str) -> str:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{section}{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the table differs")
    options = parser.parse_args()
    library = build_cuda.build_real()
    build_cuda.load(library)
    codes = [code for head_size in HEAD_SIZES for code in triton_codes(head_size, torch.bfloat16)]
    archs = [CHECKED_ARCH] if options.check else SHARED
    for dtype, head_size in itertools.product(OTHER_DTYPES, HEAD_SIZES):
        codes += triton_codes(head_size, dtype, archs, WITH_PRODUCTS)
    codes += sorted(cuda_codes(library), key=lambda code: (code.kernel, code.arch))
    faults = [fault for code in codes for fault in code.faults()]
    if not options.check:
        DOCUMENT.write_text(document_with(section(codes)))
    elif compilers() not in DOCUMENT.read_text():
        print(f"{DOCUMENT.name} was written with other compilers: not compared.", compilers())
    else:
        documented = set(DOCUMENT.read_text().splitlines())
        other = [code.line() for code in codes if code.line() not in documented]
        if other:
            faults.append("\n".join([f"{DOCUMENT.name} lacks these; run `python -m tests.gpu.machine_code`:", *other]))
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
