"""Report figures as inline SVG with real text and no global matplotlib state."""

# K classes

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastdeitlt.evaluation.metrics import Result

COLOURS = {"AVG": "#111827", "CLS": "#2563eb", "DIST": "#d97706", "TEACHER": "#6b7280"}
INK, FAINT, GRID = "#374151", "#9ca3af", "#e5e7eb"
RUN_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#4b5563", "#be185d")
SIZE_INCHES = (5.2, 3.1)
MARGINS = {"left": 0.12, "right": 0.98, "bottom": 0.15, "top": 0.93}
LEGEND_INCHES = 0.18
"""Height of a legend's row."""
PERCENT = (0, 103)  # room for a marker at 100
MAX_POINTS = 400
MAX_INTERVALS = 40
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
}

Line = tuple[Sequence[float], Sequence[float]]  # x, y


def curves(
    lines: Mapping[str, Line],
    ylabel: str,
    colours: Mapping[str, str],
    drw_epoch: int = -1,
    percent: bool = False,
    from_zero: bool = False,
) -> Markup:
    """Draw lines over epochs, thinned by local means, with the start of re-weighting.

    Args:
        lines: legend -> (epochs, values). A legend ending in " tail" is dashed.
        drw_epoch: first re-weighted epoch; -1 = none.
        percent: fix the axis to 0..100.
        from_zero: start the axis at 0.

    Returns:
        An <svg> element.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _new()
        for name, (x, y) in lines.items():
            style = "--" if name.endswith(" tail") else "-"
            marker = "o" if len(x) == 1 else None
            axes.plot(*_thin(x, y), style, marker=marker, markersize=3, color=colours[name])
        if percent:
            axes.set_ylim(*PERCENT)
        if from_zero:
            axes.set_ylim(0, 1.15 * max(max(y) for _, y in lines.values()))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=False)
        if drw_epoch >= 0:
            axes.axvline(drw_epoch, color=FAINT, linewidth=1, linestyle=":")
            _label_above(axes, drw_epoch, "DRW")
        axes.set(xlim=(0, None), xlabel="epoch", ylabel=ylabel)
        if len(lines) > 1:
            columns = 2 if len(lines) > 3 else 1
            names = [_folded(name, 40 // columns) for name in lines]
            axes.legend(axes.get_lines()[: len(lines)], names, loc="best", ncols=columns)
        return _svg(figure)


def class_accuracy(result: Result) -> Markup:
    """Draw the accuracy of each class over its number of training images.

    Up to 40 classes have 95 % Wilson intervals of the main head; more are averaged in up to twelve groups of similar
    size. A class without training images is drawn at half an image.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _new()
        counts_K = np.maximum(result.counts_K, 0.5)
        few = len(counts_K) <= MAX_INTERVALS
        for name in result.heads:
            x, y = _by_size(counts_K, result.class_accuracy(name), few)
            axes.plot(
                x, y, "o-", markersize=4, label=name, color=COLOURS.get(name, INK), zorder=3 if name == "AVG" else 2
            )
        first = result.main
        if few:
            order = np.argsort(-counts_K, kind="stable")
            low, high = result.class_interval(first)[order].T
            axes.vlines(counts_K[order], low, high, color=COLOURS.get(first, INK), linewidth=3, alpha=0.15)
        _shade_groups(axes, counts_K)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set(ylim=PERCENT, ylabel="accuracy in %")
        axes.set_xlabel("training images of the class (log scale, large classes left)")
        axes.legend(loc="best", ncols=3)
        return _svg(figure)


def reliability(result: Result, names: Mapping[str, str] | None = None) -> Markup:
    """Draw accuracy over confidence in fifteen bins, with the diagonal.

    Args:
        names: scores to draw -> name in the figure; None: all heads.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _new()
        axes.plot([0, 100], [0, 100], color=FAINT, linewidth=1, linestyle=":")
        for key, name in (names or dict(zip(result.heads, result.heads, strict=True))).items():
            head = result.heads[key]
            x = [100 * bar.confidence for bar in head.reliability]
            y = [100 * bar.accuracy for bar in head.reliability]
            size = [4 + 60 * bar.num_images / result.num_images for bar in head.reliability]
            axes.plot(x, y, color=COLOURS.get(name, INK), label=name)
            axes.scatter(x, y, s=size, color=COLOURS.get(name, INK))
        axes.set(xlim=PERCENT, ylim=PERCENT, xlabel="confidence in %", ylabel="accuracy in %")
        axes.legend(loc="upper left")
        return _svg(figure)


def bars(groups: Sequence[str], values: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> Markup:
    """Draw bars in %, grouped by ``groups``, one colour per name; NaN has no bar."""
    names = [_folded(name, 40) for name in values]
    fitting = int(62 / (5 + max(map(len, values), default=0)))  # columns of a legend as wide as the axes
    columns = min(max(fitting, 1), len(values))
    rows = -(-len(values) // max(columns, 1)) + sum(name.count("\n") for name in names)
    with matplotlib.rc_context(STYLE):
        figure, axes = _new(LEGEND_INCHES * (rows - 1))
        width = 0.8 / max(len(values), 1)
        for index, (name, heights) in enumerate(values.items()):
            x = np.arange(len(groups)) + (index - (len(values) - 1) / 2) * width
            axes.bar(x, np.nan_to_num(heights), width * 0.92, color=colours[name])
        axes.set_xticks(range(len(groups)), groups)
        axes.grid(axis="x", visible=False)
        axes.set(ylim=(0, 120), yticks=range(0, 101, 20), ylabel="accuracy in %")  # room for a row of the legend
        where = (0.5, 0.87)
        axes.legend(
            axes.containers, names, loc="lower center", bbox_to_anchor=where, ncols=columns, handlelength=1,
            columnspacing=1.2,
        )  # fmt: skip
        return _svg(figure)


def shifts(names: Sequence[str], lines: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> Markup:
    """Draw accuracy in % over shifted test sets; "AVG, known prior" is dashed."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _new()
        for name, values in lines.items():
            style = "--" if name.endswith("prior") else "-"
            axes.plot(range(len(names)), values, f"o{style}", markersize=3, label=name, color=colours[name])
        axes.set_xticks(range(len(names)), [name.rpartition(" ")[2].replace("uniform", "1") for name in names])
        axes.set(ylim=PERCENT, ylabel="accuracy in %")
        axes.set_xlabel("forward (frequent classes first)        uniform        backward", fontsize=8.5)
        axes.legend(loc="best", ncols=2)
        return _svg(figure)


def over_blocks(lines: Mapping[str, Sequence[float]], ylabel: str) -> Markup:
    """Draw one line per name over a model's blocks, numbered from 1."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _new()
        for index, (name, values) in enumerate(lines.items()):
            x = np.arange(1, len(values) + 1)
            axes.plot(x, values, "o-", markersize=3, label=name, color=RUN_COLOURS[index % len(RUN_COLOURS)])
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.set(ylim=(min(0, *(min(values) for values in lines.values())), None), xlabel="block", ylabel=ylabel)
        axes.legend(loc="best", ncols=2)
        return _svg(figure)


def distances(distance_LH: Sequence[Sequence[float]], uniform: float) -> Markup:
    """Draw each head's mean attention distance by block; dotted: uniform attention."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _new()
        for block, heads in enumerate(distance_LH, 1):
            axes.plot([block] * len(heads), heads, "o", markersize=4, alpha=0.6, color=COLOURS["CLS"])
        axes.axhline(uniform, color=FAINT, linewidth=1, linestyle=":")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        top = 1.15 * max(uniform, *(max(heads) for heads in distance_LH))
        axes.set(xlim=(0.5, len(distance_LH) + 0.5), ylim=(0, top), xlabel="block", ylabel="pixels")
        return _svg(figure)


def _folded(name: str, width: int) -> str:
    """Break a legend's name into lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(name, width, drop_whitespace=False)) or name


def _new(above: float = 0.0) -> tuple[Figure, Axes]:
    """Return a figure, with ``above`` inches of room above its axes."""
    width, height = SIZE_INCHES
    share = height / (height + above)
    margins = MARGINS | {name: share * MARGINS[name] for name in ("bottom", "top")}
    figure = Figure(figsize=(width, height + above))
    return figure, figure.subplots(gridspec_kw=margins)


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    pieces = max(1, min(MAX_POINTS, len(x)))
    means = [
        np.array([piece.mean() for piece in np.array_split(np.asarray(column, dtype=float), pieces)])
        for column in (x, y)
    ]
    return means[0], means[1]


def _by_size(counts_K: np.ndarray, accuracy_K: np.ndarray, few: bool) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-counts_K, kind="stable")
    order = order[np.isfinite(accuracy_K[order])]
    if few:
        return counts_K[order], accuracy_K[order]
    pieces = np.array_split(order, min(12, len(order)))
    return np.array([counts_K[p].mean() for p in pieces]), np.array([accuracy_K[p].mean() for p in pieces])


def _shade_groups(axes: Axes, counts_K: np.ndarray) -> None:
    """Shade the middle group of the threshold split (20 to 100 images), label all."""
    low, high = counts_K.min() / 1.3, counts_K.max() * 1.3
    axes.set_xlim(low, high)
    axes.axvspan(20, 100, color=GRID, alpha=0.5, linewidth=0)
    for name, left, right in (("head", 100, high), ("mid", 20, 100), ("tail", low, 20)):
        left, right = max(left, low), min(right, high)
        if left < right:
            _label_above(axes, float(np.sqrt(left * right)), name)


def _label_above(axes: Axes, x: float, text: str) -> None:
    where = ("data", "axes fraction")
    axes.annotate(text, (x, 1), xycoords=where, ha="center", va="bottom", fontsize=8, color=INK)


def _svg(figure: Figure) -> Markup:
    """Return the <svg> element without metadata, which would have external URLs."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])
