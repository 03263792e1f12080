import subprocess
import sys

FAULTS = """
import resource
from fastdeitlt.run import process

process.start() if {started} else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    bytes([1]) * (1 << 25)  # freed at once

use()
before = faults()
for _ in range(10):
    use()
print(faults() - before)
"""


def faults(*, started: bool) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(started=started)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_command_uses_freed_memory_again():
    assert faults(started=True) < 1000 < 10_000 < faults(started=False)


def test_a_command_collects_garbage_seldom_while_it_imports_and_not_at_its_end():
    code = (
        "import gc\nfrom fastdeitlt.run import process\nprocess.start()\nimport fastdeitlt.train\n"
        "print(gc.isenabled(), gc.get_stats()[2]['collections'])\n"
        "process.end(0, None)\nprint(gc.get_freeze_count() > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    enabled, full_collections, frozen = done.stdout.split()
    assert (enabled, frozen) == ("True", "True") and int(full_collections) <= 2, done.stdout + done.stderr
