"""Number of usable CPUs: inside a container with a CPU limit, the host's count is too high."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

NICE = 5  # added to the nice value of threads that compute


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs by affinity and cgroup quota (v2 or v1), at least 1. A quota of 2.5 CPUs counts as 2.

    Args:
        root: the folder of `proc` and `sys`; tests use another one.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas of this process's cgroup and its parents, in CPUs."""
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
    # In a container, the path may be that of the host and not exist; the mount itself is then the container's cgroup.
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


def pin_to_share(index: int, count: int) -> int:
    """Pin this process to part `index` of `count` of its CPUs. Returns the number of CPUs that it should use.

    With a CPU quota, or fewer CPUs than parts, the process is not pinned and should use its share of all CPUs.
    """
    total = usable_cpus()
    if hasattr(os, "sched_setaffinity") and len(cpus := sorted(os.sched_getaffinity(0))) == total >= count:
        os.sched_setaffinity(0, cpus[index * total // count : (index + 1) * total // count])
        return usable_cpus()
    return max(1, total // count)


def yield_to_event_loop() -> None:
    """Lower the priority of the calling thread (only Linux has priorities per thread).

    The event loop needs little CPU time, but without delay. With as many busy threads as CPUs, even rejecting a request
    would otherwise be slow.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICE))
