"""No request reads what another one left: whatever is free holds NaN while others run, and nothing changes."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.engines import between_steps, greedy, infllm_engine, manager, prompt_logprobs
from vllm_infllm.selection.layer import Summaries

SIZES = {"n_init": 32, "n_local": 128, "topk": 3, "repr_topk": 2, "exc_block_size": 64}
LENGTHS = [700, 33, 411, 128, 1000, 250]
GARBAGE = 1 << 40
"""What residency caches of no request hold: as a unit it does not exist, as a clock it is far ahead."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


@contextlib.contextmanager
def poisoned(llm: Any) -> Iterator[dict[str, int]]:
    """From now on: before a step runs, what no request holds in it becomes NaN, in every layer, once it is free.

    Units (keys, values, representatives, summaries of a selection rule), paged blocks and the attention that their
    tokens received, the null block too, and residency caches. Yields how many of each were overwritten.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from vllm_infllm.worker.base import infllm_impls

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context
    impls = infllm_impls(worker.vllm_config)
    connector, blocks = get_kv_transfer_group(), manager(llm).block_pool
    overwritten = {"units": 0, "blocks": 0, "caches": 0}
    done: dict[str, set[int]] = {"units": set(), "blocks": set()}

    def fill(kind: str, free: set[int], tensors: list[torch.Tensor]) -> None:
        new = sorted(free - done[kind])
        done[kind] = free
        overwritten[kind] += len(new)
        for tensor in tensors:
            tensor[new] = math.nan

    def fill_caches() -> None:
        for group, residency in connector._residency.items():
            held = {request.number for request in connector._requests[group]._requests.values()}
            free = [number for number in range(len(residency.unit)) if number not in held]
            overwritten["caches"] += len(free)
            for tensor in (residency.unit, residency.arrived, residency.used, residency.clock):
                tensor[free] = GARBAGE
            residency.mass[free] = math.nan

    def fill_all() -> None:
        units = {unit for unit in manager(llm).pool._free}
        free = {block.block_id for block in blocks.free_block_queue.get_all_free_blocks()} | {0}
        for tensors_of, kind, ids in ((_unit_tensors, "units", units), (_block_tensors, "blocks", free)):
            fill(kind, ids, [t for name, impl in impls.items() for t in tensors_of(impl, layers[name])])
        fill_caches()

    with between_steps(llm, fill_all):
        yield overwritten


def _unit_tensors(impl: Any, layer: Any) -> list[torch.Tensor]:
    summaries = [impl.selection.summaries] if isinstance(impl.selection, Summaries) else []
    return [impl.memory.keys, impl.memory.values, impl.memory.representatives, *summaries]


def _block_tensors(impl: Any, layer: Any) -> list[torch.Tensor]:
    return [layer.kv_cache, impl.memory.received]


def others(llm: Any) -> None:
    """Requests of which one is aborted in mid-prefill, one in decode, and one goes on to its end."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": tiny_models.tokens(length, seed=99)} for length in (900, 500, 1800)]
    ids = llm.enqueue(prompts, SamplingParams(max_tokens=60, ignore_eos=True), use_tqdm=False)
    for aborted, steps in ((2, 3), (1, 12)):
        for _ in range(steps):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([ids[aborted]], internal=True)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


@pytest.mark.parametrize(
    ("slots", "strategy", "selection"),
    [(0, "lru", "mean"), (0, "lru", "peak"), (0, "lru", "best"), (4, "lru", "mean"), (4, "lru-s", "mean")],
)
def test_no_request_reads_what_another_left(llama: str, slots: int, strategy: str, selection: str) -> None:
    """Answers and log-probabilities beside and after others equal those of a fresh engine, to the last bit."""
    prompts = [tiny_models.tokens(length, seed=length) for length in LENGTHS]
    config = {**SIZES, "max_cached_blocks": slots, "cache_strategy": strategy, "selection": selection}
    sizes = {"block_size": 32, "max_model_len": 2048, "max_num_batched_tokens": 256, "max_num_seqs": 3}
    with infllm_engine(llama, config, **sizes) as llm:
        answers, logprobs = greedy(llm, prompts, max_tokens=30), prompt_logprobs(llm, prompts)
    with infllm_engine(llama, config, **sizes) as llm, poisoned(llm) as overwritten:
        others(llm)
        assert greedy(llm, prompts, max_tokens=30) == answers
        others(llm)
        for expected, got in zip(logprobs, prompt_logprobs(llm, prompts), strict=True):
            assert torch.equal(expected, got)
    assert overwritten["units"] and overwritten["blocks"]
    assert bool(overwritten["caches"]) == bool(slots)
