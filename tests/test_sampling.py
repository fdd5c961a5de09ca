"""Requests beside greedy decoding, over sealed units: several answers, beams, log-probabilities, stops.

Units are few: requests wait for them, and share nothing.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from tests import tiny_models
from tests.engines import assert_all_returned, engine, greedy, infllm_engine, manager, scheduler

N_LOCAL = 128
SIZES = {"n_init": 32, "n_local": N_LOCAL, "topk": 3, "repr_topk": 2, "exc_block_size": 64}
FLAGS = {"block_size": 32, "max_model_len": 1024, "max_num_batched_tokens": 256}
UNIT_BYTES = 2 * (2 * 2 * 32 * 32 + 4 * 32) * 4
"""2 layers of keys and values of 2 heads, 32 tokens of size 32, and representatives of 4 heads."""
UNITS = (FLAGS["max_model_len"] - N_LOCAL) // 32 + 2
LONG, OTHER, SHORT = tiny_models.tokens(600, seed=1), tiny_models.tokens(411, seed=2), tiny_models.tokens(90, seed=3)


@pytest.fixture(scope="module")
def stock_beams(llama_with_tokenizer: str) -> list[tuple[list[int], float]]:
    """Before the engine of the other tests: no two live in one process at a time."""
    with engine(llama_with_tokenizer, **FLAGS, kv_cache_memory_bytes=1 << 24) as llm:
        return beams(llm, SHORT, max_tokens=N_LOCAL - len(SHORT))


@pytest.fixture(scope="module")
def shared(llama_with_tokenizer: str, stock_beams: Any) -> Iterator[Any]:
    infllm = {**SIZES, "host_memory_gib": UNITS * UNIT_BYTES / 2**30}
    with infllm_engine(llama_with_tokenizer, infllm, **FLAGS) as llm:
        assert manager(llm).pool.num_units == UNITS
        yield llm


@pytest.fixture
def llm(shared: Any) -> Iterator[Any]:
    """Afterwards everything is given back, whatever was asked."""
    yield shared
    assert_all_returned(shared)


def generate(llm: Any, prompts: list[list[int]], *params: SamplingParams) -> list[Any]:
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(asked, list(params) if len(params) > 1 else params[0], use_tqdm=False)


def beams(llm: Any, prompt: list[int], max_tokens: int) -> list[tuple[list[int], float]]:
    """Answers of a beam search, best first, with their log-probabilities."""
    params = BeamSearchParams(beam_width=3, max_tokens=max_tokens, ignore_eos=True)
    (output,) = llm.beam_search([{"prompt_token_ids": prompt}], params)
    return [(list(sequence.tokens)[len(prompt) :], sequence.cum_logprob) for sequence in output.sequences]


def test_several_answers_are_those_of_requests_alone(llm: Any) -> None:
    """vLLM gives the second of n answers the seed of the first and one; each is a request with units of its own.

    What is sampled at the end of each chunk of the prompt and thrown away does not advance a seed.
    """
    random = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True}
    together = generate(llm, [LONG, OTHER], SamplingParams(n=3, seed=5, **random), SamplingParams(seed=9, **random))
    alone = [generate(llm, [LONG], SamplingParams(seed=5 + i, **random))[0].outputs[0].token_ids for i in range(3)]
    assert [list(answer.token_ids) for answer in together[0].outputs] == [list(answer) for answer in alone]
    assert len({tuple(answer) for answer in alone}) == 3
    (other,) = generate(llm, [OTHER], SamplingParams(seed=9, **random))
    assert together[1].outputs[0].token_ids == other.outputs[0].token_ids


def test_beams_inside_the_window_are_those_of_stock(llm: Any, stock_beams: list[tuple[list[int], float]]) -> None:
    """Prompt and answer together fill the window; each step of a beam is a new request of one token."""
    ours = beams(llm, SHORT, max_tokens=N_LOCAL - len(SHORT))
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in stock_beams]
    assert [score for _, score in ours] == pytest.approx([score for _, score in stock_beams], abs=1e-3)


def test_beams_beyond_the_window_have_the_probability_that_their_tokens_have_alone(llm: Any) -> None:
    for tokens, score in beams(llm, LONG, max_tokens=6):
        alone = 0.0
        for i, token in enumerate(tokens):
            params = SamplingParams(max_tokens=1, temperature=0, logprobs=1, logprob_token_ids=[token])
            (output,) = generate(llm, [LONG + tokens[:i]], params)
            alone += output.outputs[0].logprobs[0][token].logprob
        assert score == pytest.approx(alone, abs=1e-4)


def test_log_probabilities_depend_neither_on_batch_mates_nor_on_chunks(llm: Any) -> None:
    """The five best of each token, of the prompt and of the answer: same tokens, same order, same values."""
    asked = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, prompt_logprobs=5, logprobs=5)
    mates = [SamplingParams(temperature=1, seed=1, max_tokens=50, ignore_eos=True, n=2), SamplingParams(max_tokens=5)]
    (expected,) = generate(llm, [LONG], asked)
    for budget in (64, 128, 200, 256):
        scheduler(llm).max_num_scheduled_tokens = budget
        got = generate(llm, [OTHER, LONG, SHORT], mates[0], asked, mates[1])[1]
        for one, other in ((expected, got), (expected.outputs[0], got.outputs[0])):
            for steps in ("prompt_logprobs", "logprobs"):
                if hasattr(one, steps):
                    assert_same(getattr(one, steps), getattr(other, steps))
    assert scheduler(llm).max_num_scheduled_tokens == FLAGS["max_num_batched_tokens"]


def assert_same(expected: list[Any], got: list[Any]) -> None:
    assert len(expected) == len(got) > 10
    for one, other in zip(expected, got, strict=True):
        if one is None:
            assert other is None  # the first token of a prompt has no probability
            continue
        assert {t: p.rank for t, p in one.items()} == {t: p.rank for t, p in other.items()}
        assert [p.logprob for p in one.values()] == pytest.approx([other[t].logprob for t in one], abs=1e-4)


def test_a_stop_cuts_the_same_answer(llm: Any) -> None:
    """By token, and by a text that spans two tokens."""
    (whole,) = greedy(llm, [LONG], max_tokens=30)
    at = next(i for i in range(5, 30) if whole[i] not in whole[:i])
    stop = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[whole[at]])
    text = SamplingParams(temperature=0, max_tokens=30, stop=[f"t{whole[at - 1]:03} t{whole[at]:03}"])
    by_token, by_text, _ = generate(llm, [LONG, LONG, OTHER], stop, text, SamplingParams(max_tokens=40))
    assert list(by_token.outputs[0].token_ids) == whole[: at + 1]
    assert list(by_text.outputs[0].token_ids) == whole[: at + 1]
    assert by_token.outputs[0].finish_reason == by_text.outputs[0].finish_reason == "stop"


def test_min_tokens_puts_a_stop_off(llm: Any) -> None:
    """The stop token is no answer before `min_tokens`; until it would have come, the answer is the same."""
    (whole,) = greedy(llm, [LONG], max_tokens=30)
    at = next(i for i in range(5, 20) if whole[i] not in whole[:i])
    params = SamplingParams(temperature=0, max_tokens=30, min_tokens=at + 5, stop_token_ids=[whole[at]])
    answer = list(generate(llm, [LONG, OTHER], params, SamplingParams(max_tokens=40))[0].outputs[0].token_ids)
    assert answer[:at] == whole[:at] and whole[at] not in answer[: at + 5] and len(answer) >= at + 5


def test_all_answers_of_a_request_aborted_in_prefill_give_back_what_they_hold(llm: Any) -> None:
    """Three answers of which one has units, when the client of all leaves."""
    (request_id,) = llm.enqueue([{"prompt_token_ids": LONG}], SamplingParams(n=3, max_tokens=50), use_tqdm=False)
    for _ in range(2):
        llm.llm_engine.step()
    assert 0 < manager(llm).pool.num_free < UNITS
    assert any(request.num_computed_tokens < len(LONG) for request in scheduler(llm).running)
    llm.llm_engine.abort_request([request_id], internal=True)
    assert not llm.llm_engine.has_unfinished_requests() and not scheduler(llm).requests
