"""Everything that needs a GPU, in one command: tests, floors, tuning, times beside the peers, and the budget.

    python -m benchmarks.gpu [STAGE ...] [--minutes M] [--dry] [--list]

Stages, most needed first: tests (of the kernels, compiled), floors (the matrix products and the copy), tune-ops
(launch settings, and what is fastest alone), one a kernel (``bench_<op>``), step (ours beside timm's and the official
loop), tune (what the whole step takes of it), parts (``fastdeitlt bench``), train (from JPEG files), profile,
tune-inat18, steps (every contestant, every model), budget. ``fastdeitlt tune`` writes into the measurements that ship
with the kernels, all others into ``benchmarks/results``. The budget sets what was measured beside the floor and the
goal of each part and ends with 1 where a goal is missed.
With ``--minutes`` a stage that is not done by then is ended and later ones are left out; rows written until then stay,
and the next call may name the stages that are left.
``--dry`` runs every stage at its smallest on a machine without a GPU: what runs there, runs; a kernel's benchmark says
that it measures nothing. Needs the package installed (``pip install --no-deps -e .`` is enough where torch, pydantic
and pytest are; DALI is needed by train alone, deepspeed by its contestant). Ends with 1 if a stage failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.aot import ops
from benchmarks.harness import installed

ROOT = Path(__file__).resolve().parent.parent
RESULTS, MEASURED = ROOT / "benchmarks" / "results", ROOT / "kernels" / "measured"
Key = tuple[str, str, str]
ONE_BATCH = ("train.batch_size=256", "train.accumulate=1", "train.virtual_ranks=1")
"""Settings under which a step is one batch of 256 images."""

IN_BUDGET = ("official loop", "+ kernels", "as shipped (auto)", "as shipped, DeepSpeed")
"""Contestants of ``bench_step`` that the budget needs, or that show what `auto` leaves."""

STEP = ("step", "b16-224")
ATTENTION, STREAM = "B=256 N=198 H=12 D=64", "B=256 N=198 D=768"
# what, op, case (None: the op's last measured), candidate, column, goal on one H200, whether more is better; a column
# "over NAME" is the time of that candidate over this one's
BUDGET: tuple[tuple[str, str, str | None, str, str, float, bool], ...] = (
    ("full step, images/s", *STEP, "as shipped (auto)", "images_per_s", 4300, True),
    ("full step / official loop", *STEP, "as shipped (auto)", "over official loop", 3.0, True),
    ("full step / timm compiled", *STEP, "as shipped (auto)", "over timm, compiled", 1.4, True),
    ("DeepSpeed / plain", *STEP, "as shipped, DeepSpeed", "over as shipped (auto)", 1 / 1.01, True),
    ("student only, images/s", "bench", "gpu-budget", "student only", "images_per_s", 5000, True),
    ("teacher forward, images/s", "bench", "gpu-budget", "teacher only", "images_per_s", 24000, True),
    ("attention forward, TFLOP/s", "attention", f"forward {ATTENTION}", "triton", "tflop_per_s", 250, True),
    ("attention backward, TFLOP/s", "attention", f"backward {ATTENTION}", "triton", "tflop_per_s", 200, True),
    ("attention forward / best SDPA", "attention", f"forward {ATTENTION}", "triton", "speedup", 1.3, True),
    ("attention backward / best SDPA", "attention", f"backward {ATTENTION}", "triton", "speedup", 1.3, True),
    ("add+LayerNorm forward, GB/s", "add_layernorm", f"forward {STREAM}", "triton", "gb_per_s", 3650, True),
    ("add+LayerNorm backward, GB/s", "add_layernorm", f"backward {STREAM}", "triton", "gb_per_s", 3400, True),
    ("joint loss, ms at K=1000", "joint_loss", "B=1024 K=1000 bfloat16", "triton", "median_ms", 0.010, False),
    ("joint loss, GB/s at K=8142", "joint_loss", "B=1024 K=8142 bfloat16", "triton", "gb_per_s", 3400, True),
    ("AdamW and average, ms", "adamw_ema", "87.3 M weights float32", "fastdeitlt", "median_ms", 0.90, False),
    ("end to end / no data, resident", "train", None, "ours, resident", "over ours, no data", 0.97, True),
    ("end to end / no data, JPEG files", "train", None, "ours, streamed", "over ours, no data", 0.90, True),
    ("augmentation, ms a batch of 256", "augment", "375 x 500 to 224 px B=256", "triton", "median_ms", 0.512, False),
)
NEEDS = {"as shipped, DeepSpeed": "deepspeed", "ours, resident": "nvidia.dali", "ours, streamed": "nvidia.dali"}
"""Candidate of the budget -> package without which it is left out."""
H200_COPY = 4300
"""GB/s of a copy on the H200 of the goals."""
COPY_BOUND = {("attention", "tflop_per_s"), ("add_layernorm", "gb_per_s"), ("joint_loss", "gb_per_s"),
              ("adamw_ema", "median_ms")}  # fmt: skip
"""(op, column) whose floor is the copy: on another GPU their goals move with what the copy reaches there."""


def commands(dry: bool) -> dict[str, list[str]]:
    """Stage -> Python command, in order."""
    config = ["imagenet_lt", "name=gpu-budget", *ONE_BATCH]
    config = ["quickstart", "name=gpu-budget", "student.depth=1", "train.batch_size=4"] if dry else config
    parts = str(RESULTS / "parts_gpu.json") if not dry else "/dev/null"
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if installed("xdist") else []
    how = ["--collect-only"] if dry else workers
    # what compiles ahead of time for every architecture is no matter of this GPU
    found = {"tests": ["-m", "pytest", "-q", *how, "tests/kernels", "--ignore=tests/kernels/test_aot.py"]}
    found["floors"] = ["-m", "benchmarks.bench_floors", *(["--dry", "--rounds", "1", "--batch", "16"] if dry else [])]
    found["tune-ops"] = _tune(dry, "imagenet_lt", "--ops-only")
    for op in ops():
        if (ROOT / "benchmarks" / f"bench_{op}.py").exists():
            found[op] = ["-m", f"benchmarks.bench_{op}", *(["--help"] if dry else [])]
    step = ["--case", "dry", "--check"] if dry else ["--case", "b16-224", "--only", *IN_BUDGET]
    found["step"] = ["-m", "benchmarks.bench_step", *step]
    found["tune"] = _tune(dry, "imagenet_lt")
    found["parts"] = ["-m", "fastdeitlt.cli", "bench", *config, "--synthetic", "--json", parts]
    found["parts"] += ["--quick", "--batches"] if dry else []
    found["train"] = ["-m", "benchmarks.bench_train"]
    found["train"] += ["--help"] if dry else ["--images", "8192", "--workers", "12", "--rounds", "3"]
    found["profile"] = ["-m", "fastdeitlt.cli", "profile", *config, "--synthetic", "--steps", "1", "--out"]
    found["profile"] += [str(ROOT / "runs" / "gpu-profile")]
    found["tune-inat18"] = _tune(dry, "inat18")
    found["steps"] = ["-m", "benchmarks.bench_step", *(["--case", "dry", "--check"] if dry else [])]
    return found


def _tune(dry: bool, recipe: str, *options: str) -> list[str]:
    rest = ["--help"] if dry else [recipe, *ONE_BATCH, "--out", str(MEASURED), *options]
    return ["-m", "fastdeitlt.cli", "tune", *rest]


def run(name: str, command: list[str], deadline: float) -> bool:
    """Run a Python command from the repository root until the deadline (``time.monotonic``), say how it ended."""
    left = deadline - time.monotonic()
    if left <= 0:
        print(f"== {name}: left out, no time", flush=True)
        return False
    print(f"== {name}: python {' '.join(command)}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    try:
        said = "done" if process.wait(None if left == float("inf") else left) == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        said = "ended, no time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
    print(f"== {name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    return said == "done"


def measured(gpu: str | None) -> dict[Key, Mapping[str, Any]]:
    """The newest row of each (op, case, candidate) of a GPU; ``bench``'s own file counts as well."""
    found: dict[Key, Mapping[str, Any]] = {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if row.get("gpu") == gpu and "candidate" in row:
                found[row["op"], row["case"], row["candidate"]] = row
    parts = RESULTS / "parts_gpu.json"
    if parts.exists():
        written = json.loads(parts.read_text(encoding="utf-8"))
        if written["environment"]["gpu"] == gpu:
            found |= {(row["op"], row["case"], row["candidate"]): row for row in written["rows"]}
    return found


def budget(rows: dict[Key, Mapping[str, Any]]) -> bool:
    """Print each part's goal, the measurement and their ratio (above 1 = better); return whether all are met.

    A part whose package is not installed counts as met.
    """
    met = True
    copy = rows.get(("floors", "copy", "copy"), {}).get("gb_per_s", H200_COPY) / H200_COPY
    for what, op, case, candidate, column, goal, more in BUDGET:
        case = case or next((key[1] for key in reversed(rows) if key[0] == op), None)
        found = {key[2]: row for key, row in rows.items() if key[:2] == (op, case)}
        over, row = found.get(column.removeprefix("over ")), found.get(candidate, {})
        got = over["median_ms"] / row["median_ms"] if over and row else row.get(column)
        if got is None:
            absent = candidate in NEEDS and not installed(NEEDS[candidate])
            met &= absent
            said = f"{NEEDS[candidate]} is not installed" if absent else "not measured"
            print(f"{what:32} goal {goal:9,.4g}   {said}")
            continue
        if (op, column) in COPY_BOUND:
            goal = goal * copy if more else goal / copy
        ratio = got / goal if more else goal / got
        floor = f", {row['share_of_floor']:.0%} of the floor" if "share_of_floor" in row else ""
        print(f"{what:32} goal {goal:9,.4g}   measured {got:9,.4g}   ratio {ratio:.2f}{floor}")
        met &= ratio >= 1
    return met


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    parser.add_argument("--dry", action="store_true", help="every stage at its smallest; works without a GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; default: when done")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(arguments)
    known = commands(options.dry)
    if unknown := set(options.stages) - {*known, "budget"}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(known)}, budget")
    if options.list:
        print("\n".join(f"{name}: python {' '.join(command)}" for name, command in known.items()))
        return 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu is None and not options.dry:
        parser.error("no GPU is visible; --dry runs what can run without one, pytest tests/kernels checks the kernels")
    RESULTS.mkdir(exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    good: dict[str, bool] = {}
    if not installed("nvidia.dali") and known.pop("train", None):
        print("== train: left out, nvidia.dali is not installed")
    for name, command in known.items():
        if not options.stages or name in options.stages:
            tested = ["--tested"] if name in ops() and good.get("tests") and not options.dry else []
            good[name] = run(name, command + tested, deadline)
    if not options.stages or "budget" in options.stages:
        good["budget"] = budget(measured(gpu)) or options.dry
    return 0 if all(good.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
