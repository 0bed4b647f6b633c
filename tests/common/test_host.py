"""Memory and cores of the machine and of the control groups that a process is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apr.common import cgroup, host

GIB, MIB = 1 << 30, 1 << 20
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """tree(membership, {path: text}): a faked /proc/self/cgroup and /sys/fs/cgroup."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "fs")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "self")

    def make(membership: str, files: dict[str, object]) -> None:
        (tmp_path / "self").write_text(membership)
        (tmp_path / "fs").mkdir()
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return make


def test_no_control_groups(tree) -> None:
    tree("", {})
    assert (cgroup.available_memory(), cgroup.cores()) == (None, None)
    assert host.cores() == len(os.sched_getaffinity(0))
    assert host.available_memory() > 0


V2 = "0::/user.slice/job\n"


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        (V2, {"memory.max": "max", "memory.current": GIB}, None),
        # Page cache is not used memory; what is no page cache is.
        (
            "0::/\n",
            {
                "memory.max": GIB,
                "memory.current": 950 * MIB,
                "memory.stat": f"anon {50 * MIB}\nfile {900 * MIB}\ninactive_file {900 * MIB}",
            },
            GIB - 50 * MIB,
        ),
        (
            "0::/\n",
            {
                "memory.max": GIB,
                "memory.current": 950 * MIB,
                "memory.stat": f"anon {50 * MIB}\nfile {900 * MIB}\nshmem {300 * MIB}\nslab_unreclaimable {MIB}\n"
                f"slab_reclaimable {7 * MIB}",
            },
            GIB - 351 * MIB,
        ),
        # Without memory.stat everything counts.
        ("0::/\n", {"memory.max": GIB, "memory.current": 950 * MIB}, GIB - 950 * MIB),
        # The limit of every group on the way counts: of the process's own, of one in the middle, of the top.
        (V2, {"user.slice/job/memory.max": 5 * MIB, "user.slice/job/memory.current": MIB}, 4 * MIB),
        (
            V2,
            {
                "user.slice/job/memory.max": 5 * GIB,
                "user.slice/job/memory.current": MIB,
                "user.slice/memory.max": GIB,
                "user.slice/memory.current": 100 * MIB,
                "memory.max": "max",
            },
            GIB - 100 * MIB,
        ),
        (V2, {"user.slice/job/memory.max": "max", "memory.max": GIB, "memory.current": 0}, GIB),
        # memory.high slows a process down as if it swapped.
        (
            V2,
            {"user.slice/job/memory.max": GIB, "user.slice/job/memory.high": 10 * MIB},
            10 * MIB,
        ),
        # Over the limit there is nothing, not less.
        ("0::/\n", {"memory.max": MIB, "memory.current": 2 * MIB}, 0),
        # A container that sees its own group as the root, and the path outside.
        ("0::/docker/0123/x\n", {"memory.max": GIB, "memory.current": MIB}, GIB - MIB),
        ("0::/../../other\n", {"memory.max": GIB, "memory.current": MIB}, GIB - MIB),
        # Version 1 beside an empty version 2.
        (
            "4:memory:/job\n0::/\n",
            {
                "memory/memory.limit_in_bytes": NO_LIMIT_V1,
                "memory/job/memory.limit_in_bytes": GIB,
                "memory/job/memory.usage_in_bytes": 50 * MIB,
                "unified/cgroup.procs": "",
            },
            GIB - 50 * MIB,
        ),
        (
            "4:cpu,memory:/job/inner\n",
            {
                "memory/job/memory.limit_in_bytes": GIB,
                "memory/job/memory.usage_in_bytes": 900 * MIB,
                "memory/job/memory.stat": f"cache 1\ntotal_cache {800 * MIB}\ntotal_shmem {10 * MIB}",
                "memory/job/inner/memory.limit_in_bytes": 2 * GIB,
                "memory/job/inner/memory.usage_in_bytes": 900 * MIB,
            },
            GIB - 110 * MIB,
        ),
        # A limit above what a container sees.
        (
            "4:memory:/\n",
            {
                "memory/memory.limit_in_bytes": NO_LIMIT_V1,
                "memory/memory.usage_in_bytes": MIB,
                "memory/memory.stat": f"hierarchical_memory_limit {GIB}",
            },
            GIB - MIB,
        ),
        ("0::/\n", {"memory.max": "nonsense", "memory.current": -1}, None),
        ("nonsense\n\0:\n", {"memory.max": GIB, "memory.current": "?", "memory.stat": "anon x\n\nfile"}, GIB),
    ],
)
def test_memory_of_control_groups(tree, membership: str, files: dict[str, object], left: int | None) -> None:
    tree(membership, files)
    assert cgroup.available_memory() == left
    if left is not None:
        assert host.available_memory() <= left


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "399999 100000"}, 3),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        (V2, {"user.slice/job/cpu.max": "800000 100000", "user.slice/cpu.max": "200000 100000"}, 2),
        (V2, {"user.slice/job/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
        (
            "5:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": 250000, "cpu/job/cpu.cfs_period_us": 100000},
            2,
        ),
        ("5:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": -1, "cpu/job/cpu.cfs_period_us": 100000}, None),
        ("0::/\n", {"cpu.max": "100000 0"}, None),
        ("0::/\n", {"cpu.max": ""}, None),
    ],
)
def test_cores_of_control_groups(tree, membership: str, files: dict[str, object], cores: int | None) -> None:
    tree(membership, files)
    own = len(os.sched_getaffinity(0))
    assert cgroup.cores() == cores
    assert host.cores() == min(own, cores or own)
