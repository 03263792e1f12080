"""Performance goals of one H200 by part, and their comparison with measurements."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import installed

Key = tuple[str, str, str]
STEP = ("step", "b16-224")
ATTENTION, STREAM = "B=256 N=198 H=12 D=64", "B=256 N=198 D=768"
# title, op, case (None: the op's last measured), candidate, column, goal on one H200, whether more is better; a column
# "over NAME" is the time of that candidate over this one's, "over the others" that of the fastest other
BUDGET: tuple[tuple[str, str, str | None, str, str, float, bool], ...] = (
    ("full step, images/s", *STEP, "as shipped (auto)", "images_per_s", 4300, True),
    ("full step / official loop", *STEP, "as shipped (auto)", "over official loop", 3.0, True),
    ("full step / timm compiled", *STEP, "as shipped (auto)", "over timm, compiled", 1.4, True),
    ("DeepSpeed / plain", *STEP, "as shipped, DeepSpeed", "over as shipped (auto)", 1 / 1.01, True),
    ("student only, images/s", "bench", "gpu-budget", "student only", "images_per_s", 5000, True),
    ("teacher forward, images/s", "bench", "gpu-budget", "teacher only", "images_per_s", 24000, True),
    ("attention forward, TFLOP/s", "attention", f"forward {ATTENTION}", "triton", "tflop_per_s", 250, True),
    ("attention backward, TFLOP/s", "attention", f"backward {ATTENTION}", "triton", "tflop_per_s", 200, True),
    ("attention forward / best SDPA", "attention", f"forward {ATTENTION}", "triton", "over the others", 1.3, True),
    ("attention backward / best SDPA", "attention", f"backward {ATTENTION}", "triton", "over the others", 1.3, True),
    ("add+LayerNorm forward, GB/s", "add_layernorm", f"forward {STREAM}", "triton", "gb_per_s", 3650, True),
    ("add+LayerNorm backward, GB/s", "add_layernorm", f"backward {STREAM}", "triton", "gb_per_s", 3400, True),
    ("joint loss, ms at K=1000", "joint_loss", "B=1024 K=1000 bfloat16", "triton", "median_ms", 0.010, False),
    ("joint loss, GB/s at K=8142", "joint_loss", "B=1024 K=8142 bfloat16", "triton", "gb_per_s", 3400, True),
    ("AdamW and average, ms", "adamw_ema", "87.3 M weights float32", "fastdeitlt", "median_ms", 0.90, False),
    ("end to end / no data, resident", "train", None, "ours, resident", "over ours, no data", 0.97, True),
    ("end to end / no data, JPEG files", "train", None, "ours, streamed", "over ours, no data", 0.90, True),
    ("augmentation, ms per batch of 256", "augment", "375 x 500 to 224 px B=256", "triton", "median_ms", 0.512, False),
)
NEEDS = {"as shipped, DeepSpeed": "deepspeed", "ours, streamed": "nvidia.dali"}
"""Candidate of the budget -> package that it requires."""
H200_COPY = 4300
"""GB/s of a copy on an H200, which the goals assume."""
COPY_BOUND = {("attention", "tflop_per_s"), ("add_layernorm", "gb_per_s"), ("joint_loss", "gb_per_s"),
              ("adamw_ema", "median_ms")}  # fmt: skip
"""(op, column) whose floor is the copy: on another GPU their goals scale with its copy rate."""


def measured(folder: Path, gpu: str | None) -> dict[Key, Mapping[str, Any]]:
    """Return a GPU's newest row of each (op, case, candidate) in a folder's files."""
    rows: dict[Key, Mapping[str, Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if row.get("gpu") == gpu and "candidate" in row:
                rows[row["op"], row["case"], row["candidate"]] = row
    for file in sorted(folder.glob("parts*.json")):
        written = json.loads(file.read_text(encoding="utf-8"))
        if written["environment"]["gpu"] == gpu:
            rows |= {(row["op"], row["case"], row["candidate"]): row for row in written["rows"]}
    return rows


def budget(rows: dict[Key, Mapping[str, Any]]) -> bool:
    """Print each part's goal, measurement and ratio; return if all are met.

    A ratio above 1 is better. A part whose package is not installed counts as met.
    """
    met = True
    copy = rows.get(("floors", "copy", "copy"), {}).get("gb_per_s", H200_COPY) / H200_COPY
    for what, op, case, candidate, column, goal, more in BUDGET:
        case = case or next((key[1] for key in reversed(rows) if key[0] == op), None)
        of_case = {key[2]: row for key, row in rows.items() if key[:2] == (op, case)}
        over, row = of_case.get(column.removeprefix("over ")), of_case.get(candidate, {})
        if column == "over the others":
            others = [other for name, other in of_case.items() if name != candidate]
            over = min(others, key=lambda other: other["median_ms"], default=None)
        got = over["median_ms"] / row["median_ms"] if over and row else row.get(column)
        if got is None:
            absent = candidate in NEEDS and not installed(NEEDS[candidate])
            met &= absent
            reason = f"{NEEDS[candidate]} is not installed" if absent else "not measured"
            print(f"{what:32} goal {goal:9,.4g}   {reason}")
            continue
        if (op, column) in COPY_BOUND:
            goal = goal * copy if more else goal / copy
        ratio = got / goal if more else goal / got
        floor = f", {row['share_of_floor']:.0%} of the floor" if "share_of_floor" in row else ""
        print(f"{what:32} goal {goal:9,.4g}   measured {got:9,.4g}   ratio {ratio:.2f}{floor}")
        met &= ratio >= 1
    return met
