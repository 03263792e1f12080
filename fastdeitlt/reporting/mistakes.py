"""Report section on mistakes: confusion matrix (also as CSV), pairs, gallery."""

# K classes

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from fastdeitlt.errors import csv_name
from fastdeitlt.evaluation.metrics import Confusion, Result
from fastdeitlt.reporting.heat_map import MAX_NUMBERED, heat_map
from fastdeitlt.reporting.page import Block, Figure, Gallery, Section, Table
from fastdeitlt.run.run_files import RunFiles
from fastdeitlt.store.files import read_json, write_atomically

MAX_DRAWN = 50
"""Most classes with a drawn matrix; more have a longer table of the worst pairs instead."""
NUM_PAIRS = 20


def read_images(run: RunFiles) -> dict[str, Any]:
    """Return the run's per-image test results (``per_image.image_facts``), or {}."""
    return read_json(run.folder / "analysis" / "images.json")


def mistakes_section(run: RunFiles, result: Result) -> Section:
    """Return the section on the main head's mistakes."""
    facts = read_images(run)
    blocks: list[Block] = []
    pairs = result.heads[result.main].confusions
    note = f"Errors of {result.main} on {run.tested_on} images."
    if facts:
        every = [Confusion(label, predicted, numbers[0]) for label, predicted, *numbers in facts["confusion"]]
        num_classes = len(result.counts_K)
        if num_classes <= MAX_DRAWN:
            blocks.append(_matrix(run, result, every))
            note += " Rows of the matrix are classes, largest first; columns are predictions."
        else:
            wrong = [pair for pair in every if pair.label != pair.predicted and pair.num_images]
            pairs = sorted(wrong, key=lambda pair: (-pair.num_images, result.support_K[pair.label]))[:NUM_PAIRS]
        note += f" The CSV file beside this page has all pairs of classes, for {', '.join(facts['heads'])}."
    blocks.append(_pair_table(run, result, pairs))
    if facts.get("mistakes"):
        blocks.append(_gallery(run, facts))
    return Section("Mistakes", note, blocks)


def _matrix(run: RunFiles, result: Result, pairs: list[Confusion]) -> Figure:
    order_K = np.argsort(-np.array(result.counts_K), kind="stable")
    place_K = np.argsort(order_K)
    matrix_KK = np.zeros((len(order_K), len(order_K)), dtype=np.int64)
    for pair in pairs:
        matrix_KK[place_K[pair.label], place_K[pair.predicted]] += pair.num_images
    names = [run.class_name(k) for k in order_K.tolist()]
    wide = len(names) > MAX_NUMBERED
    return Figure(f"Confusion matrix of {result.main}, in images", heat_map(matrix_KK, names), wide=wide)


def _pair_table(run: RunFiles, result: Result, pairs: list[Confusion]) -> Table:
    rows = [
        [
            run.class_name(pair.label),
            run.class_name(pair.predicted),
            f"{pair.num_images} of {result.support_K[pair.label]}",
            f"{result.counts_K[pair.label]:,} / {result.counts_K[pair.predicted]:,}",
        ]
        for pair in pairs
    ]
    header = ["class", "predicted", f"{run.tested_on} images", "training images"]
    return Table(f"Most frequent confusions of {result.main}", header, rows, text=True)


def _gallery(run: RunFiles, facts: dict[str, Any]) -> Gallery:
    pictures = [
        (
            item["picture"],
            f"{run.class_name(item['label'])}, predicted {run.class_name(item['predicted'])}: "
            f"{_percent(item['probability'])}. {item['path']}",
        )
        for item in facts["mistakes"]
    ]
    how = "temperature fitted on validation images" if facts["temperature"] else "uncalibrated"
    caption = f"Most confident errors: model input and probability of the prediction ({how})"
    return Gallery(caption, pictures, small=True)


def _percent(probability: float) -> str:
    """Format a probability in % without rounding up to 100."""
    return "over 99.9 %" if probability > 0.999 else f"{100 * probability:.1f} %"


def write_confusion(run: RunFiles, report: Path) -> Path | None:
    """Write the confusion matrix as CSV, one row per non-empty pair, if there is one."""
    facts = read_images(run)
    if not facts:
        return None
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["label", "class", "predicted_label", "predicted_class", *facts["heads"]])
    for label, predicted, *numbers in facts["confusion"]:
        names = [csv_name(run.class_name(k)) for k in (label, predicted)]
        writer.writerow([label, names[0], predicted, names[1], *numbers])
    path = report.with_name(f"{report.stem}-confusion.csv")
    write_atomically(path, text.getvalue())
    return path
