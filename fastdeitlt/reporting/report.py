"""HTML report of a run, from its folder alone; compare.py compares runs."""

# K classes

import json
from pathlib import Path

import numpy as np

from fastdeitlt import config
from fastdeitlt.errors import counted
from fastdeitlt.evaluation.metrics import GROUPS, SELECT_BY, Result, cell
from fastdeitlt.reporting import analysis, figures
from fastdeitlt.reporting.baselines import arms_table
from fastdeitlt.reporting.compare import compare
from fastdeitlt.reporting.mistakes import write_confusion
from fastdeitlt.reporting.next_steps import next_section, place_of
from fastdeitlt.reporting.page import Block, Code, Figure, Fold, Page, Section, Table, best_cells, write
from fastdeitlt.reporting.published import published_for, published_table
from fastdeitlt.reporting.recommended import recommendation_section
from fastdeitlt.reporting.scores import score_sections
from fastdeitlt.run.run_files import RunFiles, column, read_run

__all__ = ["compare", "write_report"]

CAPTIONS = {
    "threshold split": "Threshold split: over 100, 20 to 100, under 20 images",
    "official split": "Official split: index ranges of the DeiT-LT code",
    "thirds by class size": "Thirds by class size",
}
SPLITS = {
    "official split": "The threshold split groups classes by their number of training images. The official split is "
    "that of the DeiT-LT code for this number of classes: fixed index ranges of the classes sorted by size. Published "
    "tables mix both.",
    "thirds by class size": "The threshold split groups classes by their number of training images. No split is "
    "published for this data set; the second split divides the classes, sorted by size, into thirds.",
}
"""Description of the two splits, by title of the second."""


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's page, by default ``report.html`` in its folder.

    The confusion matrix is written to a CSV file next to it.

    Raises:
        UserError: see ``read_run``.
    """
    run = read_run(run_dir)
    analyses = analysis.sections(run.folder)
    sections = [
        recommendation_section(run),
        _headline(run),
        _signs(run),
        _learning(run),
        *score_sections(run),
        *analyses,
        _speed(run),
        *_set_up(run),
    ]
    page = Page(run.name, _lead(run), [section for section in sections if section.blocks], _tiles(run))
    path = write(page, Path(out) if out else run.folder / "report.html")
    write_confusion(run, path)
    return path


def _lead(run: RunFiles) -> str:
    dataset = run.cfg.data.title if run.cfg else "unknown data"
    model = "a model"
    if run.cfg:
        model = f"teacher {run.cfg.teacher_training.arch}" if run.is_teacher else run.cfg.student.name
    what = f"{model} on {dataset}"
    if (result := run.tested) is None:
        return f"{what}. {'No test or validation images.' if run.results else 'No test results yet.'}"
    chosen = run.results.get("selected") or {}
    weights = {"model": "weights", "ema": "averaged weights"}.get(chosen.get("weights", ""), "weights")
    epoch = f" of epoch {chosen['epoch'] + 1}" if "epoch" in chosen else ""
    on = {"val": "selected on validation images", "test": "selected on the test images", "last": "not selected"}
    how = on.get(chosen.get("on", ""), "")
    if how and chosen["on"] != "last" and "by" in chosen:
        how += f" by {SELECT_BY[chosen['by']]}"
    images = result.size(f"{run.tested_on} images")
    return f"{what}: {images} of {counted(len(result.counts_K), 'class')}, {weights}{epoch}{f', {how}' if how else ''}."


def _tiles(run: RunFiles) -> list[tuple[str, str]]:
    if (result := run.tested) is None:
        return []
    tiles = [
        (f"{cell(result.accuracy())} %", "accuracy" if run.is_teacher else "accuracy, mean of both heads"),
        (f"{cell(result.accuracy(group='tail', split='official'))} %", f"on {_tail_classes(result)}"),
    ]
    if run.teacher:
        gain = result.accuracy() - run.teacher.accuracy()
        tiles.append((f"{abs(gain):.1f}", f"points {'above' if gain >= 0 else 'below'} the teacher"))
    if run.steps:
        tiles.append((f"{np.median(column(run.steps, 'images_per_s')):,.0f}", "training images per second"))
    return tiles


def _tail_classes(result: Result) -> str:
    number = result.num_classes["official"]["tail"]
    return f"the {counted(number, 'tail class')} ({result.split_name()})"


def _headline(run: RunFiles) -> Section:
    if (result := run.tested) is None:
        return Section("Result", "", [])
    note = (
        "Top-1 accuracy in per cent. AVG is the mean of the two heads' logits. All is over images; head, mid and tail "
        f"are means of class accuracies. {SPLITS[result.split_name()]} Compare only figures of the same split."
    )
    blocks: list[Block] = [_accuracy_table(run, result, split) for split in result.num_classes]
    blocks += _published(run, result)
    blocks += arms_table(run, result)
    heads = {name: head.top1["official"] for name, head in result.heads.items()}
    if run.teacher:
        heads["TEACHER"] = run.teacher.heads[run.teacher.main].top1["official"]
    heights = {name: [row[group] for group in GROUPS] for name, row in heads.items()}
    blocks.append(Figure(f"Accuracy in %, {result.split_name()}", figures.bars(GROUPS, heights, figures.COLOURS)))
    rows = [
        [name, cell(head.top5["threshold"]["all"]), cell(head.balanced_accuracy), cell(head.macro_f1)]
        for name, head in result.heads.items()
    ]
    header = ["", "top-5", "balanced accuracy", "macro F1"]
    blocks.append(Table("Other measures, all classes, in %", header, rows))
    if {"CLS", "DIST"} <= heads.keys():
        gaps = [heads["CLS"][group] - heads["DIST"][group] for group in ("head", "tail")]
        if np.isfinite(gaps).all():
            text = f"{gaps[0]:+.1f} points on the head, {gaps[1]:+.1f} on the tail"
            note += f" CLS minus DIST, {result.split_name()}: {text}."
    return Section("Result", note, blocks)


def _accuracy_table(run: RunFiles, result: Result, split: str) -> Table:
    ours = {name: head.top1[split] for name, head in result.heads.items()}
    others = result.beside(split, run.teacher, published_for(run, split))
    num_classes = {"all": len(result.counts_K), **result.num_classes[split]}
    rows = [[name, *(cell(row.get(group)) for group in GROUPS)] for name, row in (ours | others).items()]
    header = ["", *(f"{group} ({num_classes[group]:,})" for group in GROUPS)]
    caption = CAPTIONS[result.split_name(split)]
    return Table(caption, header, rows, quiet=frozenset(others), best=best_cells(rows[: len(ours)]))


def _published(run: RunFiles, result: Result) -> list[Block]:
    """Return the published table for the training set, with this run first."""
    published_rows = published_table(run.cfg.data) if run.cfg else None
    if published_rows is None:
        return []
    name, published = published_rows
    splits = result.num_classes
    rows = [["this run", *(cell(result.accuracy(None, group, split)) for group in GROUPS), split] for split in splits]
    rows += [[p.method, *(cell(p.by_group.get(group)) for group in GROUPS), p.split or "-"] for p in published]
    others = frozenset(p.method for p in published)
    return [Table(f"Published on {name} (DeiT-LT, CVPR 2024)", ["", *GROUPS, "split"], rows, quiet=others, wide=True)]


def _signs(run: RunFiles) -> Section:
    """Return the section of the run's signs of failure (signs.py)."""
    title = "Signs of failure"
    if not run.signs:
        return Section(title, "", [])
    last, checks = run.signs[-1], len(run.signs)
    names = {sign["name"]: sign for sign in last["signs"]}
    rows = []
    for name, sign in names.items():
        epochs = [r["epoch"] + 1 for r in run.signs if any(x["seen"] and x["name"] == name for x in r["signs"])]
        when = f"{len(epochs)} of {checks}" + (f", last after epoch {epochs[-1]}" if epochs else "")
        rows.append([name, "yes" if sign["seen"] else "no", when, sign["text"]])
    note = (
        f"Checked on the selection set in {counted(checks, 'evaluation')} since the start of re-weighting; the figures "
        f"are of epoch {last['epoch'] + 1}, {last['weights']} weights."
    )
    return Section(title, note, [Table("", ["sign", "seen", "evaluations", "figures"], rows, text=True, wide=True)])


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
    for group in ("all", "tail"):
        lines = {
            head: ([epoch for epoch, _ in evaluations], [r.accuracy(head, group, "official") for _, r in evaluations])
            for head in (evaluations[0][1].heads if evaluations else ())
        }
        if lines:
            svg = figures.curves(lines, "accuracy in %", figures.COLOURS, drw_epoch, percent=True)
            title = "all classes" if group == "all" else f"tail classes ({evaluations[0][1].split_name()})"
            blocks.append(Figure(f"Accuracy on {split}, {title}, {weights} weights", svg))
    blocks += _heads_over_time(run, weights, drw_epoch)
    note = "Losses are means between log lines."
    if drw_epoch >= 0:
        loss = "loss" if run.is_teacher else "DIST loss"
        note += f" The dotted line marks epoch {drw_epoch}, from which the {loss} is re-weighted (DRW)."
    return Section("Learning", note, blocks)


def _heads_over_time(run: RunFiles, weights: str, drw_epoch: int) -> list[Block]:
    """Return figures of feature cosine and tail accuracy, training and held-out."""
    points = [e for e in run.evaluations if e["weights"] == weights and "cosine_all" in e]
    if not points:
        return []
    epochs = [e["epoch"] + 1 for e in points]
    groups = {"all": figures.INK, "head": figures.RUN_COLOURS[0], "tail": figures.RUN_COLOURS[1]}
    cosines = {group: (epochs, column(points, f"cosine_{group}")) for group in groups}
    svg = figures.curves(cosines, "cosine", groups, drw_epoch)
    blocks: list[Block] = [Figure("Cosine of CLS and DIST features", svg)]
    points = [e for e in points if e.get("tail_seen")]
    if points:
        epochs = [e["epoch"] + 1 for e in points]
        lines = {
            name: (epochs, [Result.from_json(e[key]).accuracy("AVG", "tail", "official") for e in points])
            for name, key in (("training images", "tail_seen"), ("held-out images", "result"))
        }
        colours = dict(zip(lines, figures.RUN_COLOURS[1::-1], strict=False))
        svg = figures.curves(lines, "accuracy in %", colours, drw_epoch, percent=True)
        blocks.append(Figure("AVG on tail classes: training images, held-out images", svg))
    return blocks


def _speed(run: RunFiles) -> Section:
    note = "Training loop without evaluation and checkpoints; medians over log lines."
    if not run.steps:
        return Section("Speed", note, [])
    rows = [
        ["images per second", *(f"{v:,.0f}" for v in np.nanpercentile(column(run.steps, "images_per_s"), (50, 10, 90)))]
    ]
    for key, name in (("data_wait", "waiting for data, %"), ("mfu", "MFU, %")):
        if any(key in record for record in run.steps):
            rows.append([name, *(f"{100 * v:.1f}" for v in np.nanpercentile(column(run.steps, key), (50, 10, 90)))])
    table = Table("Training speed", ["", "median", "10th pct.", "90th pct."], rows)
    lines = {"images/s": (column(run.steps, "time"), column(run.steps, "images_per_s"))}
    svg = figures.curves(lines, "images per second", {"images/s": figures.INK}, from_zero=True)
    return Section("Speed", note, [Figure("Training images per second", svg), table])


def _set_up(run: RunFiles) -> list[Section]:
    environment = Section("Environment", "Hardware and software of the run.", [])
    if run.environment:
        environment.blocks.append(Table("", [], _flat(run.environment), text=True))
    sections = [environment]
    if run.cfg is not None:
        title, header = "Settings that differ from the defaults", ["setting", "value", "default", "meaning"]
        changed: list[Block] = [
            Table(title, header, _changes(run.cfg), text=True, wide=True),
            Fold("Full configuration", Code(config.dump(run.cfg))),
        ]
        commit = run.environment.get("commit")
        lines = [f"git checkout {commit}"] if commit else []
        verb = "train-teacher" if run.is_teacher else "train"
        lines.append(f"fastdeitlt {verb} {place_of(run)}/config.yaml name={run.name}-again")
        sections.append(Section("Configuration", f"{title}, with their meaning.", changed))
        note = "Run these commands in the folder that this report was made in:"
        sections.append(Section("Reproduce this run", note, [Code("\n".join(lines))]))
    return [*sections, next_section(run)]


def _changes(cfg: config.Config) -> list[list[str]]:
    now, default = config.flatten(cfg), config.flatten(config.Config())
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
        shown = ("not installed" if prefix == "packages " else "none") if value is None else str(value)
        rows += _flat(value, f"{key} ") if isinstance(value, dict) else [[f"{prefix}{key}", shown]]
    return rows
