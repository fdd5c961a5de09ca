"""Traces of what was retrieved: against the oracle's selections, in batches, across preemption, and as JSON."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests import oracle_model, tiny_models
from tests.engines import greedy, infllm_engine, manager, scheduler
from tests.one_layer import Layer, Sequence, Shape, oracle_of
from tests.oracle import BlockRecord, OracleConfig, OracleResult
from vllm_infllm.attention.backend import InfLLMImpl
from vllm_infllm.memory.selections import traced_blocks
from vllm_infllm.memory.trace import ARGUMENT, Trace, TracedBlock, asked

SIZES = {"n_init": 32, "n_local": 128, "topk": 3, "repr_topk": 2, "exc_block_size": 64}
BLOCK_SIZE = 32
ORACLE = OracleConfig(BLOCK_SIZE, 32, 128, 3, 2, 64)
UNITS = 66
"""Of the engine's pool: enough for one request of max_model_len, and six more."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(llama: str) -> Iterator[Any]:
    unit_bytes = 2 * (2 * 2 * BLOCK_SIZE * 32 * 4 + 4 * 32 * 4)
    config = {**SIZES, "host_memory_gib": (UNITS + 0.5) * unit_bytes / 2**30}
    with infllm_engine(llama, config, block_size=BLOCK_SIZE, max_model_len=2048, max_num_batched_tokens=256) as llm:
        assert manager(llm).pool.num_units == UNITS
        yield llm


def run(llm: Any, prompts: list[list[int]], max_tokens: int, traced: list[bool]) -> list[Any]:
    """Finished outputs of prompts run in one batch."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args={ARGUMENT: wanted})
        for wanted in traced
    ]
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def trace_of(output: Any) -> Trace:
    """As it arrives over HTTP."""
    return Trace.from_json(json.loads(json.dumps(output.kv_transfer_params[ARGUMENT])))


def oracle_records(llama: str, tokens: list[int]) -> list[list[BlockRecord]]:
    """For each layer what the oracle selects over a prompt."""
    results: list[OracleResult] = []

    def recorded(*args: Any) -> OracleResult:
        results.append(attention(*args))
        return results[-1]

    attention = oracle_model.infllm_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle_model, "infllm_attention", recorded)
        oracle_model.oracle_logprobs(llama, ORACLE, tokens)
    return [result.blocks for result in results]


def test_a_trace_is_what_the_oracle_selects(llm: Any, llama: str) -> None:
    """Execution blocks and units of every layer, beside other requests, of which one has a trace, too."""
    prompt, other = tiny_models.tokens(700, seed=1), tiny_models.tokens(411, seed=2)
    outputs = run(llm, [tiny_models.tokens(300), prompt, other], max_tokens=1, traced=[False, True, True])
    assert outputs[0].kv_transfer_params is None
    for output, tokens in zip(outputs[1:], (prompt, other), strict=True):
        trace, records = trace_of(output), oracle_records(llama, tokens)
        assert trace.layers == ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
        assert [(block.start, block.end) for block in trace.blocks] == [(r.start, r.end) for r in records[0]]
        for i, block in enumerate(trace.blocks):
            assert block.units == [layer[i].selected for layer in records]
            assert trace.sealed_units(block) == records[0][i].num_sealed
    assert any(trace.sealed_units(block) > ORACLE.topk for block in trace.blocks), "nothing to choose from"


def test_each_step_of_an_answer_is_traced(llm: Any) -> None:
    """The last token of an answer is not computed; a trace does not change the answer."""
    prompt = tiny_models.tokens(500)
    (output,) = run(llm, [prompt], max_tokens=12, traced=[True])
    assert [list(output.outputs[0].token_ids)] == greedy(llm, [prompt], 12)
    blocks = trace_of(output).blocks
    assert [(block.start, block.end) for block in blocks[-12:]] == [(t, t + 1) for t in range(499, 511)]
    assert all(len(units) == 3 for block in blocks[-12:] for units in block.units)


def test_a_preempted_request_is_traced_from_its_new_beginning(llm: Any) -> None:
    """Units run out: the trace covers each token once, in order, as its last life computed it."""
    preempted = []
    original = scheduler(llm)._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler(llm)._preempt_request = preempt
    outputs = run(llm, [tiny_models.tokens(700, seed) for seed in range(3)], max_tokens=300, traced=[True] * 3)
    scheduler(llm)._preempt_request = original
    assert preempted
    for output in outputs:
        blocks = trace_of(output).blocks
        assert [block.start for block in blocks] == [0, *(block.end for block in blocks[:-1])]
        assert blocks[-1].end == 700 + 300 - 1
        for block in blocks:
            assert all(0 <= unit < (block.start - 160) // 32 for units in block.units for unit in units)


def test_nothing_is_noted_for_requests_that_did_not_ask(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rows nor selections are kept, and nothing is sent."""
    from vllm_infllm.memory.connector import InfLLMConnector
    from vllm_infllm.memory.selections import Selections

    monkeypatch.setattr(Selections, "note", lambda *args: pytest.fail("noted"))
    sent, build = [], InfLLMConnector.build_connector_worker_meta
    monkeypatch.setattr(InfLLMConnector, "build_connector_worker_meta", lambda self: sent.append(build(self)))
    (output,) = run(llm, [tiny_models.tokens(500)], max_tokens=3, traced=[False])
    assert output.kv_transfer_params is None and sent and not any(sent)


def test_aborted_requests_leave_no_trace_behind(llm: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=100, ignore_eos=True, extra_args={ARGUMENT: True})
    ids = llm.enqueue([{"prompt_token_ids": tiny_models.tokens(700)}], params, use_tqdm=False)
    for _ in range(4):
        llm.llm_engine.step()
    traces = scheduler(llm).connector._traces
    assert len(traces) == 1
    llm.llm_engine.abort_request(ids, internal=True)
    assert not traces and not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("value", ["true", 2, 1.0, None, [True]])
def test_other_values_are_refused(llm: Any, value: Any) -> None:
    """Named, with what is expected; and the engine goes on."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"infllm_trace=.*: true or false is expected"):
        llm.generate([{"prompt_token_ids": [5]}], SamplingParams(extra_args={ARGUMENT: value}), use_tqdm=False)
    assert greedy(llm, [[5, 6, 7]], 1)


def test_a_trace_of_several_answers_is_refused(llm: Any) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="n=2: set n to 1"):
        llm.generate([{"prompt_token_ids": [5]}], SamplingParams(n=2, extra_args={ARGUMENT: True}), use_tqdm=False)


@pytest.mark.parametrize(
    ("extra_args", "wanted"), [(None, False), ({}, False), ({ARGUMENT: 1}, True), ({"x": 2}, False)]
)
def test_asked(extra_args: Any, wanted: bool) -> None:
    assert asked(extra_args) is wanted


SMALL = Trace(32, 32, 128, ["a", "b"], [TracedBlock(0, 64, [[], []]), TracedBlock(64, 128, [[0], [1]])])


def test_tokens_and_units_of_a_trace() -> None:
    trace = Trace.from_json(SMALL.to_json())
    assert trace == SMALL
    trace.add(TracedBlock(128, 192, [[0, 2], [2, 3]]))
    assert trace.retrievals() == {0: 2, 1: 1, 2: 2, 3: 1}
    assert [trace.unit_of(token) for token in (0, 31, 32, 63, 64)] == [None, None, 0, 0, 1]
    assert trace.tokens_of(1) == range(64, 96)
    assert trace.share_of_layers(trace.blocks[2], 2) == 1 and trace.share_of_layers(trace.blocks[2], 3) == 0.5
    trace.add(TracedBlock(0, 64, [[], []]))
    assert trace.blocks == [TracedBlock(0, 64, [[], []])]


@pytest.mark.parametrize("data", [None, [], {}, {"blocks": [{}]}, {"blocks": [], "unknown": 1}])
def test_what_is_no_trace_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="not a trace of InfLLM"):
        Trace.from_json(data)


def test_traces_are_read_without_vllm_and_torch() -> None:
    """Where answers are looked at, neither need be installed."""
    code = "import sys; sys.modules.update(vllm=None, torch=None); import vllm_infllm.memory.trace"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_layer_notes_the_units_that_the_oracle_selects() -> None:
    """Two requests of one layer, of which one asked: numbers in the text, whatever host units they got."""
    shape = Shape(ORACLE, max_len=800)
    layer = Layer(shape, 40, 40, seed=3)
    layer.impl.number, admit, selections = 0, layer.requests.admit, []
    asking, other = Sequence.random(shape, 620, 600, seed=1), Sequence.random(shape, 300, 299, seed=2)

    def admit_traced(request_id: str, *args: Any) -> Any:
        return admit(request_id, *args, traced=request_id == str(id(asking)))

    def forward(*args: Any) -> Any:
        done = InfLLMImpl.forward(layer.impl, *args)
        selections.extend(round_.selections for round_ in args[5].rounds if round_.selections)
        return done

    layer.requests.admit, layer.impl.forward = admit_traced, forward
    layer.step([(other, 250), (asking, 256)])
    layer.run(asking, chunk=256)
    (blocks,) = traced_blocks(selections, num_layers=1).values()
    records = oracle_of(shape, asking).blocks
    assert [(b.start, b.end, b.units) for b in blocks] == [(r.start, r.end, [r.selected]) for r in records]
    assert sum(len(record.selected) < record.num_sealed for record in records) > 10
