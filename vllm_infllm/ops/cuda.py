"""Operations in CUDA C++ (csrc/cuda): exact top-k, the residency caches, and the copies into them.

The contract is interface.py's, but that outputs are kept from call to call (workspace.py). Nothing is read back to the
host, and every launch follows from shapes alone.
"""

import torch

from vllm_infllm import __version__
from vllm_infllm.config import ConfigError
from vllm_infllm.memory.residency import Residency
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import workspace
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings

_REMEDY = (
    "Install it where vLLM is installed, on a machine with nvcc, of the CUDA toolkit that torch was built for "
    "(pip install .[cuda] --no-build-isolation, in a clone of vllm-infllm)."
)


def _load() -> None:
    """Import the extension, which registers the torch operators; check that it is this version's."""
    try:
        from vllm_infllm import _cuda  # type: ignore[attr-defined]
    except ImportError as error:
        raise ConfigError(f"The CUDA operations of vllm-infllm cannot be loaded: {error}. {_REMEDY}") from error
    if _cuda.version() != __version__:
        raise ConfigError(
            f"The CUDA operations are those of vllm-infllm {_cuda.version()}, and this is {__version__}. {_REMEDY}"
        )


def _nothing(*arguments: object) -> None:
    """What the operators return, also where tensors are fake: their outputs are arguments."""


_load()
for _name in ("topk", "resolve", "gather", "attended"):
    torch.library.register_fake(f"vllm_infllm_cuda::{_name}", _nothing)


def topk(scores: torch.Tensor, blocks: ExecutionBlocks, settings: LayerSettings) -> torch.Tensor:
    """Stored blocks that each row attends to, as `select` returns them.

    scores: [R, most units of a row] float32, of the units of each row in order; need not be written for rows that
        have at most topk of them. NaN counts as -inf.
    """
    shape = (len(blocks.rows), blocks.num_chosen)
    chosen = workspace.take("chosen", shape, torch.int64, scores.device)
    torch.ops.vllm_infllm_cuda.topk(chosen, scores, blocks.rows, blocks.units, settings.init_blocks, settings.topk)
    return chosen


def resolve(
    blocks: ExecutionBlocks, settings: LayerSettings, residency: Residency, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(chosen.shape)
    slots = workspace.take("slots", shape, torch.int64, chosen.device)
    missing = workspace.take("missing", shape, torch.int64, chosen.device)
    torch.ops.vllm_infllm_cuda.resolve(
        slots,
        missing,
        residency.unit,
        residency.arrived,
        residency.used,
        residency.mass,
        residency.clock,
        residency.counts,
        chosen,
        blocks.rows,
        blocks.block_table,
        settings.init_blocks,
        residency.strategy,
    )
    return slots, missing


def gather(memory: LayerMemory, missing: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    torch.ops.vllm_infllm_cuda.gather(cache, memory.keys, memory.values, missing, slots)


def attended(
    blocks: ExecutionBlocks, settings: LayerSettings, residency: Residency, chosen: torch.Tensor, mass: torch.Tensor
) -> None:
    torch.ops.vllm_infllm_cuda.attended(
        residency.mass, residency.unit, blocks.rows, chosen, mass, settings.init_blocks, residency.decay
    )
