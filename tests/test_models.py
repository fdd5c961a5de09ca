"""Each model family, tiny and of random weights, through LLM(...) against the oracle model of the same weights."""

from pathlib import Path

import pytest

from tests import tiny_models
from tests.engines import infllm_engine, prompt_logprobs
from tests.oracle import OracleConfig
from tests.oracle_model import oracle_logprobs

SIZES = {"n_init": 32, "n_local": 128, "topk": 3, "repr_topk": 2, "exc_block_size": 80}
BLOCK_SIZE = 32


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_prompt_logprobs_equal_the_oracle(family: str, tmp_path: Path) -> None:
    """700 tokens, 5.5 windows, in chunks: every log-probability as by the dense oracle."""
    folder = tiny_models.make(family, tmp_path)
    prompt = tiny_models.tokens(700)
    with infllm_engine(folder, SIZES, block_size=BLOCK_SIZE, max_model_len=1024, max_num_batched_tokens=256) as llm:
        (ours,) = prompt_logprobs(llm, [prompt])
    config = OracleConfig(BLOCK_SIZE, 32, 128, 3, 2, 80)
    error = (ours - oracle_logprobs(folder, config, prompt)).abs()
    assert error.max() < 1e-3, f"largest {error.max():.5f} at token {error.argmax() + 1}, mean {error.mean():.6f}"


def test_a_sliding_window_as_long_as_n_local_stays_another_kind_of_layer(tmp_path: Path) -> None:
    """A hybrid model whose own window equals n_local: its sliding layers must not share the InfLLM block manager."""
    folder = tiny_models.make("gemma3", tmp_path, sliding_window=128)
    prompt = tiny_models.tokens(500)
    with infllm_engine(folder, SIZES, block_size=BLOCK_SIZE, max_model_len=1024, max_num_batched_tokens=256) as llm:
        (ours,) = prompt_logprobs(llm, [prompt])
    error = (ours - oracle_logprobs(folder, OracleConfig(BLOCK_SIZE, 32, 128, 3, 2, 80), prompt)).abs()
    assert error.max() < 1e-3
