"""The other arms of an ablation grid, to set beside one of its runs."""

import csv
import re
from dataclasses import dataclass

from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import GROUPS, Result, cell
from fastdeitlt.reporting.page import Table
from fastdeitlt.run.run_files import RunFiles

HEADER = ("arm", "head", "group", "split", "seeds", "mean", "deviation", "pairs", "difference", "p", "p_holm")
"""Columns of a grid's results.csv, a row an arm, head, group and split; the base is the first arm."""
NEEDED = 7
"""Columns that are read here."""
SPLIT = "official"


@dataclass(frozen=True)
class Arm:
    """Means over seeds of an arm's accuracies in per cent."""

    name: str
    seeds: int
    means: dict[tuple[str, str], str]
    """(head, group) -> mean and deviation, as shown."""


def arms_beside(run: RunFiles) -> list[Arm]:
    """Return the arms of the grid that the run is part of, the base first; none if it is in no grid's folder.

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
        found: dict[str, dict[tuple[str, str], str]] = {}
        seeds: dict[str, int] = {}
        for row in rows:
            if row["split"] == SPLIT:
                deviation = f" ± {float(row['deviation']):.1f}" if row["deviation"] else ""
                shown = f"{float(row['mean']):.1f}{deviation}" if row["mean"] else "-"
                found.setdefault(row["arm"], {})[row["head"], row["group"]] = shown
                seeds[row["arm"]] = max(seeds.get(row["arm"], 0), int(row["seeds"]))
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); `fastdeitlt ablate GRID --table` writes it again") from None
    arms = [Arm(name, seeds[name], means) for name, means in found.items()]
    return arms if any(arm.name == arm_of(run) for arm in arms) else []


def arm_of(run: RunFiles) -> str:
    """The arm that a run folder's name is of: ``<arm>-seed<number>``."""
    return re.sub(r"-seed\d+$", "", run.name)


def arms_table(run: RunFiles, result: Result) -> list[Table]:
    """The grid's arms under this run, AVG or TEACHER; nothing outside a grid."""
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
