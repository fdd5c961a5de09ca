"""Requests that clients get wrong are refused with a message; none is an error inside the engine, which goes on."""

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

TEXT = " ".join(f"t{token:03}" for token in tiny_models.tokens(400))
"""A prompt far beyond the window."""
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT, "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 4},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 4, "store": False},
}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "best_of")
SIZES = ("--dtype=float32", "--enforce-eager", "--block-size=32", "--max-model-len=1024", "--max-num-seqs=4")
CACHE = ("--kv-cache-memory-bytes", str(1 << 24))
INFLLM = {"n_init": 32, "n_local": 128, "topk": 3, "exc_block_size": 64, "host_memory_gib": 0.01}


@pytest.fixture(scope="module")
def server(llama_with_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    additional = f"--additional-config={json.dumps({'infllm': INFLLM})}"
    with serve(llama_with_tokenizer, tmp_path_factory.mktemp("server"), *SIZES, additional) as server:
        yield server


def post(server: Server, route: str, body: Any) -> tuple[int, str]:
    """Status and text of the answer."""
    request = urllib.request.Request(
        server.root + route, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def unharmed(server: Server) -> Iterator[None]:
    """Afterwards the server answers as before, and its log has no traceback through this package."""
    sound = {**ROUTES["/v1/completions"], "model": server.model, "temperature": 0}
    before = json.loads(post(server, "/v1/completions", sound)[1])["choices"][0]["text"]
    yield
    assert json.loads(post(server, "/v1/completions", sound)[1])["choices"][0]["text"] == before
    assert not server.lines("/vllm_infllm/")
    assert server.metric("vllm:infllm_units_in_use") == 0


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
OF_CONNECTORS = st.sampled_from(
    "do_remote_prefill do_remote_decode remote_block_ids remote_engine_id remote_host remote_port tp_size transfer_id "
    f"remote_prefill_cached_tokens prompt_token_ids {ARGUMENT}".split()
)
ODD = st.fixed_dictionaries(
    {},
    optional={
        "vllm_xargs": st.dictionaries(st.just(ARGUMENT) | OF_CONNECTORS, JSON, max_size=2) | JSON,
        "kv_transfer_params": st.dictionaries(OF_CONNECTORS, JSON, max_size=3) | JSON,
        "stream": st.booleans(),
    },
)
"""What reaches this plugin: arguments beyond OpenAI's, and parameters of other KV connectors."""


@pytest.mark.usefixtures("unharmed")
def test_server_errors_are_those_of_stock_vllm(server: Server, tmp_path: Any) -> None:
    """Requests made from the schema that the server publishes, and broken ones: whatever is answered with a status of
    500 or more is so by vLLM without InfLLM, too."""
    schema = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
    statuses: list[int] = []
    # One that is known, which vLLM's API server answers with 500: parameters of a transfer that are no object.
    known = {**ROUTES["/v1/completions"], "model": server.model, "vllm_xargs": {"kv_transfer_params": "x"}}
    failed: list[tuple[str, Any, str]] = [("/v1/completions", known, "")]
    for route in ROUTES:

        @settings(max_examples=60, suppress_health_check=list(HealthCheck))
        @given(case=schema[route]["POST"].as_strategy(), odd=ODD, data=st.data())
        def ask(route: str, case: Any, odd: dict[str, Any], data: Any) -> None:
            names = sorted(case.body) if isinstance(case.body, dict) else []
            some = data.draw(st.lists(st.sampled_from(names), max_size=5, unique=True)) if names else []
            fields = {name: case.body[name] for name in some}
            body = short({"seed": 0, **ROUTES[route], "model": server.model, **fields, **odd}, ROUTES[route])
            status, text = post(server, route, body)
            statuses.append(status)
            if status >= 500:
                failed.append((route, body, text))

        ask(route)
    assert statuses.count(200) > 30 and sum(400 <= status < 500 for status in statuses) > 30, statuses
    with serve(server.model, tmp_path, *SIZES, *CACHE, backend=None) as stock:
        ours = [case for case in failed if post(stock, *case[:2])[0] < 500]
        assert post(stock, "/v1/completions", {**known, "vllm_xargs": {}})[0] == 200
    assert not ours


def short(body: dict[str, Any], sound: dict[str, Any]) -> dict[str, Any]:
    """The same with short answers."""
    limits = {name: min(body[name], 4) for name in LENGTHS if isinstance(body.get(name), int)}
    required = {name: sound[name] for name in LENGTHS if name in sound and body.get(name) is None}
    return {**body, **limits, **required}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("value", ["yes", "true", "", 2, -1, 0.5, 1.0, [1], []])
@pytest.mark.parametrize("route", ROUTES)
def test_a_mistyped_trace_argument_is_named(server: Server, route: str, value: Any) -> None:
    body = {**ROUTES[route], "model": server.model, "vllm_xargs": {ARGUMENT: value}}
    status, text = post(server, route, body)
    assert status == 400
    assert f"{ARGUMENT}={value!r}: true or false is expected." in json.loads(text)["error"]["message"]


TRANSFERS: list[dict[str, Any]] = [
    {},
    {ARGUMENT: "x"},
    {"do_remote_prefill": True},
    {"do_remote_prefill": True, "remote_block_ids": "x", "remote_engine_id": 5, "remote_host": None, "tp_size": -1},
    {"do_remote_prefill": 1, "remote_prefill_cached_tokens": -5},
    {"do_remote_decode": True, "remote_block_ids": [[1, 2], [3]]},
    {"unknown": {"nested": [1, None, {"": 0.5}]}},
]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("wrong", [{}, {"temperature": -1}, {"vllm_xargs": {ARGUMENT: 5}}, {"n": 2}])
@pytest.mark.parametrize("transfer", TRANSFERS, ids=str)
def test_parameters_of_other_connectors_change_nothing(
    server: Server, transfer: dict[str, Any], wrong: dict[str, Any]
) -> None:
    """Answered as without them. Refused requests, too: vLLM tells the connector of some, in the engine."""
    body = {**ROUTES["/v1/completions"], "model": server.model, "seed": 0, **wrong}
    status, text = post(server, "/v1/completions", {**body, "kv_transfer_params": transfer})
    expected_status, expected = post(server, "/v1/completions", body)
    assert status == expected_status
    key = "choices" if status == 200 else "error"
    assert json.loads(text)[key] == json.loads(expected)[key]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("route", ROUTES)
def test_a_text_beyond_max_model_len_is_refused(server: Server, route: str) -> None:
    """By its number of tokens, with the limit in the message."""
    (field,) = ROUTES[route].keys() & {"prompt", "messages", "input"}
    long = " ".join([TEXT] * 3)
    text_field = [{"role": "user", "content": long}] if field == "messages" else long
    status, text = post(server, route, {**ROUTES[route], "model": server.model, field: text_field})
    assert status == 400 and "1024" in text
