"""The table of the demo: what each side answered, and what it took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from vllm_infllm.tools.demo_worker import Answer


@dataclass(frozen=True)
class Trial:
    """One pass key, hidden at one depth of one prompt."""

    depth: float
    key: int
    prompt: list[int]

    def found_in(self, answer: Answer) -> bool:
        """Whether the answer begins with the key."""
        return answer.text.strip().startswith(str(self.key))


def report(trials: Sequence[Trial], answers: Mapping[str, Sequence[Answer]], block_size: int) -> Table:
    """One column a side, one row a key, and what the side took below."""
    table = Table(title="Pass keys found, and what it took")
    table.add_column("")
    for side in answers:
        table.add_column(side, justify="right")
    for index, trial in enumerate(trials):
        cells = (_verdict(trial, side[index]) for side in answers.values())
        table.add_row(f"key {trial.key} at depth {trial.depth:g}", *cells)
    table.add_section()
    thousands = sum(len(trial.prompt) for trial in trials) / 1000
    seconds = {name: sum(answer.seconds for answer in side) for name, side in answers.items()}
    table.add_row("seconds in total", *(f"{s:.1f}" for s in seconds.values()))
    table.add_row("seconds per 1K tokens", *(f"{s / thousands:.2f}" for s in seconds.values()))
    peaks = (max(answer.blocks for answer in side) for side in answers.values())
    table.add_row(f"peak KV blocks of a request ({block_size} tokens each)", *map(str, peaks))
    return table


def _verdict(trial: Trial, answer: Answer) -> Text:
    if trial.found_in(answer):
        return Text("found", style="green")
    return Text(f"missed: {' '.join(answer.text.split()) or 'no answer'}", style="red")
