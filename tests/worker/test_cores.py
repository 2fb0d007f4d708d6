"""The cores that a worker may use, by its affinity and by the quotas of the control groups around it."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from worker.engine.cores import usable_cores


def tree(root: Path, cgroup: str, files: Mapping[str, str]) -> Path:
    """A root with /proc/self/cgroup and files under /sys/fs/cgroup."""
    groups = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in ({"proc/self/cgroup": cgroup} | groups).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        pytest.param("0::/\n", {"cpu.max": "200000 100000\n"}, 2, id="container"),
        pytest.param("0::/\n", {"cpu.max": "250000 100000\n"}, 2, id="two and a half"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000\n"}, 1, id="half a core"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, 8, id="no quota"),
        pytest.param("0::/\n", {"cpu.max": "1600000 100000\n"}, 8, id="more than there are"),
        pytest.param("0::/\n", {}, 8, id="no files"),
        pytest.param("0::/a.slice/b\n", {"a.slice/cpu.max": "300000 100000\n"}, 3, id="the group around ours"),
        pytest.param(
            "0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3, id="ours has none"
        ),
        pytest.param("0::/docker/of/the/host\n", {"cpu.max": "400000 100000\n"}, 4, id="the host's path"),
        pytest.param(
            "3:memory:/\n2:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "50000\n"},
            3,
            id="v1",
        ),
        pytest.param(
            "2:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8, id="v1, no quota"
        ),
        pytest.param("nonsense\n", {"cpu.max": "nonsense\n"}, 8, id="nonsense"),
    ],
)
def test_quotas_bound_the_cores(tmp_path: Path, cgroup: str, files: dict[str, str], cores: int) -> None:
    assert usable_cores(tree(tmp_path, cgroup, files)) == cores


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8
    assert 1 <= usable_cores() <= 8
