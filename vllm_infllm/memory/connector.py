"""Carries unit ids and admissions from the block manager to the worker: a KV connector of vLLM.

Scheduler side: collects what the manager did in a step. Worker side: allocates the layers' memory, keeps the table
of requests, and completes the attention metadata into the step's plan before the first layer runs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from vllm_infllm import selection
from vllm_infllm.attention import aside
from vllm_infllm.attention.metadata import InfLLMMetadata
from vllm_infllm.attention.planner import Limits
from vllm_infllm.config import KEY, InfLLMConfig
from vllm_infllm.memory.manager import InfLLMManager, InfLLMSpec
from vllm_infllm.memory.requests import RequestMemory, RequestTable
from vllm_infllm.memory.residency import Residency, Strategy
from vllm_infllm.memory.selections import Selections, traced_blocks
from vllm_infllm.memory.stats import GroupCounter, InfLLMPromMetrics, InfLLMStats, scheduler_stats
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.memory.trace import ARGUMENT, Trace, TracedBlock
from vllm_infllm.selection.layer import allocate as allocate_selection

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_infllm.attention.backend import InfLLMImpl

NAME = "InfLLMConnector"


@dataclass
class Admission:
    """A request that starts, or starts again after preemption."""

    request_id: str
    first_block: int
    prompt_len: int
    outgrows_window: bool
    traced: bool


@dataclass
class GroupUpdate:
    """What happened to one KV cache group in a step, in this order."""

    ended: list[str]
    """Requests that ended or were preempted."""
    admissions: list[Admission]
    new_units: list[tuple[int, list[int]]]
    """(first block of the request, unit ids it was given)."""


@dataclass
class InfLLMConnectorMetadata(KVConnectorMetadata):
    groups: dict[int, GroupUpdate]


@dataclass
class InfLLMWorkerMetadata(KVConnectorWorkerMetadata):
    """What a step retrieved for the requests that asked for a trace, by request."""

    blocks: dict[str, list[TracedBlock]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "InfLLMWorkerMetadata":
        """All workers select the same units."""
        return self


class InfLLMConnector(KVConnectorBase_V1, SupportsHMA):
    """One instance on the scheduler, one on the worker; `role` tells which."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.config = InfLLMConfig(**vllm_config.additional_config[KEY])
        self.max_model_len = vllm_config.model_config.max_model_len
        self._managers: dict[int, InfLLMManager] = {}
        self._admitted: list[Request] = []
        self._requests: dict[int, RequestTable] = {}
        self._residency: dict[int, Residency] = {}
        self._counters: dict[int, GroupCounter] = {}
        self._group_of_layer: dict[str, int] = {}
        self._layer_numbers = {name: number for number, name in enumerate(_our_layers(kv_cache_config))}
        self._selections: list[Selections] = []
        self._traces: dict[str, Trace] = {}
        self._num_waiting = 0

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # nothing leaves this engine

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> InfLLMStats:
        return InfLLMStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> InfLLMPromMetrics:
        return InfLLMPromMetrics(*args)

    def get_kv_connector_stats(self) -> InfLLMStats | None:
        """Once a step, of either side."""
        if self.role is KVConnectorRole.SCHEDULER:
            return scheduler_stats(self._managers.values(), self._num_waiting)
        stats = InfLLMStats()
        for counter in self._counters.values():
            stats = stats.aggregate(InfLLMStats(counter.take()))
        return None if stats.is_empty() else stats

    # ---- scheduler side -------------------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        managers = enumerate(kv_cache_manager.coordinator.single_type_managers)
        self._managers = {group: manager for group, manager in managers if isinstance(manager, InfLLMManager)}

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        self._admitted.append(request)
        if _wants_trace(request):
            config = self.config
            trace = Trace(config.block_size, config.n_init, config.n_local, list(self._layer_numbers))
            self._traces.setdefault(request.request_id, trace)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> InfLLMConnectorMetadata:
        # The plan must be complete before the forward pass, not beside it.
        scheduler_output.has_sync_kv_loads = True
        admitted, self._admitted = self._admitted, []
        groups = {}
        for group, manager in self._managers.items():
            groups[group] = GroupUpdate(
                ended=manager.take_ended(),
                admissions=[self._admission(request, manager) for request in admitted],
                new_units=[(manager.first_block(r), units) for r, units in manager.take_new_units().items()],
            )
        return InfLLMConnectorMetadata(groups)

    def _admission(self, request: "Request", manager: InfLLMManager) -> Admission:
        longest = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        return Admission(
            request_id=request.request_id,
            first_block=manager.first_block(request.request_id),
            prompt_len=request.num_tokens,
            outgrows_window=longest > self.config.n_local,
            traced=request.request_id in self._traces,
        )

    def take_step(self, output: "KVConnectorOutput | None", num_waiting: int) -> None:
        """From the scheduler, before it handles a step's output: what the worker sent, and how many requests queue.

        vLLM's own call, update_connector_output, comes when the requests that end in the step are gone.
        """
        self._num_waiting = num_waiting
        sent = output.kv_connector_worker_meta if output else None
        if not isinstance(sent, InfLLMWorkerMetadata):
            return
        for request_id, blocks in sent.blocks.items():
            # A step may have been in flight when its request ended.
            if trace := self._traces.get(request_id):
                for block in blocks:
                    trace.add(block)

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        trace = self._traces.pop(request.request_id, None)
        return False, {ARGUMENT: trace.to_json()} if trace else None

    # ---- worker side ----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Allocate the memory of each InfLLM layer beside its paged cache [num_blocks, KH, B, 2D]."""
        layers = self._vllm_config.compilation_config.static_forward_context
        for group, group_spec in enumerate(self._kv_cache_config.kv_cache_groups):
            for name in group_spec.layer_names:
                spec = _spec_of(name, group_spec.kv_cache_spec)
                if not isinstance(spec, InfLLMSpec):
                    continue
                impl, cache = layers[name].impl, kv_caches[name]
                impl.memory = LayerMemory.allocate(
                    spec.num_units, cache.shape[0], impl.num_heads, cache, impl.head_size
                )
                rule = selection.load(self.config.selection)
                impl.selection = rule and allocate_selection(rule, impl.ops, impl.memory, self.config.repr_topk)
                impl.number = self._layer_numbers[name]
                self._group_of_layer[name] = group
                self._requests[group] = RequestTable()
        for group in self._requests:
            ours = [name for name, its_group in self._group_of_layer.items() if its_group == group]
            self._allocate_residency(group, [layers[name].impl for name in ours], kv_caches[ours[0]].device)
            residency, on_cpu = self._residency.get(group), kv_caches[ours[0]].device.type == "cpu"
            block_bytes = [kv_caches[name][0].nbytes for name in ours]
            self._counters[group] = GroupCounter(block_bytes, not on_cpu and residency is None, residency)
            if self.config.ops == "triton" and not on_cpu:
                self._warm_up({name: layers[name].impl for name in ours}, kv_caches)

    def _warm_up(self, impls: dict[str, "InfLLMImpl"], kv_caches: dict[str, torch.Tensor]) -> None:
        """Compile the kernels, which are the same for layers of the same shapes."""
        one_of_each = {(impl.num_heads, impl.num_kv_heads, impl.head_size): name for name, impl in impls.items()}
        requests = self._vllm_config.scheduler_config.max_num_seqs
        for name in one_of_each.values():
            limits = Limits(self.max_model_len, requests, layers=len(self._layer_numbers), group="warm-up")
            impls[name].warm_up(kv_caches[name], limits)

    def _allocate_residency(self, group: int, impls: list["InfLLMImpl"], device: torch.device) -> None:
        config, requests = self.config, self._vllm_config.scheduler_config.max_num_seqs
        if not config.max_cached_blocks:
            for impl in impls:
                impl.residency = None
            return
        strategy = Strategy.of(config.cache_strategy)
        caches = self._residency[group] = Residency.allocate(
            strategy, config.score_decay, requests, len(impls), config.max_cached_blocks, device
        )
        for number, impl in enumerate(impls):
            impl.residency = caches.layer(number)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Apply the step's updates, then complete its attention metadata."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, InfLLMConnectorMetadata)
        for group, update in metadata.groups.items():
            self._apply(update, self._requests[group], self._residency.get(group))
        # Model runner V2 builds the metadata outside the forward context and passes it along.
        per_layer = kwargs.get("attn_metadata") or forward_context.attn_metadata or {}
        for name, group in self._group_of_layer.items():
            attention = per_layer.get(name)
            if isinstance(attention, InfLLMMetadata) and not attention.planned:
                members = _members(attention, self._requests[group], kwargs.get("request_ids"))
                attention.plan(members, self.config.geometry, self.config.topk)
                self._counters[group].count(attention.rounds)
                self._selections += [round_.selections for round_ in attention.rounds if round_.selections]

    def _apply(self, update: GroupUpdate, requests: RequestTable, residency: Residency | None) -> None:
        for request_id in update.ended:
            requests.end(request_id)
        for new in update.admissions:
            request = requests.admit(new.request_id, new.first_block, new.prompt_len, new.outgrows_window, new.traced)
            if residency:
                residency.reset(request.number)
        for first_block, units in update.new_units:
            requests[first_block].give(units)

    def build_connector_worker_meta(self) -> InfLLMWorkerMetadata | None:
        """At the end of a step. Waits for a GPU if a request of the step asked for a trace, and only then."""
        if not self._selections:
            return None
        selections, self._selections = self._selections, []
        return InfLLMWorkerMetadata(traced_blocks(selections, len(self._layer_numbers)))

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        """The step is complete when its blocks are in the store."""
        aside.wait_all()


def _our_layers(kv_cache_config: "KVCacheConfig") -> list[str]:
    """Names of the layers that run InfLLM, in the order of the model."""
    specs = [(group.layer_names, group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    ours = [name for names, spec in specs for name in names if isinstance(_spec_of(name, spec), InfLLMSpec)]
    return sorted(ours, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])


def _spec_of(layer: str, group_spec: Any) -> Any:
    """The layer's own spec, where the layers of a group differ."""
    return getattr(group_spec, "kv_cache_specs", {}).get(layer, group_spec)


def _wants_trace(request: "Request") -> bool:
    """Requests were checked where they arrived (plugin.py); nothing may fail here, inside the engine."""
    return bool(request.sampling_params and (request.sampling_params.extra_args or {}).get(ARGUMENT))


def _members(attention: InfLLMMetadata, requests: RequestTable, request_ids: list[str] | None) -> list[RequestMemory]:
    """The requests of a step's spans."""
    rows = [span.table for span in attention.spans]
    if request_ids is not None:
        return [requests.named(request_ids[row]) for row in rows]
    # Model runner V1 does not say whose row is whose; the first block does.
    first_blocks = attention.block_table[:, 0].tolist()
    return [requests[first_blocks[row]] for row in rows]
