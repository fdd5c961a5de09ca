"""The memory of one layer: stored blocks on the host, representatives and received attention beside the cache."""

from dataclasses import dataclass

import torch


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
        """Reserve address space; nothing is touched before it is used.

        kv_cache: the layer's paged cache [num_blocks, KH, B, 2 * head_size], for dtype, device and sizes.
        """
        _, kv_heads, block_size, _ = kv_cache.shape
        on_device = {"dtype": kv_cache.dtype, "device": kv_cache.device}
        on_host = {"dtype": kv_cache.dtype, "device": "cpu", "pin_memory": kv_cache.device.type != "cpu"}
        unit_shape = (num_units, kv_heads, block_size, head_size)
        return cls(
            keys=torch.empty(unit_shape, **on_host),
            values=torch.empty(unit_shape, **on_host),
            representatives=torch.empty((num_units, num_heads, head_size), **on_device),
            received=torch.empty((num_blocks, num_heads, block_size), dtype=torch.float32, device=kv_cache.device),
        )
