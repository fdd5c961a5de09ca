"""What the worker knows of each request's memory."""

from dataclasses import dataclass, field

import torch


def _no_units() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class RequestMemory:
    """One request, from its admission to its end or preemption.

    prompt_len: tokens known when it was admitted (prompt; after preemption also the answer so far).
    outgrows_window: whether prompt and answer can be longer than n_local; otherwise nothing will be stored and no
        attention needs to be accumulated.
    number: its own among the requests that are in the worker now, below max_num_seqs.
    units: [stored blocks] int64, host unit ids of its stored blocks, in order, given as it grows.
    trace_id: the request's own id if it asked for a trace.
    """

    prompt_len: int
    outgrows_window: bool
    number: int = 0
    units: torch.Tensor = field(default_factory=_no_units)
    trace_id: str | None = None

    def give(self, units: list[int]) -> None:
        """Add the units of the blocks that will be stored next."""
        self.units = torch.cat([self.units, torch.tensor(units, dtype=torch.int64)])


class RequestTable:
    """The requests of one KV cache group, by the physical id of their first block, which they keep for life."""

    def __init__(self) -> None:
        self._requests: dict[int, RequestMemory] = {}
        self._names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, first_block: int) -> RequestMemory:
        return self._requests[first_block]

    def named(self, request_id: str) -> RequestMemory:
        return self._requests[self._names[request_id]]

    def admit(
        self, request_id: str, first_block: int, prompt_len: int, outgrows_window: bool, traced: bool = False
    ) -> RequestMemory:
        """A request that starts; it gets the lowest number that nobody has."""
        taken = {request.number for request in self._requests.values()}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        self._names[request_id] = first_block
        trace_id = request_id if traced else None
        self._requests[first_block] = RequestMemory(prompt_len, outgrows_window, number, trace_id=trace_id)
        return self._requests[first_block]

    def end(self, request_id: str) -> None:
        """A request that ended or was preempted; one that no step has seen is not known here."""
        if request_id in self._names:
            del self._requests[self._names.pop(request_id)]
