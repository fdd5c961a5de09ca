"""The benchmark: what it computes from its samples, what it writes, and the synthetic fill."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

import benchmarks.engine
from benchmarks import decode, evaluation, gpu, report, results
from benchmarks.engine import WORKER
from benchmarks.engine_worker import Engine
from benchmarks.floors import MODELS
from benchmarks.plan import ANSWER_ROOM, FULL
from benchmarks.progress import Display
from benchmarks.samples import (
    Step,
    complete,
    predictor,
    prompt_seconds,
    ratio_of_prompts,
)
from benchmarks.synthetic import PERIOD
from benchmarks.tables import fill_in
from benchmarks.targets import Target, targets
from tests import tiny_models
from tests.engines import engine, infllm_engine
from vllm_infllm.selection import RULES
from vllm_infllm.tools import CommandError
from vllm_infllm.tools.eval.results import Record
from vllm_infllm.tools.samples import Ratio, ratio_of_medians
from vllm_infllm.tools.tables import Table
from vllm_infllm.tools.worker_process import WorkerProcess

CHUNK = 2048


def full_attention(start: int, tokens: int = CHUNK) -> Step:
    """A step whose seconds a token grow linearly with the position: 1 ms and 50 ns for every token before."""
    return Step(start, tokens, tokens * (1e-3 + 5e-8 * (start + tokens / 2)), 0.0)


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_a_ratio_is_of_medians_and_its_spread_of_pairs() -> None:
    """One slow run on one side moves the spread, not the ratio."""
    ratio = ratio_of_medians([4.0, 9.0, 4.2], [2.0, 2.0, 2.1])
    assert ratio.value == pytest.approx(4.2 / 2.0)
    assert (ratio.low, ratio.high) == (pytest.approx(2.0), pytest.approx(4.5))


def test_runs_that_were_not_in_turn_give_no_ratio() -> None:
    with pytest.raises(ValueError):
        ratio_of_medians([1.0, 2.0], [1.0])


def test_a_prompt_from_samples_is_the_sum_of_all_its_steps() -> None:
    """Where seconds grow linearly, a few steps tell the whole, whatever the gaps."""
    everything = [full_attention(start) for start in range(0, 65536, CHUNK)]
    few = [everything[i] for i in (0, 1, 5, 6, 20, 31)]
    assert prompt_seconds(few, 65536) == pytest.approx(sum(step.seconds for step in everything))


def test_measured_steps_count_as_they_are() -> None:
    """A slow step is in the sum, even where its neighbours say otherwise."""
    steps = [Step(0, 10, 1.0, 0), Step(10, 10, 7.0, 0), Step(20, 10, 1.0, 0)]
    assert prompt_seconds(steps, 30) == 9.0
    assert prompt_seconds(steps, 20) == 8.0


@pytest.mark.parametrize("starts", [(2048, 4096), (0, 2048), ()])
def test_a_prompt_is_not_extrapolated(starts: tuple[int, ...]) -> None:
    """Without a step at its beginning and at its end there is no figure."""
    with pytest.raises(ValueError, match="first 6144 tokens"):
        prompt_seconds([full_attention(start) for start in starts], 6144)


def test_the_spread_of_a_prompt_comes_from_its_steps() -> None:
    """Noise in every other step shows in the spread; without noise there is none."""
    smooth = [full_attention(start) for start in range(0, 16384, CHUNK)]
    exact = ratio_of_prompts(smooth, smooth, 16384)
    assert (exact.low, exact.value, exact.high) == pytest.approx((1, 1, 1))
    noisy = [step._replace(seconds=step.seconds * (1.3 if i % 2 else 1.0)) for i, step in enumerate(smooth)]
    spread = ratio_of_prompts(noisy, smooth, 16384)
    assert spread.low < spread.value < spread.high and spread.high > 1.2


def test_steps_ahead_are_predicted_by_a_line() -> None:
    predict = predictor([full_attention(start) for start in (0, 2048, 4096, 6144)])
    assert predict(63488, CHUNK) == pytest.approx(full_attention(63488).seconds)
    assert predictor([full_attention(0)])(2048, 4096) == pytest.approx(2 * full_attention(0).seconds)


def test_the_plan_samples_the_end_of_every_length() -> None:
    """Otherwise there is no figure for it; so do the tokens that flatness is read from."""
    for length in FULL.prefill_lengths:
        steps = [full_attention(start) for start in FULL.prefill_samples]
        assert prompt_seconds(steps, length) > 0 and not complete(steps, length)
    assert sum(FULL.seconds.values()) <= FULL.total == 3600
    assert FULL.max_model_len(["short", "decode"]) == max(FULL.decode_contexts) + ANSWER_ROOM


# ---- targets and report ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "at_least", "verdict"),
    [
        (3.0, True, "met"),
        (2.5, True, "met"),
        (2.0, True, "missed by 20%"),
        (2.0, False, "met"),
        (3.0, False, "missed by 20%"),
    ],
)
def test_a_missed_target_says_by_how_much(value: float, at_least: bool, verdict: str) -> None:
    target = Target("name", Ratio(value, value, value), 2.5, at_least)
    assert target.verdict == verdict and target.met == (verdict == "met")
    assert target.wanted == ("at least 2.50" if at_least else "at most 2.50")


def test_what_was_not_measured_is_no_target_met() -> None:
    """A run of nothing still names every target of the engines."""
    found = list(targets({}, FULL))
    assert len(found) == 3 * 2 + 2 + 1 + 3 + 2
    assert {target.verdict for target in found} == {"not measured"} and not any(target.met for target in found)


def test_text_around_the_tables_stays() -> None:
    """Only what is between the marks of a section changes; twice is as once; a section without a place is not lost."""
    text = "# Title\nprose <!-- bench:a -->\nold\n<!-- /bench -->\nmore\n<!-- bench:b -->\nkept\n<!-- /bench -->\nend\n"
    filled = fill_in(text, {"a": r"\1 new | \d", "c": "last"})
    assert filled.startswith("# Title\nprose <!-- bench:a -->\n\\1 new | \\d\n<!-- /bench -->\nmore\n")
    assert "<!-- bench:b -->\nkept\n<!-- /bench -->\nend\n" in filled and "old" not in filled
    assert filled.endswith("<!-- bench:c -->\nlast\n<!-- /bench -->\n")
    assert fill_in(filled, {"a": r"\1 new | \d", "c": "last"}) == filled


def test_a_table_as_markdown() -> None:
    table = Table("title", ("", "figure"), [("row", "1")])
    assert table.markdown() == "|  | figure |\n| --- | ---: |\n| row | 1 |"


def infllm(start: int) -> Step:
    return Step(start, CHUNK, 2.0 * full_attention(0).seconds, 3.0)


@pytest.fixture
def record() -> Iterator[dict[str, Any]]:
    """Samples as they come out of JSON: stock computed all of 32K, and samples of 64K."""
    starts = [start for start in range(0, 65536, CHUNK) if start < 32768 or start in FULL.prefill_samples]
    block = [list(Step(32768, 1, 0.06, 0.06)), list(Step(32769, 1, 0.04, 0.04)), list(Step(32770, 1, 0.05, 0.05))]
    faster = [[*step[:2], step[2] / 2, step[3] / 2] for step in block]
    environment = {"dtype": "float32", "flags": ["avx2"]}
    yield {
        "environments": {"authors": environment},
        "notes": {"prefill": ["131072 tokens: not measured, 999 s more do not fit into the time"]},
        "parts": {
            "prefill": {
                "steps": {
                    "stock": [list(full_attention(start)) for start in starts],
                    "infllm": [list(infllm(start)) for start in range(0, 65536, CHUNK)],
                }
            },
            "decode": {
                "32768": {"stock": {"real": [block] * 2, "idle": []}, "infllm": {"real": [faster] * 2, "idle": []}}
            },
            "authors": {"length": 4096, "runs": [{"prefill": [list(infllm(0)), list(infllm(2048))], "decode": block}]},
        },
    }


def test_the_report_says_where_stocks_seconds_come_from(record: dict[str, Any]) -> None:
    """All computed up to 32K, and compared with the samples alone; from samples up to 64K; and what was left out."""
    rows = report.section("prefill", record, FULL).splitlines()
    (at_32k,) = [row for row in rows if row.startswith("| 32,768")]
    (at_64k,) = [row for row in rows if row.startswith("| 65,536")]
    assert "all computed" in at_32k and re.search(r"\([+-]0\.0%\)", at_32k)
    assert "sampled steps" in at_64k and "%" not in at_64k
    assert "- 131072 tokens: not measured, 999 s more do not fit into the time" in rows
    whole = sum(full_attention(start).seconds for start in range(0, 65536, CHUNK))
    assert results.prefill(record["parts"]["prefill"], 65536).value == pytest.approx(whole / (32 * infllm(0).seconds))


def test_flatness_compares_late_tokens_with_early_ones(record: dict[str, Any]) -> None:
    samples = record["parts"]["prefill"]
    assert results.flat(samples, *FULL.flat) == Ratio(1, 1, 1)
    samples["steps"]["infllm"][-1][2] *= 3
    flat = results.flat(samples, *FULL.flat)
    assert flat is not None and flat.high == pytest.approx(3)
    del samples["steps"]["infllm"][-4:]
    assert results.flat(samples, *FULL.flat) is None


def test_decode_without_idle_steps_is_still_reported(record: dict[str, Any]) -> None:
    assert str(results.decode(record["parts"]["decode"]["32768"])) == "2.00 (2.00 to 2.00)"
    assert "| 32,768 | 50.0 |" in report.section("decode", record, FULL)


def test_recorded_figures_say_where_they_come_from(record: dict[str, Any]) -> None:
    """6 processor seconds for 4,096 tokens, beside 4.6 s and 10.89 s for 1,000 tokens, recorded elsewhere."""
    section = report.section("authors", record, FULL)
    assert "infllm, float32" in section
    assert "theirs: a CPU of 470 GFLOP/s in bfloat16, bfloat16 | 4.6 s | 1.46 s | 3.14 " in section
    assert "theirs: the same, float32 | 10.9 s | 1.46 s | 7.43 " in section


def test_the_record_reads_back(record: dict[str, Any]) -> None:
    """But for what is beyond six digits; a step is a line."""
    record["parts"]["decode"]["32768"]["stock"]["real"][0][0][2] = 0.01234567
    text = report.dump(record)
    assert "[ 32768, 1, 0.0123457, 0.06 ]" in text and '[ "avx2" ]' in text
    record["parts"]["decode"]["32768"]["stock"]["real"][0][0][2] = 0.0123457
    assert json.loads(text)["parts"]["decode"] == record["parts"]["decode"]


def test_the_report_keeps_what_it_has_no_samples_of(record: dict[str, Any], tmp_path: Path) -> None:
    """Tables of parts that were never run stay, and plots are drawn of those that were; the same twice."""
    page = tmp_path / "performance.md"
    mark = "<!-- bench:{} -->\n{}<!-- /bench -->\n"
    page.write_text("prose\n" + mark.format("short", "older table\n") + mark.format("decode", ""))
    files = report.write(record, FULL, tmp_path)
    text, plots = page.read_text(), [file.read_bytes() for file in files[1:]]
    assert text.startswith("prose\n<!-- bench:short -->\nolder table\n") and "| 32,768 | 50.0 |" in text
    assert [file.name for file in files] == ["performance.md", "prefill.svg", "decode.svg"]
    assert report.write(record, FULL, tmp_path) == files
    assert page.read_text() == text and [file.read_bytes() for file in files[1:]] == plots


# ---- engines ---------------------------------------------------------------------------------------------------------


def test_a_process_answers_line_by_line(tmp_path: Path) -> None:
    """And what it dies of is its last answer."""
    (tmp_path / "echo.py").write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    word = json.loads(line)\n"
        "    print(json.dumps({'error': 'no more'} if word == 'stop' else word * 2), flush=True)\n"
        "    if word == 'stop': sys.exit(3)\n"
    )
    with WorkerProcess("echo", "echo", {"PYTHONPATH": str(tmp_path)}) as process:
        assert process.ask("a") == "aa" and process.ask([1]) == [1, 1]
        with pytest.raises(CommandError, match=r"echo: no more \(exit status 3, log: (.*)\)") as failure:
            process.ask("stop")
    Path(str(failure.value).rpartition("log: ")[2].rstrip(")")).unlink()


def filled_answer(llm: Any, context: int) -> tuple[list[int], list[Step]]:
    """Eight tokens decoded after a synthetic fill, and the steps that they took."""
    side = Engine(llm)
    side.start(context, answer=12)
    steps = []
    while not steps or steps[-1].end < context:
        steps += side.step(1, "fill")
    steps += side.step(8, "real")
    tokens = list(side.request.output_token_ids)
    steps += side.step(2, "idle")
    side.finish()
    return tokens, steps


def test_the_fill_gives_both_engines_the_same_content(tmp_path: Path) -> None:
    """Inside the window both compute full attention: after the same fill they decode the same tokens, in float32."""
    model = tiny_models.make("llama", tmp_path)
    worker = {"worker_extension_cls": WORKER, "distributed_executor_backend": "mp"}
    sizes: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 256, **worker}
    with engine(model, kv_cache_memory_bytes=64 << 20, **sizes) as llm:
        stock, stock_steps = filled_answer(llm, 600)
    with infllm_engine(model, {"n_local": 768, "exc_block_size": 256}, block_size=128, **sizes) as llm:
        ours, our_steps = filled_answer(llm, 600)
    assert ours == stock and len(set(ours)) > 1
    assert [step[:2] for step in our_steps] == [step[:2] for step in stock_steps]
    assert [step.tokens for step in our_steps] == [256, 256, 88, *[1] * 10]


def test_the_fill_seals_units(tmp_path: Path) -> None:
    """Beyond the window, units hold the fill's values, and their representatives are those of the attention set."""
    model = tiny_models.make("llama", tmp_path)
    config = {"n_init": 128, "n_local": 256, "topk": 1, "exc_block_size": 256}
    sizes: dict[str, Any] = {"max_model_len": 2048, "max_num_batched_tokens": 256, "worker_extension_cls": WORKER}
    with infllm_engine(model, config, block_size=128, **sizes) as llm:
        tokens, _ = filled_answer(llm, 1024)
        assert len(tokens) == 9
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        layer = worker.model_runner.compilation_config.static_forward_context["model.layers.1.self_attn.attn"]
        memory = layer.impl.memory
        assert memory.representatives[1:5].isfinite().all() and memory.representatives[1:5].abs().sum() > 0
        _, values = layer.impl.ops.unpack(memory.keys[:6], memory.values[:6])
        content = torch.randn(PERIOD, 2, 2 * 32, generator=torch.Generator().manual_seed(0))
        wanted = content[torch.arange(128, 256) + 97, 1].view(128, 2, 32).transpose(0, 1)
        assert any(torch.equal(unit, wanted) for unit in values)


class Here:
    """A worker in this process, which notes the steps it is asked for."""

    def __init__(self, llm: Any) -> None:
        self.engine = Engine(llm)
        self.steps: list[tuple[str, int]] = []

    def ask(self, command: dict[str, Any]) -> Any:
        done = getattr(self.engine, command["do"])(**{name: value for name, value in command.items() if name != "do"})
        if command["do"] == "step":
            self.steps += [(command["mode"], step.tokens) for step in done]
        return done


def test_a_context_is_filled_but_for_the_end_of_the_prompt(tmp_path: Path) -> None:
    """Answers are measured after a real piece of a prompt, which leaves a kernel's scratch memory as users have it."""
    model = tiny_models.make("llama", tmp_path)
    plan = replace(FULL, chunk=256, decode_contexts=(512,), decode_blocks=2, decode_steps=3)
    sizes: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 256, "worker_extension_cls": WORKER}
    with infllm_engine(model, {"n_local": 256}, block_size=128, **sizes) as llm:
        here = Here(llm)
        with Display(Console(quiet=True)) as display, display.part("decode", 60) as part:
            decode.run({"infllm": benchmarks.engine.Engine(here, {})}, plan, part)  # type: ignore[arg-type]
    measured = [("real", 1)] * 2 * 3 + [("idle", 1)] * decode.IDLE_BLOCKS * 3
    assert here.steps == [("fill", 256), ("fill", 256), ("real", decode.TAIL), ("real", 1), ("real", 1), *measured]
    assert [len(block) for block in part.samples["512"]["infllm"]["real"]] == [3, 3]


def evaluated(backend: str, score: float, retrieved: float | None) -> Record:
    return Record("passkey", backend, 8192, 0.5, "", 8190, "", [], {}, 2.0, 1.0, score, retrieved=retrieved)


def test_the_table_of_selection_rules_by_hand() -> None:
    """Only needles that had to be retrieved count; the paper's rule goes by its name; what is missing stays empty."""
    plays = [evaluated("infllm", 0.0, 0.25), evaluated("infllm", 1.0, 0.75), evaluated("infllm", 1.0, None)]
    manual = [evaluated("infllm-peak", 1.0, 0.9), evaluated("full", 1.0, None)]
    question = [evaluated("infllm", 1.0, 1.0)]
    table = evaluation.rules({"rules/plays": plays, "rules/manual": manual, "question/plays": question})
    assert table.header == ["rule", "plays, 8K", "manual, 8K"]
    rows = {row[0]: row[1:] for row in table.rows}
    variants = [label for label, _, _ in evaluation.VARIANTS.values()]
    assert set(rows) == {"full attention", *(f"`{rule}`" for rule in ("mean", *RULES)), *variants}
    assert rows["`mean`"] == ["1 of 2, 50%", ""] and rows["`peak`"] == ["", "1 of 1, 90%"]
    assert rows["full attention"] == ["", "1 of 1"] and rows["`best`"] == ["", ""]
    assert rows[evaluation.VARIANTS["question"][0]] == ["1 of 1, 100%", ""]


def test_a_model_of_random_weights_has_its_sizes(tmp_path: Path) -> None:
    """vLLM reads them from the folder that is written."""
    for model in MODELS:
        gpu._write_config(tmp_path, model)
        config = AutoConfig.from_pretrained(tmp_path)
        assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (
            model.layers,
            model.hidden,
            model.vocabulary,
        )
        assert (config.num_attention_heads, config.num_key_value_heads) == (model.heads, model.kv_heads)
        assert config.hidden_size // config.num_attention_heads == model.head_size


def test_prompts_of_random_tokens_differ() -> None:
    """One of each length warms up, and none is measured twice; the table finds the measured ones."""
    args = gpu._parser().parse_args(["--random-weights", MODELS[0].name, "--lengths", "100", "300", "--runs", "2"])
    asked = list(gpu._random_questions(args))
    assert [len(prompt) for _, _, prompt in asked] == [100, 300] * 3
    assert len({tuple(prompt[:100]) for _, _, prompt in asked}) == 6
    assert all(max(prompt) < min(model.vocabulary for model in MODELS) for _, _, prompt in asked)
    answers = [
        {"prompt": name, "first_seconds": i, "seconds": i + 1.28, "tokens": 129} for i, (name, *_) in enumerate(asked)
    ]
    rows = gpu._table({"infllm": answers, "stock": answers}, args).rows
    assert [row[0] for row in rows] == ["100", "300"]
    assert [row[1] for row in rows] == ["3", "4"], "medians of runs 1 and 2, without the warm-up"
    assert {row[4] for row in rows} == {"10"}
