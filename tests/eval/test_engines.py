"""`vllm-infllm eval` with real engines on the demo model: what each backend sees, and what it tells of retrieval."""

import json
from typing import Any

import pytest

from vllm_infllm.tools import cli

INFLLM = {"n_local": 256, "topk": 4, "exc_block_size": 128, "host_memory_gib": 1}
LENGTH = 896
"""128 initial tokens, 4 units of 128, and the window of 256: a prompt of which every sealed unit is retrieved."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By task and backend."""
    out = tmp_path_factory.mktemp("eval") / "out"
    arguments = ["--lengths", str(LENGTH), "--depths", "0.0,0.5", "--infllm", json.dumps(INFLLM), "--output", str(out)]
    arguments += ["--engine", json.dumps({"enforce_eager": True, "dtype": "float32"})]
    assert cli.main(["eval", "passkey", "perplexity", "--backends", "full,streaming,infllm-peak", *arguments]) == 0
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in (out / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault((record["task"], record["backend"]), []).append(record)
    return found


def test_only_what_is_seen_is_found(results: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Depth 0 lies among the initial tokens, depth 0.5 between them and the window."""
    scores = {
        backend: [record["score"] for record in results["passkey", backend]]
        for backend in ("full", "streaming", "infllm-peak")
    }
    assert scores == {"full": [1.0, 1.0], "streaming": [1.0, 0.0], "infllm-peak": [1.0, 1.0]}


def test_retrieval_is_told_where_there_is_one(results: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """All layers retrieve all units, so the needle's, too; an initial token belongs to no unit."""
    assert [record["retrieved"] for record in results["passkey", "infllm-peak"]] == [None, 1.0]
    for backend in ("full", "streaming"):
        assert [record["retrieved"] for record in results["passkey", backend]] == [None, None]


def test_perplexity_differs_only_beyond_the_window(results: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    (full,), (streaming,), (infllm,) = (
        [record["nll"] for record in results["perplexity", backend]] for backend in ("full", "streaming", "infllm-peak")
    )
    assert len(full) == 4 and all(1 < nll < 6 for nll in full)
    assert streaming[0] == pytest.approx(full[0], abs=1e-5)
    assert all(abs(ours - theirs) > 1e-3 for ours, theirs in zip(streaming[1:], full[1:], strict=True))
    # The first unit is sealed at 128 + 128 + 256 tokens.
    assert infllm[:2] == streaming[:2]
    assert all(abs(ours - theirs) > 1e-4 for ours, theirs in zip(infllm[2:], streaming[2:], strict=True))
