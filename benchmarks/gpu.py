"""Everything that needs a GPU, in one command: kernel tests compiled, tuning, times beside the peers, result rows.

    python -m benchmarks.gpu [op ...] [--no-tune]

Needs the package installed (``pip install --no-deps -e .`` is enough where torch and pytest are). Prints the lines to
paste into each op's TUNED table; rows go to ``benchmarks/results``. Ends with 1 if a test or a benchmark failed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.aot import ops

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *command: str) -> bool:
    """Run a Python command from the repository root, say how it ended."""
    print(f"== {name}", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT).returncode == 0
    print(f"== {name}: {'done' if done else 'FAILED'}", flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benched = [op for op in ops() if (ROOT / "benchmarks" / f"bench_{op}.py").exists()]
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default all: {', '.join(benched)}")
    parser.add_argument("--no-tune", action="store_true", help="keep the committed launch settings")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(benched):
        parser.error(f"no benchmark of {', '.join(sorted(unknown))}; there are {', '.join(benched)}")
    if not torch.cuda.is_available():
        parser.error("no GPU is visible; the kernels' correctness without one: pytest tests/kernels")
    tune = [] if arguments.no_tune else ["--tune"]
    good = [run("kernel tests", "-m", "pytest", "-q", "tests/kernels")]
    good += [run(op, "-m", f"benchmarks.bench_{op}", *tune) for op in arguments.ops or benched]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
