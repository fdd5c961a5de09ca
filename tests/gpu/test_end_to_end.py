"""vLLM itself on the GPU's operations: Triton in its interpreter, CUDA C++ compiled for the CPU."""

from typing import Any

import pytest

from tests import tiny_models
from tests.engines import greedy, infllm_engine, manager, operations
from tests.gpu import build_cuda
from vllm_infllm.ops import load

build_cuda.load_for_cpu()

SIZES = {"n_init": 16, "n_local": 64, "topk": 2, "repr_topk": 2, "exc_block_size": 32}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


def answers(model: str, ops: str, **infllm: Any) -> list[list[int]]:
    """Greedy answers to a mixed batch: one prompt inside the window, one more than two windows long."""
    prompts = [tiny_models.tokens(length, seed=length) for length in (140, 30)]
    config = {**SIZES, "ops": ops, **infllm}
    with infllm_engine(model, config, block_size=16, max_model_len=256, max_num_batched_tokens=64) as llm:
        assert operations(llm) == {load(ops).describe()}  # type: ignore[arg-type]
        found = greedy(llm, prompts, max_tokens=8)
        assert manager(llm).pool.num_free == manager(llm).pool.num_units
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "infllm",
    [{}, {"max_cached_blocks": 2, "cache_strategy": "lru-s"}],
    ids=["in place", "from slots"],
)
def test_the_same_tokens_as_with_the_cpu_operations(llama: str, infllm: dict[str, Any]) -> None:
    """Prefill in chunks, sealing, retrieval and residency, mixed with decoding."""
    assert answers(llama, "triton", **infllm) == answers(llama, "cpu", **infllm)
