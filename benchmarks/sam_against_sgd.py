"""SAM against plain SGD on the embedded data: the quick start's teacher with each, over seeds.

    python -m benchmarks.sam_against_sgd [--seeds 0 1 2] [--runs-dir runs/sam] [--table]

Trains missing runs (an interrupted one resumes), diagnoses each teacher on the quick start's images, and prints mean
and sample standard deviation over seeds. ``--table`` trains nothing.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness
from fastdeitlt import config
from fastdeitlt.evaluation.metrics import GROUPS
from fastdeitlt.run import folder as run
from fastdeitlt.store.files import read_json, write_atomically
from fastdeitlt.teachers.diagnose import diagnose_teacher
from fastdeitlt.train_teacher import train_teacher

ARMS = {"SAM": "sam", "SGD": "none"}


def numbers(folder: Path) -> dict[str, float]:
    """Return the table's numbers of a finished run; its diagnosis is cached in the run's folder."""
    kept = folder / "analysis" / "teacher.json"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        facts = diagnose_teacher(folder, config.load("quickstart"))
        write_atomically(kept, json.dumps(facts, indent=1))
    facts, results = read_json(kept), read_json(folder / "results.json")
    top1 = results["test"]["heads"]["TEACHER"]["top1"]["official"]
    row = {f"test accuracy, {group}, %": top1[group] for group in GROUPS}
    row["clean training images right, %"] = facts["clean"]["accuracy"]
    row["mixed, resized training images right, %"] = facts["mixed_resized"]["accuracy"]
    row["entropy on them, nats"] = facts["mixed_resized"]["entropy"]
    for radius, gap in facts["sharpness"]["gap"].items():
        row[f"rise of the loss at radius {radius}"] = gap
    row["largest eigenvalue of the Hessian"] = facts["sharpness"]["top_eigenvalue"]
    for centring in ("sample", "feature"):
        row[f"feature rank, centred by {centring}, of {facts['feature_rank']['width']}"] = facts["feature_rank"][
            centring
        ]
    return row


def summary(runs: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return mean and sample standard deviation of each number."""
    return {
        name: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan)
        for name in runs[0]
        for values in [[found[name] for found in runs]]
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/sam"))
    parser.add_argument("--table", action="store_true", help="train nothing, show what is finished")
    options = parser.parse_args(arguments)
    run.set_up_logging()
    numbers_of: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in ARMS}
    for seed in options.seeds:
        for arm, sam in ARMS.items():
            folder = options.runs_dir / f"{sam}-{seed}"
            if not options.table:
                settings = [f"name={sam}-{seed}", f"runs_dir={options.runs_dir}", f"train.seed={seed}"]
                train_teacher(config.load("teacher/quickstart", [*settings, f"teacher_training.sam={sam}"]))
            if (folder / "results.json").is_file():
                numbers_of[arm][seed] = numbers(folder)
    arms = {arm: summary(list(runs.values())) for arm, runs in numbers_of.items() if runs}
    seeds = {arm: sorted(numbers_of[arm]) for arm in arms}
    print("| | " + " | ".join(f"{arm} ({len(seeds[arm])} seeds)" for arm in arms) + " |")
    print("| --- |" + " --- |" * len(arms))
    for name in next(iter(arms.values()), {}):
        print(f"| {name} | " + " | ".join(_shown(*arms[arm][name]) for arm in arms) + " |")
    rows: list[dict[str, Any]] = [
        {"op": "sam_against_sgd", "arm": arm, "seed": seed, **numbers_of[arm][seed]}
        for arm in arms
        for seed in seeds[arm]
    ]
    if not options.table:
        print(f"rows appended to {harness.append('sam_against_sgd', rows).relative_to(harness.ROOT)}")
    return 0


def _shown(mean: float, deviation: float) -> str:
    digits = 1 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


if __name__ == "__main__":
    sys.exit(main())
