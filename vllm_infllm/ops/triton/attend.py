"""`attend` of the interface: rows with one token, then rows with several, each by kernels of their own."""

import torch

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops import workspace
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Row, halves
from vllm_infllm.ops.triton import attend_decode, attend_prefill, received
from vllm_infllm.ops.triton.rotate import far_queries
from vllm_infllm.ops.triton.tiles import Call


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
    stored = (memory.keys, memory.values, chosen) if slots is None else (*halves(cache), slots)
    far = far_queries(blocks, settings, rope, query)
    call = Call(blocks, settings, rope, query, far, cache, *stored, memory.received, output)
    weights = None
    if mass is not None and mass.numel():
        shape = (call.rows, call.heads, blocks.num_chosen)
        weights = workspace.take("weights", shape, torch.float32, query.device)
    if weights is not None or blocks.longest == 1 or _some_have_one_token(blocks):
        attend_decode.attend(call, weights)
    if blocks.longest > 1:
        lse = workspace.take("lse", query.shape[:2], torch.float32, query.device)
        found = None
        if settings.local_attention == "xformers":
            from vllm_infllm.ops.triton import local_xformers  # optional, so not imported above

            found = local_xformers.attend(call)
        attend_prefill.attend(call, lse, found)
        received.accumulate(call, lse)
        if weights is not None:
            received.weigh(call, lse, weights)
    if weights is not None and mass is not None:
        received.sum_heads(call, weights, mass)


def _some_have_one_token(blocks: ExecutionBlocks) -> bool:
    """A launch takes the host as long whether there is something to do or not."""
    return blocks.host_rows is None or any(row[Row.END] - row[Row.START] == 1 for row in blocks.host_rows)
