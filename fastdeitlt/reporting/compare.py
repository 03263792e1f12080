"""HTML page that compares runs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastdeitlt import config
from fastdeitlt.errors import UserError, counted
from fastdeitlt.evaluation import shift
from fastdeitlt.evaluation.metrics import GROUPS, Result, cell
from fastdeitlt.reporting import figures
from fastdeitlt.reporting.page import Block, Figure, Page, Section, Table, best_cells, write
from fastdeitlt.run.run_files import Record, RunFiles, column, read_run


def compare(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a page that compares results, curves, speed and settings of runs.

    Args:
        run_dirs: two or more run folders; runs without results are in the curves and settings only.
        out: the file to write; default: ``compare.html`` next to the first run.

    Raises:
        UserError: fewer than two runs, a duplicate run, or an unreadable folder.
    """
    if len(run_dirs) < 2:
        raise UserError(f"compare: got {counted(len(run_dirs), 'run folder')}, expected at least 2")
    runs = _told_apart([read_run(folder) for folder in run_dirs])
    sections = [_results(runs), _curves(runs), _speed(runs), _settings(runs)]
    lead = f"{len(runs)} runs: {', '.join(run.name for run in runs)}."
    page = Page("Comparison", lead, [section for section in sections if section.blocks])
    return write(page, Path(out) if out else runs[0].folder.resolve().parent / "compare.html")


def _told_apart(runs: list[RunFiles]) -> list[RunFiles]:
    """Name each run by its shortest unique path suffix."""
    paths = [run.folder.resolve().parts for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError(
            f"compare: got one run twice ({', '.join(str(run.folder) for run in runs)}), expected different runs"
        )
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [replace(run, name="/".join(path[-depth:])) for run, path in zip(runs, paths, strict=True)]


def _colours(runs: list[RunFiles]) -> dict[str, str]:
    return {run.name: figures.RUN_COLOURS[index % len(figures.RUN_COLOURS)] for index, run in enumerate(runs)}


def _results(runs: list[RunFiles]) -> Section:
    note = (
        "Top-1 accuracy in per cent; the best run of each column is bold. AVG is the mean of the two heads' logits. "
        "Runs scored on test images and on validation images are in separate tables."
    )
    blocks: list[Block] = []
    for images in ("test", "validation"):
        scored = {run.name: result for run in runs if run.tested_on == images and (result := run.tested)}
        blocks += _scores(scored, f"{images} images", _colours(runs)) if scored else []
    return Section("Result", note, blocks)


def _scores(scored: dict[str, Result], images: str, colours: dict[str, str]) -> list[Block]:
    """Return tables and a figure of runs that are scored on the same images."""
    blocks: list[Block] = []
    for head in figures.COLOURS:
        for split in ("threshold", "official"):
            rows = [
                [name, *(cell(result.accuracy(head, group, split)) for group in GROUPS)]
                for name, result in scored.items()
                if head in result.heads
            ]
            if rows:
                caption = f"{head}, {_split_name(scored, split)}, {images}"
                blocks.append(Table(caption, ["", *GROUPS], rows, best=best_cells(rows)))
    heights = {name: [result.accuracy(None, g, "official") for g in GROUPS] for name, result in scored.items()}
    svg = figures.bars(GROUPS, heights, colours)
    figure = Figure(f"Accuracy in %, {_split_name(scored)}, {images}", svg)
    return [*blocks, _measures(scored, images), figure]


def _split_name(scored: dict[str, Result], split: str = "official") -> str:
    """Return the titles of a split, which can differ between data sets."""
    return " or ".join(dict.fromkeys(result.split_name(split) for result in scored.values()))


def _measures(scored: dict[str, Result], images: str) -> Table:
    """Return a table of further measures of the predicting head."""
    rows = []
    for name, result in scored.items():
        head, shifted = result.heads[result.main], shift.accuracies(result)[result.main]
        accuracies = [head.balanced_accuracy, head.macro_f1, shifted["forward 50"], shifted["backward 50"]]
        calibration = [head.ece["official"]["all"], head.nll["official"]["all"]]
        rows.append([name, *(cell(value) for value in accuracies), cell(calibration[0]), cell(calibration[1], 3)])
    header = ["", "balanced", "macro F1", "forward 50", "backward 50", "ECE", "NLL"]
    return Table(f"Other measures, {images} (forward, backward: shifted class frequencies)", header, rows, wide=True)


def _curves(runs: list[RunFiles]) -> Section:
    blocks: list[Block] = []
    curves = {run.name: run.selection_curve()[2] for run in runs}
    for group in ("all", "tail"):
        lines = {
            name: ([epoch for epoch, _ in points], [r.accuracy(None, group, "official") for _, r in points])
            for name, points in curves.items()
            if points
        }
        if lines:
            svg = figures.curves(lines, "accuracy in %", _colours(runs), percent=True)
            blocks.append(Figure(f"Accuracy on the selection set, {group} classes", svg))
    cosines = {run.name: [e for e in run.evaluations if "cosine_all" in e] for run in runs}
    lines = {
        name: ([e["epoch"] + 1 for e in points], column(points, "cosine_all"))
        for name, points in ((name, _of_one_kind(points)) for name, points in cosines.items())
        if points
    }
    if lines:
        blocks.append(Figure("Cosine of CLS and DIST features", figures.curves(lines, "cosine", _colours(runs))))
    losses = {run.name: (column(run.steps, "time"), column(run.steps, "loss")) for run in runs if run.steps}
    if losses:
        blocks.append(Figure("Training loss", figures.curves(losses, "loss", _colours(runs))))
    return Section("Learning", "Accuracy on the selection set.", blocks)


def _of_one_kind(points: list[Record]) -> list[Record]:
    """Return the evaluations of one kind of weights, that of the first: model or EMA."""
    return [e for e in points if e["weights"] == points[0]["weights"]]


def _speed(runs: list[RunFiles]) -> Section:
    rows = [
        [
            run.name,
            f"{np.nanmedian(column(run.steps, 'images_per_s')):,.0f}",
            cell(100 * float(np.nanmedian(column(run.steps, "data_wait")))),
            str(run.environment.get("gpu") or f"{run.environment.get('cpus', '?')} CPU cores"),
        ]
        for run in runs
        if run.steps
    ]
    blocks: list[Block] = [Table("", ["", "img/s", "data wait, %", "device"], rows)] if rows else []
    return Section(
        "Speed", "Medians over log lines; data wait is the fraction of time spent waiting for images.", blocks
    )


def _settings(runs: list[RunFiles]) -> Section:
    flat = {run.name: config.flatten(run.cfg) for run in runs if run.cfg}
    names = dict.fromkeys(name for settings in flat.values() for name in settings if name != "name")
    rows = [
        [name, *(str(settings.get(name, "-")) for settings in flat.values())]
        for name in names
        if len({str(settings.get(name, "-")) for settings in flat.values()}) > 1
    ]
    blocks: list[Block] = [Table("", ["setting", *flat], rows, text=True, wide=True)] if rows else []
    return Section("Settings that differ", "All other settings are equal.", blocks)
