"""What the residency caches are compared with."""

import numpy as np

from vllm_infllm.memory.residency import EMPTY, PLACES, Strategy


class PlainModel:
    """The policies, said plainly: what is in each slot of a request, and the history of its units."""

    def __init__(self, strategy: Strategy, decay: float) -> None:
        self.strategy, self.decay, self.now = strategy, np.float32(decay), 0
        self.slots: list[int] = []
        self.came: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.mass: dict[int, np.float32] = {}

    def resolve(self, wanted: dict[int, int], available: int) -> tuple[list[int], list[int]]:
        """Units that came in, and those that left. `wanted` tells each unit's place."""
        self.now += 1
        self.slots += [EMPTY] * (available - len(self.slots))
        new, left = [unit for unit in wanted if unit not in self.slots], []
        for unit in new:
            if EMPTY not in self.slots:
                left.append(min((u for u in self.slots if u not in wanted), key=self.rank))
            slot = self.slots.index(left[-1] if EMPTY not in self.slots else EMPTY)
            self.slots[slot] = unit
            self.came[unit], self.mass[unit] = self.now * PLACES + wanted[unit], np.float32(0)
        self.used.update(dict.fromkeys(wanted, self.now))
        return new, left

    def rank(self, unit: int) -> tuple[float, int]:
        rank = {Strategy.LRU: self.used, Strategy.FIFO: {}, Strategy.LRU_S: self.mass}[self.strategy]
        return float(rank.get(unit, 0)), self.came[unit]

    def attended(self, mass: dict[int, np.float32]) -> None:
        for unit in self.slots:
            if unit != EMPTY:
                self.mass[unit] = self.mass[unit] * self.decay + mass.get(unit, np.float32(0))
