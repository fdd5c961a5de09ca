"""Host memory that cannot be had."""

import resource
from collections.abc import Iterator

import psutil
import pytest
import torch

from vllm_infllm.config import ConfigError
from vllm_infllm.memory.store import LayerMemory

GIB = 1 << 30


@pytest.fixture
def address_space() -> Iterator[None]:
    """4 GiB of address space more than this process has mapped."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 4 * GIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_units_that_cannot_be_had_are_refused(address_space: None) -> None:
    """Not an allocator's traceback: what was wanted, why not, and which fields and limits to change."""
    cache = torch.zeros(2, 2, 32, 128)
    unit = 2 * 2 * 32 * 64 * 4
    with pytest.raises(ConfigError) as refusal:
        LayerMemory.allocate(8 * GIB // unit, 2, 4, cache, 64)
    for words in (
        f"{8 * GIB // unit} units, 8.00 GiB a layer",
        "Cannot allocate memory",
        "host_memory_gib",
        "ulimit -v",
    ):
        assert words in str(refusal.value)
    assert LayerMemory.allocate(GIB // unit, 2, 4, cache, 64).keys.shape[0] == GIB // unit
