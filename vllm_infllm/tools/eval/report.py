"""The tables of an evaluation: scores, and what answers took."""

from collections.abc import Callable, Sequence
from math import exp, fsum
from statistics import mean, median

from vllm_infllm.tools.eval.results import Record
from vllm_infllm.tools.tables import Table


def scores(records: Sequence[Record]) -> Table:
    """A row for each task and backend, a column for each length; nothing in it depends on the machine's speed."""
    return _by_length("Scores of 100, with the number of samples (perplexity: the lower the better)", records, _score)


def times(records: Sequence[Record]) -> Table:
    """Median seconds of an answer, and of its first token."""
    return _by_length(
        "Seconds a prompt: first token, whole answer (medians)",
        records,
        lambda group: (
            f"{median(r.first_token_seconds for r in group):.1f}, {median(r.seconds for r in group):.1f}"
            if group
            else ""
        ),
    )


def retrieved(records: Sequence[Record]) -> Table:
    """How often what is asked for was retrieved, where it was neither in the window nor among the initial tokens."""
    title = "Layers and steps of the answer that retrieve the needle, %"
    return _by_length(title, [record for record in records if record.retrieved is not None], _retrieved)


def _by_length(title: str, records: Sequence[Record], cell: Callable[[Sequence[Record]], str]) -> Table:
    lengths = sorted({record.length for record in records})
    rows = []
    for task, backend in dict.fromkeys((record.task, record.backend) for record in records):
        row = [record for record in records if (record.task, record.backend) == (task, backend)]
        rows.append([f"{task}, {backend}", *(cell([r for r in row if r.length == length]) for length in lengths)])
    return Table(title, ["task, backend", *(f"{length:,}" for length in lengths)], rows)


def _retrieved(group: Sequence[Record]) -> str:
    return f"{100 * mean(r.retrieved or 0 for r in group):.0f} ({len(group)})" if group else ""


def _score(group: Sequence[Record]) -> str:
    if not group:
        return ""
    if nll := [value for record in group for value in record.nll or ()]:
        return f"{exp(fsum(nll) / len(nll)):.2f}"
    return f"{100 * mean(r.score for r in group if r.score is not None):.1f} ({len(group)})"
