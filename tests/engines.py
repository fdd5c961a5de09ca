"""Engines for tests: vLLM in this process, so that a test sees scheduler, block manager and worker."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def engine(model: str, **kwargs: Any) -> Iterator[Any]:
    """A vllm.LLM in this process, float32 and uncompiled unless said otherwise; gone afterwards."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 8,
        "skip_tokenizer_init": not Path(model, "tokenizer.json").exists(),
    }
    llm = LLM(model, **{**defaults, **kwargs})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def infllm_engine(model: str, infllm: dict[str, Any] | None = None, **kwargs: Any) -> Iterator[Any]:
    """An engine that runs InfLLM with the configuration `infllm`, with a small host pool unless it sets another."""
    config = {"host_memory_gib": 1.0, **(infllm or {})}
    with engine(model, attention_backend="infllm", additional_config={"infllm": config}, **kwargs) as llm:
        yield llm


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def manager(llm: Any) -> Any:
    """The InfLLM block manager of an engine in this process; asserts that there is one."""
    from vllm_infllm.memory.manager import InfLLMManager

    managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    (found,) = [m for m in managers if isinstance(m, InfLLMManager)]
    return found


def assert_all_returned(llm: Any) -> None:
    """Every block and unit is back; one block, the null block, is never given out."""
    pool, blocks = manager(llm).pool, manager(llm).block_pool
    pool.check_integrity()
    assert pool.num_free == pool.num_units
    assert blocks.get_num_free_blocks() == blocks.num_gpu_blocks - 1
    assert not manager(llm).units


def plan(llm: Any) -> Any:
    """The memory plan that the worker made and printed."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.plan


def operations(llm: Any) -> set[str]:
    """What the layers that run InfLLM say of the operations that they run; asserts that there are such layers."""
    from vllm_infllm.attention.backend import InfLLMImpl

    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    impls = [layer.impl for layer in layers if isinstance(getattr(layer, "impl", None), InfLLMImpl)]
    assert impls
    return {impl.ops.describe() for impl in impls}


@contextlib.contextmanager
def between_steps(llm: Any, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` whenever a step has been scheduled, before it runs."""
    original = scheduler(llm).schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        check()
        return output

    scheduler(llm).schedule = schedule
    yield
    scheduler(llm).schedule = original


def prompt_logprobs(llm: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probability of each prompt token but the first, of prompts run in one batch: [N - 1] each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        torch.tensor([step[token].logprob for step, token in zip(o.prompt_logprobs[1:], p[1:], strict=True)])
        for o, p in zip(outputs, prompts, strict=True)
    ]


def greedy(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy answers, token ids, of prompts run in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]
