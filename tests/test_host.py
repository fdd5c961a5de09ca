"""Host memory that a process may use: limits of control groups and of the shell."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_infllm.memory import host

GIB = 1 << 30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "PROCESS", tmp_path / "process")
    monkeypatch.setattr(host, "GROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


def test_without_limits_all_memory_may_be_used(groups: Path) -> None:
    """Neither where there are no control groups, nor where they set no limit."""
    assert host.within_limits(24 * GIB, 20 * GIB) == (24 * GIB, 20 * GIB)
    host.PROCESS.write_text("0::/user.slice\n")
    group(groups / "user.slice", max="max", current="4096")
    assert host.within_limits(24 * GIB, 20 * GIB) == (24 * GIB, 20 * GIB)


def test_a_service_is_limited_by_its_own_group_and_those_above(groups: Path) -> None:
    """Version 2, as systemd sets MemoryMax: 8 GiB for the slice, of which 6 are used; 16 for the service in it."""
    host.PROCESS.write_text("0::/system.slice/vllm.service\n")
    group(groups / "system.slice/vllm.service", max=str(16 * GIB), current=str(GIB), stat="anon 5\ninactive_file 0")
    assert host.within_limits(24 * GIB, 20 * GIB) == (16 * GIB, 15 * GIB)
    group(groups / "system.slice", max=str(8 * GIB), current=str(6 * GIB), stat="anon 5")
    assert host.within_limits(24 * GIB, 20 * GIB) == (8 * GIB, 2 * GIB)
    assert host.within_limits(24 * GIB, GIB) == (8 * GIB, GIB)


def test_caches_of_files_are_not_in_use(groups: Path) -> None:
    """Weights that were read count in the group's use, and leave when memory is needed."""
    host.PROCESS.write_text("0::/job\n")
    group(groups / "job", max=str(8 * GIB), current=str(6 * GIB), stat=f"active_file {GIB}\ninactive_file {2 * GIB}")
    assert host.within_limits(24 * GIB, 20 * GIB) == (8 * GIB, 5 * GIB)


def test_version_1(groups: Path) -> None:
    """The memory controller's own hierarchy; no limit is a huge number there."""
    host.PROCESS.write_text("9:cpu,cpuacct:/elsewhere\n4:memory:/job\n0::/\n")
    group(groups / "memory", limit_in_bytes="9223372036854771712", usage_in_bytes=str(20 * GIB))
    group(groups / "memory/job", limit_in_bytes=str(8 * GIB), usage_in_bytes=str(3 * GIB))
    (groups / "memory/job/memory.stat").write_text(f"inactive_file 1\ntotal_active_file 0\ntotal_inactive_file {GIB}\n")
    assert host.within_limits(24 * GIB, 20 * GIB) == (8 * GIB, 6 * GIB)


def test_the_shells_limit_counts() -> None:
    """`ulimit -v`, in a process of its own: what it has mapped already is not free."""
    program = "from vllm_infllm.memory.host import within_limits; print(*within_limits(1 << 50, 1 << 50))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB)),
    )
    total, free = map(int, run.stdout.split())
    assert total == 4 * GIB and 0 < free < 4 * GIB
