"""Fuzzed configurations: each starts, or stops with a message that names what is wrong; what starts finishes requests.

Everything up to the engine is built as vLLM builds it: arguments, configuration, memory plan, KV cache groups,
scheduler. Only the model is missing, whose answers are made up.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from vllm.plugins import load_general_plugins

from tests import tiny_models
from tests.schedulers import answer, assert_all_returned, build, request
from vllm_infllm.config import KEY, ConfigError

TRAINED = 4096
ABSURD: list[Any] = [0, -1, 1, 1 << 40, 1 << 64, 0.5, float("nan"), float("inf"), "", "many", None, True, [], {"a": 1}]

sizes = st.sampled_from([0, 16, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096])
near = sizes.flatmap(lambda n: st.sampled_from([n - 1, n, n + 1]))
absurd = st.sampled_from(ABSURD)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n_init": sizes | near,
    "n_local": sizes | near,
    "topk": st.integers(0, 70),
    "repr_topk": st.integers(0, 40),
    "exc_block_size": sizes | near,
    "max_cached_blocks": st.integers(0, 70),
    "cache_strategy": st.sampled_from(["lru", "fifo", "lru-s", "lfu", "LRU"]),
    "score_decay": st.floats(-0.5, 1.5),
    "host_memory_gib": st.floats(1e-4, 40) | st.just(1e-12),
    "ops": st.sampled_from(["cpu", "reference", "triton", "cuda"]),
}
FLAGS: dict[str, st.SearchStrategy[Any]] = {
    "block_size": st.sampled_from([1, 8, 16, 24, 32, 48, 64, 128, 256]) | near,
    "max_model_len": st.integers(1, 20_000) | st.just(1 << 22),
    "max_num_seqs": st.integers(-1, 300),
    "max_num_batched_tokens": near | st.integers(0, 5000),
    "max_num_scheduled_tokens": near,
    "long_prefill_token_threshold": near,
    "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16", "float64", "int8", "half"]),
    "kv_cache_dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e5m2", "int4"]),
    "kv_cache_memory_bytes": st.integers(0, 1 << 36),
    "num_gpu_blocks_override": st.integers(-1, 200),
    "gpu_memory_utilization": st.floats(-0.5, 1.5),
    "enable_chunked_prefill": st.booleans(),
    "enable_prefix_caching": st.booleans(),
    "async_scheduling": st.booleans(),
    "enforce_eager": st.booleans(),
    "disable_sliding_window": st.booleans(),
    "scheduling_policy": st.sampled_from(["fcfs", "priority", "lottery"]),
    "scheduler_reserve_full_isl": st.booleans(),
    "watermark": st.floats(-0.2, 1.2),
    "max_num_active_seqs": st.integers(-1, 8),
    "prefill_schedule_interval": st.integers(-1, 4),
    "stream_interval": st.integers(-1, 4),
    "cpu_offload_gb": st.floats(-1, 2),
    "tensor_parallel_size": st.integers(0, 2),
    "seed": st.integers(-1, 1 << 33),
}


@st.composite
def configurations(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and flags. Mostly sizes that divide, so that many start; then a few values that need not make sense."""
    block = draw(st.sampled_from([16, 32, 64, 128]))
    blocks = st.integers(1, 8).map(lambda n: n * block)
    fields: dict[str, Any] = {"n_init": draw(blocks), "n_local": draw(blocks), "topk": draw(st.integers(0, 20))}
    fields["exc_block_size"] = draw(st.integers(1, fields["n_local"]))
    flags: dict[str, Any] = {"block_size": block, "max_num_seqs": draw(st.integers(1, 8))}
    flags["max_model_len"] = draw(st.integers(2, 20_000))
    flags["max_num_batched_tokens"] = fields["exc_block_size"] + draw(st.integers(0, 2048))
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=2)):
        fields[name] = draw(FIELDS[name] | absurd)
    for name in draw(st.lists(st.sampled_from(sorted(FLAGS)), max_size=2)):
        flags[name] = draw(FLAGS[name] | absurd)
    return fields, flags


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    load_general_plugins()
    yield tiny_models.make("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=TRAINED)


def refusal(model: str, fields: dict[str, Any], flags: dict[str, Any]) -> str | None:
    """Why it does not start; None if it does, and then three requests are finished."""
    try:
        scheduler = build(model, fields, flags)
    except ConfigError as error:
        return str(error)
    except (ValueError, NotImplementedError) as error:
        # vLLM's own refusal, of a flag of its own; pydantic's validation errors are such errors, too.
        assert not re.search(KEY, str(error), re.IGNORECASE) or flags, error
        return str(error)
    finish_requests(scheduler)
    return None


def finish_requests(scheduler: Any) -> None:
    """One as long as can be (3,000 tokens at most) and two short ones: each step makes progress, all is given back."""
    longest = min(scheduler.max_model_len - 1, 3000)
    for number, length in enumerate([longest, 1, max(1, longest // 2)]):
        scheduler.add_request(request(str(number), length, max_tokens=3))
    idle = 0
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        idle = 0 if output.total_num_scheduled_tokens else idle + 1
        assert idle < 10, "requests wait for ever"
        scheduler.update_from_output(output, answer(scheduler, output))
    assert_all_returned(scheduler)


def names(message: str, given: dict[str, Any]) -> bool:
    """Whether the message names a field or flag that was given, as in Python or as on the command line."""
    spelled = message.replace("-", "_").lower()
    # A line of pydantic has the attribute of vLLM's configuration class, like SchedulerConfig.policy.
    attributes = [line.split("_")[-1] for line in spelled.splitlines()]
    return any(name in spelled or name.split("_")[-1] in attributes for name in given)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(configuration=configurations())
def test_a_configuration_starts_or_says_why_not(
    llama: str, configuration: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    fields, flags = configuration
    message = refusal(llama, fields, flags)
    event("starts" if message is None else "is refused")
    if message is not None:
        assert names(message, {**fields, **flags}), message


SOUND: tuple[dict[str, Any], dict[str, Any]] = (
    {"n_init": 32, "n_local": 128, "topk": 3, "exc_block_size": 64},
    {"block_size": 32, "max_num_seqs": 4, "max_model_len": 4096, "max_num_batched_tokens": 256},
)


def test_the_fuzzed_configurations_start_where_they_are_sound(llama: str) -> None:
    """Otherwise the test above would hold for a plugin that refuses everything."""
    assert refusal(llama, *SOUND) is None


FOUND: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # name: (fields, flags, what is named); each was a message of vLLM that named neither
    "paged cache of no bytes": ({}, {"kv_cache_memory_bytes": 0}, "--kv-cache-memory-bytes 0 "),
    "more blocks than planned": ({}, {"num_gpu_blocks_override": 1 << 40}, "--num-gpu-blocks-override"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_fuzzing_found(name: str, llama: str) -> None:
    fields, flags, named = FOUND[name]
    assert named in str(refusal(llama, {**SOUND[0], **fields}, {**SOUND[1], **flags}))
