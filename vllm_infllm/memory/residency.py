"""Residency caches: which unit sits in which slot, for every request and layer.

Slots are the first paged blocks of the request, which it keeps for life. The first n_init / B of them hold the initial
tokens and never change; slot s of the cache is the block after these. A slot exists once its block's own tokens are
stored, so the number of slots of a request is a function of its position. The operations `resolve` and `attended`
(ops/interface.py) decide who leaves; the tensors here are their memory, on the device.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch

EMPTY = -1
PLACES = 1 << 16
"""Units that may arrive in one call: arrival is ordered by clock, then by the place among the chosen."""


class Strategy(IntEnum):
    """Which unit leaves first; on equal rank the one that arrived first."""

    LRU = 0
    """Least recently used."""
    FIFO = 1
    """First in."""
    LRU_S = 2
    """Least attention mass, decayed at each use."""

    @classmethod
    def of(cls, name: str) -> "Strategy":
        return cls[name.upper().replace("-", "_")]


@dataclass(frozen=True)
class Residency:
    """The residency caches of N requests in one layer, or in L layers while they are allocated together.

    unit: [N, S] int64, the host unit id in each slot, or EMPTY.
    arrived: [N, S] int64, clock * PLACES + place among the chosen, when the unit came in.
    used: [N, S] int64, clock of its last use.
    mass: [N, S] float32, its decayed attention mass.
    clock: [N, 1] int64, execution blocks seen.
    counts: [N, 3] int64: units found resident, units copied in, units evicted.
    Views of single layers keep the strides of all.
    """

    strategy: Strategy
    decay: float
    unit: torch.Tensor
    arrived: torch.Tensor
    used: torch.Tensor
    mass: torch.Tensor
    clock: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def allocate(
        cls, strategy: Strategy, decay: float, requests: int, layers: int, slots: int, device: torch.device
    ) -> "Residency":
        """Tensors [requests, layers, ...]; all slots empty."""

        def zeros(last: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros((requests, layers, last), dtype=dtype, device=device)

        unit = zeros(slots).fill_(EMPTY)
        return cls(strategy, decay, unit, zeros(slots), zeros(slots), zeros(slots, torch.float32), zeros(1), zeros(3))

    def layer(self, layer: int) -> "Residency":
        """The caches of one layer."""
        tensors = (x.select(1, layer) for x in (self.unit, self.arrived, self.used, self.mass, self.clock, self.counts))
        return Residency(self.strategy, self.decay, *tensors)

    def reset(self, request: int) -> None:
        """Empty the caches of one request in all layers, for another that takes its number."""
        self.unit[request].fill_(EMPTY)
        for tensor in (self.arrived, self.used, self.mass, self.clock):
            tensor[request].zero_()

    def check_integrity(self) -> None:
        """No unit is in two slots of a request and layer, and empty slots stand behind the others."""
        for units in self.unit.flatten(0, -2).tolist():
            resident = [unit for unit in units if unit != EMPTY]
            if len(set(resident)) != len(resident) or units[: len(resident)] != resident:
                raise RuntimeError(f"residency cache: units {units} in the slots")
