"""The residency cache: its policies against a plain model, and its answers against reading the host store in place."""

import random
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.engines import greedy, infllm_engine, manager, plan, prompt_logprobs
from tests.plain_residency import PlainModel
from vllm_infllm.memory.residency import Residency, Strategy
from vllm_infllm.ops import reference
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings

STRATEGIES = ("lru", "fifo", "lru-s")
SIZES = {"n_init": 64, "n_local": 128, "topk": 3, "repr_topk": 2, "exc_block_size": 64}

INIT, SLOTS, TOPK = 1, 6, 4
SETTINGS = LayerSettings(n_local=16, init_blocks=INIT, topk=TOPK, repr_topk=1, scale=1.0)


def decode_step(request: int, stored: int) -> ExecutionBlocks:
    """One token of a request whose block i is physical block 100 + i."""
    row = [0, 5000, 5001, 0, 0, stored, 0, 1, request]
    table = torch.arange(100, 200, dtype=torch.int32)[None]
    none = torch.empty((0, 4), dtype=torch.int64)
    return ExecutionBlocks(torch.tensor([row]), table, torch.empty(0), none, INIT + TOPK, 1, stored)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_policies_equal_a_plain_model(strategy: str) -> None:
    """3,000 random steps: the same units are resident, only misses are copied, wanted units never leave."""
    draw = random.Random(strategy)
    caches = Residency.allocate(Strategy.of(strategy), 0.5, 3, 2, SLOTS, torch.device("cpu"))
    request, residency, model = 1, caches.layer(1), PlainModel(Strategy.of(strategy), 0.5)
    blocks = decode_step(request, stored=INIT + SLOTS + 20)
    counts = [0, 0, 0]
    for _ in range(3000):
        wanted = sorted(draw.sample(range(20), draw.randint(0, TOPK)))
        chosen = torch.tensor([[77, *wanted, *[-1] * (TOPK - len(wanted))]])
        slots, missing = reference.resolve(blocks, SETTINGS, residency, chosen)
        caches.check_integrity()
        new, left = model.resolve({unit: place for place, unit in enumerate(wanted, INIT)}, SLOTS)
        assert residency.unit[request].tolist() == model.slots
        assert slots.tolist() == [[100, *(101 + model.slots.index(u) for u in wanted), *[-1] * (TOPK - len(wanted))]]
        assert missing.tolist() == [[-1, *(u if u in new else -1 for u in wanted), *[-1] * (TOPK - len(wanted))]]
        mass = torch.tensor([[draw.random() for _ in range(INIT + TOPK)]])
        reference.attended(blocks, SETTINGS, residency, chosen, mass)
        model.attended(dict(zip(wanted, mass[0, INIT:].numpy(), strict=False)))
        events = len(wanted) - len(new), len(new), len(left)
        counts = [total + number for total, number in zip(counts, events, strict=True)]
    assert residency.counts[request].tolist() == counts
    assert (caches.unit[:, 0] == -1).all() and (caches.unit[[0, 2]] == -1).all(), "another request or layer was touched"


def test_slots_exist_once_their_own_tokens_are_stored() -> None:
    """While a request grows, a unit is never given a block whose tokens are still read from it."""
    residency = Residency.allocate(Strategy.LRU, 1.0, 1, 1, SLOTS, torch.device("cpu")).layer(0)
    for stored in range(INIT + 1, INIT + 2 * SLOTS):
        sealed = list(range(50, 50 + stored - INIT))[-TOPK:]
        chosen = torch.tensor([[77, *sealed, *[-1] * (TOPK - len(sealed))]])
        slots, _ = reference.resolve(decode_step(0, stored), SETTINGS, residency, chosen)
        assert slots.max() < 100 + min(stored, INIT + SLOTS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


def start(model: str, **infllm: Any) -> Any:
    return infllm_engine(model, {**SIZES, **infllm}, block_size=32, max_model_len=2048, max_num_batched_tokens=256)


def prompts() -> list[list[int]]:
    return [tiny_models.tokens(length, seed=length) for length in (1500, 90, 700, 380)]


@pytest.fixture(scope="module")
def in_place(llama: str) -> tuple[list[torch.Tensor], list[list[int]], int]:
    """Log-probabilities, greedy answers and blocks a request without a residency cache."""
    with start(llama) as llm:
        return prompt_logprobs(llm, prompts()), greedy(llm, prompts(), max_tokens=50), plan(llm).blocks_per_request


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_slots_give_bit_equal_results(
    strategy: str, llama: str, in_place: tuple[list[torch.Tensor], list[list[int]], int]
) -> None:
    """Attention from slots, with room for one unit more than is retrieved, equals attention from the host store."""
    logprobs, answers, blocks = in_place
    with start(llama, max_cached_blocks=4, cache_strategy=strategy) as llm:
        assert plan(llm).blocks_per_request == blocks + 2 + 4 - 1
        for expected, got in zip(logprobs, prompt_logprobs(llm, prompts()), strict=True):
            assert torch.equal(expected, got)
        assert greedy(llm, prompts(), max_tokens=50) == answers
        assert manager(llm).pool.num_free == manager(llm).pool.num_units


def test_attention_does_read_the_slots(llama: str, in_place: tuple[list[torch.Tensor], list[list[int]], int]) -> None:
    """With copies into slots left out the results change: nothing falls back to the host store."""
    from vllm_infllm.ops import cpu

    with pytest.MonkeyPatch.context() as patch, start(llama, max_cached_blocks=4) as llm:
        patch.setattr(cpu, "gather", lambda *args: None)
        (got, *_) = prompt_logprobs(llm, prompts()[:1])
    assert (got - in_place[0][0]).abs().max() > 0.01
