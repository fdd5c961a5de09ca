"""Writes down what layers select, for requests that asked for a trace (see memory/trace.py), on the worker."""

from collections.abc import Iterable, Iterator
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
    """Of one round. `note` copies what is traced where it is; reading it waits for the device."""

    rows: list[TracedRow]
    kept: torch.Tensor | None = None
    """[layers, requests, num_chosen]: where a CUDA graph notes the selections of all rows. `note` does not run then."""
    chosen: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """By the number of the layer, for each traced row [num_chosen] host unit ids."""

    def note(self, layer: int, chosen: torch.Tensor) -> None:
        """chosen: [R, num_chosen] of a layer, as `select` returned it."""
        if self.kept is not None:
            self.kept[layer, : len(chosen)].copy_(chosen)
        else:
            self.chosen[layer] = [chosen[row.row].clone() for row in self.rows]

    def by_layer(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Number of a layer, and for each traced row [num_chosen] host unit ids: none for layers of another group."""
        if self.kept is None:
            yield from self.chosen.items()
        else:
            for layer, of_requests in enumerate(self.kept.cpu()):
                yield layer, [of_requests[row.row] for row in self.rows]


def traced_blocks(selections: Iterable[Selections], num_layers: int) -> dict[str, list[TracedBlock]]:
    """What rounds noted, by request; the groups of a model's layers come in rounds of their own."""
    blocks: dict[str, dict[int, TracedBlock]] = {}
    for noted in selections:
        by_layer = list(noted.by_layer())[:num_layers]
        for i, row in enumerate(noted.rows):
            empty = TracedBlock(row.start, row.end, [[] for _ in range(num_layers)])
            block = blocks.setdefault(row.request_id, {}).setdefault(row.start, empty)
            for layer, chosen in by_layer:
                block.units[layer] += torch.isin(row.units, chosen[i].cpu()).nonzero().flatten().tolist()
    return {request_id: [by_start[start] for start in sorted(by_start)] for request_id, by_start in blocks.items()}
