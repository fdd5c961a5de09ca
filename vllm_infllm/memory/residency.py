"""The residency cache of one request in one layer: which unit sits in which slot.

Slots are the first paged blocks of the request, which it keeps for life. The first n_init / B of them hold the initial
tokens and never change; the others hold retrieved units. A slot exists once its block's own tokens are stored.
"""

from dataclasses import dataclass, field


@dataclass
class ResidencyCache:
    """Resident units by slot; decides who leaves. Integers only, it moves no data.

    strategy: "lru" least recently used, "fifo" first in, "lru-s" least attention mass, decayed by `decay` at each use.
    """

    strategy: str
    decay: float
    slot_of: dict[int, int] = field(default_factory=dict)
    """Unit -> slot, in the order in which the units came in."""
    _free: list[int] = field(default_factory=list)
    _last_used: dict[int, int] = field(default_factory=dict)
    _mass: dict[int, float] = field(default_factory=dict)
    _clock: int = 0

    def add_slot(self, slot: int) -> None:
        """A further slot exists, empty."""
        self._free.append(slot)

    def resolve(self, wanted: list[int]) -> list[tuple[int, int]]:
        """Make all `wanted` units resident; returns (unit, slot) for those whose data must be copied in.

        Units in `wanted` never leave. There must be at least as many slots as wanted units.
        """
        self._clock += 1
        keep = set(wanted)
        missing = [unit for unit in wanted if unit not in self.slot_of]
        copies = []
        for unit in missing:
            slot = self._free.pop(0) if self._free else self._evict(keep)
            self.slot_of[unit] = slot
            self._mass[unit] = 0.0
            copies.append((unit, slot))
        for unit in wanted:
            self._last_used[unit] = self._clock
        return copies

    def attended(self, mass: dict[int, float]) -> None:
        """Attention mass that the units of the last `resolve` received; the others only decay."""
        for unit in self._mass:
            self._mass[unit] = self._mass[unit] * self.decay + mass.get(unit, 0.0)

    def check_integrity(self) -> None:
        """No slot is lost or holds two units, and every resident unit is accounted for."""
        slots = [*self.slot_of.values(), *self._free]
        if len(set(slots)) != len(slots) or not self.slot_of.keys() == self._mass.keys() == self._last_used.keys():
            raise RuntimeError(f"residency cache: slots {sorted(slots)}, units {sorted(self.slot_of)}")

    def _evict(self, keep: set[int]) -> int:
        """The slot of the unit that leaves; on equal rank the one that came in first."""
        rank = {"lru": self._last_used.__getitem__, "fifo": lambda unit: 0, "lru-s": self._mass.__getitem__}
        victim = min((unit for unit in self.slot_of if unit not in keep), key=rank[self.strategy])
        del self._mass[victim], self._last_used[victim]
        return self.slot_of.pop(victim)
