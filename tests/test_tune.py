"""`vllm-infllm tune`: the choice against brute force, and what a candidate takes against the plan's arithmetic."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny_models
from vllm_infllm.tools import cli, tune
from vllm_infllm.tools.tune import Candidate, Goal, choose, explain_failure

BLOCK = 128
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        n_local=st.integers(1, 8).map(lambda blocks: blocks * BLOCK),
        topk=st.integers(1, 8),
        block_size=st.just(BLOCK),
        kv_gib=st.integers(1, 4).map(float),
        ms=st.integers(1, 4).map(float),
        refusal=st.sampled_from([None, None, None, "too long"]),
    ),
    min_size=1,
    max_size=12,
)
GOALS = st.builds(Goal, st.none() | st.integers(0, 5).map(float), st.none() | st.integers(0, 5).map(float))


@given(considered=CANDIDATES, goal=GOALS)
def test_the_choice_is_brute_forces(considered: list[Candidate], goal: Goal) -> None:
    """No candidate that can start and keeps both goals attends to more tokens, or to as many with a larger window."""
    best: Candidate | None = None
    for candidate in considered:
        if candidate.refusal is not None:
            continue
        if goal.kv_gib is not None and candidate.kv_gib > goal.kv_gib:
            continue
        if goal.ms is not None and candidate.ms > goal.ms:
            continue
        size = (candidate.n_local + BLOCK * candidate.topk, candidate.n_local)
        if best is None or size > (best.n_local + BLOCK * best.topk, best.n_local):
            best = candidate
    assert choose(considered, goal) == best
    if best is None:
        assert explain_failure(considered, goal)


def test_a_failure_names_what_is_closest() -> None:
    small, large = Candidate(512, 4, BLOCK, kv_gib=0.5, ms=9.0), Candidate(1024, 4, BLOCK, kv_gib=0.75, ms=7.0)
    said = explain_failure([small, large], Goal(0.25, 5.0))
    assert "--max-kv-gib-per-request 0.25 (least: 0.5000 at n_local 512)" in said
    assert "--max-ms-per-token 5 (fastest: 7.00 at n_local 1024, topk 4)" in said


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)


def command(model: str, *more: str) -> list[str]:
    sizes = ["--max-model-len", "8k", "--max-num-seqs", "2", "--max-num-batched-tokens", "512", "--topk", "2,4"]
    return ["tune", "--model", model, "--dtype", "float32", *sizes, *more]


def paged_gib(n_local: int) -> float:
    """One block more than window, block and step of 512 tokens take; of each block 128 tokens in two layers: K and V of
    2 heads of 32, and one number for each of 4 query heads; all float32."""
    blocks = -(-(n_local + 128 - 1 + 512) // 128) + 1
    return blocks * 2 * 128 * (2 * 2 * 32 + 4) * 4 / (1 << 30)


def test_the_largest_setting_within_a_memory_goal(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows of 256, 512 and 1,024 fit a model trained on 2,048 tokens; a goal between the last two leaves 512. The
    last line is JSON, and the line above it what vLLM takes."""
    goal = (paged_gib(512) + paged_gib(1024)) / 2
    assert cli.main(command(model, "--max-kv-gib-per-request", str(goal), "--infllm", '{"repr_topk": 2}')) == 0
    lines = capsys.readouterr().out.splitlines()
    choice = json.loads(lines[-1])
    assert choice["kv_gib_per_request"] == pytest.approx(paged_gib(512), rel=1e-6) and choice["ms_per_token"] is None
    assert choice["additional_config"] == {"infllm": {"repr_topk": 2, "n_local": 512, "topk": 4}}
    assert lines[-2] == f"--additional-config '{json.dumps(choice['additional_config'])}'"
    first = [line.split()[1] for line in lines if line.startswith("│")]
    assert [cell for cell in first if cell.isdigit()] == ["256", "256", "512", "512", "1024", "1024"]


def test_milliseconds_are_measured(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode step is the layers' operations, a share of a sealing and the weights' product: 2 layers measured as 2,
    with a clock that takes 1 s for whatever is run."""
    monkeypatch.setattr(tune, "_seconds", lambda run_once: (run_once(), 1.0)[1])
    assert cli.main(command(model, "--max-ms-per-token", "1e6", "--n-local", "512", "--topk", "2")) == 0
    choice = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert choice["ms_per_token"] == pytest.approx(1e3 * (1 + 1 / 128 + 1))


def test_a_measurement_within_the_window_seals_nothing(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A context that no window leaves: nothing is sealed, and there is a figure all the same."""
    arguments = command(model, "--max-ms-per-token", "1e6", "--n-local", "1k", "--max-model-len", "1k")
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ms_per_token"] > 0


def test_an_impossible_goal_is_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not possible at all is refused beside the table, and the closest figure is named."""
    arguments = command(model, "--max-kv-gib-per-request", "0.000001", "--n-local", "256,512,8k")
    assert cli.main(arguments) == 1
    shown = capsys.readouterr()
    assert f"(least: {paged_gib(256):.4f} at n_local 256)" in shown.err.splitlines()[-1]
    assert "refused" in shown.out and "more than the 2048 that the model was trained for" in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a goal: --max-kv-gib-per-request, --max-ms-per-token or both"),
        (["--max-ms-per-token", "-1"], "'-1' is not a positive number"),
        (["--max-ms-per-token", "nan"], "'nan' is not a positive number"),
        (["--max-ms-per-token", "5", "--topk", "0"], "'0' is not a positive integer"),
        (["--max-ms-per-token", "5", "--infllm", '{"topk": 3}'], "--infllm sets topk, which --n-local and --topk vary"),
        (["--max-ms-per-token", "5", "--infllm", "[1]"], "is not a JSON object"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["tune", *arguments])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--model", str(tmp_path), "--max-ms-per-token", "5"]) == 2
    assert f"--model {tmp_path}: no model is there" in capsys.readouterr().err
