"""The operations in Triton (this folder) and CUDA C++ (ops/cuda.py), for GPUs. The contract is interface.py's.

Packing: token by token, as in the reference. Outputs are kept from call to call (workspace.py).
"""

import torch

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.ops import workspace
from vllm_infllm.ops.cuda import attended, gather, resolve, topk
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, check_sizes

# Refused on a GPU: there it would read all keys over the bus.
from vllm_infllm.ops.reference import select_peak
from vllm_infllm.ops.triton.attend import attend
from vllm_infllm.ops.triton.score import score
from vllm_infllm.ops.triton.seal import seal
from vllm_infllm.ops.triton.write import write

__all__ = [
    "attend",
    "attended",
    "check",
    "describe",
    "gather",
    "resolve",
    "seal",
    "select",
    "select_peak",
    "unpack",
    "write",
]


def check(head_size: int, block_size: int) -> str | None:
    return check_sizes("Triton", head_size, block_size)


def describe() -> str:
    return "Triton and CUDA"


def select(
    blocks: ExecutionBlocks,
    settings: LayerSettings,
    rope: RotaryTable,
    query: torch.Tensor,
    representatives: torch.Tensor,
) -> torch.Tensor:
    num_units = blocks.most_stored - settings.init_blocks
    if 0 < settings.topk < num_units:
        return topk(score(blocks, settings, rope, query, representatives), blocks, settings)
    nobody_has_a_choice = workspace.take("scores", (len(blocks.rows), 0), torch.float32, query.device)
    return topk(nobody_has_a_choice, blocks, settings)


def unpack(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return keys, values
