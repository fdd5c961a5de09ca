"""The oracle against what the authors' code recorded, and against a brute force that shares no code with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import (
    NeoxRope,
    OracleConfig,
    OracleResult,
    execution_blocks,
    full_attention,
    highest,
    infllm_attention,
    visible_tokens,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD_DIM = 32
SCALE = HEAD_DIM**-0.5


class Golden:
    """The recorded arrays, with the calls that repeat them."""

    def __init__(self) -> None:
        with np.load(Path(__file__).parent / "data" / "golden.npz") as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        names = ("block_size", "n_init", "n_local", "topk", "repr_topk", "exc_block_size")
        self.config = OracleConfig(*(int(self["cfg_" + name]) for name in names))
        self.rope = NeoxRope(HEAD_DIM, float(self["rope_base"]))
        self.q, self.k, self.v = self["q"], self["k"], self["v"]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def blocks(self, case: str) -> list[tuple[int, int]]:
        starts, lengths = self[case + "_exc_q_start"].tolist(), self[case + "_exc_len_q"].tolist()
        return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]

    def selected(self, case: str) -> list[list[int]]:
        return [[unit for unit in row if unit >= 0] for row in self[case + "_selected"].tolist()]

    def run_oracle(self, case: str) -> OracleResult:
        return infllm_attention(self.config, self.q, self.k, self.v, self.rope, SCALE, self.blocks(case))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="module")
def result_c(golden: Golden) -> OracleResult:
    return golden.run_oracle("c")


def assert_near(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected.double(), rtol=0, atol=atol)


# --- The recorded run with the corrected mask: the meaning of the project -------------------------------------------


def test_execution_blocks_are_those_of_the_recording(golden: Golden) -> None:
    """Without a prompt length, appends of 512 and 8 x 1 are cut as the authors' code cut them."""
    assert execution_blocks(golden.config, golden["c_appends"].tolist(), None) == golden.blocks("c")


def test_output(golden: Golden, result_c: OracleResult) -> None:
    assert_near(result_c.output, golden["c_out"], atol=1e-5)


def test_selected_units_and_sealed_counts(golden: Golden, result_c: OracleResult) -> None:
    assert [block.num_sealed for block in result_c.blocks] == golden["c_exc_num_blocks"].tolist()
    assert [block.selected for block in result_c.blocks] == golden.selected("c")


def test_scores(golden: Golden, result_c: OracleResult) -> None:
    """Every sealed unit has a score, in every execution block; the recorded ones are float32 and up to 63."""
    for block, recorded in zip(result_c.blocks, golden["c_block_scores"], strict=True):
        assert torch.equal(~recorded.isnan(), torch.arange(len(recorded)) < block.num_sealed)
        assert_near(block.scores, recorded[: block.num_sealed], atol=1e-4)


def test_attention_received(golden: Golden, result_c: OracleResult) -> None:
    assert_near(result_c.acc, golden["c_block_token_score"], atol=1e-5)


def test_representatives(golden: Golden, result_c: OracleResult) -> None:
    assert torch.equal(result_c.repr_tokens, golden["c_block_repr_token"].long().sort(dim=-1).values)
    assert_near(result_c.repr_keys, golden["c_block_repr_key"], atol=1e-6)


# --- The recorded runs of the authors' code as it is: they see tokens twice -----------------------------------------


@pytest.mark.parametrize("case", ["a", "b"])
def test_double_counting_does_not_pass(golden: Golden, case: str) -> None:
    """With the reference's mask, the output is far off; not so the queries that the fault does not touch.

    In an execution block that selected the same units, the last query agrees (for a decode step that is the only one),
    and so do all queries of blocks that end within the first window; all other queries differ.
    """
    result = golden.run_oracle(case)
    error = (result.output - golden[case + "_out"]).abs().amax(dim=(0, 2))  # [N]
    assert error.max() > 0.5

    agreeing_decode_steps = 0
    for block, selected in zip(result.blocks, golden.selected(case), strict=True):
        if block.selected != selected:
            assert error[block.end - 1] > 1e-3  # other units, another output
            continue
        assert error[block.end - 1] < 1e-5
        if block.end <= golden.config.n_local:
            assert error[block.start : block.end].max() < 1e-5
        elif block.end - block.start > 1:
            assert error[block.start : block.end - 1].min() > 1e-3
        else:
            agreeing_decode_steps += 1
    assert agreeing_decode_steps >= 3


@pytest.mark.parametrize(("case", "double_counting"), [("a", True), ("b", True), ("c", False)])
def test_double_counting_is_the_only_difference(golden: Golden, case: str, double_counting: bool) -> None:
    """Given the recorded selections, the brute force repeats the recorded outputs: a, b with the fault, c without."""
    seen = enumerate_visible(golden.config, golden.blocks(case), golden.selected(case), double_counting)
    p = brute_force_probabilities(golden.config, golden.q, golden.k, golden.rope, SCALE, seen)
    v = golden.v.double().repeat_interleave(2, dim=0)
    assert_near(p @ v, golden[case + "_out"], atol=1e-5)


# --- Every visible token exactly once -------------------------------------------------------------------------------

Seen = list[list[tuple[int, str]]]  # per query: (token, part), a token seen twice is there twice


def enumerate_visible(
    config: OracleConfig,
    blocks: list[tuple[int, int]],
    selected: list[list[int]],
    double_counting: bool = False,
) -> Seen:
    """What each query sees, token by token, with the memory kept as a state that moves on after every execution block.

    This is how the authors' code goes about it (initial tokens and units are taken off the front of the remainder);
    `double_counting` repeats its fault: the far part of the remainder ends where the window of the *last* query begins.
    """
    seen: Seen = []
    num_initial, units, remainder = 0, [], 0
    for (start, end), chosen in zip(blocks, selected, strict=True):
        for query in range(start, end):
            window = range(max(0, query - config.n_local + 1), query + 1)
            far_end = (end - config.n_local) if double_counting else window.start
            seen.append(
                [(token, "local") for token in window]
                + [(token, "initial") for token in range(num_initial)]
                + [(token, "remainder") for token in range(remainder, far_end)]
                + [(token, "retrieved") for unit in chosen for token in units[unit]]
            )
        free = end - remainder - config.n_local  # tokens that have left every window
        if num_initial < config.n_init and free > 0:
            moved = min(config.n_init - num_initial, free)
            num_initial, remainder = num_initial + moved, remainder + moved
        while end - remainder - config.block_size >= config.n_local:
            units.append(range(remainder, remainder + config.block_size))
            remainder += config.block_size
    return seen


def brute_force_probabilities(
    config: OracleConfig, q: Tensor, k: Tensor, rope: NeoxRope, scale: float, seen: Seen
) -> Tensor:
    """Attention of q [H, N, D] on k [KH, N, D], one query at a time; returns [H, N, N].

    Only the query is rotated, by the relative distance: t - j for a local token and n_local - 1 for any other.
    """
    q, k = q.double(), k.double().repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    p = torch.zeros(q.shape[0], q.shape[1], q.shape[1], dtype=torch.float64)
    for query, entries in enumerate(seen):
        tokens = torch.tensor([token for token, _ in entries])
        distances = torch.tensor([query - token if part == "local" else config.n_local - 1 for token, part in entries])
        rotated = rope.rotate(q[:, query, None].expand(-1, len(entries), -1), distances)
        weights = ((rotated * k[:, tokens]).sum(dim=-1) * scale).softmax(dim=-1)
        p[:, query].index_add_(1, tokens, weights)
    return p


@st.composite
def cases(draw: st.DrawFn) -> tuple[OracleConfig, list[int], int | None]:
    """A small configuration, appends and perhaps the length of the prompt."""
    block_size = draw(st.sampled_from([2, 3, 4]))
    n_local = block_size * draw(st.integers(1, 4))
    config = OracleConfig(
        block_size=block_size,
        n_init=block_size * draw(st.integers(0, 3)),
        n_local=n_local,
        topk=draw(st.integers(1, 3)),
        repr_topk=draw(st.integers(1, block_size)),
        exc=draw(st.integers(1, n_local)),
    )
    appends = draw(st.lists(st.integers(1, 25), min_size=1, max_size=4)) + [1] * draw(st.integers(0, 5))
    prompt_len = draw(st.none() | st.integers(1, sum(appends)))
    return config, appends, prompt_len


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.integers(0, 2**31 - 1))
def test_every_visible_token_counts_exactly_once(
    case: tuple[OracleConfig, list[int], int | None], uniform: bool, seed: int
) -> None:
    """One-hot values make the output the probabilities: each visible token once, at its distance, no other token.

    With `uniform`, all logits are equal: every visible token must get 1 / (number of visible tokens).
    """
    config, appends, prompt_len = case
    blocks = execution_blocks(config, appends, prompt_len)
    num_tokens = sum(appends)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(4, num_tokens, 8, generator=generator) * (0.0 if uniform else 1.0)
    k = torch.randn(2, num_tokens, 8, generator=generator)
    one_hot = torch.eye(num_tokens).expand(2, -1, -1)
    rope = NeoxRope(8)

    result = infllm_attention(config, q, k, one_hot, rope, 0.7, blocks)

    seen = enumerate_visible(config, blocks, [block.selected for block in result.blocks])
    for query, entries in enumerate(seen):
        assert len({token for token, _ in entries}) == len(entries), f"query {query} sees a token twice"
    assert_near(result.output, brute_force_probabilities(config, q, k, rope, 0.7, seen), atol=1e-12)
    if uniform:
        expected = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
        for query, entries in enumerate(seen):
            expected[query, [token for token, _ in entries]] = 1 / len(entries)
        assert_near(result.output, expected.expand(4, -1, -1), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_parts_are_disjoint(case: tuple[OracleConfig, list[int], int | None]) -> None:
    """No token is in two parts of what a query sees, whichever units are selected, and none lies in the future."""
    config, appends, prompt_len = case
    for start, end in execution_blocks(config, appends, prompt_len):
        parts = visible_tokens(config, start, end, list(range(config.num_sealed(start))))
        count = sum(part.int() for part in (parts.local, parts.initial, parts.remainder, parts.retrieved))
        # All units selected: everything up to the query is visible, once.
        assert torch.equal(count, (torch.arange(end) <= torch.arange(start, end)[:, None]).int())


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**31 - 1))
def test_attention_received_is_the_sum_over_windows(
    case: tuple[OracleConfig, list[int], int | None], seed: int
) -> None:
    """`acc` of a sealed unit is complete: its probabilities summed over all queries that had it in their window."""
    config, appends, prompt_len = case
    num_tokens = sum(appends)
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(4, num_tokens, 8, generator=generator), torch.randn(2, num_tokens, 8, generator=generator)
    one_hot = torch.eye(num_tokens).expand(2, -1, -1)
    result = infllm_attention(config, q, k, one_hot, NeoxRope(8), 0.7, execution_blocks(config, appends, prompt_len))

    assert len(result.acc) == len(result.repr_tokens) == len(result.repr_keys) == config.num_sealed(num_tokens)
    for unit in range(len(result.acc)):
        for offset in range(config.block_size):
            token = config.unit_start(unit) + offset
            received = result.output[:, token : token + config.n_local, token].sum(dim=1)
            assert_near(result.acc[unit, :, offset], received, atol=1e-12)


# --- Short inputs, cuts, ties, rotations ----------------------------------------------------------------------------


@pytest.mark.parametrize("appends", [[64], [50, 1, 13], [1] * 64])
@pytest.mark.parametrize("prompt_len", [None, 40])
def test_short_input_is_full_attention(golden: Golden, appends: list[int], prompt_len: int | None) -> None:
    """Up to n_local tokens nothing is far and nothing is sealed: exact full causal attention."""
    q, k, v = (x[:, : golden.config.n_local] for x in (golden.q, golden.k, golden.v))
    blocks = execution_blocks(golden.config, appends, prompt_len)
    result = infllm_attention(golden.config, q, k, v, golden.rope, SCALE, blocks)
    assert_near(result.output, full_attention(q, k, v, golden.rope, SCALE), atol=1e-12)
    assert len(result.acc) == 0 and not any(block.selected for block in result.blocks)


def test_full_attention_up_to_the_window_then_not(golden: Golden, result_c: OracleResult) -> None:
    """In a long input, too, the first n_local tokens see full attention; the first token behind them does not."""
    full = full_attention(golden.q, golden.k, golden.v, golden.rope, SCALE)
    error = (result_c.output - full).abs().amax(dim=(0, 2))
    n_local = golden.config.n_local
    assert error[:n_local].max() < 1e-12
    assert error[n_local:].min() > 1e-3


def test_full_attention_is_torchs() -> None:
    """Grouped heads and the causal mask are those of scaled_dot_product_attention."""
    q, k, v = torch.randn(6, 40, 16).double(), torch.randn(2, 40, 16).double(), torch.randn(2, 40, 16).double()
    rope = NeoxRope(16)
    positions = torch.arange(40)
    expected = torch.nn.functional.scaled_dot_product_attention(
        rope.rotate(q, positions), rope.rotate(k, positions), v, is_causal=True, scale=0.3, enable_gqa=True
    )
    assert_near(full_attention(q, k, v, rope, 0.3), expected, atol=1e-12)


CUTS = OracleConfig(block_size=4, n_init=4, n_local=16, topk=2, repr_topk=1, exc=8)


@pytest.mark.parametrize(
    ("appends", "prompt_len", "expected"),
    [
        ([20], None, [(0, 8), (8, 16), (16, 20)]),
        ([20], 20, [(0, 8), (8, 16), (16, 19), (19, 20)]),
        ([5, 15], 20, [(0, 5), (5, 8), (8, 16), (16, 19), (19, 20)]),
        ([17, 1, 1], 17, [(0, 8), (8, 16), (16, 17), (17, 18), (18, 19)]),
        ([18, 1], 18, [(0, 8), (8, 16), (16, 17), (17, 18), (18, 19)]),
        ([1, 1], 1, [(0, 1), (1, 2)]),
        ([10], 20, [(0, 8), (8, 10)]),  # the prompt goes on after what has been handed over
    ],
)
def test_cuts(appends: list[int], prompt_len: int | None, expected: list[tuple[int, int]]) -> None:
    """Multiples of exc, before the last token of the prompt, ends of the appends."""
    assert execution_blocks(CUTS, appends, prompt_len) == expected


def test_chunks_that_end_at_multiples_of_exc_change_nothing(golden: Golden) -> None:
    """The execution blocks, hence all results, do not depend on the token budget if chunks end at multiples of exc."""
    assert execution_blocks(golden.config, [64, 32, 416, 8], 520) == execution_blocks(golden.config, [520], 520)


def test_gap_between_execution_blocks_is_refused(golden: Golden) -> None:
    with pytest.raises(ValueError, match="do not cover"):
        infllm_attention(golden.config, golden.q, golden.k, golden.v, golden.rope, SCALE, [(0, 32), (33, 520)])


@pytest.mark.parametrize("n_init", [0, 4, 8])
def test_sealed_units_are_out_of_the_last_window(n_init: int) -> None:
    """Counted unit by unit: sealed when the query before the execution block already had it outside its window."""
    config = OracleConfig(block_size=4, n_init=n_init, n_local=8, topk=2, repr_topk=1, exc=8)
    for position in range(60):
        distances = [(position - 1) - (n_init + unit * 4 + 3) for unit in range(20)]
        assert config.num_sealed(position) == sum(distance >= 8 for distance in distances)


def test_ties_go_to_the_lower_index() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert highest(values, 2).tolist() == [[1, 2], [0, 1]]
    assert highest(torch.zeros(5000), 3).tolist() == [0, 1, 2]


def test_equal_scores_select_the_first_units(golden: Golden) -> None:
    """Queries of zero give every unit the score 0."""
    q = torch.zeros_like(golden.q)
    result = infllm_attention(golden.config, q, golden.k, golden.v, golden.rope, SCALE, golden.blocks("c"))
    assert [block.selected for block in result.blocks] == [list(range(min(2, b.num_sealed))) for b in result.blocks]


def test_rotation_of_pairs() -> None:
    """Element i turns with element i + rotary_dim/2 by position * base^(-2i/rotary_dim)."""
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    slow = 5 * 100**-0.5
    expected = [np.cos(5), -2 * np.sin(slow), np.sin(5), 2 * np.cos(slow)]
    assert_near(NeoxRope(4, base=100.0).rotate(x, torch.tensor([5])), torch.tensor([expected]), atol=1e-12)


def test_partial_rotation_passes_the_rest_through() -> None:
    x, positions = torch.randn(3, 7, 12), torch.arange(7) * 11
    rotated = NeoxRope(12, rotary_dim=8).rotate(x, positions)
    assert_near(rotated[..., :8], NeoxRope(8).rotate(x[..., :8], positions), atol=0)
    assert_near(rotated[..., 8:], x[..., 8:], atol=0)


def test_tables_are_used_as_they_are() -> None:
    """Tables of the plain angles give the plain rotation; an attention factor in them scales what is rotated."""
    x, positions = torch.randn(2, 6, 12), torch.tensor([0, 3, 1, 9, 9, 4])
    plain = NeoxRope(12, base=500.0, rotary_dim=8)
    angles = torch.arange(10)[:, None] * plain.inv_freq
    from_tables = NeoxRope(12, cos=angles.cos(), sin=angles.sin())
    assert_near(from_tables.rotate(x, positions), plain.rotate(x, positions), atol=1e-12)
    scaled = NeoxRope(12, cos=1.5 * angles.cos(), sin=1.5 * angles.sin()).rotate(x, positions)
    assert_near(scaled[..., :8], 1.5 * plain.rotate(x, positions)[..., :8], atol=1e-12)
    assert_near(scaled[..., 8:], x[..., 8:], atol=0)
