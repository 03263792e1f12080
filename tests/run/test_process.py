import os
import subprocess
import sys

import pytest

FAULTS = """
import ctypes
import resource
from fastdeitlt.run import process

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would make faults rare on some kernels

class OldLibc:
    def mallopt(self, option, value):
        if option == process.M_MMAP_THRESHOLD and value > 1 << 25:
            return 0
        return libc.mallopt(option, value)

if {of_libc!r} == "old":
    ctypes.CDLL = lambda name: OldLibc()
if {of_libc!r}:
    process.start()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    blocks = [libc.malloc(1 << 24) for _ in range(5)]  # as torch's: a free-threaded Python's own allocator is another
    for block in blocks:
        libc.memset(ctypes.c_void_p(block), 1, 1 << 24)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))

use()
before = faults()
for _ in range(10):
    use()
print(faults() - before)
"""


def faults(of_libc: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(of_libc=of_libc)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("of_libc", ["installed", "old"])  # until glibc 2.34, blocks of 32 MiB are the largest accepted
def test_a_command_uses_freed_memory_again(of_libc):
    assert faults(of_libc) < 1000 < 10_000 < faults("")


def test_a_command_collects_garbage_seldom_while_it_imports_and_not_at_its_end():
    code = (
        "import gc\nfrom fastdeitlt.run import process\nprocess.start()\nimport fastdeitlt.train\n"
        "print(gc.isenabled(), gc.get_stats()[2]['collections'])\n"
        "process.end(0, None)\nprint(gc.get_freeze_count() > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    enabled, full_collections, frozen = done.stdout.split()
    assert (enabled, frozen) == ("True", "True") and int(full_collections) <= 2, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "kept"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")], ids=str
)
def test_waiting_threads_sleep_soon_unless_the_user_decides(given, kept):
    code = (
        "import os, sys\nfrom fastdeitlt.run import process\nprocess.start()\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment | given, capture_output=True, text=True)
    assert done.stdout.split() == [kept, "False"], done.stderr
