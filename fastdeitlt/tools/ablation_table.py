"""Table of an ablation grid: arms over seeds, Holm-corrected paired tests."""

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import GROUPS, cell
from fastdeitlt.reporting.baselines import HEADER
from fastdeitlt.reporting.figures import COLOURS, STYLE
from fastdeitlt.run.run_files import read_run
from fastdeitlt.store.files import read_json, write_atomically

log = logging.getLogger("fastdeitlt")
TEACHER_FILE = Path("analysis", "teacher.json")
"""File in a run folder: ``diagnose_teacher`` of its teacher on its images."""
SPLITS = ("official", "threshold")
ROUNDING = 1e-9
"""Largest deviation, in points of accuracy, of differences that are equal but for rounding."""

Metric = tuple[str, str, str]  # head, group, split
Values = dict[Metric, float]


@dataclass(frozen=True)
class Summary:
    """A metric of an arm over seeds, and its paired difference from the baseline."""

    num_seeds: int
    mean: float
    deviation: float
    """Sample standard deviation; NaN for one seed."""
    num_pairs: int
    difference: float
    p: float
    """Two-sided paired t-test; NaN if it has none (``paired_t_test``)."""
    corrected: float = math.nan
    """p corrected for all comparisons of the table of differences (``holm``); NaN for numbers that are not in it."""


def paired_t_test(differences: Sequence[float]) -> float:
    """Return the two-sided p of a paired t-test; NaN without spread.

    Source: Student 1908; the distribution as finite sums, Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    pairs = len(differences)
    deviation = float(np.std(differences, ddof=1)) if pairs > 1 else 0.0
    if deviation < ROUNDING:
        return math.nan
    t = float(np.mean(differences)) / (deviation / math.sqrt(pairs))
    return 1 - _central_probability(abs(t), pairs - 1)


def _central_probability(t: float, degrees: int) -> float:
    """Return P(-t < T < t) of Student's distribution with integer degrees of freedom."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = (cosine if odd else 1.0) * (degrees > 1)
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for multiple tests, in order; NaN stays and does not count.

    The smallest of m is multiplied by m, the next by m - 1 and so on, monotone and at most 1. Valid for any dependence
    of the tests. Source: Holm 1979, the sequentially rejective test.
    """
    corrected, largest = [math.nan] * len(p_values), 0.0
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[index] = largest
    return corrected


def read_values(folder: Path) -> Values:
    """Return a finished run's accuracies in %: heads, TEACHER, TEACHER on OOD images."""
    run = read_run(folder)
    if (tested := run.tested) is None:
        raise UserError(f"run folder {folder}: no test or validation scores. Add a test or validation set.")
    results = [tested, *([run.teacher] if run.teacher else [])]
    values = {
        (head, group, split): result.accuracy(head, group, split)
        for result in results
        for head in result.heads
        for group in GROUPS
        for split in SPLITS
    }
    if ood := read_json(folder / TEACHER_FILE):
        values["TEACHER", "OOD", "training"] = float(ood["mixed_resized"]["accuracy"])
    elif run.teacher:
        message = "%s: no %s, not in *teacher, OOD*; run `fastdeitlt analyze teacher %s`"
        log.warning(message, folder, TEACHER_FILE, folder)
    return values


def summarise(values: Mapping[str, Mapping[int, Values]]) -> dict[str, dict[Metric, Summary]]:
    """Return arm -> metric -> summary; the first arm is the baseline."""
    base = next(iter(values.values()), {})
    summaries = {
        arm: {
            metric: _summary(metric, by_seed, base) for metric in dict.fromkeys(m for v in by_seed.values() for m in v)
        }
        for arm, by_seed in values.items()
    }
    compared = _comparisons(summaries)
    corrected = holm([summaries[arm][metric].p for arm, metric in compared])
    for (arm, metric), p in zip(compared, corrected, strict=True):
        summaries[arm][metric] = replace(summaries[arm][metric], corrected=p)
    return summaries


def _comparisons(summaries: Mapping[str, Mapping[Metric, Summary]]) -> list[tuple[str, Metric]]:
    """Return the (arm, metric) pairs with a p value in the table of differences."""
    candidates = ((arm, COLUMNS[name]) for arm in [*summaries][1:] for name in DIFFERENCES)
    return [(arm, m) for arm, m in candidates if m in summaries[arm] and not math.isnan(summaries[arm][m].p)]


def _summary(metric: Metric, arm: Mapping[int, Values], base: Mapping[int, Values]) -> Summary:
    accuracies = [values[metric] for values in arm.values() if metric in values]
    pairs = [arm[s][metric] - base[s][metric] for s in arm if s in base and metric in arm[s] and metric in base[s]]
    return Summary(
        num_seeds=len(accuracies),
        mean=float(np.mean(accuracies)),
        deviation=float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else math.nan,
        num_pairs=len(pairs),
        difference=float(np.mean(pairs)) if pairs else math.nan,
        p=paired_t_test(pairs),
    )


COLUMNS: dict[str, Metric] = {
    "teacher": ("TEACHER", "all", "official"),
    "teacher, OOD": ("TEACHER", "OOD", "training"),
    **{f"AVG {group}": ("AVG", group, "official") for group in GROUPS},
    **{f"{head} {group}": (head, group, "official") for head in ("CLS", "DIST") for group in ("all", "head", "tail")},
}
DIFFERENCES = ("AVG all", "AVG head", "AVG tail", "CLS head", "DIST tail")


def rows(summaries: Mapping[str, Mapping[Metric, Summary]]) -> tuple[list[list[str]], list[list[str]]]:
    """Return (accuracies, differences), tables of text with a header row."""
    accuracies = [["arm", "seeds", *COLUMNS]]
    differences = [["arm", "pairs", *(name for column in DIFFERENCES for name in (column, "p", "Holm"))]]
    for index, (arm, summary) in enumerate(summaries.items()):
        seeds = max((s.num_seeds for s in summary.values()), default=0)
        accuracies.append([arm, str(seeds), *(_spread(summary.get(metric)) for metric in COLUMNS.values())])
        if index:
            compared = [summary.get(COLUMNS[column]) for column in DIFFERENCES]
            pairs = max((s.num_pairs for s in summary.values()), default=0)
            cells = [text for s in compared for text in (_signed(s), *(cell(p, 3) for p in _p_values(s)))]
            differences.append([arm, str(pairs), *cells])
    return accuracies, differences


def _spread(summary: Summary | None) -> str:
    if summary is None or math.isnan(summary.mean):
        return "-"
    return cell(summary.mean) + ("" if math.isnan(summary.deviation) else f" ± {summary.deviation:.1f}")


def _signed(summary: Summary | None) -> str:
    return "-" if summary is None or math.isnan(summary.difference) else f"{summary.difference:+.1f}"


def _p_values(summary: Summary | None) -> tuple[float | None, float | None]:
    return (summary.p, summary.corrected) if summary else (None, None)


def markdown(base: str, summaries: Mapping[str, Mapping[Metric, Summary]]) -> str:
    """Return both tables as Markdown with explanations."""
    accuracies, differences = rows(summaries)
    return (
        "Top-1 accuracy in %, mean ± sample standard deviation over seeds; head, mid and tail as in the runs' "
        "reports. *teacher, OOD*: the teacher on the student's training images (augmented, mixed, resized).\n\n"
        f"{_markdown(accuracies)}\n"
        f"Difference from `{base}` in points, with the two-sided p of a paired t-test over seeds. *Holm*: p corrected "
        f"for the {len(_comparisons(summaries))} comparisons of the table (Holm's step-down method).\n\n"
        f"{_markdown(differences)}"
    )


def _markdown(table: list[list[str]]) -> str:
    heading, *lines = [f"| {' | '.join(row)} |\n" for row in table]
    return heading + f"| --- |{' ---: |' * (len(table[0]) - 1)}\n" + "".join(lines)


def write(folder: Path, arms: Sequence[str], finished: Sequence[tuple[str, int, Path]]) -> None:
    """Write results.csv, .md and .svg of the finished runs, and print the table.

    Raises:
        UserError: no run is finished, or results that cannot be read.
    """
    if not finished:
        raise UserError(f"ablate: no finished run in {folder}. Run the grid first.")
    ran = {arm for arm, _, _ in finished} | {arms[0]}
    values: dict[str, dict[int, Values]] = {arm: {} for arm in arms if arm in ran}
    for arm, seed, run in finished:
        values[arm][seed] = read_values(run)
    summaries = summarise(values)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADER)
    for arm, summary in summaries.items():
        for metric, s in summary.items():
            numbers = (s.mean, s.deviation, s.difference, s.p, s.corrected)
            mean, deviation, *tested = ("" if math.isnan(n) else f"{n:.6g}" for n in numbers)
            table.writerow([arm, *metric, s.num_seeds, mean, deviation, s.num_pairs, *tested])
    write_atomically(folder / "results.csv", text.getvalue())
    absent = [f"`{arm}`" for arm in arms if arm not in ran]
    note = f"\nNo finished run of {', '.join(absent)}.\n" if absent else ""
    write_atomically(folder / "results.md", markdown(arms[0], summaries) + note)
    write_atomically(folder / "results.svg", figure(values))
    Console().print(_brief(arms[0], summaries))


def _brief(base: str, summaries: Mapping[str, Mapping[Metric, Summary]]) -> Table:
    """Return a table for 80 columns."""
    columns = {name: COLUMNS[name] for name in ("teacher", "AVG all", "CLS head", "DIST tail")}
    table = Table("arm", "seeds", *columns, "AVG all", "p, Holm", title=f"accuracy in %, difference of AVG from {base}")
    for arm, summary in summaries.items():
        average = summary.get(COLUMNS["AVG all"])
        table.add_row(
            arm,
            str(average.num_seeds if average else 0),
            *(_spread(summary.get(metric)) for metric in columns.values()),
            *(("", "") if arm == base else (_signed(average), cell(_p_values(average)[1], 3))),
        )
    return table


def figure(values: Mapping[str, Mapping[int, Values]]) -> str:
    """Draw AVG, CLS on head, DIST on tail by arm as <svg>: dots seeds, bars means."""
    panels: dict[str, Metric] = {name: COLUMNS[name] for name in ("AVG all", "CLS head", "DIST tail")}
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(8.6, 0.9 + 0.32 * len(values)), layout="constrained")
        for axes, (title, metric) in zip(
            np.atleast_1d(drawing.subplots(1, 3, sharey=True)), panels.items(), strict=True
        ):
            colour = COLOURS[metric[0]]
            for row, by_seed in enumerate(values.values()):
                accuracies = [v[metric] for v in by_seed.values() if metric in v]
                axes.plot(accuracies, [row] * len(accuracies), "o", markersize=4, color=colour, alpha=0.45)
                if accuracies:
                    axes.plot([np.mean(accuracies)], [row], "|", markersize=13, markeredgewidth=2, color=colour)
            axes.set_title(f"{title}, %", fontsize=9)
            axes.set_yticks(range(len(values)), list(values))
            axes.set_ylim(len(values) - 0.5, -0.5)
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
