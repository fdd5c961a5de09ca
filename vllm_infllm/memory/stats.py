"""What InfLLM counts, and its way to Prometheus and to vLLM's log.

Worker and scheduler count; vLLM joins both once a step (`InfLLMStats`) and hands the sum to its exporter
(`InfLLMPromMetrics`) and to its periodic log line.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_infllm.config import KEY
from vllm_infllm.memory.residency import Residency

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_infllm.attention.planner import Round
    from vllm_infllm.memory.manager import InfLLMManager

PREFIX = "vllm:infllm_"
GAUGES = {
    "units_in_use": "Host units that requests hold.",
    "unit_capacity": "Host units that there are; 0 before the first step.",
    "blocks_held": "Paged KV cache blocks that requests hold in layers that run InfLLM.",
    "requests_waiting_for_units": "Requests that wait because units are short, those queued behind them included.",
}
COUNTERS = {
    "units_sealed": "Units that were moved to host memory, each for all layers at once.",
    "units_retrieved": "Units that were attended to, summed over layers, requests and execution blocks.",
    "bytes_to_host": "Bytes of keys and values moved to host memory.",
    "bytes_to_device": "Bytes of stored keys and values copied into slots, or, on a GPU without slots, read in place.",
}
RESIDENCY_COUNTERS = {
    "residency_hits": "Retrieved units that were in a slot already, summed over layers.",
    "residency_misses": "Retrieved units that were copied into a slot, summed over layers.",
    "residency_evictions": "Units that left a slot for another, summed over layers.",
}
DEVICE_READ_SECONDS = 1.0
"""How often counts that lie on a GPU are read."""


class InfLLMStats(KVConnectorStats):
    """`data`: gauges and what counters gained, by name without the prefix; what is not known is not in it."""

    data: dict[str, int]

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> "InfLLMStats":
        """Those of a later step, or of the other side in the same step: gauges are replaced, counters add up."""
        gained = {name: self.data.get(name, 0) + n for name, n in other.data.items() if name not in GAUGES}
        gauges = {name: n for name, n in other.data.items() if name in GAUGES}
        return InfLLMStats({**self.data, **gauges, **gained})

    def reduce(self) -> dict[str, int | float]:
        """For the line in vLLM's log: what happened since the last one."""
        return {f"infllm_{name}": n for name, n in sorted(self.data.items())}


class InfLLMPromMetrics(KVConnectorPromMetrics):
    """The metrics as Prometheus sees them, one series for each engine."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        slots = vllm_config.additional_config[KEY]["max_cached_blocks"] > 0
        counters = {**COUNTERS, **RESIDENCY_COUNTERS} if slots else COUNTERS
        # Several API servers each have a copy of the gauges; only one of them is told the numbers of a step.
        self._gauges = {
            name: self._make(self._gauge_cls, name, text, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        self._counters = {name: self._make(self._counter_cls, name, text) for name, text in counters.items()}

    def _make(self, kind: Any, name: str, documentation: str, **kwargs: Any) -> Any:
        metric = kind(name=PREFIX + name, documentation=documentation, labelnames=self._labelnames, **kwargs)
        return create_metric_per_engine(metric, self.per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, int], engine_idx: int = 0) -> None:
        for name, n in transfer_stats_data.items():
            if name in self._gauges:
                self._gauges[name][engine_idx].set(n)
            else:
                self._counters[name][engine_idx].inc(n)


def scheduler_stats(managers: Iterable["InfLLMManager"], waiting: int) -> InfLLMStats:
    """What the block managers know. waiting: requests in the scheduler's queue."""
    managers = list(managers)
    return InfLLMStats(
        {
            "units_in_use": sum(manager.pool.num_units - manager.pool.num_free for manager in managers),
            "unit_capacity": sum(manager.pool.num_units for manager in managers),
            "blocks_held": sum(manager.num_blocks_held for manager in managers),
            "requests_waiting_for_units": waiting if any(manager.short_of_units for manager in managers) else 0,
        }
    )


@dataclass
class GroupCounter:
    """Counts what the layers of one KV cache group do on the worker.

    block_bytes: for each layer, keys and values of one block.
    reads_over_link: whether attention reads stored blocks through the link to the host (a GPU without slots).
    residency: the caches of all the group's layers, if there are slots.
    """

    block_bytes: list[int]
    reads_over_link: bool
    residency: Residency | None
    gained: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._caches = CacheCounts(self.residency.counts) if self.residency else None

    def count(self, rounds: Iterable["Round"]) -> None:
        """Add what the rounds of a step's plan do; the plan has counted already."""
        layers, all_bytes = len(self.block_bytes), sum(self.block_bytes)
        for round_ in rounds:
            tally = round_.tally
            self._gain("units_sealed", tally.sealed)
            self._gain("units_retrieved", tally.retrieved * layers)
            self._gain("bytes_to_host", tally.stored * all_bytes)
            if self.reads_over_link:
                self._gain("bytes_to_device", tally.chosen * all_bytes)
            if self._caches:
                # Initial tokens come back to their slots once, when they have been stored.
                self._gain("bytes_to_device", (tally.stored - tally.sealed) * all_bytes)

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        if self._caches:
            for (hits, misses, evictions), size in zip(self._caches.take(), self.block_bytes, strict=False):
                self._gain("residency_hits", hits)
                self._gain("residency_misses", misses)
                self._gain("residency_evictions", evictions)
                self._gain("bytes_to_device", misses * size)
        gained, self.gained = self.gained, {}
        return gained

    def _gain(self, name: str, count: int) -> None:
        if count:
            self.gained[name] = self.gained.get(name, 0) + count


class CacheCounts:
    """Hits, misses and evictions of residency caches, by layer.

    On a GPU they are read at most once a second, and the host never waits for them: a copy to pinned memory is started
    in one step and looked at in a later one.
    """

    def __init__(self, counts: torch.Tensor) -> None:
        """counts: [N, L, 3] int64, as `Residency` keeps them; they only grow."""
        self._counts = counts
        self._on_host = counts.device.type == "cpu"
        self._copy = torch.zeros(counts.shape[1:], dtype=counts.dtype, pin_memory=not self._on_host)
        self._seen = self._copy.clone()
        self._copied: Any = None
        self._next = 0.0

    def take(self) -> list[list[int]]:
        """(hits, misses, evictions) of each layer since the last call; empty if nothing new has been read."""
        if self._on_host:
            torch.sum(self._counts, 0, out=self._copy)
        elif not self._arrived():
            return []
        gained = self._copy - self._seen
        self._seen.copy_(self._copy)
        rows: list[list[int]] = gained.tolist()
        return rows

    def _arrived(self) -> bool:
        """Whether a copy from the device has arrived; starts the next one when it is time."""
        if self._copied is not None and self._copied.query():
            self._copied = None
            return True
        if self._copied is None and time.monotonic() >= self._next:
            self._copy.copy_(self._counts.sum(0), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
            self._next = time.monotonic() + DEVICE_READ_SECONDS
        return False
