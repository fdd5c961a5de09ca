"""A running server as what answers (`--base-url`): vLLM's, through the OpenAI client."""

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from vllm_infllm.tools import CommandError, UsageError
from vllm_infllm.tools.eval.answers import Answer, Request

REQUEST_SECONDS = 24 * 3600
"""A long prompt may take hours on a CPU; a server that is gone is noticed anyway."""


@dataclass(frozen=True)
class Server:
    """A server's first model, asked `concurrency` requests at a time."""

    base_url: str
    model: str
    max_model_len: int
    concurrency: int
    retrieves = False
    """Streamed answers do not carry what was retrieved."""

    @classmethod
    def connect(cls, base_url: str, concurrency: int) -> "Server":
        """Ask the server what it serves.

        Raises:
            UsageError: if it does not answer, or not as vLLM's does.
        """
        import openai

        try:
            served = _client(base_url).with_options(timeout=30).models.list().data[0]
        except (openai.OpenAIError, IndexError, ValueError, AttributeError) as error:
            raise UsageError(f"--base-url {base_url}: {_one_line(error)}; is it .../v1 of a running server?") from error
        max_model_len = getattr(served, "max_model_len", None)
        if not max_model_len:
            raise UsageError(f"--base-url {base_url}: does not tell its max_model_len, as vLLM's server does")
        return cls(base_url, served.id, max_model_len, concurrency)

    def __call__(self, requests: Iterator[Request]) -> Iterator[Answer]:
        client = _client(self.base_url)
        running: set[Future[Answer]] = set()
        with ThreadPoolExecutor(self.concurrency) as pool:
            while True:
                while len(running) < self.concurrency and (request := next(requests, None)):
                    running.add(pool.submit(self._ask, client, request))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()

    def _ask(self, client: Any, request: Request) -> Answer:
        import openai

        try:
            return self._logprobs(client, request) if request.prompt_logprobs else self._stream(client, request)
        except openai.OpenAIError as error:
            raise CommandError(f"--base-url {self.base_url}: {_one_line(error)}") from error

    def _stream(self, client: Any, request: Request) -> Answer:
        start, first, text = time.monotonic(), 0.0, ""
        for chunk in client.completions.create(
            model=self.model, prompt=request.prompt, max_tokens=request.max_tokens, temperature=0, stream=True
        ):
            first = first or time.monotonic() - start
            text += "".join(choice.text for choice in chunk.choices)
        return Answer(request.id, text, time.monotonic() - start, first, None)

    def _logprobs(self, client: Any, request: Request) -> Answer:
        start = time.monotonic()
        completion = client.completions.create(
            model=self.model,
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            temperature=0,
            extra_body={"prompt_logprobs": 0},
        )
        seconds = time.monotonic() - start
        steps = zip(completion.choices[0].prompt_logprobs[1:], request.prompt[1:], strict=True)
        logprobs = [step[str(token)]["logprob"] for step, token in steps]
        return Answer(request.id, completion.choices[0].text, seconds, seconds, logprobs)


def _client(base_url: str) -> Any:
    import openai

    # No retries: a prompt that was half done would begin again, and its seconds would be those of both.
    return openai.OpenAI(base_url=base_url, api_key="none", timeout=REQUEST_SECONDS, max_retries=0)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
