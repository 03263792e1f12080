"""Report sections from scores: classes, mistakes, calibration, post-hoc, shifts."""

# K classes

import math

import numpy as np

from fastdeitlt.evaluation import shift
from fastdeitlt.evaluation.metrics import GROUPS, Result, cell
from fastdeitlt.evaluation.posthoc import HEADER, PostHoc
from fastdeitlt.reporting import figures
from fastdeitlt.reporting.mistakes import mistakes_section
from fastdeitlt.reporting.page import Block, Figure, Fold, Section, Table, best_cells
from fastdeitlt.run.run_files import RunFiles

MAX_CLASS_ROWS = 200


def score_sections(run: RunFiles) -> list[Section]:
    """Return sections on classes, calibration, post-hoc methods and shifts."""
    if (result := run.tested) is None:
        return []
    fitted = run.post_hoc
    classes = [_classes(run, result), mistakes_section(run, result)]
    return [*classes, _calibration(result, fitted), *_fitted(fitted), _shifted(result, fitted)]


def _classes(run: RunFiles, result: Result) -> Section:
    blocks: list[Block] = [
        Figure("Accuracy of a class against its training images", figures.class_accuracy(result)),
        Fold("All classes", _class_table(run, result)),
    ]
    return Section(
        "Classes",
        "Large classes are on the left. Pale bars are 95 % Wilson intervals of the first head. With few "
        f"{run.tested_on} images per class they are wide: do not compare single classes.",
        blocks,
    )


def _calibration(result: Result, fitted: PostHoc | None) -> Section:
    blocks: list[Block] = [Figure("Accuracy against confidence, uncalibrated", figures.reliability(result))]
    if fitted:
        names = {"AVG, temperature": "AVG", "CLS, temperature": "CLS", "DIST, temperature": "DIST"}
        svg = figures.reliability(fitted.result, names)
        blocks.append(
            Figure("Accuracy against confidence, with a temperature per head fitted on validation images", svg)
        )
    blocks.append(_calibration_table(result))
    return Section(
        "Calibration",
        "On the diagonal a confidence of 70 % is right 70 % of the time. ECE is the mean gap in per cent (15 "
        "bins), NLL the negative log-likelihood in nats, Brier the squared error of the probabilities.",
        blocks,
    )


def _fitted(fitted: PostHoc | None) -> list[Section]:
    if fitted is None:
        return []
    rows = [row[:-1] for row in fitted.rows()]
    accuracies = best_cells([row[: 1 + len(GROUPS)] for row in rows])
    meaning = [[method, text] for method, text in fitted.meaning.items()]
    return [
        Section(
            "Fitted on validation images",
            f"Post-hoc methods, fitted on {fitted.num_fitted:,} validation images with equal class weights and scored "
            f"on the test images ({fitted.result.split_name()}). T divides the logits; tau is the factor of the log "
            "training frequencies, which are subtracted; alpha is the weight of the DIST head, 0.5 in AVG.",
            [
                Table("Accuracy, ECE in %, NLL in nats", HEADER[:-1], rows, best=accuracies, wide=True),
                Table("Fitted values", ["method", "values"], meaning, text=True, wide=True),
            ],
        )
    ]


def _shifted(result: Result, fitted: PostHoc | None) -> Section:
    lines = shift.accuracies(result)
    with_prior = {"AVG, known prior": fitted.prior_known} if fitted else {}
    colours = {**figures.COLOURS, "AVG, known prior": figures.RUN_COLOURS[2]}
    names = list(shift.SHIFTS)
    series = {name: [values[shifted] for shifted in names] for name, values in (lines | with_prior).items()}
    rows = [[shifted, *(cell(values[shifted]) for values in (lines | with_prior).values())] for shifted in names]
    explanation = (
        " Known prior: AVG with the class prior fitted on validation images and the test set's prior added."
        if fitted
        else ""
    )
    return Section(
        "Other class frequencies",
        "Expected accuracy on a long-tailed test set. Forward: classes that are frequent in training are frequent in "
        f"the test too, by the stated ratio; backward: classes that are rare in training are.{explanation}",
        [
            Figure("Accuracy by shift of the test classes, in %", figures.shifts(names, series, colours)),
            Fold("Figures as a table", Table("Accuracy in %", ["test classes", *(lines | with_prior)], rows)),
        ],
    )


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
    return Table(caption, ["class", "training", run.tested_on, *result.heads, f"95 % interval of {first}"], rows)


def _calibration_table(result: Result) -> Table:
    rows = [
        [f"{name} {group}", *(cell(*pair) for pair in zip(values, (1, 3, 3), strict=True))]
        for name, head in result.heads.items()
        for group in GROUPS
        for values in [[measure["threshold"][group] for measure in (head.ece, head.nll, head.brier)]]
    ]
    return Table("By head and group (threshold split)", ["", "ECE", "NLL", "Brier"], rows)
