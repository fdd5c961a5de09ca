"""What the worker knows of each request's memory."""

from dataclasses import dataclass, field

import torch

from vllm_infllm.memory.residency import ResidencyCache


def _no_units() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class RequestMemory:
    """One request, from its admission until its first block is given to another.

    prompt_len: tokens known when it was admitted (prompt; after preemption also the answer so far).
    outgrows_window: whether prompt and answer can be longer than n_local; otherwise nothing will be stored and no
        attention needs to be accumulated.
    units: [stored blocks] int64, host unit ids of its stored blocks, in order, given as it grows.
    residency: residency cache of each layer, by the layer's number; empty unless max_cached_blocks is set.
    """

    prompt_len: int
    outgrows_window: bool
    units: torch.Tensor = field(default_factory=_no_units)
    residency: dict[int, ResidencyCache] = field(default_factory=dict)

    def give(self, units: list[int]) -> None:
        """Add the units of the blocks that will be stored next."""
        self.units = torch.cat([self.units, torch.tensor(units, dtype=torch.int64)])


# By the physical id of the request's first block, which it keeps for life.
RequestTable = dict[int, RequestMemory]
