"""The memory of one layer: stored blocks on the host, representatives and received attention beside the cache."""

import math
from dataclasses import dataclass

import torch

from vllm_infllm.config import KEY, ConfigError
from vllm_infllm.memory import pages
from vllm_infllm.memory.plan import GIB


@dataclass(frozen=True)
class LayerMemory:
    """Tensors of one layer.

    keys, values: [num_units, KH, B, D], host memory (pinned where there is an accelerator); keys un-rotated.
    representatives: [num_units, H, D], on the device.
    received: [num_blocks, H, B] float32, on the device; attention received by the tokens of each paged block.
    """

    keys: torch.Tensor
    values: torch.Tensor
    representatives: torch.Tensor
    received: torch.Tensor

    @classmethod
    def allocate(
        cls, num_units: int, num_blocks: int, num_heads: int, kv_cache: torch.Tensor, head_size: int
    ) -> "LayerMemory":
        """Reserve address space; nothing is touched before it is used. Host memory comes in huge pages.

        kv_cache: the layer's paged cache [num_blocks, KH, B, 2 * head_size], for dtype, device and sizes.
        """
        _, kv_heads, block_size, _ = kv_cache.shape
        dtype, device = kv_cache.dtype, kv_cache.device
        unit_shape = (num_units, kv_heads, block_size, head_size)
        representatives_shape, received_shape = (num_units, num_heads, head_size), (num_blocks, num_heads, block_size)
        try:
            if device.type == "cpu":
                pages.collapse(kv_cache)
                return cls(
                    keys=pages.empty(unit_shape, dtype),
                    values=pages.empty(unit_shape, dtype),
                    representatives=pages.empty(representatives_shape, dtype),
                    received=pages.empty(received_shape, torch.float32),
                )
            return cls(
                keys=torch.empty(unit_shape, dtype=dtype, pin_memory=True),
                values=torch.empty(unit_shape, dtype=dtype, pin_memory=True),
                representatives=torch.empty(representatives_shape, dtype=dtype, device=device),
                received=torch.empty(received_shape, dtype=torch.float32, device=device),
            )
        except (OSError, RuntimeError) as error:  # no address space, no memory that can be pinned
            units = 2 * math.prod(unit_shape) * dtype.itemsize
            raise ConfigError(
                f"Host memory for {num_units} units, {units / GIB:.2f} GiB a layer, cannot be had ({error}): "
                f'set or lower --additional-config "{KEY}": host_memory_gib, lower --max-model-len or --max-num-seqs, '
                "or raise the limits of the process (ulimit -v, ulimit -l, vm.overcommit_memory)."
            ) from error
