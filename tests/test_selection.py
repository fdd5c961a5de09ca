"""Selection rules other than the paper's, through vLLM against the oracle with the same rule written out."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny_models
from tests.engines import infllm_engine, plan, prompt_logprobs
from tests.oracle import OracleConfig, highest
from tests.oracle_model import oracle_logprobs
from vllm_infllm import selection
from vllm_infllm.selection.layer import allocate
from vllm_infllm.worker.base import infllm_impls

SIZES = {"n_init": 32, "n_local": 128, "topk": 3, "repr_topk": 2, "exc_block_size": 80}
BLOCK_SIZE = 32


def best_tokens(keys: Tensor, received: Tensor, repr_topk: int) -> Tensor:
    """Keys [repr_topk, D] of one unit and head: of the tokens that received most."""
    return keys[highest(received, repr_topk)]


def log_odds(logits: list[Tensor]) -> Tensor:
    """How one query shares its attention among units, whose logits [n] each are given: log(p / (1 - p)), [U]."""
    others = [torch.cat(logits[:u] + logits[u + 1 :]) for u in range(len(logits))]
    return torch.stack([one.logsumexp(0) - rest.logsumexp(0) for one, rest in zip(logits, others, strict=True)])


def each_head(
    score: Callable[[Tensor, Tensor, Tensor, int], float],
) -> Callable[[Tensor, Tensor, Tensor, float, int], Tensor]:
    """Sum over heads of a score of (mean query [D], keys [B, D], received [B], repr_topk)."""

    def summed(query: Tensor, keys: Tensor, received: Tensor, scale: float, repr_topk: int) -> Tensor:
        heads, units = range(len(query)), range(len(keys))
        return torch.tensor(
            [sum(float(score(query[h].mean(0), keys[u, h], received[u, h], repr_topk)) for h in heads) for u in units]
        )

    return summed


def zscore(query: Tensor, keys: Tensor, received: Tensor, scale: float, repr_topk: int) -> Tensor:
    total = torch.zeros(len(keys), dtype=torch.float64)
    for h in range(len(query)):
        means = [best_tokens(k[h], r[h], repr_topk).mean(0) for k, r in zip(keys, received, strict=True)]
        scores = torch.stack([query[h].mean(0) @ mean for mean in means])
        total += (scores - scores.mean()) / scores.std(correction=0)
    return total


def peak(query: Tensor, keys: Tensor, received: Tensor, scale: float, repr_topk: int) -> Tensor:
    every = [log_odds([k[h] @ q * scale for k in keys]) for h in range(len(query)) for q in query[h]]
    return torch.stack(every).amax(0)


def peak_of_representatives(query: Tensor, keys: Tensor, received: Tensor, scale: float, repr_topk: int) -> Tensor:
    kept = torch.stack(
        [
            torch.stack([best_tokens(k[h], r[h], repr_topk) for h in range(len(query))])
            for k, r in zip(keys, received, strict=True)
        ]
    )
    return peak(query, kept, received, scale, repr_topk)


WRITTEN_OUT = {
    "best": each_head(lambda q, k, r, n: (best_tokens(k, r, n) @ q).max()),
    "average": each_head(lambda q, k, r, n: (k @ q).mean()),
    "bounds": each_head(lambda q, k, r, n: torch.maximum(q * k.amin(0), q * k.amax(0)).sum()),
    "zscore": zscore,
    "peak": peak,
    "peak-last": lambda query, *others: peak(query[:, -32:], *others),
    "peak-repr": peak_of_representatives,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[Any]:
    with infllm_engine(
        model, {**SIZES, "selection": "zscore"}, block_size=BLOCK_SIZE, max_model_len=1024, max_num_batched_tokens=256
    ) as llm:
        yield llm


def impls(llm: Any) -> list[Any]:
    return list(infllm_impls(llm.llm_engine.vllm_config).values())


def test_the_rule_peak_keeps_nothing_beside_the_store(model: str) -> None:
    # Before the fixture `llm`: vLLM has one KV connector a process.
    with infllm_engine(model, {**SIZES, "selection": "peak-last"}, block_size=BLOCK_SIZE, max_model_len=1024) as llm:
        assert all(impl.selection.rule is selection.RULES["peak-last"] for impl in impls(llm))
        assert plan(llm).unit_bytes == len(impls(llm)) * (2 * 2 * BLOCK_SIZE * 32 * 4 + 4 * 32 * 4)


def test_the_configured_rule_runs_and_its_summaries_are_in_the_memory_plan(llm: Any) -> None:
    """A rule that keeps representatives one by one keeps H * repr_topk vectors of a unit beside their means."""
    for impl in impls(llm):
        assert impl.selection.rule is selection.RULES["zscore"]
        assert impl.selection.summaries.shape[1:] == (4 * 2, 32)
    unit, representatives, summary = 2 * 2 * BLOCK_SIZE * 32 * 4, 4 * 32 * 4, 4 * 2 * 32 * 4
    assert plan(llm).unit_bytes == len(impls(llm)) * (unit + representatives + summary)


@pytest.mark.parametrize("name", selection.RULES)
def test_a_rule_selects_as_it_is_written(name: Any, llm: Any, model: str) -> None:
    """Every log-probability of 700 tokens as by the oracle with this rule, and not as by the paper's."""
    for impl in impls(llm):
        impl.selection = allocate(selection.RULES[name], impl.ops, impl.memory, SIZES["repr_topk"])
    prompt = tiny_models.tokens(700)
    (ours,) = prompt_logprobs(llm, [prompt])
    config = OracleConfig(BLOCK_SIZE, 32, 128, 3, 2, 80, rule=WRITTEN_OUT[name])
    error = (ours - oracle_logprobs(model, config, prompt)).abs()
    assert error.max() < 1e-3, f"largest {error.max():.5f} at token {error.argmax() + 1}, mean {error.mean():.6f}"
    papers = oracle_logprobs(model, OracleConfig(BLOCK_SIZE, 32, 128, 3, 2, 80), prompt)
    assert (ours - papers).abs().max() > 0.01
