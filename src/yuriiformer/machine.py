"""The memory of this machine and of this process."""

from __future__ import annotations

import math
import sys
from pathlib import Path

CGROUPS = (  # of the kernel's version 2 and 1: what a container may use, what it uses, and how much of that is files
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_free() -> float:
    """Bytes that this machine, or the container around this process, has left; infinity where nothing tells."""
    return min(_available(), *(_left(*names) for names in CGROUPS))


def memory_peak() -> int:
    """The most bytes that this process has held at a time; 0 where nothing tells."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _available() -> float:
    try:
        return 1024.0 * int(_field(Path("/proc/meminfo"), "MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


def _left(folder: str, limit: str, usage: str, files: str) -> float:
    try:
        allowed, used = (int((Path(folder) / name).read_text(encoding="ascii")) for name in (limit, usage))
        return float(allowed - used + int(_field(Path(folder, "memory.stat"), files)))
    except (OSError, ValueError, StopIteration):  # no such file, or "max"
        return math.inf


def _field(path: Path, name: str) -> str:
    rows = map(str.split, path.read_text(encoding="ascii").splitlines())
    return next(row[1] for row in rows if row[0] == name)
