"""Unit ids are handed out once, come back once, and none is lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_infllm.memory.pool import UnitPool


class PoolMachine(RuleBasedStateMachine):
    """Any order of taking and giving back, right and wrong, against a plain model: which request holds which units."""

    @initialize(num_units=st.integers(0, 12))
    def start(self, num_units: int) -> None:
        self.num_units = num_units
        self.pool = UnitPool(num_units)
        self.holders: list[list[int]] = []

    @property
    def held(self) -> list[int]:
        return [unit for units in self.holders for unit in units]

    @rule(count=st.integers(0, 12))
    def take(self, count: int) -> None:
        """Units taken are as many as asked for, and nobody else's; without enough of them, none is taken."""
        if count > self.num_units - len(self.held):
            with pytest.raises(RuntimeError, match=f"{count} units taken"):
                self.pool.take(count)
            return
        units = self.pool.take(count)
        assert len(set(units)) == len(units) == count
        assert not set(units) & set(self.held)
        self.holders.append(units)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.pool.give_back(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def give_back_too_much(self, data: st.DataObject) -> None:
        """A list with a unit twice, or with one that is not held, is refused as a whole."""
        units = data.draw(st.sampled_from([units for units in self.holders if units]))
        not_held = next(unit for unit in range(-1, self.num_units + 1) if unit not in self.held)
        for wrong in (units + units[:1], [*units, not_held], [not_held]):
            with pytest.raises(RuntimeError, match="given back"):
                self.pool.give_back(wrong)

    @invariant()
    def whole(self) -> None:
        """Free and held units are all units, after every step, refused ones included."""
        self.pool.check_integrity()
        assert self.pool.num_free == self.num_units - len(self.held)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_giving_back_twice_raises() -> None:
    """Units that have come back once cannot come back again; the message lists them."""
    pool = UnitPool(4)
    units = pool.take(2)
    pool.give_back(units)
    with pytest.raises(RuntimeError, match=r"not held: \[0, 1\]"):
        pool.give_back(units)
    pool.check_integrity()


def test_last_returned_is_first_taken() -> None:
    """Units that were in use are used again before untouched ones, so that the memory touched stays small."""
    pool = UnitPool(100)
    first = pool.take(3)
    pool.give_back(first)
    assert pool.take(3) == first == [0, 1, 2]


@pytest.mark.parametrize(
    ("free", "held"),
    [
        pytest.param([1], [0], id="lost"),
        pytest.param([2, 1, 0], [0], id="held and free"),
        pytest.param([2, 1, 1], [0], id="free twice"),
        pytest.param([3, 1, 2], [0], id="not its own"),
    ],
)
def test_integrity_check_sees(free: list[int], held: list[int]) -> None:
    """check_integrity raises, with the numbers, when a unit is lost, in two places, or none of the pool's."""
    pool = UnitPool(3)
    pool._free, pool._held = free, set(held)
    with pytest.raises(RuntimeError, match=rf"{len(free)} free .* {len(held)} held, 3 in all"):
        pool.check_integrity()
