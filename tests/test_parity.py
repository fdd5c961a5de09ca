"""The real model through LLM(...) against the oracle model of the same weights, and against stock vLLM."""

import pydoc_data.topics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.engines import engine, infllm_engine, prompt_logprobs, scheduler
from tests.oracle import OracleConfig
from tests.oracle_model import oracle_logprobs
from vllm_infllm.tools.model import demo_model

SIZES = {"n_init": 128, "n_local": 1024, "topk": 4, "repr_topk": 4, "exc_block_size": 512}
LENGTH = 4096


def english(length: int, skip: int = 0) -> list[int]:
    """Tokens of Python's language reference, which every Python carries."""
    text = "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    tokens = AutoTokenizer.from_pretrained(demo_model()).encode(text[skip : skip + 10 * length])
    return tokens[:length]


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    config = OracleConfig(128, SIZES["n_init"], SIZES["n_local"], SIZES["topk"], SIZES["repr_topk"], 512)
    return oracle_logprobs(str(demo_model()), config, english(LENGTH))


def start() -> Any:
    return infllm_engine(
        str(demo_model()), SIZES, max_model_len=LENGTH + 8, max_num_seqs=4, max_num_batched_tokens=2048
    )


@pytest.fixture(scope="class")
def llm() -> Iterator[Any]:
    with start() as llm:
        yield llm


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    error = (got - expected).abs()
    assert error.mean() < 0.002 and error.max() < 0.05, f"mean {error.mean():.6f}, largest {error.max():.4f}"


class TestOracle:
    """One engine; no other may live in this process meanwhile, vLLM holds one KV connector a process."""

    @pytest.mark.parametrize("budget", [2048, 1024, 700, 512])
    def test_equals_the_oracle_with_any_token_budget(self, budget: int, llm: Any, expected: torch.Tensor) -> None:
        """4,096 tokens of English in float32; the scheduler is given the budget, the engine stays."""
        scheduler(llm).max_num_scheduled_tokens = budget
        (got,) = prompt_logprobs(llm, [english(LENGTH)])
        assert_equal(got, expected)

    def test_a_batch_of_four_equals_the_oracle(self, llm: Any, expected: torch.Tensor) -> None:
        """Four different texts of 4,096 tokens in one batch: the first equals the oracle, the last itself alone."""
        scheduler(llm).max_num_scheduled_tokens = 2048
        texts = [english(LENGTH), *(english(LENGTH, skip) for skip in (100_000, 200_000, 300_000))]
        batch = prompt_logprobs(llm, texts)
        assert_equal(batch[0], expected)
        assert_equal(batch[3], prompt_logprobs(llm, [texts[3]])[0])


def test_short_prompts_equal_stock_vllm() -> None:
    """Up to n_local tokens, for a request that will outgrow the window and for one that will not."""
    short, full = english(300), english(SIZES["n_local"])
    with start() as llm:
        ours = prompt_logprobs(llm, [short, full])
    with engine(str(demo_model()), max_model_len=LENGTH + 8, kv_cache_memory_bytes=1 << 30) as stock:
        theirs = prompt_logprobs(stock, [short, full])
    for got, reference in zip(ours, theirs, strict=True):
        assert (got - reference).abs().max() < 0.002
