"""Cores and memory that this process may use: the machine's, within its control groups (containers, Slurm)."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")
MEMORY_FILES = (
    ("memory.max", "memory.current", "file", "shmem"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
)
"""Limit, usage, and in memory.stat the page cache and its part that cannot be dropped, in groups of version 2 and 1."""


def usable_cores() -> int:
    """Return the number of cores of this process, within its groups' quotas."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in _groups("cpu"):
        quota = _numbers(group / "cpu.max")
        quota = quota or _numbers(group / "cpu.cfs_quota_us") + _numbers(group / "cpu.cfs_period_us")
        if len(quota) == 2:  # else there is no limit
            cores = min(cores, quota[0] / quota[1])
    return max(1, int(cores))


def available_memory() -> int:
    """Return the bytes available without swapping, which include file caches."""
    free = _amounts(PROC / "meminfo").get("MemAvailable", 0) * 1024
    free = free or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # some sandboxes do not state it
    for group in _groups("memory"):
        for limit, usage, cache, shared in MEMORY_FILES:
            most, used = _numbers(group / limit), _numbers(group / usage)
            if most and used:
                parts = _amounts(group / "memory.stat")
                free = min(free, most[0] - used[0] + parts.get(cache, 0) - parts.get(shared, 0))
    return max(0, free)


def _groups(controller: str) -> Iterator[Path]:
    """Yield folders of this process's groups (version 2, 1), inner ones first.

    A container sees its own group as the root, beside a path of the host.
    """
    text = (PROC / "self" / "cgroup").read_text(encoding="utf-8") if (PROC / "self" / "cgroup").is_file() else ""
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            root = CGROUPS if number == "0" else CGROUPS / controller
            inner = root / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _numbers(path: Path) -> list[int]:
    """Return the numbers in a file; none without file or limit ("max", -1)."""
    words = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return [int(word) for word in words] if all(word.isdigit() for word in words) else []


def _amounts(path: Path) -> dict[str, int]:
    """Return the first number of each line by its name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name.rstrip(":"): int(rest[0]) for name, *rest in map(str.split, lines) if rest}
