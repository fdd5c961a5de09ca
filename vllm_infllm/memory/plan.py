"""The memory plan: one budget, made once at startup, in the worker, where layers and free memory are known."""

from dataclasses import dataclass

from vllm_infllm.config import KEY, ConfigError, InfLLMConfig

GIB = 1 << 30
RESERVE = 0.2
"""Share of the machine's memory that stays free."""
PAGED_SHARE = 1 / 3
"""Most of the budget that the paged cache gets on CPU."""


@dataclass(frozen=True)
class MemorySizes:
    """What a request needs, in bytes, over all layers.

    paged_request: paged cache of one request at its bound, other layers of the model included.
    received_request: received attention beside it.
    unit: one host unit (keys and values); representative: what it adds on the device.
    """

    blocks_per_request: int
    paged_request: int
    received_request: int
    unit: int
    representative: int


@dataclass(frozen=True)
class MemoryPlan:
    blocks_per_request: int
    num_units: int
    unit_bytes: int
    paged_bytes: int | None
    """Bytes of the paged cache; None where vLLM's own profiling sizes it (accelerators)."""

    def __str__(self) -> str:
        paged = "" if self.paged_bytes is None else f"paged cache {self.paged_bytes / GIB:.2f} GiB, "
        return (
            f"at most {self.blocks_per_request} blocks a request, {paged}"
            f"{self.num_units} host units = {self.num_units * self.unit_bytes / GIB:.2f} GiB"
        )


def make_plan(
    config: InfLLMConfig,
    sizes: MemorySizes,
    max_num_seqs: int,
    max_model_len: int,
    total_memory: int,
    free_memory: int,
    paged_bytes: int | None,
    shares_host_memory: bool,
) -> MemoryPlan:
    """Divide the host's memory between the paged cache (on CPU) and the unit pool.

    Args:
        total_memory, free_memory: of the host, in bytes, after the weights are loaded.
        paged_bytes: the size that the user gave the paged cache, if any.
        shares_host_memory: whether the paged cache lies in host memory, too.

    Raises:
        ConfigError: if a request of max_model_len can never fit.
    """
    budget = max(0, free_memory - int(RESERVE * total_memory))
    # Beside the cache itself: attention received by its tokens, and on CPU the representatives of the units.
    overhead = 1 + sizes.received_request / sizes.paged_request
    unit_bytes = sizes.unit + (sizes.representative if shares_host_memory else 0)
    units_request = config.geometry.stored_blocks(max_model_len)

    left = free_memory
    remedy = "free memory on this machine"
    if shares_host_memory:
        if paged_bytes is None:
            # One more than the sequences: vLLM keeps a null block back.
            wanted = (max_num_seqs + 1) * sizes.paged_request
            paged_bytes = max(2 * sizes.paged_request, min(wanted, int(budget * PAGED_SHARE / overhead)))
        else:
            _check_paged(paged_bytes, sizes, max_model_len)
            remedy = f"lower --kv-cache-memory-bytes {paged_bytes}"
        budget -= int(paged_bytes * overhead)
        left -= int(paged_bytes * overhead)
    pool_bytes = max(0, budget)
    if config.host_memory_gib is not None:
        field = f'--additional-config "{KEY}": host_memory_gib={config.host_memory_gib}'
        pool_bytes = int(config.host_memory_gib * GIB)
        remedy = f"raise {field}"
        if pool_bytes > left:
            raise ConfigError(f"{field} is more than the {max(0, left) / GIB:.2f} GiB that are free: lower it.")
    num_units = min(pool_bytes // unit_bytes, max_num_seqs * units_request)
    if num_units < units_request:
        need, have = units_request * unit_bytes / GIB, pool_bytes / GIB
        raise ConfigError(
            f"--max-model-len {max_model_len} needs {units_request} host units = {need:.2f} GiB for one request, and "
            f"the pool has {have:.2f} GiB: {need - have:.2f} GiB are missing. Lower --max-model-len or {remedy}."
        )
    return MemoryPlan(sizes.blocks_per_request, num_units, unit_bytes, paged_bytes)


def _check_paged(given: int, sizes: MemorySizes, max_model_len: int) -> None:
    """A paged cache of a given size must hold one request at its bound, and the null block that vLLM keeps back."""
    need = sizes.paged_request + sizes.paged_request // sizes.blocks_per_request
    if given < need:
        raise ConfigError(
            f"--kv-cache-memory-bytes {given} holds no request of --max-model-len {max_model_len}, which needs {need}: "
            "raise it, or leave it out."
        )
