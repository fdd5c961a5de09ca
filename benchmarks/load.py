"""A server under load: more clients than its host pool has room for, some of which disconnect.

`vllm bench serve` asks, and beside it a client that leaves before its answers are complete. Promises, each checked: all
other requests complete; sampled answers equal those the same requests get alone; nothing is in use after a round; the
worker's resident memory is flat over the rounds. Flags that are not listed here are those of `vllm serve`.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from vllm_infllm.config import KEY
from vllm_infllm.tools import CommandError
from vllm_infllm.tools.engine_options import positive, tokens
from vllm_infllm.tools.model import demo_model
from vllm_infllm.tools.server import Server
from vllm_infllm.tools.sides import load_tokenizer

AT_REST = (
    "vllm:infllm_units_in_use",
    "vllm:infllm_blocks_held",
    "vllm:infllm_requests_waiting_for_units",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)
"""Gauges that are 0 when nothing runs."""
WAITING = "vllm:infllm_requests_waiting_for_units"
PREEMPTIONS = "vllm:num_preemptions_total"
GROWTH = 1.03
"""Most that resident memory may differ between rounds, but for the first, in which it is touched."""
LOOK_SECONDS = 0.1
ENV = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""Of the server. By default oneDNN keeps code for 1,024 shapes of matrix products, and each number of tokens in a step
is another shape: hundreds of MiB that come slowly, with vLLM's own attention, too."""
COUNTED_SECONDS = 0.5
"""How much later than a token arrives the metrics may count what happened before it."""
MORE_ROUNDS = 3
"""At most so many times the rounds asked for are put, when fewer have shown too few requests undisturbed."""
REST_SECONDS = 10
START_SECONDS = 400
WORDS = 2000
"""Tokens of the vocabulary that are tried as words of prompts."""
DEMO_FLAGS = (
    *("--additional-config", json.dumps({KEY: {"host_memory_gib": 0.42}})),
    *("--max-num-batched-tokens", "2048", "--long-prefill-token-threshold", "512"),
)
"""With the demo model: units for the longest request and little more, which prompts take beside each other."""


@dataclass(frozen=True)
class Asked:
    """A request of `tokens` tokens, which continues to exactly `answer` tokens.

    leaves_after: chunks of the answer after which its client waits for `patience` seconds and disconnects; None: never.
    """

    prompt: str
    tokens: int
    answer: int
    leaves_after: int | None = None
    patience: float = 0.0


@dataclass(frozen=True)
class Load:
    """A seeded distribution of requests; lengths in tokens, evenly spread over the orders of magnitude.

    One client of `clients` is the one that leaves: it asks `disconnects` of the requests, the others ask the rest.
    """

    requests: int = 200
    clients: int = 8
    shortest: int = 64
    longest: int = 12_000
    answer: int = 256
    disconnects: float = 0.1
    seed: int = 0

    def asked(self, words: Sequence[str]) -> list[Asked]:
        """words: each of them, after a blank, is one token."""
        chance = random.Random(self.seed)
        return [self._one(chance, words) for _ in range(self.requests)]

    def _one(self, chance: random.Random, words: Sequence[str]) -> Asked:
        length = round(self.shortest * (self.longest / self.shortest) ** chance.random())
        answer = round(self.answer ** chance.random())
        prompt = "".join(f" {word}" for word in chance.choices(words, k=length))
        if chance.random() >= self.disconnects:
            return Asked(prompt, length, answer)
        # Half of them while they wait or are in prefill, unless that is over sooner; the others before their end.
        return Asked(prompt, length, self.answer, chance.choice([0, answer // 2]), chance.uniform(0, 0.5))


@dataclass
class Answered:
    """What became of a request that was not left: an error, or a text; seconds by the clock of `time.perf_counter`."""

    asked: Asked
    text: str
    error: str
    begin: float
    end: float


@dataclass
class Watch:
    """What the server's metrics said during a round."""

    preempted: list[tuple[float, float]] = field(default_factory=list)
    """Between which two looks the count of preemptions grew."""
    preemptions: int = 0
    waiting: int = 0
    """Most requests that waited for units at once."""

    def undisturbed(self, one: Answered) -> bool:
        """Whether no request at all was preempted while this one was in the server, so that it was not.

        vLLM counts a preemption with the next token of the request that suffered it, so before its end.
        """
        return not any(begin <= one.end and one.begin <= end for begin, end in self.preempted)


@dataclass
class Round:
    answered: list[Answered]
    left: int
    watch: Watch
    resident: int
    """Bytes of the worker after it."""
    in_use: dict[str, float]
    """What is not 0 after it."""


@dataclass
class Report:
    rounds: list[Round] = field(default_factory=list)
    undisturbed: int = 0
    compared: list[tuple[Answered, Answered]] = field(default_factory=list)
    """Answers under load, and alone."""
    samples: int = 1
    """How many were to be compared."""

    @property
    def answered(self) -> list[Answered]:
        return [one for round_ in self.rounds for one in round_.answered]

    @property
    def different(self) -> list[tuple[Answered, Answered]]:
        return [(one, alone) for one, alone in self.compared if one.text != alone.text]

    def broken(self) -> list[str]:
        """What was promised and did not hold."""
        errors = [one.error for one in [*self.answered, *(alone for _, alone in self.compared)] if one.error]
        preemptions, waiting = (self._sum(name) for name in ("preemptions", "waiting"))
        in_use = [round_.in_use for round_ in self.rounds]
        resident = [round_.resident for round_ in self.rounds[1:]]
        found = [
            (errors, f"{len(errors)} requests failed, the first with {errors[:1]}"),
            (not all(r.left for r in self.rounds), "a round in which no client disconnected proves nothing about it"),
            (not preemptions, "nothing was preempted: the pool is too large for this load to prove anything"),
            (not waiting, "nothing waited for units: the pool is too large for this load to prove anything"),
            (len(self.compared) < self.samples, f"{self.undisturbed} requests ran undisturbed, not {self.samples}"),
            (self.different, f"{len(self.different)} of {len(self.compared)} answers are not those given alone"),
            (any(in_use), f"in use when nothing runs, after each round: {in_use}"),
            (not resident, "one round alone says nothing about memory"),
            (resident and max(resident) > GROWTH * min(resident), f"resident memory is not flat: {resident} bytes"),
        ]
        return [what for broken, what in found if broken]

    def lines(self) -> list[str]:
        lengths = sorted(one.asked.tokens for one, _ in self.compared)
        of = f" of prompts of {lengths[0]:,} to {lengths[-1]:,} tokens" if lengths else ""
        mib = ", ".join(f"{round_.resident / (1 << 20):.0f}" for round_ in self.rounds)
        waiting = ", ".join(str(round_.watch.waiting) for round_ in self.rounds)
        return [
            f"{sum(not one.error for one in self.answered)} requests answered, "
            f"{sum(round_.left for round_ in self.rounds)} clients disconnected",
            f"{self._sum('preemptions')} preemptions; most requests that waited for units at once: {waiting}",
            f"{len(self.compared) - len(self.different)} of {len(self.compared)} compared answers{of} are those given "
            f"alone (of {self.undisturbed} that ran while nothing was preempted)",
            f"in use after each round: {[round_.in_use for round_ in self.rounds]} (empty: nothing)",
            f"resident memory of the worker after each round: {mib} MiB",
        ]

    def _sum(self, name: str) -> int:
        return sum(getattr(round_.watch, name) for round_ in self.rounds)


async def put(server: Server, model: str, load: Load, rounds: int, samples: int) -> Report:
    """Put the load on a server `rounds` times, then ask `samples` of the undisturbed requests again, alone.

    Where preemptions are so frequent that fewer are undisturbed, further rounds are put.
    """
    asked, report, steady = load.asked(words(model)), Report(samples=samples), list[Answered]()
    while len(report.rounds) < rounds or (len(steady) < samples and len(report.rounds) < MORE_ROUNDS * rounds):
        report.rounds.append(last := await _round(server, model, load, asked))
        steady += [one for one in last.answered if not one.error and last.watch.undisturbed(one)]
    report.undisturbed = len(steady)
    sampled = random.Random(load.seed).sample(steady, min(samples, len(steady)))
    if sampled:
        alone = await bench(server, model, [one.asked for one in sampled], clients=1)
        report.compared = list(zip(sampled, alone, strict=True))
    return report


def words(model: str) -> list[str]:
    """Words of which each, after a blank, is one token of a model, so that the length of a text is known."""
    tokenizer = load_tokenizer(model)
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    tried = random.Random(0).sample(ids, min(WORDS, len(ids)))
    texts = {i: tokenizer.decode([i]).strip() for i in tried}
    whole = {i: text for i, text in texts.items() if text.isascii() and text.isalnum()}
    return [text for i, text in whole.items() if tokenizer.encode(f" {text}", add_special_tokens=False) == [i]]


async def _round(server: Server, model: str, load: Load, asked: Iterable[Asked]) -> Round:
    stay = [one for one in asked if one.leaves_after is None]
    leave = [one for one in asked if one.leaves_after is not None]
    async with _watching(server) as watch:
        answered, left = await asyncio.gather(
            bench(server, model, stay, load.clients - 1), _leave(server, model, leave)
        )
    in_use = await _rest(server)
    (worker,) = server.processes("VLLM::Worker")
    return Round(answered, left, watch, worker.memory_info().rss, in_use)


@contextlib.asynccontextmanager
async def _watching(server: Server) -> AsyncIterator[Watch]:
    """Look at the metrics all the time, and once more when it is over."""
    watch, over = Watch(), asyncio.Event()

    async def look() -> None:
        first = previous = (await asyncio.to_thread(server.metrics))[PREEMPTIONS]
        before, last = time.perf_counter(), False
        while not last:
            await asyncio.sleep(LOOK_SECONDS)
            last, now = over.is_set(), time.perf_counter()
            found = await asyncio.to_thread(server.metrics)
            watch.waiting = max(watch.waiting, int(found[WAITING]))
            watch.preemptions = int(found[PREEMPTIONS] - first)
            if found[PREEMPTIONS] > previous:
                watch.preempted.append((before - COUNTED_SECONDS, time.perf_counter()))
            before, previous = now, found[PREEMPTIONS]

    looking = asyncio.create_task(look())
    try:
        yield watch
    finally:
        over.set()
        await looking


async def _rest(server: Server) -> dict[str, float]:
    """Gauges that are not 0 though all requests are gone; numbers of a last step may take a moment."""
    deadline = time.monotonic() + REST_SECONDS
    while True:
        found = await asyncio.to_thread(server.metrics)
        in_use = {name: found[name] for name in AT_REST if found[name]}
        if not in_use or time.monotonic() > deadline:
            return in_use
        await asyncio.sleep(LOOK_SECONDS)


async def bench(server: Server, model: str, asked: Sequence[Asked], clients: int) -> list[Answered]:
    """Ask by `vllm bench serve`, greedily, `clients` at a time."""
    from vllm.benchmarks.serve import add_cli_args, main_async

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as dataset:
        dataset.writelines(json.dumps({"prompt": one.prompt, "output_tokens": one.answer}) + "\n" for one in asked)
        dataset.flush()
        args = parser.parse_args(
            [
                *("--model", model, "--base-url", server.url, "--ready-check-timeout-sec", "0"),
                *("--dataset-name", "custom", "--dataset-path", dataset.name, "--num-prompts", str(len(asked))),
                *("--custom-output-len", "-1", "--skip-chat-template", "--disable-shuffle"),
                *("--max-concurrency", str(clients), "--temperature", "0", "--ignore-eos"),
                *("--disable-tqdm", "--save-detailed"),
            ]
        )
        result = await main_async(args)
    return [
        Answered(one, text, error, begin, begin + seconds)
        for one, text, error, begin, seconds in zip(
            asked, *(result[k] for k in ("generated_texts", "errors", "start_times", "latencies")), strict=True
        )
    ]


async def _leave(server: Server, model: str, asked: Sequence[Asked]) -> int:
    """Ask one after the other, and disconnect; how many left before the end of their answer."""
    left = 0
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0) as client:
        for one in asked:
            left += await _leave_one(client, model, one)
    return left


async def _leave_one(client: openai.AsyncOpenAI, model: str, one: Asked) -> bool:
    options: Any = {"temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = await client.completions.create(model=model, prompt=one.prompt, max_tokens=one.answer, **options)
    async with stream:
        for _ in range(one.leaves_after or 0):
            if await anext(stream, None) is None:
                return False
        await asyncio.sleep(one.patience)
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--requests", type=positive, default=200, help="a round (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=4, help="the first is a warm-up too (default: %(default)s)")
    parser.add_argument("--longest", type=tokens, default=12_000, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--samples", type=positive, default=20, help="answers to compare (default: %(default)s)")
    parser.add_argument("--log", type=Path, default=Path("build/load.log"), help="of the server (default: %(default)s)")
    args, flags = parser.parse_known_args(argv)
    load, model = Load(requests=args.requests, longest=args.longest), args.model or str(demo_model())
    arguments = [model, *server_flags(load), *([] if args.model else DEMO_FLAGS), *flags]
    os.environ.update(ENV)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Server("server", arguments, args.log, START_SECONDS) as server:
            report = asyncio.run(put(server, model, load, args.rounds, args.samples))
    except CommandError as error:
        sys.exit(str(error))
    print("", *report.lines(), *(f"BROKEN: {line}" for line in report.broken()), sep="\n")
    sys.exit(bool(report.broken()))


def server_flags(load: Load) -> list[str]:
    """Flags of `vllm serve` for a load; float32, where what else is in a batch does not turn an answer."""
    return [
        *("--attention-backend", "infllm", "--dtype", "float32"),
        *("--max-model-len", str(load.longest + load.answer), "--max-num-seqs", str(load.clients)),
    ]


if __name__ == "__main__":
    main()
