"""How many CPU cores this process may keep busy: by its affinity, and the quota of its control group (containers)."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

_MOUNT: Final = "sys/fs/cgroup"


def usable_cores(root: Path = Path("/")) -> int:
    """At least 1. A quota of two and a half cores counts as two: threads beyond it would only wait for their turn."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """In cores, of every group around this process ("man 7 cgroups"; `cpu.max`, or `cpu.cfs_quota_us` before v2)."""
    for folder in _groups(root):
        unified, quota, period = (folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
        try:
            limit, per = unified.read_text().split() if unified.exists() else (quota.read_text(), period.read_text())
            if limit.strip() not in ("max", "-1"):
                yield int(limit) / int(per)
        except (OSError, ValueError, ZeroDivisionError):
            continue  # no quota that can be read here


def _groups(root: Path) -> Iterator[Path]:
    """A line of /proc/self/cgroup is NUMBER:CONTROLLERS:PATH. Inside a container the path may be the host's, which is
    not to be seen there: then the container's own group is where the tree is mounted."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [_MOUNT] if not controllers else [f"{_MOUNT}/{controllers}", f"{_MOUNT}/cpu"]
        inner = PurePosixPath(path.lstrip("/"))
        yield from (root / mount / group for mount in mounts for group in (inner, *inner.parents))
