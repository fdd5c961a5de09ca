"""Scheduling and memory, end to end on a tiny model: batches, budgets, bounds, preemption, abort."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.engines import (
    assert_all_returned,
    between_steps,
    engine,
    greedy,
    infllm_engine,
    manager,
    plan,
    prompt_logprobs,
    scheduler,
)

SIZES = {"n_init": 32, "n_local": 128, "topk": 3, "repr_topk": 2, "exc_block_size": 64}
BLOCK_SIZE = 32
LENGTHS = [700, 33, 411, 128, 1000, 7, 250]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=40960)


def start(model: str, infllm: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    defaults = {"block_size": BLOCK_SIZE, "max_model_len": 2048, "max_num_batched_tokens": 256}
    return infllm_engine(model, {**SIZES, **(infllm or {})}, **{**defaults, **kwargs})


@pytest.fixture
def llm(llama: str) -> Iterator[Any]:
    with start(llama) as llm:
        yield llm


def prompts() -> list[list[int]]:
    return [tiny_models.tokens(length, seed=length) for length in LENGTHS]


def test_a_batch_answers_as_each_request_alone(llm: Any) -> None:
    """Mixed lengths, prefill beside decode: greedy answers and prompt log-probabilities do not change."""
    together = greedy(llm, prompts(), max_tokens=40)
    alone = [greedy(llm, [prompt], max_tokens=40)[0] for prompt in prompts()]
    assert together == alone
    batch = prompt_logprobs(llm, prompts())
    for logprobs, prompt in zip(batch, prompts(), strict=True):
        torch.testing.assert_close(logprobs, prompt_logprobs(llm, [prompt])[0], atol=1e-4, rtol=0)
    assert_all_returned(llm)


def test_the_token_budget_changes_nothing(llama: str) -> None:
    """Budgets that divide execution blocks and budgets that do not."""
    results = []
    for budget in (64, 100, 256, 2048):
        with start(llama, max_num_batched_tokens=budget, max_num_seqs=4) as llm:
            results.append(prompt_logprobs(llm, prompts()))
    for other in results[1:]:
        for expected, got in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_short_requests_equal_stock(llama: str) -> None:
    """While prompt and answer fit into the window InfLLM is full attention; just beyond it is not."""
    short, beyond = tiny_models.tokens(100), tiny_models.tokens(1000)
    with start(llama) as llm:
        ours = prompt_logprobs(llm, [short, tiny_models.tokens(128), beyond])
        answer = greedy(llm, [short], max_tokens=28)
    with engine(llama, block_size=BLOCK_SIZE, max_model_len=2048, kv_cache_memory_bytes=1 << 26) as llm:
        stock = prompt_logprobs(llm, [short, tiny_models.tokens(128), beyond])
        assert answer == greedy(llm, [short], max_tokens=28)
    for expected, got in zip(stock[:2], ours[:2], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours[2][:127], stock[2][:127], atol=1e-3, rtol=0)
    assert (ours[2] - stock[2]).abs().max() > 0.1


def test_blocks_of_a_request_stay_within_the_plan(llama: str) -> None:
    """A 32K prompt holds no more blocks than the plan printed, reaches that number, and gives everything back."""
    peak = 0

    def check() -> None:
        nonlocal peak
        for request_id in list(manager(llm).units):
            peak = max(peak, manager(llm).blocks_held(request_id))
        manager(llm).pool.check_integrity()

    with (
        start(llama, max_model_len=32768 + 8, max_num_seqs=1, max_num_batched_tokens=2048) as llm,
        between_steps(llm, check),
    ):
        greedy(llm, [tiny_models.tokens(32768)], max_tokens=4)
        bound = plan(llm).blocks_per_request  # one more than chunks that start at a block need
        assert bound - 1 <= peak <= bound < 80
        assert_all_returned(llm)


def short_of_units(llama: str, unit_bytes: int) -> Any:
    """An engine with units for one request of max_model_len, and three more."""
    units = (2048 - SIZES["n_local"]) // BLOCK_SIZE + 3
    return start(llama, {"host_memory_gib": units * unit_bytes / 2**30})


def test_requests_wait_when_units_are_short(llama: str) -> None:
    """Units for one and a half of four long prompts: the others wait, answer as alone, and nothing is lost."""
    long = [tiny_models.tokens(1500, seed) for seed in range(4)]
    with start(llama) as llm:
        alone = [greedy(llm, [prompt], max_tokens=8)[0] for prompt in long]
        unit_bytes = plan(llm).unit_bytes
    most_running = 0

    def check() -> None:
        nonlocal most_running
        most_running = max(most_running, len(scheduler(llm).running))
        manager(llm).pool.check_integrity()

    with short_of_units(llama, unit_bytes) as llm, between_steps(llm, check):
        assert greedy(llm, long, max_tokens=8) == alone
        assert most_running == 1
        assert_all_returned(llm)


def test_requests_are_preempted_when_units_run_out(llama: str) -> None:
    """Five answers outgrow the pool: some are preempted, all finish, those that never were answer as alone."""
    grown = [tiny_models.tokens(500, seed) for seed in range(5)]
    with start(llama) as llm:
        alone = [greedy(llm, [prompt], max_tokens=300)[0] for prompt in grown]
        unit_bytes = plan(llm).unit_bytes
    preempted = set()

    def check() -> None:
        requests = scheduler(llm).requests.values()
        preempted.update(grown.index(list(r.prompt_token_ids)) for r in requests if r.num_preemptions)
        manager(llm).pool.check_integrity()

    with short_of_units(llama, unit_bytes) as llm, between_steps(llm, check):
        answers = greedy(llm, grown, max_tokens=300)
        assert 0 < len(preempted) < len(grown)
        for i, answer in enumerate(answers):
            assert len(answer) == 300
            assert i in preempted or answer == alone[i]
        assert_all_returned(llm)


def test_aborted_requests_return_blocks_and_units(llm: Any) -> None:
    """Aborted in mid-prefill and in decode."""
    from vllm import SamplingParams

    for steps in (2, 12):
        ids = llm.enqueue(
            [{"prompt_token_ids": tiny_models.tokens(900, seed)} for seed in range(3)],
            SamplingParams(max_tokens=500, ignore_eos=True),
            use_tqdm=False,
        )
        for _ in range(steps):
            llm.llm_engine.step()
        assert manager(llm).pool.num_free < manager(llm).pool.num_units
        llm.llm_engine.abort_request(ids, internal=True)
        assert not llm.llm_engine.has_unfinished_requests()
        assert_all_returned(llm)


def test_topk_zero_attends_to_window_and_initial_tokens_only(llama: str) -> None:
    """Against the oracle with topk 0; and it differs from topk 3."""
    from tests.oracle import OracleConfig
    from tests.oracle_model import oracle_logprobs

    prompt = tiny_models.tokens(600)
    with start(llama, {"topk": 0}) as llm:
        (ours,) = prompt_logprobs(llm, [prompt])
    expected = oracle_logprobs(llama, OracleConfig(BLOCK_SIZE, 32, 128, 0, 2, 64), prompt)
    retrieving = oracle_logprobs(llama, OracleConfig(BLOCK_SIZE, 32, 128, 3, 2, 64), prompt)
    torch.testing.assert_close(ours.double(), expected, atol=1e-3, rtol=0)
    assert (ours - retrieving).abs().max() > 0.01
