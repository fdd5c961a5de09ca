"""What a prompt is asked of an engine with, and what comes back; the same for an own engine and a server."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from vllm_infllm.tools.worker_process import WorkerProcess

WORKER = "vllm_infllm.tools.eval.worker"


@dataclass(frozen=True)
class Request:
    """Token ids to complete greedily; `prompt_logprobs`: those of the prompt are wanted, too.

    needles: tokens [start, end) of the prompt whose retrieval is to be watched.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    prompt_logprobs: bool
    needles: list[list[int]]


@dataclass(frozen=True)
class Answer:
    """What a request gave: seconds until the last token and until the first, log-probabilities of all prompt tokens
    but the first if they were wanted, and the share of layers that retrieved the needles (see retrieval.py)."""

    id: str
    text: str
    seconds: float
    first_token_seconds: float
    logprobs: list[float] | None
    retrieved: float | None = None


class Answering(Protocol):
    """Something that answers requests: takes them as it needs them, and gives answers as they are ready."""

    @property
    def retrieves(self) -> bool:
        """Whether it retrieves units and tells which."""

    def __call__(self, requests: Iterator[Request]) -> Iterable[Answer]: ...


@dataclass(frozen=True)
class OwnEngine:
    """An engine in a process of its own (see worker.py), alive while it answers.

    `concurrency` requests at a time; one more waits in the process, so that the engine never waits for a prompt.
    """

    name: str
    engine: dict[str, Any]
    concurrency: int
    env: dict[str, str]
    retrieves: bool

    def __call__(self, requests: Iterator[Request]) -> Iterator[Answer]:
        with WorkerProcess(WORKER, self.name, self.env) as process:
            process.send({"engine": self.engine, "concurrency": self.concurrency})
            for _ in range(self.concurrency + 1):
                _send_next(process, requests)
            for event in process.lines():
                _send_next(process, requests)
                yield Answer(**event)


def _send_next(process: WorkerProcess, requests: Iterator[Request]) -> None:
    request = next(requests, None)
    if request is None:
        process.end_input()
    else:
        process.send(asdict(request))
