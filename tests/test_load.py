"""A server under more load than its host pool has room for: `make load` in small."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from benchmarks.load import ENV, Answered, Asked, Load, Report, Round, Watch, put, server_flags
from vllm_infllm.tools.server import Server

LOAD = Load(requests=40, shortest=32, longest=2000, answer=200)
UNIT_BYTES = 2 * (2 * 2 * 32 * 32 + 4 * 32) * 4
"""2 layers of keys and values of 2 heads, 32 tokens of size 32, and representatives of 4 heads."""
UNITS = (LOAD.longest + LOAD.answer - 128) // 32 + 2
"""For the longest request, and two more."""


@pytest.fixture(scope="module")
def server(llama_with_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Prompts advance beside each other, in chunks, so that units run out in the middle of them, too."""
    infllm = {
        "n_init": 32,
        "n_local": 128,
        "topk": 3,
        "exc_block_size": 64,
        "host_memory_gib": UNITS * UNIT_BYTES / 2**30,
    }
    flags = ["--max-num-batched-tokens=512", "--long-prefill-token-threshold=128", "--enforce-eager", "--block-size=32"]
    additional = f"--additional-config={json.dumps({'infllm': infllm})}"
    log = tmp_path_factory.mktemp("server") / "log"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENV.items():
            patch.setenv(name, value)
        # Tests with engines keep theirs in one process.
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        with Server(
            "server", [llama_with_tokenizer, *server_flags(LOAD), *flags, additional], log, start_seconds=400
        ) as server:
            yield server


def test_under_load(server: Server, llama_with_tokenizer: str) -> None:
    """Waiting, preempted, left alone: the rest completes, answers as alone, and gives back all; memory is flat."""
    report = asyncio.run(put(server, llama_with_tokenizer, LOAD, rounds=4, samples=20))
    assert not report.broken(), report.lines()
    assert len(report.answered) + sum(round_.left for round_ in report.rounds) == len(report.rounds) * LOAD.requests
    assert len(report.compared) == 20
    assert max(one.asked.tokens for one, _ in report.compared) > 500


def test_what_is_asked_is_seeded() -> None:
    """The same requests each time: prompts over the orders of magnitude, one in ten clients disconnecting."""
    asked = Load().asked(["a", "b"])
    assert asked == Load().asked(["a", "b"]) != Load(seed=1).asked(["a", "b"])
    lengths = sorted(one.tokens for one in asked)
    assert len(asked) == 200 and lengths[0] >= 64 and lengths[-1] <= 12_000 and 400 < lengths[100] < 1600
    assert all(len(one.prompt.split()) == one.tokens for one in asked)
    assert 10 <= sum(one.leaves_after is not None for one in asked) <= 30


def one_round(**changes: object) -> Round:
    answered = [Answered(Asked("a", 1, 1), "b", "", begin=10.0, end=11.0)]
    whole = {"answered": answered, "left": 1, "watch": Watch([(8.0, 9.0)], 1, 1), "resident": 1000, "in_use": {}}
    return Round(**{**whole, **changes})  # type: ignore[arg-type]


FAILED = [Answered(Asked("a", 1, 1), "", "Bad Request", 0, 1)]
ONE = one_round().answered[0]


@pytest.mark.parametrize(
    ("changes", "compared", "what"),
    [
        ({"answered": FAILED}, (ONE, ONE), "failed, the first with ['Bad Request']"),
        ({"left": 0}, (ONE, ONE), "no client disconnected"),
        ({"watch": Watch([], 0, 1)}, (ONE, ONE), "nothing was preempted"),
        ({"watch": Watch([(8.0, 9.0)], 1, 0)}, (ONE, ONE), "nothing waited"),
        ({}, None, "0 requests ran undisturbed, not 1"),
        ({}, (ONE, FAILED[0]), "1 of 1 answers are not those given alone"),
        ({"in_use": {"units": 3}}, (ONE, ONE), "'units': 3"),
    ],
)
def test_a_broken_promise_is_named(changes: dict, compared: tuple[Answered, Answered] | None, what: str) -> None:
    pairs = [compared] if compared else []
    good, bad = Report([one_round()] * 3, 1, [(ONE, ONE)]), Report([one_round(**changes)] * 3, len(pairs), pairs)
    assert not good.broken()
    assert any(what in line for line in bad.broken())


def test_memory_that_grows_after_the_first_round_is_named() -> None:
    for sizes, flat in (([500, 1000, 1030], True), ([1000, 1000, 1031], False), ([1000, 1031, 1000], False)):
        report = Report([one_round(resident=size) for size in sizes], 1, [(ONE, ONE)])
        assert ("not flat" in str(report.broken())) is not flat


def test_undisturbed_is_who_saw_no_preemption() -> None:
    one = Answered(Asked("a", 1, 1), "b", "", begin=10.0, end=20.0)
    assert Watch([(8.0, 9.9), (20.1, 21.0)]).undisturbed(one)
    for preempted in ((9.0, 10.0), (12.0, 13.0), (20.0, 21.0), (5.0, 25.0)):
        assert not Watch([preempted]).undisturbed(one)
