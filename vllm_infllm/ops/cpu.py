"""The operations in C++ (csrc/cpu): one call a layer for all rows of a batch. The contract is interface.py's.

Packing: csrc/cpu/layout.h. The instruction set is the best one of the machine, or that of the environment variable
VLLM_INFLLM_CPU_ISA.
"""

import os
from types import ModuleType
from typing import Any

import torch

from vllm_infllm import __version__
from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.config import KEY, ConfigError
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, check_sizes

# A residency cache on a CPU saves nothing, since the store can be read in place: it is there to be tested.
from vllm_infllm.ops.reference import attended as attended
from vllm_infllm.ops.reference import gather as gather
from vllm_infllm.ops.reference import resolve as resolve

PANEL = 16
ISA_VARIABLE = "VLLM_INFLLM_CPU_ISA"
_REMEDY = (
    "Install it again where vLLM is installed (pip install --no-build-isolation --force-reinstall --no-deps "
    f'vllm-infllm), or ask for the slow operations: --additional-config "{KEY}": ops="reference".'
)


def _load() -> ModuleType:
    """The extension, which registers the torch operators; checked to be this version's."""
    try:
        from vllm_infllm import _cpu  # type: ignore[attr-defined]
    except ImportError as error:
        raise ConfigError(f"The C++ operations of vllm-infllm cannot be loaded: {error}. {_REMEDY}") from error
    if _cpu.version() != __version__:
        raise ConfigError(
            f"The C++ operations are those of vllm-infllm {_cpu.version()}, and this is {__version__}. {_REMEDY}"
        )
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted and wanted not in _cpu.isas():
        raise ConfigError(f"{ISA_VARIABLE}={wanted}: this machine can run {', '.join(_cpu.isas())}; use one of them.")
    if wanted:
        _cpu.use_isa(wanted)
    extension: ModuleType = _cpu
    return extension


_extension = _load()


def isas() -> list[str]:
    """Instruction sets that this machine can run, the best one last."""
    return list(_extension.isas())


def use_isa(name: str) -> None:
    """Run on one of `isas()` from now on."""
    _extension.use_isa(name)


def check(head_size: int, block_size: int) -> str | None:
    return check_sizes("C++", head_size, block_size)


def describe() -> str:
    return f"C++ ({_extension.isa()})"


def write(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    torch.ops.vllm_infllm.write(cache, key, value, slots)


def select(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    query: torch.Tensor,
    representatives: torch.Tensor,
) -> torch.Tensor:
    chosen: torch.Tensor = torch.ops.vllm_infllm.select(query, representatives, *_choosing(blocks, settings, rope))
    return chosen


def select_peak(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    query: torch.Tensor,
    keys: torch.Tensor,
    last: int,
) -> torch.Tensor:
    chosen: torch.Tensor = torch.ops.vllm_infllm.select_peak(
        query, keys, *_choosing(blocks, settings, rope), last, settings.scale
    )
    return chosen


def _choosing(blocks: ExecutionBlocks, settings: LayerSettings, rope: RotaryTable) -> tuple[Any, ...]:
    """Arguments of both operators that choose units."""
    sizes = (settings.n_local, settings.init_blocks, settings.topk)
    return (rope.cos_sin, rope.neox, blocks.rows, blocks.units, blocks.num_chosen, *sizes)


def attend(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    query: torch.Tensor,
    cache: torch.Tensor,
    memory: LayerMemory,
    chosen: torch.Tensor,
    slots: torch.Tensor | None,
    output: torch.Tensor,
    mass: torch.Tensor | None,
) -> None:
    torch.ops.vllm_infllm.attend(
        output,
        query,
        cache,
        memory.keys,
        memory.values,
        memory.received,
        rope.cos_sin,
        rope.neox,
        blocks.rows,
        blocks.block_table,
        chosen,
        slots,
        mass,
        settings.n_local,
        settings.scale,
    )


def seal(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    cache: torch.Tensor,
    memory: LayerMemory,
) -> None:
    torch.ops.vllm_infllm.seal(
        cache,
        memory.received,
        memory.keys,
        memory.values,
        memory.representatives,
        rope.cos_sin,
        rope.neox,
        blocks.leaving,
        settings.repr_topk,
    )


def unpack(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count, heads, block_size, head_size = keys.shape
    tokens, dims = block_size // PANEL, head_size // PANEL
    if keys.dtype == torch.bfloat16:  # pairs along the summed dimension
        key = keys.reshape(count, heads, tokens, head_size // 2, PANEL, 2).permute(0, 1, 2, 4, 3, 5)
        value = values.reshape(count, heads, dims, block_size // 2, PANEL, 2).permute(0, 1, 3, 5, 2, 4)
    else:
        key = keys.reshape(count, heads, tokens, head_size, PANEL).transpose(3, 4)
        value = values.reshape(count, heads, dims, block_size, PANEL).permute(0, 1, 3, 2, 4)
    return key.reshape(keys.shape), value.reshape(keys.shape)
