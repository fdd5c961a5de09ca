"""The tables of an evaluation: scores, and what answers took."""

from collections.abc import Callable, Sequence
from math import exp, fsum
from statistics import mean, median

from rich.table import Table

from vllm_infllm.tools.eval.results import Record


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


def _by_length(title: str, records: Sequence[Record], cell: Callable[[Sequence[Record]], str]) -> Table:
    lengths = sorted({record.length for record in records})
    table = Table("task", "backend", title=title)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for task, backend in dict.fromkeys((record.task, record.backend) for record in records):
        row = [record for record in records if (record.task, record.backend) == (task, backend)]
        table.add_row(task, backend, *(cell([r for r in row if r.length == length]) for length in lengths))
    return table


def _score(group: Sequence[Record]) -> str:
    if not group:
        return ""
    if nll := [value for record in group for value in record.nll or ()]:
        return f"{exp(fsum(nll) / len(nll)):.2f}"
    return f"{100 * mean(r.score for r in group if r.score is not None):.1f} ({len(group)})"
