"""A server under load: more clients than its host pool has room for, some of which disconnect.

Promises, each checked: all other requests complete; sampled answers equal those the same requests get alone; afterwards
no block and no unit is in use; the worker's resident memory is flat over the rounds.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import openai
from rich.console import Console

from tests.servers import Server, serve
from vllm_infllm.tools.model import demo_model

AT_REST = ("vllm:kv_cache_usage_perc",)
"""Gauges that are 0 when nothing runs."""
PREEMPTIONS = "vllm:num_preemptions_total"
GROWTH = 1.03
"""Most that resident memory may grow from the first round to a later one."""


@dataclass(frozen=True)
class Load:
    """A seeded distribution of requests; lengths in tokens, prompts evenly spread over the orders of magnitude."""

    requests: int = 200
    clients: int = 8
    shortest: int = 64
    longest: int = 12_000
    answer: int = 128
    disconnects: float = 0.1
    vocabulary: range = range(3, 256)
    seed: int = 0

    def asked(self) -> list["Asked"]:
        chance = random.Random(self.seed)
        return [self._one(chance) for _ in range(self.requests)]

    def _one(self, chance: random.Random) -> "Asked":
        length = round(self.shortest * (self.longest / self.shortest) ** chance.random())
        answer = chance.randint(1, self.answer)
        leaves = chance.randint(0, answer) if chance.random() < self.disconnects else None
        return Asked(chance.choices(self.vocabulary, k=length), answer, leaves)


@dataclass
class Asked:
    """A request. `leaves_after`: chunks after which its client disconnects; 0 before the first, None never."""

    prompt: list[int]
    max_tokens: int
    leaves_after: int | None
    text: str | None = None
    error: str | None = None
    undisturbed: bool = False
    """No request at all was preempted while this one was in the server, so it was not."""


@dataclass
class Report:
    rounds: list[list[Asked]] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    preemptions: float = 0
    compared: int = 0
    different: int = 0
    in_use: dict[str, float] = field(default_factory=dict)

    def broken(self) -> list[str]:
        """What was promised and did not hold."""
        failed = [one.error for asked in self.rounds for one in asked if one.error]
        missing = [one for asked in self.rounds for one in asked if one.text is None and one.leaves_after is None]
        found = [
            (failed, f"{len(failed)} requests failed, the first with {failed[:1]}"),
            (missing, f"{len(missing)} requests without an answer"),
            (not self.preemptions, "nothing was preempted: the pool is too large for this load to prove anything"),
            (not self.compared, "no request ran undisturbed, so no answer was compared"),
            (self.different, f"{self.different} of {self.compared} answers are not those given alone"),
            (any(self.in_use.values()), f"in use when nothing runs: {self.in_use}"),
            (max(self.resident) > GROWTH * self.resident[0], f"resident memory grows: {self.resident} bytes"),
        ]
        return [what for broken, what in found if broken]

    def lines(self) -> list[str]:
        left = sum(one.leaves_after is not None for asked in self.rounds for one in asked)
        done = sum(one.text is not None for asked in self.rounds for one in asked)
        mib = ", ".join(f"{size / (1 << 20):.0f}" for size in self.resident)
        return [
            f"{done} requests answered, {left} clients disconnected, {self.preemptions:.0f} preemptions",
            f"{self.compared - self.different} of {self.compared} compared answers are those given alone",
            f"in use afterwards: {self.in_use}; resident memory of the worker after each round: {mib} MiB",
        ]


async def put(server: Server, load: Load, rounds: int, samples: int) -> Report:
    """Put the load on a server `rounds` times, then ask `samples` of the undisturbed requests again, alone."""
    report, before = Report(), server.metric(PREEMPTIONS)
    (worker,) = server.processes("VLLM::Worker")
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0) as client:
        for _ in range(rounds):
            asked, free = load.asked(), asyncio.Semaphore(load.clients)
            await asyncio.gather(*(_ask(server, client, one, free) for one in asked))
            report.rounds.append(asked)
            report.resident.append(worker.memory_info().rss)
        report.preemptions = server.metric(PREEMPTIONS) - before
        steady = [one for asked in report.rounds for one in asked if one.undisturbed and one.text is not None]
        for one in random.Random(load.seed).sample(steady, min(samples, len(steady))):
            again = Asked(one.prompt, one.max_tokens, None)
            await _ask(server, client, again, asyncio.Semaphore(1))
            report.compared += 1
            report.different += again.text != one.text
    report.in_use = {name: server.metric(name) for name in AT_REST}
    return report


async def _ask(server: Server, client: openai.AsyncOpenAI, one: Asked, free: asyncio.Semaphore) -> None:
    async with free:
        before = await asyncio.to_thread(server.metric, PREEMPTIONS)
        try:
            one.text = await _stream(client, server.model, one)
        except openai.OpenAIError as error:
            one.error = repr(error)
        one.undisturbed = before == await asyncio.to_thread(server.metric, PREEMPTIONS)


async def _stream(client: openai.AsyncOpenAI, model: str, one: Asked) -> str | None:
    """The answer; None if the client left before it was complete."""
    asking = client.completions.create(
        model=model,
        prompt=one.prompt,
        max_tokens=one.max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    if one.leaves_after == 0:
        try:
            await asyncio.wait_for(asking, 0.2)
        except asyncio.TimeoutError:
            return None
        return None
    text = []
    async with await asking as stream:
        async for chunk in stream:
            text.append(chunk.choices[0].text)
            if len(text) == one.leaves_after:
                return None
    return "".join(text)


def server_flags(max_model_len: int, host_memory_gib: float, **infllm: float) -> list[str]:
    """Flags of `vllm serve`; float32, where what else is in a batch does not turn an answer."""
    additional = {"infllm": {"host_memory_gib": host_memory_gib, **infllm}}
    flags = ["--dtype", "float32", "--max-model-len", str(max_model_len), "--max-num-seqs", "8"]
    return [*flags, "--additional-config", json.dumps(additional)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--requests", type=int, default=200, help="a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--longest", type=int, default=12_000, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=20, help="answers to compare (default: %(default)s)")
    parser.add_argument("--max-model-len", type=int, default=12_288, help="default: %(default)s")
    parser.add_argument("--host-memory-gib", type=float, default=0.5, help="of the pool (default: %(default)s)")
    args = parser.parse_args(argv)
    load, console = Load(requests=args.requests, longest=args.longest), Console(highlight=False)
    flags = server_flags(args.max_model_len, args.host_memory_gib)
    with (
        tempfile.TemporaryDirectory() as folder,
        console.status("a server starts, then clients ask"),
        serve(args.model or str(demo_model()), Path(folder), *flags) as server,
    ):
        report = asyncio.run(put(server, load, args.rounds, args.samples))
    for line in report.lines():
        console.print(line)
    broken = report.broken()
    for line in broken:
        console.print(f"BROKEN: {line}", style="red")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
