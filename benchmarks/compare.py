"""The guard against slower code: two files of benchmark rows, and what became slower beyond the noise.

    python -m benchmarks.compare BEFORE AFTER [--noise 0.05]

Takes rows of ``benchmarks/results/*.jsonl`` or of ``fastdeitlt bench --json``. Rows are matched by op, case and
candidate; of several in a file the last counts. A row is slower when its median rose by more than the bound: the
larger of ``--noise`` and the sum of both rows' own spread, (p80 - p20) / (2 median). Where both rows name the same
baseline, the ratio to it is compared instead, which is steadier across machines and days. Ends with 1 if anything
became slower or vanished, with 2 if the files cannot be compared.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOISE = 0.05
"""Least change that counts; a chosen bound, beside which the rows' own spread counts."""
Key = tuple[str, str, str]


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """The rows of a file with a time, the last of each (op, case, candidate).

    Raises:
        ValueError: not such a file, or no row in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)["rows"] if path.suffix == ".json" else [json.loads(row) for row in text.splitlines()]
        rows = {(row["op"], row["case"], row["candidate"]): row for row in found if "median_ms" in row}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: got {type(error).__name__} ({error}), expected benchmark rows (.jsonl or .json)"
        ) from None
    if not rows:
        raise ValueError(f"{path}: holds no row with a time")
    return rows


def spread(row: Mapping[str, Any]) -> float:
    """Half the distance from p20 to p80, as a share of the median."""
    return (row["p80_ms"] - row["p20_ms"]) / (2 * row["median_ms"])


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, str]:
    """How many times slower the second is, and what was compared: the time, or the ratio to the common baseline."""
    compared = before.get("baseline"), after.get("baseline")
    if compared[0] and compared[0] == compared[1] and before["candidate"] != compared[0]:
        return before["speedup"] / after["speedup"], f"ratio to {compared[0]}"
    return after["median_ms"] / before["median_ms"], "time"


def compare(before: Mapping[Key, Any], after: Mapping[Key, Any], noise: float = NOISE) -> tuple[list[str], int]:
    """Lines to print, and how many rows became slower or vanished."""
    lines, bad = [], 0
    for key, old in before.items():
        new, name = after.get(key), " ".join(key)
        if new is None:
            bad += 1
            lines.append(f"GONE    {name}: not measured in the second file")
            continue
        times, what = change(old, new)
        bound = max(noise, spread(old) + spread(new))
        verdict = "SLOWER" if times > 1 + bound else "faster" if times < 1 / (1 + bound) else "same"
        bad += verdict == "SLOWER"
        lines.append(f"{verdict:7} {name}: {what} x {times:.3f} (bound {1 + bound:.3f})")
    return lines + [f"new     {' '.join(key)}" for key in after if key not in before], bad


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--noise", type=float, default=NOISE, help=f"least share that counts as a change ({NOISE})")
    options = parser.parse_args(arguments)
    try:
        before, after = read(options.before), read(options.after)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    lines, bad = compare(before, after, options.noise)
    print("\n".join(lines))
    print(f"{len(before)} compared, {bad} slower or gone")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
