"""The cores and memory of a process are those of its control groups, not the whole machine's."""

import os
import subprocess
import sys

import pytest

from fastdeitlt import machine

GIB = 1 << 30
V2 = "0::/slurm/job_7/step_0\n"
V1 = "4:memory:/slurm/job_7\n3:cpuset:/\n2:cpu,cpuacct:/slurm/job_7\n0::/\n"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A machine of 64 cores and 500 GiB; its groups are files under a folder."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal: {600 << 20} kB\nMemAvailable:   {500 << 20} kB\nHugePages: 0\n"
    )

    def write(groups, **files):
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_without_limits_all_of_the_machine_is_usable(host, monkeypatch):
    assert (machine.usable_cores(), machine.available_memory()) == (64, 500 * GIB)  # no control groups at all
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}[name])
    (machine.PROC / "meminfo").rename(machine.PROC / "stated")
    assert machine.available_memory() == 7 * 4096
    (machine.PROC / "stated").rename(machine.PROC / "meminfo")
    host(V2, **{"cpu.max": "max 100000\n", "memory.max": "max\n", "memory.current": "7\n"})
    assert (machine.usable_cores(), machine.available_memory()) == (64, 500 * GIB)
    unlimited = {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "7"}
    host(V1, **unlimited, **{"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"})
    assert (machine.usable_cores(), machine.available_memory()) == (64, 500 * GIB)


@pytest.mark.parametrize("group", ["", "slurm/job_7/", "slurm/job_7/step_0/"], ids=["container", "job", "step"])
def test_the_tightest_of_the_groups_decides(host, group):
    inner = {f"{group}cpu.max": "350000 100000\n", f"{group}memory.max": f"{8 * GIB}\n"}
    inner |= {f"{group}memory.current": f"{7 * GIB}\n", f"{group}memory.stat": f"anon 1\nfile {5 * GIB}\nshmem {GIB}\n"}
    host(V2, **inner)
    assert machine.usable_cores() == 3
    assert machine.available_memory() == (8 - 7 + 5 - 1) * GIB  # a file cache is dropped when needed, shared memory not


def test_groups_of_version_1(host):
    files = {"memory.limit_in_bytes": 8 * GIB, "memory.usage_in_bytes": 9 * GIB}
    host(V1, **{f"memory/slurm/job_7/{name}": str(amount) for name, amount in files.items()})
    host(V1, **{"memory/slurm/job_7/memory.stat": f"cache 1\ntotal_cache {3 * GIB}\ntotal_shmem 0\n"})
    host(V1, **{"cpu/slurm/job_7/cpu.cfs_quota_us": "50000\n", "cpu/slurm/job_7/cpu.cfs_period_us": "100000\n"})
    assert machine.usable_cores() == 1  # half a core
    assert machine.available_memory() == 2 * GIB


def test_torch_starts_with_a_containers_cores_unless_the_user_set_its_threads(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("100000 100000")
    program = f"""
import os, pathlib
from fastdeitlt import machine
machine.CGROUPS = machine.PROC = pathlib.Path({str(tmp_path)!r})
os.sched_getaffinity = lambda _: range(3)
from fastdeitlt.run import process
process.start()
import torch
from fastdeitlt.data.pixels.workers import num_threads
print(torch.get_num_threads(), process.THREADS, num_threads())
"""
    for set_to, expected in (({}, "1 None 1"), ({"OMP_NUM_THREADS": "2"}, "2 2 1")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | set_to
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
