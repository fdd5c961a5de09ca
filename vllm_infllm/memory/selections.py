"""Writes down what layers select, for requests that asked for a trace (see memory/trace.py), on the worker."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from vllm_infllm.memory.trace import TracedBlock


@dataclass(frozen=True)
class TracedRow:
    """A row of a round whose request asked. units: [stored] int64, host unit ids of its sealed units, in order."""

    row: int
    request_id: str
    start: int
    end: int
    units: torch.Tensor


@dataclass
class Selections:
    """Of one round. `note` copies the traced rows where they are; reading them waits for the device."""

    rows: list[TracedRow]
    chosen: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """By the number of the layer, for each traced row [num_chosen] host unit ids."""

    def note(self, layer: int, chosen: torch.Tensor) -> None:
        """chosen: [R, num_chosen] of a layer, as `select` returned it."""
        self.chosen[layer] = [chosen[row.row].clone() for row in self.rows]


def traced_blocks(selections: Iterable[Selections], num_layers: int) -> dict[str, list[TracedBlock]]:
    """What rounds noted, by request; the groups of a model's layers come in rounds of their own."""
    blocks: dict[str, dict[int, TracedBlock]] = {}
    for noted in selections:
        for i, row in enumerate(noted.rows):
            empty = TracedBlock(row.start, row.end, [[] for _ in range(num_layers)])
            block = blocks.setdefault(row.request_id, {}).setdefault(row.start, empty)
            for layer, chosen in noted.chosen.items():
                block.units[layer] += torch.isin(row.units, chosen[i].cpu()).nonzero().flatten().tolist()
    return {request_id: [by_start[start] for start in sorted(by_start)] for request_id, by_start in blocks.items()}
