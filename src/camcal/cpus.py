"""How many CPUs this process may use: the host's count misleads inside a limited container."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

NICE = 5  # by how much the threads that compute stand back


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs by affinity and cgroup quota (v2 or v1), at least 1. A quota of 2.5 CPUs counts as 2.

    Args:
        root: where `proc` and `sys` are; another folder only in tests.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quota of this process's cgroup and of every cgroup above it, in CPUs."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _walk(root / "sys/fs/cgroup", path, _quota_v2)
        elif "cpu" in controllers.split(","):
            for mount in ("cpu", "cpu,cpuacct"):
                yield from _walk(root / "sys/fs/cgroup" / mount, path, _quota_v1)


def _walk(mount: Path, path: str, read: Callable[[Path], float | None]) -> Iterator[float]:
    # Inside a container the path may be the host's, and absent here; the mount itself is then the container's cgroup.
    folder = Path(path.lstrip("/"))
    for part in (folder, *folder.parents):
        try:
            quota = read(mount / part)
        except (OSError, ValueError):
            continue
        if quota is not None:
            yield quota


def _quota_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def take_share(index: int, count: int) -> int:
    """Keep this process to part `index` of `count` of its CPUs, if it may have them whole; how many it may then use.

    Under a quota, or with fewer CPUs than parts, all parts keep all CPUs, and each should use its share of them.
    """
    total = usable_cpus()
    if hasattr(os, "sched_setaffinity") and len(cpus := sorted(os.sched_getaffinity(0))) == total >= count:
        os.sched_setaffinity(0, cpus[index * total // count : (index + 1) * total // count])
        return usable_cpus()
    return max(1, total // count)


def yield_to_event_loop() -> None:
    """Lower the calling thread's priority, where threads have one of their own (Linux).

    The event loop needs little CPU but needs it at once: with as many busy threads as CPUs beside it, it would answer
    late even those whom it only has to refuse.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICE))
