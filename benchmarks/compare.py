"""Regression check: compare two files of benchmark rows and report what became slower beyond the noise.

    python -m benchmarks.compare BEFORE AFTER [--noise 0.05]

Reads rows of ``benchmarks/results/*.jsonl`` or of ``fastdeitlt bench --json``. Rows are matched by op, case and
candidate, the last of each in a file. A row is slower if its median rose by more than the bound: the larger of
``--noise`` and the sum of both rows' spread, (p80 - p20) / (2 median). If both rows have the same baseline, the ratio
to it is compared instead, which varies less across machines and days. Exits with 1 if a row became slower or is
missing, with 2 if the files cannot be compared.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOISE = 0.05
"""Smallest change that counts, if the rows' spread is not larger."""
Key = tuple[str, str, str]


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """Read the timed rows of a file, the last of each (op, case, candidate).

    Raises:
        ValueError: not a file of rows, or no timed row.
    """
    try:
        text = path.read_text(encoding="utf-8")
        parsed = json.loads(text)["rows"] if path.suffix == ".json" else [json.loads(row) for row in text.splitlines()]
        rows = {(row["op"], row["case"], row["candidate"]): row for row in parsed if "median_ms" in row}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: got {type(error).__name__} ({error}), expected benchmark rows (.jsonl or .json)"
        ) from None
    if not rows:
        raise ValueError(f"{path}: no row with a time, expected benchmark rows")
    return rows


def spread(row: Mapping[str, Any]) -> float:
    """Return half the distance from p20 to p80, relative to the median."""
    return (row["p80_ms"] - row["p20_ms"]) / (2 * row["median_ms"])


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, str]:
    """Return the factor by which the second is slower, and the quantity.

    Time, or ratio to the common baseline.
    """
    compared = before.get("baseline"), after.get("baseline")
    if compared[0] and compared[0] == compared[1] and before["candidate"] != compared[0]:
        return before["speedup"] / after["speedup"], f"ratio to {compared[0]}"
    return after["median_ms"] / before["median_ms"], "time"


def compare(before: Mapping[Key, Any], after: Mapping[Key, Any], noise: float = NOISE) -> tuple[list[str], int]:
    """Return lines to print, and the number of slower or missing rows."""
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
    parser.add_argument(
        "--noise", type=float, default=NOISE, help=f"smallest fraction that counts as a change ({NOISE})"
    )
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
