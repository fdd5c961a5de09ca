"""LongBench and InfiniteBench's novels, as lm-eval-harness defines them: documents of a hub, prompts and measures.

The definitions are read out of the installed package lm_eval, which is not imported: a YAML file for each task, and the
functions that it names.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from vllm_infllm.tools import UsageError
from vllm_infllm.tools.eval.haystack import package
from vllm_infllm.tools.eval.tasks.base import AnswerTask, Sample

LONGBENCH = (
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum"),
    *("multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
INFINITEBENCH = ("longbook_qa_en", "longbook_choice_en", "longbook_sum_en", "longdialogue_qa_en", "code_debug")
NAMES = (*(f"longbench_{name}" for name in LONGBENCH), *(f"infinitebench_{name}" for name in INFINITEBENCH))
INSTALL = "pip install 'vllm-infllm[hub]' && pip install --no-deps lm_eval"

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the documents of a task lie: arguments of `datasets.load_dataset`."""

    path: str
    name: str | None
    split: str


@dataclass(frozen=True)
class HarnessTask(AnswerTask):
    """The samples are the documents in an order drawn from the seed; what is too long loses its middle."""

    source: Source
    prompt: Callable[[Document], str]
    measure: Callable[[Document, list[str]], Mapping[str, float]]
    stops: tuple[str, ...]
    """Where an answer ends."""

    def generate(self, tokenizer: Any, length: int, depth: float, seed: str) -> Sample:
        """The document whose number the seed ends with; shorter than `length` where the document is.

        Raises:
            UsageError: if there are fewer documents, or they cannot be loaded.
        """
        documents = load(self.source)
        order = list(range(len(documents)))
        Random(f"{seed.partition(':')[0]}:{self.name}").shuffle(order)
        number = int(seed.rpartition("/")[2])
        if number >= len(order):
            raise UsageError(f"--samples {number + 1}: {self.name} has only {len(order)} documents")
        document = documents[order[number]]
        tokens = tokenizer(self.prompt(document))["input_ids"]
        answers = document["answers"] if "answers" in document else document["answer"]
        return Sample(without_middle(tokens, length), list(answers), {"document": order[number]})

    def score(self, sample: Sample, text: str) -> float:
        for stop in self.stops:
            text = text.partition(stop)[0]
        return float(self.measure(load(self.source)[sample.meta["document"]], [text])["score"])


def without_middle(tokens: Sequence[int], length: int) -> list[int]:
    """At most `length` tokens: as many of the beginning as of the end, which holds the question (LongBench's way)."""
    if len(tokens) <= length:
        return list(tokens)
    return [*tokens[: length // 2], *tokens[len(tokens) - (length - length // 2) :]]


@cache
def find(name: str) -> HarnessTask:
    """The task of this name, of `NAMES`.

    Raises:
        UsageError: if a package is missing.
    """
    family = name.partition("_")[0]
    # Without it the harness measures a summary by other means, and says so only in its log.
    needed = {"infinitebench_longbook_sum_en": "rouge_score"}.get(name)
    if needed and not importlib.util.find_spec(needed):
        raise UsageError(f"{name} needs the package {needed}: {INSTALL}")
    folder = package("lm_eval", f"{name} is defined in") / "tasks" / family
    short = name.removeprefix("longbench_") if family == "longbench" else name
    definition = _definition(folder / f"{short}.yaml")
    generation = definition["generation_kwargs"]
    return HarnessTask(
        name=name,
        max_tokens=generation["max_gen_toks"],
        source=Source(definition["dataset_path"], definition.get("dataset_name"), definition["test_split"]),
        prompt=_prompt(definition, folder),
        measure=_function(definition["process_results"], folder, name),
        stops=tuple(generation["until"]),
    )


@dataclass(frozen=True)
class _Reference:
    """`!function module.name` of a definition."""

    module: str
    name: str


def _definition(file: Path) -> dict[str, Any]:
    """A YAML file, and what it includes for the keys it has not."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: _Reference(*loader.construct_scalar(node).split(".")))
    definition = yaml.load(file.read_text(encoding="utf-8"), Loader)
    if included := definition.get("include"):
        return _definition(file.with_name(included)) | definition
    return definition


def _prompt(definition: Mapping[str, Any], folder: Path) -> Callable[[Document], str]:
    text, head = definition["doc_to_text"], definition.get("description", "")
    if isinstance(text, _Reference):
        function = _function(text, folder, definition["task"])
        return lambda document: head + function(document)
    import jinja2

    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(text)
    return lambda document: head + template.render(**document)


def _function(reference: _Reference, folder: Path, task: str) -> Any:
    return getattr(_module(folder / f"{reference.module}.py", task), reference.name)


def _module(file: Path, task: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"_lm_eval_{file.parent.name}_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UsageError(f"{task} is measured by packages that are missing: {INSTALL}") from error
    return module


@cache
def load(source: Source) -> Sequence[Document]:
    """All documents, downloaded or from the hub's cache on this machine.

    Raises:
        UsageError: if they are neither there nor can be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{source.path} needs the package datasets: {INSTALL}") from error
    try:
        splits = datasets.get_dataset_split_names(source.path, source.name)
        # The harness says longbook_qa_en, the hub longbook_qa_eng.
        (split,) = [split for split in splits if re.fullmatch(f"{source.split}g?", split)]
        return datasets.load_dataset(source.path, source.name, split=split)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"the documents of {source.path} cannot be loaded ({reason}): run where their hub can be reached, or copy "
            "its cache (HF_HOME) from there"
        ) from error
