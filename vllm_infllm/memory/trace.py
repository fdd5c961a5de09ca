"""What was retrieved for a request: the JSON that a response carries, as a class. Needs neither vLLM nor torch.

Asked for with `SamplingParams(extra_args={"infllm_trace": True})`, over HTTP `"vllm_xargs": {"infllm_trace": true}`; it
comes in `kv_transfer_params["infllm_trace"]` of the finished answer.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

ARGUMENT = "infllm_trace"


def asked(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request wants a trace.

    Raises:
        ValueError: if the argument is neither true nor false.
    """
    value = (extra_args or {}).get(ARGUMENT, False)
    # Over HTTP vLLM turns true and false into 1 and 0.
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{ARGUMENT}={value!r}: true or false is expected.")
    return bool(value)


@dataclass(frozen=True)
class TracedBlock:
    """One execution block, tokens [start, end).

    units: for each layer the numbers of the units it retrieved, ascending; empty while none is sealed.
    """

    start: int
    end: int
    units: list[list[int]]


@dataclass
class Trace:
    """All execution blocks of a request, in order. Sizes in tokens.

    layers: names of those that run InfLLM, in the order of the model.
    """

    block_size: int
    n_init: int
    n_local: int
    layers: list[str]
    blocks: list[TracedBlock] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: Any) -> "Trace":
        """Read what a response carries under "infllm_trace".

        Raises:
            ValueError: if it is something else.
        """
        try:
            return cls(**{**data, "blocks": [TracedBlock(**block) for block in data["blocks"]]})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a trace of InfLLM: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Lists, numbers and strings only."""
        return asdict(self)

    def add(self, block: TracedBlock) -> None:
        """The next execution block; after preemption a request begins again, and with it its trace."""
        while self.blocks and self.blocks[-1].end > block.start:
            self.blocks.pop()
        self.blocks.append(block)

    def sealed_units(self, block: TracedBlock) -> int:
        """Number of units that the block could choose from."""
        return max(0, (block.start - self.n_local - self.n_init) // self.block_size)

    def had_choice(self, block: TracedBlock) -> bool:
        """Whether more units were sealed than a layer retrieves."""
        return self.sealed_units(block) > max(map(len, block.units), default=0)

    def unit_of(self, token: int) -> int | None:
        """The unit that a token belongs to once it has been sealed; None for initial tokens."""
        return None if token < self.n_init else (token - self.n_init) // self.block_size

    def tokens_of(self, unit: int) -> range:
        """Positions of a unit's tokens."""
        first = self.n_init + unit * self.block_size
        return range(first, first + self.block_size)

    def retrievals(self) -> Counter[int]:
        """How often each unit was retrieved, over all layers and execution blocks."""
        return Counter(unit for block in self.blocks for units in block.units for unit in units)

    def share_of_layers(self, block: TracedBlock, unit: int) -> float:
        """Share of the layers that retrieved a unit for an execution block."""
        return sum(unit in units for units in block.units) / len(block.units)
