"""Prompts of the tasks: solvable, as long as asked for, with the needle where it should be; and how answers count."""

from typing import Any

import pytest

from tests.eval.solvers import SOLVERS
from vllm_infllm.tools import UsageError
from vllm_infllm.tools.eval import tasks
from vllm_infllm.tools.eval.haystack import encode, join, longest, manual, plays, weave
from vllm_infllm.tools.eval.plan import Point, points
from vllm_infllm.tools.eval.tasks.base import AnswerTask, Sample
from vllm_infllm.tools.eval.tasks.math_find import QUESTIONS
from vllm_infllm.tools.eval.tasks.perplexity import BIN, bins
from vllm_infllm.tools.model import demo_model
from vllm_infllm.tools.sides import load_tokenizer

LENGTHS = (1100, 4096)
WITH_DEPTH = ("passkey", "passkey-plain", "number", "kv", "needle-single", "needle-multikey")
# Tokens by which a prompt may fall short: a line, record, function, or what one more word adds in all its repetitions.
SHORT_OF = {"kv": 100, "common-words": 30, "needle": 60}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(demo_model()))


def sample(tokenizer: Any, name: str, length: int, index: int = 0, depth: float = 0.3, seed: int = 0) -> Sample:
    return Point(name, length, depth, index).sample(tasks.find(name), tokenizer, seed)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_scores_in_full_and_others_answers_do_not(tokenizer: Any, name: str, length: int) -> None:
    """What is read off the prompt is what is expected; the answers of other samples count (nearly) nothing."""
    task = tasks.find(name)
    assert isinstance(task, AnswerTask)
    made = [sample(tokenizer, name, length, index) for index in range(6)]
    answers = [SOLVERS[name](tokenizer.decode(one.prompt)) for one in made]
    assert [task.score(one, f" {answer}. ") for one, answer in zip(made, answers, strict=True)] == [1.0] * len(made)
    shifted = [*answers[1:], answers[0]]
    wrong = [task.score(one, answer) for one, answer in zip(made, shifted, strict=True)]
    # Numbers below 100 and small sums may agree by chance.
    assert sum(wrong) / len(wrong) <= (0.4 if name in ("math-find", "code-run") else 0.06)
    assert task.score(made[0], "") == 0.0


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompts_are_as_long_as_asked_for(tokenizer: Any, name: str) -> None:
    """Never longer, and short of it by less than a line."""
    for length in (700, *LENGTHS) if name != "variable-tracking" else LENGTHS:
        missing = length - len(sample(tokenizer, name, length).prompt)
        assert 0 <= missing <= SHORT_OF.get(name.split("-")[0] if name.startswith("needle") else name, 30)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", WITH_DEPTH)
def test_needles_lie_at_their_depth(tokenizer: Any, name: str, depth: float) -> None:
    """The tokens that `meta` names hold the needle, and lie where they should within the filler."""
    length = 4096
    one = sample(tokenizer, name, length, depth=depth)
    ((start, end),) = one.meta["needle_tokens"]
    needle = tokenizer.decode(one.prompt[start:end])
    assert one.answers[0] in needle and len(needle.strip()) < 100
    assert one.answers[0] not in tokenizer.decode(one.prompt[:start] + one.prompt[end:])
    # Head and tail take up to 90 and 60 tokens, and lines of prose are not all as long.
    assert start == pytest.approx(depth * (length - 120), abs=90 + 0.05 * length)


@pytest.mark.parametrize("name", ["needle-multivalue", "needle-multiquery", "variable-tracking", "code-run"])
def test_tokens_of_several_needles(tokenizer: Any, name: str) -> None:
    one = sample(tokenizer, name, 2048)
    found = [tokenizer.decode(one.prompt[start:end]) for start, end in one.meta["needle_tokens"]]
    if name == "code-run":
        assert len(found) == one.meta["calls"] and all(needle.lstrip().startswith("def func_") for needle in found)
    else:
        assert all(answer in needle for answer, needle in zip(one.answers, found, strict=True))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_sample_is_a_function_of_seed_and_place(tokenizer: Any, name: str) -> None:
    """The same whenever it is made; another for another index or seed."""
    first, again = (sample(tokenizer, name, 1100) for _ in range(2))
    assert first == again
    assert first.prompt != sample(tokenizer, name, 1100, index=1).prompt
    assert first.prompt != sample(tokenizer, name, 1100, seed=1).prompt


@pytest.mark.parametrize(
    ("name", "expected", "text", "score"),
    [
        ("passkey", ["12345"], " 12345. Remember", 1),
        ("passkey", ["12345"], " 123456", 0),
        ("passkey", ["12345"], " 99999 12345", 0),
        ("number", ["0012"], "is 0012!", 1),
        ("kv", ["ab-1"], '"ab-1"}', 1),
        ("kv", ["ab-1"], "xab-1", 0),
        ("math-find", ["49.5"], "49.5 is it", 1),
        ("math-find", ["49"], "49.5", 0),
        ("math-find", ["7"], "", 0),
        ("code-run", ["-3"], " -3.\nfunc_3", 1),
        ("code-run", ["-3"], " 3", 0),
        ("needle-multivalue", ["1000001", "1000002", "1000003", "1000004"], "1000001, 1000003", 0.5),
        ("variable-tracking", ["ABCDE", "FGHIJ"], "abcde", 0.5),
        ("common-words", ["art", "tea"], "1. art 2. coffee", 0.5),
        ("frequent-words", ["abcdef", "ghijkl", "mnopqr"], "abcdef ghijkl mnopqr", 1),
    ],
)
def test_how_answers_count(name: str, expected: list[str], text: str, score: float) -> None:
    task = tasks.find(name)
    assert isinstance(task, AnswerTask)
    assert task.score(Sample([], expected), text) == score


def test_every_question_of_math_find_comes(tokenizer: Any) -> None:
    made = [tokenizer.decode(sample(tokenizer, "math-find", 300, index).prompt) for index in range(60)]
    assert {question for question in QUESTIONS if any(f" the {question} number from" in text for text in made)} == set(
        QUESTIONS
    )


def test_common_words_by_hand(tokenizer: Any) -> None:
    """Ten words six times, all others once, numbered from 1; below 4,096 tokens."""
    one = sample(tokenizer, "common-words", 1100)
    text = tokenizer.decode(one.prompt)
    listed = text[text.rindex("Memorize the ones") :].split("\n")[1].split()
    assert listed[::2] == [f"{i}." for i in range(1, len(listed) // 2 + 1)]
    assert all(listed.count(word) == 6 for word in one.answers)
    assert {listed.count(word) for word in listed[1::2] if word not in one.answers} == {1}


def test_weave_by_hand() -> None:
    """Each needle in front of the line at its depth; places in the order given, without the white space around."""
    text = weave("H ", ["a ", "b ", "c ", "d "], [(1, "\nlast\n"), (0, "first "), (0.5, "mid ")], "T")
    assert text.text == "H first a b mid c d \nlast\nT"
    assert [text.text[start:end] for start, end in text.needles] == ["last", "first", "mid"]


def test_tokens_of_a_needle_by_hand() -> None:
    """One token a character and a special one in front: the needle's tokens are its characters, shifted by one."""

    def tokenizer(text: str, return_offsets_mapping: bool = False) -> dict[str, Any]:
        offsets = [(0, 0), *((i, i + 1) for i in range(len(text)))]
        return {"input_ids": list(range(len(offsets))), "offset_mapping": offsets}

    assert encode(tokenizer, join(["ab", "cd", "e"], [1, 0]))[1] == [[3, 5], [1, 3]]
    for per_line in (1, 7):
        for length in (13, 14, 100, 1000):
            lines = longest(tokenizer, length, lambda n: join(["x" * (12 + n * per_line)]))  # noqa: B023
            assert 13 + lines * per_line <= length < 13 + (lines + 1) * per_line


def test_too_short_a_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"--lengths 30: a prompt of this task takes at least \d+ tokens"):
        sample(tokenizer, "passkey", 30)


def test_prose_is_what_is_spoken() -> None:
    text = plays()
    assert "Who's there?\n" in text and "To be, or not to be: that is the question:\n" in text
    assert len(text) > 100_000 and not any(line[0] in "#*_" for line in text)


def test_the_manual_is_sentences() -> None:
    text = manual()
    assert len(text) > 1500 and all(line[0].isupper() and line[-2] in ".:" and "  " not in line for line in text)
    assert any("iterator" in line for line in text) and not any(">>>" in line for line in text)


def test_the_haystack_can_be_chosen(tokenizer: Any) -> None:
    """Another filler, the same needle; tasks without a haystack stay as they are."""
    prose, grass = (
        Point("passkey", 1100, 0.5, 0).sample(tasks.find("passkey", filler), tokenizer, 0)
        for filler in ("plays", "grass")
    )
    assert prose.answers == grass.answers
    assert "grass is green" in tokenizer.decode(grass.prompt) and "grass is green" not in tokenizer.decode(prose.prompt)
    assert tasks.find("kv", "grass") is tasks.find("kv")


def test_bins_by_hand() -> None:
    """Bin i holds positions [256 i, 256 (i + 1)); the first position has no log-probability."""
    logprobs = [-1.0] * (BIN - 1) + [-3.0] * BIN + [-7.0]
    assert bins(logprobs) == [1.0, 3.0, 7.0]
    assert bins([-2.0]) == [2.0]


def test_the_plan() -> None:
    """Samples for each depth where a task has depths; ids differ, and do not depend on what else is run."""
    chosen = [tasks.find("passkey"), tasks.find("code-run")]
    plan = points(chosen, [2048, 1024], depths=[0.0, 0.5, 1.0], samples=2)
    assert len(plan) == 2 * (3 * 2 + 2) == len({point.id for point in plan})
    assert [point.length for point in plan] == sorted(point.length for point in plan)
    assert {point.depth for point in plan if point.task == "passkey"} == {0.0, 0.5, 1.0}
    assert {point.id for point in points(chosen[:1], [1024], [0.0, 1.0], 1)} <= {point.id for point in plan}


def test_an_unknown_task_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="there is no task 'passkeys'; the tasks are passkey, passkey-plain, number"):
        tasks.find("passkeys")
