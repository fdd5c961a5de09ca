"""Requests that clients get wrong: refused with a message, never an error inside the engine, which goes on.

Requests are made from the schema that the server publishes, with what it takes beyond OpenAI's; what the server answers
with a status of 500 or more must be answered so by stock vLLM, too.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny_models
from tests.servers import Server, serve
from vllm_infllm.memory.trace import ARGUMENT

ROUTES = {
    "/v1/completions": {"prompt": "t005 t006 t007"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "t005 t006 t007"}]},
    "/v1/responses": {"input": "t005 t006 t007"},
}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "best_of")
FLAGS = ["--dtype=float32", "--enforce-eager", "--block-size=32", "--max-model-len=1024", "--max-num-seqs=4"]
INFLLM = {"n_init": 32, "n_local": 128, "topk": 3, "exc_block_size": 64, "host_memory_gib": 0.01}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.add_tokenizer(folder)
    return tiny_models.make("llama", folder)


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serve(model, folder, *FLAGS, f"--additional-config={json.dumps({'infllm': INFLLM})}") as server:
        yield server


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda j: st.lists(j, max_size=3) | st.dictionaries(st.text(max_size=5), j, max_size=3))
TRANSFER_KEYS = st.sampled_from(
    ["do_remote_prefill", "do_remote_decode", "remote_block_ids", "remote_engine_id", "remote_host", "remote_port"]
    + ["remote_prefill_cached_tokens", "prompt_token_ids", "transfer_id", "tp_size", ARGUMENT]
)
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "vllm_xargs": st.dictionaries(st.just(ARGUMENT) | TRANSFER_KEYS, JSON, max_size=2) | JSON,
        "kv_transfer_params": st.dictionaries(TRANSFER_KEYS, JSON, max_size=3) | JSON,
        "stream": st.booleans(),
    },
)
"""What reaches the plugin: arguments beyond OpenAI's, and parameters of other KV connectors."""


def test_a_bad_request_is_the_clients_fault(server: Server, model: str, tmp_path_factory: Any) -> None:
    """Requests from the published schema: answered or refused, or a server error of stock vLLM, too."""
    failed = []
    for route in ROUTES:
        for body in bodies(server, route, examples=60):
            status, text = post(server, route, body)
            if status >= 500:
                failed.append((route, body, text))
    assert_alive(server)
    if failed:
        with serve(
            model, tmp_path_factory.mktemp("stock"), *FLAGS, "--kv-cache-memory-bytes=100000000", backend=None
        ) as stock:
            ours = [case for case in failed if post(stock, case[0], case[1])[0] < 500]
        assert not ours
