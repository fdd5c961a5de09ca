"""`vllm serve MODEL --attention-backend infllm`, as an operator starts it, with the OpenAI client."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from transformers import AutoTokenizer

from tests.servers import Server, serve
from vllm_infllm import __version__
from vllm_infllm.tools.model import demo_model
from vllm_infllm.tools.passkey import passkey_prompt

KEY = 83412


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """No memory setting, default compilation, default configuration of InfLLM.

    In float32, where what else is in a batch cannot turn an answer.
    """
    folder = tmp_path_factory.mktemp("server")
    with serve(str(demo_model()), folder, "--max-model-len", "32768", "--dtype", "float32") as server:
        yield server


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
