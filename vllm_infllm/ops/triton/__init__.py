"""The operations in Triton (this folder) and CUDA C++ (ops/cuda.py), for GPUs. The contract is interface.py's.

Packing: token by token, as in the reference. Outputs are kept from call to call (workspace.py).
"""

import torch

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.config import KEY
from vllm_infllm.ops import workspace
from vllm_infllm.ops.cuda import attended, gather, resolve, topk
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings
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
    "unpack",
    "write",
]

STEP, MAX_HEAD_SIZE = 16, 256


def check(head_size: int, block_size: int) -> str | None:
    if block_size % STEP:
        return (
            f"--block-size {block_size}: the Triton operations need a multiple of {STEP}. Use one, or set "
            f'--additional-config "{KEY}": ops="reference".'
        )
    if head_size % STEP or not 2 * STEP <= head_size <= MAX_HEAD_SIZE:
        return (
            f"The model's head size {head_size}: the Triton operations run {2 * STEP} to {MAX_HEAD_SIZE} in steps of "
            f'{STEP}. Set --additional-config "{KEY}": ops="reference".'
        )
    return None


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
