"""Stage 10: one HTML page of a run, from the run folder alone. compare.py sets several side by side."""

# K classes

import json
import math
from pathlib import Path

import numpy as np
import rich.table

from fastdeitlt import config, figures
from fastdeitlt.compare import compare
from fastdeitlt.errors import UserError
from fastdeitlt.metrics import GROUPS, Result, cell
from fastdeitlt.page import Block, Code, Figure, Fold, Page, Section, Table, best_cells, write
from fastdeitlt.run_files import RunFiles, column, read_run

__all__ = ["compare", "results_table", "write_report"]

SPLITS = {
    "threshold": "Threshold split: over 100, 20 to 100, under 20 images",
    "official": "Official split: index ranges of the DeiT-LT code, else thirds",
}
MAX_CLASS_ROWS = 200


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` of a run into its folder, from whatever parts are there.

    Raises:
        UserError: see ``read_run``.
    """
    run = read_run(run_dir)
    sections = [_headline(run), _learning(run), *_classes(run), _speed(run), *_set_up(run)]
    page = Page(run.name, _lead(run), [section for section in sections if section.blocks], _tiles(run))
    return write(page, run.folder / "report.html")


def _lead(run: RunFiles) -> str:
    dataset = run.cfg.data.dataset if run.cfg else "unknown data"
    model = "a model"
    if run.cfg:
        model = f"teacher {run.cfg.teacher_training.arch}" if run.is_teacher else run.cfg.student.name
    what = f"{model} on {dataset}"
    if run.tested is None:
        return f"{what}. No results yet: the run has not been tested."
    name, result = run.tested
    chosen = run.results.get("selected") or {}
    weights = {"model": "weights", "ema": "averaged weights"}.get(chosen.get("weights", ""), "weights")
    epoch = f" of epoch {chosen['epoch'] + 1}" if "epoch" in chosen else ""
    on = {"val": "chosen on validation images", "test": "chosen on the test images", "last": "the last ones"}
    how = on.get(chosen.get("on", ""), "")
    images = f"{result.num_images:,} {'test' if name == 'test' else 'validation'} images"
    return f"{what}: {images} of {len(result.counts_K):,} classes, {weights}{epoch}{f', {how}' if how else ''}."


def _tiles(run: RunFiles) -> list[tuple[str, str]]:
    if run.tested is None:
        return []
    _, result = run.tested
    tiles = [
        (f"{cell(result.accuracy())} %", "accuracy" if run.is_teacher else "accuracy, mean of both heads"),
        (f"{cell(result.accuracy(group='tail', split='official'))} %", "on the tail (official split)"),
    ]
    if run.teacher:
        gain = result.accuracy() - run.teacher.accuracy()
        tiles.append((f"{gain:+.1f}", "points over the teacher"))
    if run.steps:
        tiles.append((f"{np.median(column(run.steps, 'images_per_s')):,.0f}", "training images a second"))
    return tiles


def _headline(run: RunFiles) -> Section:
    note = (
        "Top-1 accuracy in per cent. AVG is the mean of the two heads' logits. All is over images; head, mid and tail "
        "are means of class accuracies. Published tables mix the two splits, so compare a tail only with its split."
    )
    if run.tested is None:
        return Section("Result", note, [])
    _, result = run.tested
    blocks: list[Block] = [_accuracy_table(run, result, split) for split in SPLITS]
    heads = {name: head.top1["official"] for name, head in result.heads.items()}
    if run.teacher:
        heads["TEACHER"] = run.teacher.heads[run.teacher.main].top1["official"]
    heights = {name: [row[group] for group in GROUPS] for name, row in heads.items()}
    blocks.append(Figure("Accuracy in %, official split", figures.bars(GROUPS, heights, figures.COLOURS)))
    rows = [
        [name, cell(head.top5["threshold"]["all"]), cell(head.balanced_accuracy), cell(head.macro_f1)]
        for name, head in result.heads.items()
    ]
    header = ["", "top-5", "balanced accuracy", "macro F1"]
    blocks.append(Table("Other measures, all classes, in %", header, rows))
    if {"CLS", "DIST"} <= heads.keys():
        gaps = [heads["CLS"][group] - heads["DIST"][group] for group in ("head", "tail")]
        if np.isfinite(gaps).all():
            note += f" CLS minus DIST, official split: {gaps[0]:+.1f} points on the head, {gaps[1]:+.1f} on the tail."
    return Section("Result", note, blocks)


def _accuracy_table(run: RunFiles, result: Result, split: str) -> Table:
    ours = {name: head.top1[split] for name, head in result.heads.items()}
    others = result.beside(split, run.teacher, run.published)
    num_classes = {"all": len(result.counts_K), **result.num_classes[split]}
    rows = [[name, *(cell(row.get(group)) for group in GROUPS)] for name, row in (ours | others).items()]
    header = ["", *(f"{group} ({num_classes[group]:,})" for group in GROUPS)]
    return Table(SPLITS[split], header, rows, quiet=frozenset(others), best=best_cells(rows[: len(ours)]))


def _learning(run: RunFiles) -> Section:
    recipe = run.cfg and (run.cfg.teacher_training if run.is_teacher else run.cfg.loss)
    drw_epoch = recipe.drw_epoch if recipe else -1
    blocks: list[Block] = []
    if run.steps:
        time = column(run.steps, "time")
        losses = {"loss": "loss", "CLS": "cls_loss", "DIST": "dist_loss"}
        colours = {"loss": figures.COLOURS["AVG"], "CLS": figures.COLOURS["CLS"], "DIST": figures.COLOURS["DIST"]}
        lines = {name: (time, column(run.steps, key)) for name, key in losses.items() if key in run.steps[0]}
        blocks.append(Figure("Training loss", figures.curves(lines, "loss", colours, drw_epoch)))
        rate = {"lr": (time, column(run.steps, "lr"))}
        blocks.append(Figure("Learning rate", figures.curves(rate, "learning rate", {"lr": figures.INK}, drw_epoch)))
    weights, split, evaluations = run.selection_curve()
    for group, title in (("all", "all classes"), ("tail", "tail classes (official split)")):
        lines = {
            head: ([epoch for epoch, _ in evaluations], [r.accuracy(head, group, "official") for _, r in evaluations])
            for head in (evaluations[0][1].heads if evaluations else ())
        }
        if lines:
            svg = figures.curves(lines, "accuracy in %", figures.COLOURS, drw_epoch, percent=True)
            blocks.append(Figure(f"Accuracy on {split}, {title}, {weights} weights", svg))
    note = "Losses are averages between log lines."
    if drw_epoch >= 0:
        loss = "loss" if run.is_teacher else "DIST loss"
        note += f" The dotted line marks epoch {drw_epoch}, from which the {loss} is re-weighted (DRW)."
    return Section("Learning", note, blocks)


def _classes(run: RunFiles) -> list[Section]:
    if run.tested is None:
        return []
    _, result = run.tested
    per_class: list[Block] = [
        Figure("Accuracy of a class against its training images", figures.class_accuracy(result)),
        _confusions(run, result),
        Fold("Every class", _class_table(run, result)),
    ]
    calibration: list[Block] = [
        Figure("Accuracy against confidence", figures.reliability(result)),
        _calibration_table(result),
    ]
    return [
        Section(
            "Classes",
            "Large classes are on the left. Pale bars are 95 % Wilson intervals of the first head: with few "
            "test images a class they are wide, and single classes should not be compared.",
            per_class,
        ),
        Section(
            "Calibration",
            "On the diagonal a confidence of 70 % is right 70 % of the time. ECE is the mean gap in per cent (15 "
            "bins), NLL the negative log-likelihood in nats, Brier the squared error of the probabilities.",
            calibration,
        ),
    ]


def _confusions(run: RunFiles, result: Result) -> Table:
    name, head = result.main, result.heads[result.main]
    rows = [
        [
            run.class_name(pair.label),
            run.class_name(pair.predicted),
            f"{pair.num_images} of {result.support_K[pair.label]}",
            f"{result.counts_K[pair.label]:,} / {result.counts_K[pair.predicted]:,}",
        ]
        for pair in head.confusions
    ]
    header = ["class", "taken for", "test images", "training images"]
    return Table(f"Most frequent confusions of {name}", header, rows, text=True)


def _class_table(run: RunFiles, result: Result) -> Table:
    first = result.main
    accuracy = {name: result.class_accuracy(name) for name in result.heads}
    interval = result.class_interval(first)
    order = np.argsort(-np.array(result.counts_K), kind="stable")
    caption = "Accuracy in per cent by class, largest first"
    if len(order) > MAX_CLASS_ROWS:
        order = np.argsort(np.nan_to_num(accuracy[first], nan=math.inf), kind="stable")[:MAX_CLASS_ROWS]
        caption = f"Accuracy in per cent of the {MAX_CLASS_ROWS} worst of {len(result.counts_K):,} classes"
    rows = [
        [
            run.class_name(k),
            f"{result.counts_K[k]:,}",
            f"{result.support_K[k]:,}",
            *(cell(accuracy[name][k]) for name in result.heads),
            f"{cell(interval[k, 0], 0)} to {cell(interval[k, 1], 0)}",
        ]
        for k in order
    ]
    return Table(caption, ["class", "training", "test", *result.heads, f"95 % interval of {first}"], rows)


def _calibration_table(result: Result) -> Table:
    rows = [
        [f"{name} {group}", *(cell(*pair) for pair in zip(values, (1, 3, 3), strict=True))]
        for name, head in result.heads.items()
        for group in GROUPS
        for values in [[measure["threshold"][group] for measure in (head.ece, head.nll, head.brier)]]
    ]
    return Table("By head and group (threshold split)", ["", "ECE", "NLL", "Brier"], rows)


def _speed(run: RunFiles) -> Section:
    note = "Whole loop, evaluation and checkpoints left out; medians over log lines."
    if not run.steps:
        return Section("Speed", note, [])
    rows = [
        ["images a second", *(f"{v:,.0f}" for v in np.nanpercentile(column(run.steps, "images_per_s"), (50, 10, 90)))]
    ]
    for key, name in (("data_wait", "waiting for data, %"), ("mfu", "MFU, %")):
        if any(key in record for record in run.steps):
            rows.append([name, *(f"{100 * v:.1f}" for v in np.nanpercentile(column(run.steps, key), (50, 10, 90)))])
    table = Table("Training speed", ["", "median", "10th pct.", "90th pct."], rows)
    lines = {"images/s": (column(run.steps, "time"), column(run.steps, "images_per_s"))}
    svg = figures.curves(lines, "images a second", {"images/s": figures.INK}, from_zero=True)
    return Section("Speed", note, [Figure("Training images a second", svg), table])


def _set_up(run: RunFiles) -> list[Section]:
    environment = Section("Environment", "What the run ran on.", [])
    if run.environment:
        environment.blocks.append(Table("", [], _flat(run.environment), text=True))
    sections = [environment]
    if run.cfg is not None:
        changed: list[Block] = [
            Table(
                "Settings that differ from the defaults",
                ["setting", "value", "default", "meaning"],
                _changes(run),
                text=True,
                wide=True,
            ),
            Fold("Whole configuration", Code(config.dump(run.cfg))),
        ]
        commit = run.environment.get("commit")
        lines = [f"git checkout {commit}"] if commit else []
        lines.append(f"fastdeitlt train {run.folder.name}/config.yaml name={run.name}-again")
        sections.append(Section("Configuration", "Every setting that is not the default, and what it means.", changed))
        sections.append(Section("Run it again", "With config.yaml from this run's folder:", [Code("\n".join(lines))]))
    return sections


def _changes(run: RunFiles) -> list[list[str]]:
    if run.cfg is None:
        return []
    now, default = config.flatten(run.cfg), config.flatten(config.Config())
    return [
        [name, _plain(now[name]), _plain(default.get(name)), config.describe(name) if name in default else ""]
        for name in now
        if now[name] != default.get(name) and name != "name"
    ]


def _plain(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _flat(tree: dict[str, object], prefix: str = "") -> list[list[str]]:
    rows: list[list[str]] = []
    for key, value in tree.items():
        rows += _flat(value, f"{key} ") if isinstance(value, dict) else [[f"{prefix}{key}", str(value)]]
    return rows


def results_table(run_dir: str | Path) -> rich.table.Table:
    """The official-split table of a run for a terminal, beside teacher, chance and published numbers.

    Raises:
        UserError: see ``read_run``; or the run has no results yet.
    """
    run = read_run(run_dir)
    if run.tested is None:
        raise UserError(f"run folder {run.folder}: no results.json; the run has not been tested yet")
    return run.tested[1].table("official", run.teacher, run.published)
