"""Limits of the control groups that this process is in, versions 1 and 2: containers, batch systems and services set them.

A group lies in another, and the limit of each on the way up holds for all that is in it: the tightest counts. In a container
the path in /proc may be that of the machine outside, of which nothing can be seen but the lowest part, or the group itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Memory of a version 2 group that no pressure gives back: page cache and caches of the kernel are not in it.
HELD = (
    "anon", "shmem", "kernel_stack", "pagetables", "sec_pagetables", "percpu", "sock", "vmalloc", "slab_unreclaimable",
    "zswap",
)  # fmt: skip


def available_memory() -> int | None:
    """Count the bytes that the tightest limit leaves; None without a limit."""
    left = [_left_v2(group) for group in _groups(None)]
    left += [_left_v1(group) for group in _groups("memory")]
    return min((max(0, n) for n in left if n is not None), default=None)


def cores() -> int | None:
    """Count the whole cores that the tightest quota gives time for, at least 1; None without a quota."""
    quotas = [_text(group / "cpu.max").split() for group in _groups(None)]
    quotas += [
        [_text(group / "cpu.cfs_quota_us").strip(), _text(group / "cpu.cfs_period_us").strip()]
        for group in _groups("cpu")
    ]
    whole = [int(q[0]) // int(q[1]) for q in quotas if len(q) == 2 and all(n.isdigit() and int(n) for n in q)]
    return max(1, min(whole)) if whole else None


def _groups(controller: str | None) -> Iterator[Path]:
    """Yield the folders from this process's group up to the root, for a controller of version 1 or, None, of version 2."""
    roots = [ROOT, ROOT / "unified"] if controller is None else [ROOT / controller]
    inner = [part for part in _path_of(controller).parts if part not in ("/", "..")]
    for root in roots:
        for depth in range(len(inner), -1, -1):
            group = root.joinpath(*inner[:depth])
            if group.is_dir():
                yield group


def _path_of(controller: str | None) -> PurePosixPath:
    """Read the path of this process's group: lines of number:controllers:path, of version 2 without controllers."""
    for line in _text(MEMBERSHIP).splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3 and (controller or "") in fields[1].split(","):
            return PurePosixPath(fields[2])
    return PurePosixPath("/")


def _left_v2(group: Path) -> int | None:
    limits = [n for n in (_number(group / name) for name in ("memory.max", "memory.high")) if n is not None]
    if not limits:
        return None
    used, stat = _number(group / "memory.current") or 0, _table(group / "memory.stat")
    if "anon" in stat:
        used = min(used, sum(stat.get(name, 0) for name in HELD))
    return min(limits) - used


def _left_v1(group: Path) -> int | None:
    limit, stat = _number(group / "memory.limit_in_bytes"), _table(group / "memory.stat")
    if limit is None:
        return None
    used = _number(group / "memory.usage_in_bytes") or 0

    def counted(name: str) -> int:
        """Of the group and all in it; a group without others need not have the totals."""
        return stat.get(f"total_{name}", stat.get(name, 0))

    # Shared memory counts as page cache there, and stays.
    used = max(0, used - counted("cache") + counted("shmem"))
    # The last is the tightest of the groups above, of which a container may see nothing.
    return min(limit, stat.get("hierarchical_memory_limit", limit)) - used


def _table(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    """Read a number of bytes; None where there is none, "max" included."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
