"""What the demo and benchmarks/gpu.py take from one answer."""

from tests import tiny_models
from tests.engines import infllm_engine
from vllm_infllm.tools.demo_worker import Answer, answer

SIZES = {"n_init": 32, "n_local": 128, "topk": 3, "repr_topk": 2, "exc_block_size": 64}


def test_an_answer_tells_its_first_token_from_its_last(llama_with_tokenizer: str) -> None:
    """A short prompt and a long answer: most of the time passes after the first token."""
    with infllm_engine(llama_with_tokenizer, SIZES, block_size=32, max_model_len=1024, disable_log_stats=False) as llm:
        list(answer(llm, tiny_models.tokens(40), max_tokens=2))
        *progress, last = answer(llm, tiny_models.tokens(40), max_tokens=100)
    told = Answer(**last)
    assert 0 < told.first_seconds < told.seconds / 2
    assert told.blocks == 5 and told.tokens == 100
    assert progress[0] == {"tokens": 40}
