"""Comparison of a run with the arms of its ablation grid."""

import csv
import re
from dataclasses import dataclass

from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import GROUPS, Result, cell
from fastdeitlt.reporting.page import Table
from fastdeitlt.run.run_files import RunFiles

HEADER = ("arm", "head", "group", "split", "seeds", "mean", "deviation", "pairs", "difference", "p", "p_holm")
"""Columns of a grid's results.csv, one row per arm, head, group and split; the baseline is the first arm."""
NEEDED = 7
"""Number of columns read here."""
SPLIT = "official"


@dataclass(frozen=True)
class Arm:
    """An arm's accuracies in %, means over seeds."""

    name: str
    seeds: int
    means: dict[tuple[str, str], str]
    """(head, group) -> formatted mean and deviation."""


def arms_beside(run: RunFiles) -> list[Arm]:
    """Return the arms of a run's grid, the baseline first; none outside a grid.

    Raises:
        UserError: the grid's results.csv cannot be read.
    """
    path = run.folder.resolve().parent / "results.csv"
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ())[:NEEDED] != HEADER[:NEEDED]:  # another program's table
                return []
            rows = list(reader)
        means_by_arm: dict[str, dict[tuple[str, str], str]] = {}
        seeds: dict[str, int] = {}
        for row in rows:
            if row["split"] == SPLIT:
                deviation = f" ± {float(row['deviation']):.1f}" if row["deviation"] else ""
                shown = f"{float(row['mean']):.1f}{deviation}" if row["mean"] else "-"
                means_by_arm.setdefault(row["arm"], {})[row["head"], row["group"]] = shown
                seeds[row["arm"]] = max(seeds.get(row["arm"], 0), int(row["seeds"]))
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Rewrite it with `fastdeitlt ablate GRID --table`."
        ) from None
    arms = [Arm(name, seeds[name], means) for name, means in means_by_arm.items()]
    return arms if any(arm.name == arm_of(run) for arm in arms) else []


def arm_of(run: RunFiles) -> str:
    """Return the arm in a run folder's name, ``<arm>-seed<number>``."""
    return re.sub(r"-seed\d+$", "", run.name)


def arms_table(run: RunFiles, result: Result) -> list[Table]:
    """Return a table of this run and its grid's arms; none outside a grid."""
    arms = arms_beside(run)
    if not arms:
        return []
    own = arm_of(run)
    rows = [["this run", "1", *(cell(result.accuracy(None, group, SPLIT)) for group in GROUPS)]]
    rows += [
        [
            f"{arm.name}{' (its arm)' if arm.name == own else ''}",
            str(arm.seeds),
            *(arm.means.get((result.main, group), "-") for group in GROUPS),
        ]
        for arm in arms
    ]
    caption = (
        f"Arms of the grid {run.folder.resolve().parent.name}: {result.main}, {result.split_name(SPLIT)}, "
        f"mean ± deviation over seeds; {arms[0].name} is the base"
    )
    return [Table(caption, ["", "seeds", *GROUPS], rows, wide=True, quiet=frozenset(row[0] for row in rows[1:]))]
