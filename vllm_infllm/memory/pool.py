"""Unit ids of the host store: who holds which."""


class UnitPool:
    """Hands out unit ids 0 .. num_units - 1, last returned first, so that the host memory touched stays small."""

    def __init__(self, num_units: int) -> None:
        self.num_units = num_units
        self._held: set[int] = set()
        self._free = list(range(num_units - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` units; the caller has checked num_free."""
        if count > len(self._free):
            raise RuntimeError(f"{count} units taken, {len(self._free)} of {self.num_units} free")
        units = [self._free.pop() for _ in range(count)]
        self._held.update(units)
        return units

    def give_back(self, units: list[int]) -> None:
        not_held = set(units) - self._held
        if not_held or len(set(units)) != len(units):
            raise RuntimeError(f"units given back that are not held: {sorted(not_held)} of {units}")
        self._held.difference_update(units)
        self._free.extend(reversed(units))

    def check_integrity(self) -> None:
        """Every unit is either free or held, once."""
        if sorted([*self._free, *self._held]) != list(range(self.num_units)):
            raise RuntimeError(
                f"unit pool: {len(self._free)} free ({len(set(self._free))} distinct), "
                f"{len(self._held)} held, {self.num_units} in all"
            )
