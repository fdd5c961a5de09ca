"""`vllm serve MODEL --attention-backend infllm`, as an operator starts it, with the OpenAI client."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from vllm_infllm import __version__
from vllm_infllm.tools.model import demo_model
from vllm_infllm.tools.passkey import passkey_prompt

START_SECONDS = 400
KEY = 83412


@dataclass
class Server:
    url: str
    log: Path

    def lines(self, word: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if word in line]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """No memory setting, default compilation, default configuration of InfLLM.

    In float32, where what else is in a batch cannot turn an answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(demo_model()), "--attention-backend", "infllm"]
    # vLLM binds its own threads to cores; let it have all of them.
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--max-model-len", "32768", "--port", str(port), "--dtype", "float32"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**env, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"},
        )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
        yield Server(f"http://127.0.0.1:{port}/v1", log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    pytest.fail(f"the server did not come up; its log ends with\n{log.read_text()[-4000:]}")


def test_the_log_says_what_runs(server: Server) -> None:
    """One line with version, effective configuration and memory plan; one with the layers."""
    (line,) = server.lines(f"vllm-infllm {__version__}")
    for part in ("n_init=128", "n_local=4096", "topk=16", "repr_topk=4", "exc_block_size=512", "block_size=128"):
        assert part in line
    assert "blocks a request" in line and "host units" in line and "GiB" in line
    (layers,) = server.lines("InfLLM runs")
    assert "30 of 30 attention layers: model.layers.[0-29].self_attn.attn" in layers
    assert server.lines("prefix caching is switched off")


@pytest.mark.timeout(1500)
def test_answers_beside_others_are_those_given_alone(server: Server) -> None:
    """A pass key out of 12K tokens, streamed while requests of 10 to 5,000 tokens run."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    filler = passkey_prompt(tokenizer, 6000, 0.5, 11111)
    prompts = [passkey_prompt(tokenizer, 12_000, 0.3, KEY), filler[50:60], filler[50:750], filler[50:5050]]

    async def complete(client: openai.AsyncOpenAI, prompt: list[int]) -> str:
        stream = await client.completions.create(
            model=str(demo_model()), prompt=prompt, max_tokens=8, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", timeout=1200, max_retries=0) as client:
            together = await asyncio.gather(*(complete(client, prompt) for prompt in prompts))
            alone = [await complete(client, prompt) for prompt in prompts]
        return together, alone

    together, alone = asyncio.run(ask())
    assert together == alone
    assert together[0].strip().startswith(str(KEY))


def test_a_request_longer_than_max_model_len_is_refused(server: Server) -> None:
    """vLLM's own error, HTTP 400."""
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="32768"):
        client.completions.create(model=str(demo_model()), prompt=[5] * 33_000, max_tokens=1)
