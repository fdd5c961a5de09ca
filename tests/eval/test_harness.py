"""Tasks of LongBench and InfiniteBench, with documents made by hand: no hub is reached here."""

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_infllm.tools import UsageError
from vllm_infllm.tools.eval import tasks
from vllm_infllm.tools.eval.plan import Point
from vllm_infllm.tools.eval.tasks import harness
from vllm_infllm.tools.model import demo_model
from vllm_infllm.tools.sides import load_tokenizer

CONTEXT = "Alice keeps the key in a drawer. Bob lives in Paris, near the river."
QUESTION = "Where does Bob live?"
OPTIONS = ["Rome", "Paris", "Oslo", "Lima"]
# Answers of documents 0, 1 and 2, where a task does not take any text.
ANSWERS: dict[str, list[str]] = {
    "longbench_passage_count": ["12", "7", "9"],
    "longbench_passage_retrieval_en": ["Paragraph 4", "Paragraph 5", "Paragraph 6"],
    "longbench_trec": ["City", "Food", "Currency name"],
    "infinitebench_longbook_choice_en": ["Rome", "Paris", "Oslo"],
    "infinitebench_code_debug": ["Rome", "Paris", "Oslo"],
    "infinitebench_longdialogue_qa_en": ["ALICE", "BOB", "EVE"],
}
LETTERED = ("infinitebench_longbook_choice_en", "infinitebench_code_debug")
LETTERS = dict(zip(OPTIONS, "ABCD", strict=True))
NOT_ASKING = (
    *(f"longbench_{name}" for name in ("gov_report", "multi_news", "passage_count", "lcc")),
    "infinitebench_longdialogue_qa_en",
    "infinitebench_code_debug",
)
# It falls back to another measure without the package rouge_score, which the environment of the tests lacks.
MEASURED = [name for name in harness.NAMES if name != "infinitebench_longbook_sum_en"]


def documents(name: str) -> list[dict[str, Any]]:
    """Three, in the fields of the benchmark."""
    made = []
    for answer in ANSWERS.get(name, ["in Paris", "a red drawer", "nobody knows it"]):
        if name.startswith("longbench"):
            classes = ["City", "Food", "Currency name", "Currency"]
            made.append({"context": CONTEXT, "question": QUESTION, "answers": [answer], "all_classes": classes})
            made[-1] |= {"input": QUESTION}
        else:
            made.append({"id": 0, "context": CONTEXT, "input": QUESTION, "answer": [answer], "options": OPTIONS})
    return made


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has the documents; jieba cuts Chinese only."""
    monkeypatch.setitem(sys.modules, "jieba", ModuleType("jieba"))
    harness.find.cache_clear()
    by_source = {harness.find(name).source: documents(name) for name in MEASURED}
    monkeypatch.setattr(harness, "load", by_source.__getitem__)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(demo_model()))


def sample(tokenizer: Any, name: str, number: int, length: int = 4096, seed: int = 0) -> tasks.base.Sample:
    return Point(name, length, None, number).sample(tasks.find(name), tokenizer, seed)


@pytest.mark.parametrize("name", MEASURED)
def test_own_answers_count_in_full_and_others_do_not(tokenizer: Any, name: str) -> None:
    task = harness.find(name)
    samples = [sample(tokenizer, name, number) for number in range(3)]
    assert sorted(one.meta["document"] for one in samples) == [0, 1, 2]
    answers = [LETTERS[one.answers[0]] if name in LETTERED else one.answers[0] for one in samples]
    assert [task.score(one, answer) for one, answer in zip(samples, answers, strict=True)] == [pytest.approx(1)] * 3
    shifted = [*answers[1:], answers[0]]
    # Two lines of code have letters in common.
    most = 0.6 if name in ("longbench_lcc", "longbench_repobench-p") else 0.0
    assert max(task.score(one, answer) for one, answer in zip(samples, shifted, strict=True)) <= most
    for one in samples:
        text = tokenizer.decode(one.prompt)
        assert CONTEXT in text and (QUESTION in text) == (name not in NOT_ASKING)


@pytest.mark.parametrize(
    ("name", "answer", "given", "expected"),
    [
        ("longbench_hotpotqa", "in Paris", "Paris", 2 * 1 * 0.5 / 1.5),  # precision 1, recall 1/2
        ("longbench_hotpotqa", "in Paris", "The river. In Paris!", 2 * (2 / 3) / (2 / 3 + 1)),  # no articles, no marks
        ("longbench_passage_retrieval_en", "Paragraph 4", "Paragraph 4 or 5", 0.5),
        ("longbench_trec", "Currency name", "Currency name\nQuestion: Food", 1.0),  # ends with the line
        ("infinitebench_longbook_qa_en", "in Paris", "In Paris.\nNo, in Rome", 1.0),
    ],
)
def test_scores_by_hand(tokenizer: Any, name: str, answer: str, given: str, expected: float) -> None:
    samples = [sample(tokenizer, name, number) for number in range(3)]
    (one,) = [one for one in samples if one.answers == [answer]]
    assert harness.find(name).score(one, given) == pytest.approx(expected)


def test_a_long_document_loses_its_middle(tokenizer: Any) -> None:
    """By tokens; a short one stays whole."""
    whole = sample(tokenizer, "longbench_hotpotqa", 0).prompt
    assert len(whole) < 200
    cut = sample(tokenizer, "longbench_hotpotqa", 0, length=41).prompt
    assert cut == [*whole[:20], *whole[-21:]]


def test_the_seed_orders_the_documents(tokenizer: Any) -> None:
    orders = {
        seed: [sample(tokenizer, "longbench_qasper", number, seed=seed).meta["document"] for number in range(3)]
        for seed in range(8)
    }
    assert len({tuple(order) for order in orders.values()}) > 2
    # Another length, the same documents.
    assert orders[1] == [sample(tokenizer, "longbench_qasper", n, 64, 1).meta["document"] for n in range(3)]
    with pytest.raises(UsageError, match="--samples 4: longbench_qasper has only 3 documents"):
        sample(tokenizer, "longbench_qasper", 3)


def test_the_hubs_documents_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the harness's dataset, under the hub's name of its split."""
    monkeypatch.undo()
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, split: str) -> list[Mapping[str, Any]]:
        asked.append((path, name, split))
        return []

    fake = SimpleNamespace(
        load_dataset=load_dataset, get_dataset_split_names=lambda path, name: ["test", "kept", "qag"]
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert harness.load(harness.Source("owner/set", "hotpotqa", "test")) == []
    assert harness.load(harness.Source("owner/set", None, "qa")) == []
    assert asked == [("owner/set", "hotpotqa", "test"), ("owner/set", None, "qag")]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    harness.find.cache_clear()
    with pytest.raises(
        UsageError, match=r"longbook_sum_en needs the package rouge_score: pip install 'vllm-infllm\[hub\]'"
    ):
        harness.find("infinitebench_longbook_sum_en")
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UsageError, match="longbench_trec is measured by packages that are missing: pip install"):
        harness.find("longbench_trec")
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = harness.Source("owner/other", None, "test")
    with pytest.raises(UsageError, match="owner/other needs the package datasets: pip install"):
        harness.load(source)

    def unreachable(path: str, name: str | None) -> list[str]:
        raise ConnectionError("Couldn't reach\n'owner/other' on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(get_dataset_split_names=unreachable))
    with pytest.raises(UsageError, match=r"cannot be loaded \(Couldn't reach 'owner/other' on the Hub\): run where"):
        harness.load(source)
