"""The interval arithmetic against a brute force over tokens, written from design.md section 1."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from vllm_infllm.memory.geometry import Geometry


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Small sizes, so that every case of the arithmetic comes up within a few dozen tokens."""
    block_size = draw(st.integers(1, 5))
    n_local = block_size * draw(st.integers(1, 5))
    return Geometry(
        block_size=block_size,
        n_init=block_size * draw(st.integers(0, 3)),
        n_local=n_local,
        exc_block_size=draw(st.integers(1, n_local)),
    )


@st.composite
def execution_blocks(draw: st.DrawFn) -> tuple[Geometry, int, int]:
    """A geometry and an execution block [s, e) anywhere in a sequence."""
    geometry = draw(geometries())
    start = draw(st.integers(0, 12 * geometry.n_local))
    return geometry, start, start + draw(st.integers(1, geometry.exc_block_size))


# --- The definitions, token by token ---------------------------------------------------------------------------------


def unit_tokens(geometry: Geometry, unit: int) -> range:
    first = geometry.n_init + unit * geometry.block_size
    return range(first, first + geometry.block_size)


def sealed(geometry: Geometry, start: int) -> list[int]:
    """Units all of whose tokens are n_local or more behind the last token before the execution block."""
    units = range(start // geometry.block_size + 1)
    return [u for u in units if all((start - 1) - j >= geometry.n_local for j in unit_tokens(geometry, u))]


def visible(geometry: Geometry, start: int, query: int, selected: list[int]) -> tuple[list[int], list[int]]:
    """Tokens that the query sees locally, and those that it sees far; the table of design.md section 1."""
    units = sealed(geometry, start)
    unsealed_from = unit_tokens(geometry, len(units)).start
    local, far = [], []
    for j in range(query + 1):
        if query - j < geometry.n_local:
            local.append(j)
        elif j < geometry.n_init:
            far.append(j)  # initial
        elif j >= unsealed_from:
            far.append(j)  # remainder
    far += [j for u in selected for j in unit_tokens(geometry, u)]
    return local, far


# --- stored_blocks, sealed_units, edge_start -------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(geometries(), st.integers(0, 150))
def test_sealed_units_are_those_outside_the_last_window(geometry: Geometry, start: int) -> None:
    """U(s) counts the units that the token before s no longer has in its window."""
    assert geometry.sealed_units(start) == len(sealed(geometry, start))


@settings(max_examples=300, deadline=None)
@given(geometries(), st.integers(0, 150))
def test_sealed_units_follow_the_formula(geometry: Geometry, start: int) -> None:
    """U(s) = max(0, (s - n_local - n_init) // B), as design.md has it."""
    expected = max(0, (start - geometry.n_local - geometry.n_init) // geometry.block_size)
    assert geometry.sealed_units(start) == expected


@settings(max_examples=300, deadline=None)
@given(execution_blocks(), st.integers(0, 2**31 - 1))
def test_each_visible_token_is_read_exactly_once(block: tuple[Geometry, int, int], seed: int) -> None:
    """Stored initial blocks, selected units and the paged cache from edge_start on are together what a query sees."""
    geometry, start, end = block
    units = sealed(geometry, start)
    choice = random.Random(seed)
    selected = choice.sample(units, choice.randint(0, len(units)))
    stored = geometry.stored_blocks(start)
    initial_blocks = range(min(stored, geometry.init_blocks))
    read_blocks = [*initial_blocks, *(geometry.init_blocks + u for u in selected)]
    from_store = [b * geometry.block_size + i for b in read_blocks for i in range(geometry.block_size)]

    for query in range(start, end):
        local, far = visible(geometry, start, query, selected)
        from_cache = list(range(geometry.edge_start(start), query + 1))
        assert Counter(from_store + from_cache) == Counter(local + far)
        assert not set(from_store) & set(local), "a stored token is still in a window"


@settings(max_examples=300, deadline=None)
@given(geometries(), st.integers(0, 150))
def test_stored_blocks_are_initial_blocks_then_units(geometry: Geometry, start: int) -> None:
    """Stored blocks fill up with the initial tokens first, and each further one is a sealed unit of the same tokens."""
    stored, units = geometry.stored_blocks(start), geometry.sealed_units(start)
    assert stored == units + min(stored, geometry.init_blocks)
    for unit in range(units):
        block = geometry.init_blocks + unit
        assert block < stored
        assert unit_tokens(geometry, unit).start == block * geometry.block_size


@settings(max_examples=200, deadline=None)
@given(geometries(), st.data())
def test_blocks_are_stored_from_what_the_step_holds(geometry: Geometry, data: st.DataObject) -> None:
    """What an execution block reads or stores was not freed after an earlier step, is computed, and is stored once."""
    computed, stored_so_far = 0, 0
    while computed < 6 * geometry.n_local:
        freed = geometry.stored_blocks(computed)  # by the block manager, before the step
        chunk_end = computed + data.draw(st.integers(1, 2 * geometry.n_local), label="chunk")
        for start, end in geometry.execution_blocks(computed, chunk_end, prompt_len=chunk_end):
            assert geometry.edge_start(start) // geometry.block_size >= freed
            for block in range(geometry.stored_blocks(start), geometry.stored_blocks(end)):
                assert block == stored_so_far
                assert freed <= block
                last_token = (block + 1) * geometry.block_size - 1
                assert (end - 1) - last_token >= geometry.n_local, "stored while in a window"
                stored_so_far += 1
        computed = chunk_end
    assert stored_so_far == geometry.stored_blocks(computed)


# --- window_blocks ---------------------------------------------------------------------------------------------------


def most_blocks_held(geometry: Geometry, tokens_per_step: int) -> int:
    """Counted: blocks with a token that is not stored before the step, or one of the step, for every step there is."""
    most = 0
    for computed in range(geometry.n_local + 3 * geometry.block_size):
        for chunk in range(1, tokens_per_step + 1):
            held = {
                j // geometry.block_size
                for j in range(computed + chunk)
                if j // geometry.block_size >= geometry.stored_blocks(computed)
            }
            most = max(most, len(held))
    return most


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(1, 12))
def test_window_blocks_is_the_least_bound(geometry: Geometry, tokens_per_step: int) -> None:
    """window_blocks is never exceeded by chunks of up to tokens_per_step tokens, and some chunk attains it."""
    assert geometry.window_blocks(tokens_per_step) == most_blocks_held(geometry, tokens_per_step)


def test_window_blocks_of_the_paper() -> None:
    """4,096 tokens in blocks of 128 and steps of 2,048 tokens: 32 + 16 blocks and one that straddles the edge."""
    assert Geometry(128, 128, 4096, 512).window_blocks(2048) == 49


# --- execution_blocks and chunk_end ----------------------------------------------------------------------------------


def as_oracle(geometry: Geometry) -> oracle.OracleConfig:
    return oracle.OracleConfig(
        block_size=geometry.block_size,
        n_init=geometry.n_init,
        n_local=geometry.n_local,
        topk=1,
        repr_topk=1,
        exc=geometry.exc_block_size,
    )


@settings(max_examples=300, deadline=None)
@given(geometries(), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.data())
def test_execution_blocks_are_the_oracles(geometry: Geometry, appends: list[int], data: st.DataObject) -> None:
    """Chunk by chunk, the cuts are those that the oracle makes of the whole sequence."""
    prompt_len = data.draw(st.integers(1, sum(appends) + 10), label="prompt_len")
    blocks, start = [], 0
    for length in appends:
        blocks += geometry.execution_blocks(start, start + length, prompt_len)
        start += length
    assert blocks == oracle.execution_blocks(as_oracle(geometry), appends, prompt_len)


def scheduled_blocks(geometry: Geometry, prompt_len: int, budgets: list[int]) -> list[tuple[int, int]]:
    """Execution blocks of a prompt whose prefill chunks get the given token budgets, then as much as they want."""
    blocks, start, step = [], 0, 0
    while start < prompt_len:
        budget = budgets[step] if step < len(budgets) else prompt_len
        end = geometry.chunk_end(start, min(start + budget, prompt_len), prompt_len)
        assert end > start or step < len(budgets), "a budget for the whole prompt makes no progress"
        blocks += geometry.execution_blocks(start, end, prompt_len) if end > start else []
        start, step = end, step + 1
    return blocks


@settings(max_examples=300, deadline=None)
@given(geometries(), st.integers(1, 120), st.lists(st.integers(1, 60), max_size=12))
def test_execution_blocks_do_not_depend_on_the_token_budget(
    geometry: Geometry, prompt_len: int, budgets: list[int]
) -> None:
    """Prefill in chunks of any budgets is cut into the execution blocks of one big chunk."""
    whole = geometry.execution_blocks(0, prompt_len, prompt_len)
    assert scheduled_blocks(geometry, prompt_len, budgets) == whole


@settings(max_examples=300, deadline=None)
@given(geometries(), st.integers(0, 150), st.integers(1, 80), st.integers(1, 240))
def test_chunk_end_is_the_furthest_allowed(geometry: Geometry, start: int, budget: int, known_tokens: int) -> None:
    """A chunk stops at the last multiple of exc_block_size in reach, at the last known token, or has not begun."""
    start = min(start, known_tokens - 1)
    end = min(start + budget, known_tokens)
    allowed = [t for t in range(start + 1, end + 1) if t % geometry.exc_block_size == 0 or t == known_tokens]
    assert geometry.chunk_end(start, end, known_tokens) == max(allowed, default=start)


@settings(max_examples=200, deadline=None)
@given(geometries(), st.integers(0, 10), st.integers(0, 60), st.integers(1, 200))
def test_a_budget_of_one_execution_block_makes_progress(
    geometry: Geometry, blocks_done: int, extra: int, left: int
) -> None:
    """From where a chunk may end, a budget of exc_block_size always schedules something, so prefill cannot stall."""
    exc = geometry.exc_block_size
    start = blocks_done * exc
    end = min(start + exc + extra, start + left)
    assert geometry.chunk_end(start, end, start + left) > start


@settings(max_examples=200, deadline=None)
@given(geometries(), st.integers(1, 150))
def test_decode_is_never_clipped(geometry: Geometry, computed: int) -> None:
    """One token after the last computed one is scheduled, whatever its position, as an execution block of its own."""
    assert geometry.chunk_end(computed, computed + 1, computed + 1) == computed + 1
    blocks = geometry.execution_blocks(computed, computed + 1, prompt_len=computed)
    assert blocks == [(computed, computed + 1)]


@pytest.mark.parametrize("prompt_len", [1, 2, 8, 9, 16, 17, 40])
def test_last_prompt_token_stands_alone(prompt_len: int) -> None:
    """The token that the first answer token is predicted from is an execution block of its own."""
    geometry = Geometry(block_size=4, n_init=4, n_local=16, exc_block_size=8)
    assert geometry.execution_blocks(0, prompt_len, prompt_len)[-1] == (prompt_len - 1, prompt_len)
