"""Stage 10: one HTML page of a run, or of several side by side, from the run folder alone."""

# K classes

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from fastdeitlt import config, figures
from fastdeitlt.config import Config
from fastdeitlt.errors import UserError
from fastdeitlt.metrics import GROUPS, HeadResult, Result, cell
from fastdeitlt.page import Block, Code, Figure, Fold, Page, Section, Table, write

SPLITS = {"threshold": "more than 100, 20 to 100, fewer than 20 images", "official": "index ranges of the DeiT-LT code"}
MAX_CLASS_ROWS = 200
Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; missing files are None or empty."""

    folder: Path
    cfg: Config | None
    environment: dict[str, Any]
    steps: list[Record]
    evaluations: list[Record]
    results: dict[str, Any]
    class_names: list[str] | None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def tested(self) -> tuple[str, Result] | None:
        """The set that the chosen weights were reported on ("test", else "val") and the scores."""
        for name in ("test", "val"):
            if self.results.get(name):
                return name, Result.from_json(self.results[name])
        return None

    @property
    def teacher(self) -> Result | None:
        """The teacher's scores on the same set."""
        return Result.from_json(self.results["teacher"]) if self.results.get("teacher") else None

    @property
    def published(self) -> dict[str, float]:
        """Published accuracies in per cent by group."""
        return self.results.get("published") or (self.cfg.published if self.cfg else {})

    def class_name(self, index: int) -> str:
        """The name of a class, or its number."""
        return self.class_names[index] if self.class_names else f"class {index}"


def read_run(folder: str | Path) -> RunFiles:
    """Read what a run folder holds.

    Raises:
        UserError: no such folder, nothing of a run in it, or a file that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"run folder {folder}: no such folder; give runs/<name>")
    config_file = folder / "config.yaml"
    records = _read_records(folder / "metrics.jsonl")
    results = _read_json(folder / "results.json")
    if not (config_file.is_file() or records or results):
        raise UserError(f"run folder {folder}: no config.yaml, metrics.jsonl or results.json; give runs/<name>")
    manifests = [_read_json(folder / "checkpoints" / which / "manifest.json") for which in ("best", "last")]
    return RunFiles(
        folder=folder,
        cfg=config.load(str(config_file)) if config_file.is_file() else None,
        environment=_read_json(folder / "env.json"),
        steps=_place_in_epochs([record for record in records if record.get("kind") == "step"]),
        evaluations=[record for record in records if record.get("kind") == "eval"],
        results=results,
        class_names=next((m["class_names"] for m in manifests if m.get("class_names")), None),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore or remove it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: got a {type(tree).__name__}, expected an object; restore or remove it")
    return tree


def _read_records(path: Path) -> list[Record]:
    """The whole lines of metrics.jsonl; a last line that a crash cut short is not one."""
    records: list[Record] = []
    if not path.is_file():
        return records
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: not JSON ({error}); remove the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number}: got {line.strip()[:40]!r}, expected an object; remove the line")
        records.append(record)
    return records


def _place_in_epochs(steps: list[Record]) -> list[Record]:
    """Add "time", the fractional epoch of each record: records of one epoch are evenly spread over it."""
    by_epoch: dict[int, list[Record]] = {}
    for record in steps:
        by_epoch.setdefault(record["epoch"], []).append(record)
    return [
        record | {"time": epoch + (index + 1) / len(records)}
        for epoch, records in by_epoch.items()
        for index, record in enumerate(records)
    ]


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
    student = f"{run.cfg.student.name} on {dataset}" if run.cfg else dataset
    if run.tested is None:
        return f"{student}. No results yet: the run has not been tested."
    name, result = run.tested
    chosen = run.results.get("selected") or {}
    weights = {"model": "weights", "ema": "averaged weights"}.get(chosen.get("weights", ""), "weights")
    epoch = f" of epoch {chosen['epoch'] + 1}" if "epoch" in chosen else ""
    on = {"val": "chosen on validation images", "test": "chosen on the test images", "last": "the last ones"}
    how = on.get(chosen.get("on", ""), "")
    images = f"{result.num_images:,} {'test' if name == 'test' else 'validation'} images"
    return f"{student}: {images} of {len(result.counts_K):,} classes, {weights}{epoch}{f', {how}' if how else ''}."


def _tiles(run: RunFiles) -> list[tuple[str, str]]:
    if run.tested is None:
        return []
    _, result = run.tested
    tiles = [
        (f"{cell(result.accuracy())} %", "accuracy, mean of both heads"),
        (f"{cell(result.accuracy(group='tail', split='official'))} %", "on the tail (official split)"),
    ]
    if run.teacher:
        gain = result.accuracy() - run.teacher.accuracy(next(iter(run.teacher.heads)))
        tiles.append((f"{gain:+.1f}", "points over the teacher"))
    tiles.append((f"{cell(100 / len(result.counts_K))} %", "chance"))
    if run.steps:
        tiles.append((f"{np.median(_column(run.steps, 'images_per_s')):,.0f}", "training images a second"))
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
    header = ["", "top-5", "balanced acc.", "macro F1", "ECE", "NLL", "Brier"]
    blocks.append(Table("Other measures, all classes", header, [_measures(n, h) for n, h in result.heads.items()]))
    first = result.heads
    if {"CLS", "DIST"} <= first.keys():
        cls, dist = first["CLS"].top1["official"], first["DIST"].top1["official"]
        note += (
            f" By the official split CLS minus DIST is {cls['head'] - dist['head']:+.1f} points on the head and "
            f"{cls['tail'] - dist['tail']:+.1f} on the tail."
        )
    return Section("Result", note, blocks)


def _accuracy_table(run: RunFiles, result: Result, split: str) -> Table:
    ours = {name: head.top1[split] for name, head in result.heads.items()}
    others: dict[str, dict[str, float]] = {}
    if run.teacher:
        others["teacher"] = next(iter(run.teacher.heads.values())).top1[split]
    others["chance"] = dict.fromkeys(GROUPS, 100 / len(result.counts_K))
    if run.published:
        others["published"] = run.published
    num_classes = {"all": len(result.counts_K), **result.num_classes[split]}
    rows = [[name, *(cell(row.get(group)) for group in GROUPS)] for name, row in (ours | others).items()]
    best = frozenset(
        (max(ours, key=lambda name: ours[name][group]), column)
        for column, group in enumerate(GROUPS, 1)
        if not math.isnan(ours["AVG" if "AVG" in ours else next(iter(ours))][group])
    )
    header = ["", *(f"{group} ({num_classes[group]:,})" for group in GROUPS)]
    return Table(f"{split} split: {SPLITS[split]}", header, rows, quiet=frozenset(others), best=best)


def _measures(name: str, head: HeadResult) -> list[str]:
    values = (head.top5["threshold"]["all"], head.balanced_accuracy, head.macro_f1, head.ece["threshold"]["all"])
    fractions = (head.nll["threshold"]["all"], head.brier["threshold"]["all"])
    return [name, *(cell(value) for value in values), *(cell(value, 3) for value in fractions)]


def _column(records: Sequence[Record], name: str) -> list[float]:
    return [math.nan if record.get(name) is None else float(record[name]) for record in records]
