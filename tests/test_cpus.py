from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from camcal.cpus import usable_cpus, yield_to_event_loop

HOST = 16


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(HOST)), raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_affinity_without_cgroup(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path) == HOST


def test_cpu_count_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cpus(tmp_path) == 3


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", HOST), ("250000 100000", 2), ("50000 100000", 1), ("garbage", HOST)]
)
def test_cgroup_v2(tmp_path: Path, quota: str, expected: int) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/app\n", "sys/fs/cgroup/app/cpu.max": quota})
    assert usable_cpus(tmp_path) == expected


def test_cgroup_v2_parent_and_container_root(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/pod/app\n", "sys/fs/cgroup/pod/app/cpu.max": "max 100000"}
    write(tmp_path, {**files, "sys/fs/cgroup/pod/cpu.max": "400000 100000", "sys/fs/cgroup/cpu.max": "300000 100000"})
    assert usable_cpus(tmp_path) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", HOST), ("150000", 1), ("400000", 4)])
def test_cgroup_v1(tmp_path: Path, quota: str, expected: int) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct"
    files = {"proc/self/cgroup": "3:memory:/x\n2:cpu,cpuacct:/docker/abc\n"}
    write(tmp_path, {**files, f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"})
    assert usable_cpus(tmp_path) == expected


def test_yield_to_event_loop_lowers_only_the_calling_thread() -> None:
    def priority(_: int) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority(0)
    with ThreadPoolExecutor(1, initializer=yield_to_event_loop) as threads:
        (of_thread,) = threads.map(priority, [0])
    assert priority(0) == before
    assert of_thread == (min(19, before + 5) if sys.platform == "linux" else before)
