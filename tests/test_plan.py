"""The memory plan: who gets how much of the host's memory."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_infllm.config import ConfigError, InfLLMConfig
from vllm_infllm.memory.plan import GIB, MemoryPlan, MemorySizes, make_plan

MIB = 1 << 20
SIZES = MemorySizes(
    blocks_per_request=50,
    paged_request=100 * MIB,
    received_request=20 * MIB,
    unit=2 * MIB,
    representative=MIB // 2,
)
"""About a model of 1B parameters."""

UNITS_32K = (32768 - 4096) // 128


def plan(
    sizes: MemorySizes = SIZES,
    host_memory_gib: float | None = None,
    max_num_seqs: int = 8,
    max_model_len: int = 32768,
    total: int = 24 * GIB,
    free: int = 20 * GIB,
    paged_bytes: int | None = None,
    on_cpu: bool = True,
) -> MemoryPlan:
    config = InfLLMConfig(host_memory_gib=host_memory_gib)
    return make_plan(config, sizes, max_num_seqs, max_model_len, total, free, paged_bytes, on_cpu)


def refusal(**kwargs: Any) -> str:
    with pytest.raises(ConfigError) as error:
        plan(**kwargs)
    return str(error.value)


def used(sizes: MemorySizes, made: MemoryPlan) -> int:
    """Host bytes on CPU, all told: paged cache and attention beside it, units and their representatives."""
    paged = made.paged_bytes or 0
    beside = paged * sizes.received_request // sizes.paged_request
    return paged + beside + made.num_units * (sizes.unit + sizes.representative)


# --- On CPU: one budget ----------------------------------------------------------------------------------------------


def test_plenty_of_memory_serves_every_sequence() -> None:
    """With memory for all, the paged cache holds all sequences (and vLLM's null block), the pool their units."""
    made = plan(total=400 * GIB, free=400 * GIB)
    assert made.paged_bytes == 9 * SIZES.paged_request
    assert made.num_units == 8 * UNITS_32K


def test_units_hold_what_lies_outside_the_window() -> None:
    """No units are planned for requests that never outgrow the window."""
    assert plan(max_model_len=4096).num_units == 0
    assert plan(max_model_len=4096 + 127).num_units == 0
    assert plan(max_model_len=4096 + 128).num_units == 8


def test_paged_cache_is_capped_at_a_third_of_the_budget() -> None:
    """Many sequences do not starve the pool: paged cache and attention beside it get a third, the pool the rest."""
    made = plan(max_num_seqs=256, max_model_len=1 << 19)
    budget = 20 * GIB - 24 * GIB // 5
    assert made.paged_bytes is not None
    assert made.paged_bytes * 1.2 == pytest.approx(budget / 3, rel=1e-3)
    assert made.num_units * (SIZES.unit + SIZES.representative) == pytest.approx(budget * 2 / 3, rel=1e-3)


def test_a_fifth_of_the_memory_stays_free() -> None:
    """Taking less for everybody, the plan leaves a fifth of the machine's memory alone, whatever else is in use."""
    for free in (10 * GIB, 15 * GIB, 24 * GIB):
        made = plan(max_num_seqs=1000, free=free)
        assert free - used(SIZES, made) >= 24 * GIB // 5 - MIB


SIZES_ST = st.builds(
    MemorySizes,
    blocks_per_request=st.just(50),
    paged_request=st.integers(1, 4 * GIB),
    received_request=st.integers(0, GIB),
    unit=st.integers(1, 64 * MIB),
    representative=st.integers(0, 8 * MIB),
)


@settings(max_examples=300, deadline=None)
@given(
    sizes=SIZES_ST,
    max_num_seqs=st.integers(1, 1024),
    max_model_len=st.integers(1, 1 << 21),
    total=st.integers(1, 1024).map(lambda gib: gib * GIB),
    share=st.floats(0, 1),
)
def test_a_plan_fits_or_is_refused(
    sizes: MemorySizes, max_num_seqs: int, max_model_len: int, total: int, share: float
) -> None:
    """Nothing in a plan is negative, one longest request fits, and all of it lies within the budget."""
    free = int(total * share)
    try:
        made = plan(sizes, None, max_num_seqs, max_model_len, total, free)
    except ConfigError:
        return
    units_request = max(0, (max_model_len - 4096) // 128)
    assert made.paged_bytes is not None and made.paged_bytes >= 2 * sizes.paged_request
    assert units_request <= made.num_units <= max_num_seqs * units_request
    least = 2 * (sizes.paged_request + sizes.received_request)
    budget = max(0, free - int(0.2 * total))
    assert used(sizes, made) <= max(budget, least) + sizes.paged_request // 1000 + 1


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES_ST, free=st.integers(0, 512).map(lambda gib: gib * GIB), max_model_len=st.integers(4300, 1 << 21))
def test_a_plan_is_refused_only_if_one_request_does_not_fit(sizes: MemorySizes, free: int, max_model_len: int) -> None:
    """When two bounds of paged cache and the units of one longest request fit into the budget, there is a plan."""
    budget = max(0, free - int(0.2 * 512 * GIB))
    units_request = (max_model_len - 4096) // 128
    pool = units_request * (sizes.unit + sizes.representative)
    # What the paged cache may take: a third of the budget, or two requests where that is more.
    paged = max(2 * (sizes.paged_request + sizes.received_request), budget / 3)
    try:
        plan(sizes, total=512 * GIB, free=free, max_model_len=max_model_len)
    except ConfigError:
        assert pool + paged > budget
    else:
        assert pool + 2 * (sizes.paged_request + sizes.received_request) <= budget + sizes.paged_request


# --- Explicit sizes --------------------------------------------------------------------------------------------------


def test_given_paged_cache_is_kept() -> None:
    """A size that the user gave the paged cache is not changed, and the pool gets what it leaves."""
    made = plan(paged_bytes=10 * GIB, max_num_seqs=1000)
    assert made.paged_bytes == 10 * GIB
    left = 20 * GIB - 24 * GIB // 5 - 12 * GIB
    assert made.num_units == pytest.approx(left / (2.5 * MIB), abs=1)


def test_given_pool_is_kept() -> None:
    """host_memory_gib is what the pool gets, representatives included, however much is free."""
    made = plan(host_memory_gib=2.0, max_num_seqs=1000)
    assert made.num_units == int(2 * GIB / (2.5 * MIB))


def test_given_pool_is_not_larger_than_useful() -> None:
    """More units than all sequences can fill are not planned."""
    assert plan(host_memory_gib=12.0, max_num_seqs=2).num_units == 2 * UNITS_32K


@pytest.mark.parametrize("on_cpu", [True, False])
def test_pool_beyond_the_memory_is_refused(on_cpu: bool) -> None:
    """A pool larger than the memory there is would be killed later, when it is filled: startup stops, naming it."""
    message = refusal(host_memory_gib=100.0, max_num_seqs=1000, on_cpu=on_cpu)
    assert "host_memory_gib=100.0" in message


# --- On accelerators: the paged cache is vLLM's ----------------------------------------------------------------------


def test_accelerators_size_their_own_cache() -> None:
    """With the paged cache on a device, the pool gets the whole budget, and representatives are not host memory."""
    made = plan(on_cpu=False, max_num_seqs=10_000)
    assert made.paged_bytes is None
    budget = 20 * GIB - 24 * GIB // 5
    assert made.num_units == pytest.approx(budget / SIZES.unit, abs=1)


# --- Too little memory -----------------------------------------------------------------------------------------------


def gib(message: str, pattern: str) -> float:
    found = re.search(pattern, message)
    assert found, message
    return float(found[1])


def test_too_little_memory_says_how_much_is_missing() -> None:
    """The message names the flag and its value, needed, present and missing GiB, and both ways out."""
    message = refusal(free=6 * GIB, max_model_len=200_000)
    units = (200_000 - 4096) // 128
    assert "--max-model-len 200000" in message and f"{units} host units" in message
    need, have = units * 2.5 / 1024, 6 - 4.8 - 2 * 120 / 1024
    assert gib(message, r"= ([\d.]+) GiB for one request") == pytest.approx(need, abs=0.01)
    assert gib(message, r"pool has ([\d.]+) GiB") == pytest.approx(min(have, (6 - 4.8) * 2 / 3), abs=0.3)
    missing = gib(message, r"([\d.]+) GiB are missing")
    assert missing == pytest.approx(need - gib(message, r"pool has ([\d.]+) GiB"), abs=0.011)
    assert "Lower --max-model-len" in message and "free memory" in message


def test_too_small_a_given_pool_is_named() -> None:
    """When the pool's size was given, it is what to raise, with its value."""
    message = refusal(host_memory_gib=0.25)
    assert "host_memory_gib=0.25" in message and "raise" in message and "Lower --max-model-len" in message
    assert gib(message, r"pool has ([\d.]+) GiB") == 0.25
    assert gib(message, r"([\d.]+) GiB are missing") == pytest.approx(UNITS_32K * 2.5 / 1024 - 0.25, abs=0.01)


def test_no_memory_at_all_is_no_negative_pool() -> None:
    """On a machine whose free memory is below the reserve the pool has 0 GiB, not less."""
    assert gib(refusal(free=GIB), r"pool has ([-\d.]+) GiB") == 0.0


@pytest.mark.parametrize("given", [0, 1, SIZES.paged_request])
def test_too_small_a_given_paged_cache_is_named(given: int) -> None:
    """It holds no request, or no null block beside it; the message says how much would do, and that does."""
    message = refusal(paged_bytes=given)
    assert f"--kv-cache-memory-bytes {given} " in message and "--max-model-len 32768" in message
    assert plan(paged_bytes=int(gib(message, r"needs (\d+)"))).paged_bytes


def test_paged_cache_too_large_to_leave_a_pool_is_named() -> None:
    """When the given paged cache leaves too little, lowering its size is a way out, and the message says so."""
    message = refusal(paged_bytes=15 * GIB)
    assert "--kv-cache-memory-bytes" in message


@settings(max_examples=100, deadline=None)
@given(missing_units=st.integers(1, 500))
def test_the_missing_memory_is_what_helps(missing_units: int) -> None:
    """With the missing GiB added to the given pool, the same request is planned."""
    unit_gib = 2.5 / 1024
    have = (UNITS_32K - min(missing_units, UNITS_32K - 1)) * unit_gib
    missing = gib(refusal(host_memory_gib=have - unit_gib / 2), r"([\d.]+) GiB are missing")
    assert plan(host_memory_gib=have + missing + 0.01).num_units >= UNITS_32K


def test_plan_is_said_in_one_line() -> None:
    """The startup line names blocks a request, the paged cache's size, and the pool in units and GiB."""
    text = str(plan(total=400 * GIB, free=400 * GIB))
    assert "at most 50 blocks a request" in text
    assert f"paged cache {900 / 1024:.2f} GiB" in text
    assert f"{8 * UNITS_32K} host units = {8 * UNITS_32K * 2.5 / 1024:.2f} GiB" in text
    assert "paged cache" not in str(plan(on_cpu=False))
