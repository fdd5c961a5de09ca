"""How much host memory this process may use: limits that vLLM does not look at.

vLLM reads the machine's memory and the limit of a container, which lies at the root of the control groups that are seen
from inside. A service manager or a batch system sets it on a group further down, a shell by `ulimit -v`; who overlooks
it is killed when the memory is filled.
"""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

PROCESS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def within_limits(total: int, free: int) -> tuple[int, int]:
    """All and free memory in bytes, lowered to what the process's control groups and address space allow."""
    for limit, used in [*_group_limits(), *_address_space()]:
        total, free = min(total, limit), max(0, min(free, limit - used))
    return total, free


def _group_limits() -> Iterator[tuple[int, int]]:
    """Limit and use of the process's control group and all above it, in bytes; caches of files do not count as use."""
    for line in PROCESS.read_text().splitlines() if PROCESS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, names = GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        leaf = root / path.lstrip("/")
        for group in (leaf, *leaf.parents):
            if not group.is_relative_to(root):
                break
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                yield limit, max(0, used - _file_caches(group / "memory.stat"))


def _number(file: Path) -> int | None:
    """What a file of a control group says; None for no limit ("max"), or where the file is not there."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _file_caches(statistics: Path) -> int:
    try:
        entries = dict(line.split(" ", 1) for line in statistics.read_text().splitlines())
    except OSError:
        return 0
    # Version 1 counts the groups below under names of their own.
    return sum(int(entries.get(f"total_{name}", entries.get(name, 0))) for name in ("active_file", "inactive_file"))


def _address_space() -> Iterator[tuple[int, int]]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit, psutil.Process().memory_info().vms
