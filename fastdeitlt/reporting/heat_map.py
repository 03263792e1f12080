"""Confusion matrix as inline SVG with names and tooltips, without a script."""

# K classes

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape
from rich.cells import cell_len, set_cell_size

from fastdeitlt.errors import counted, printable
from fastdeitlt.reporting.figures import COLOURS, INK

RIGHT, WRONG, EMPTY = COLOURS["CLS"], COLOURS["DIST"], "#f3f4f6"
SIDE = 460
"""Side of the matrix in SVG units, unless cells are limited by ``CELL``."""
CELL = (13.0, 44.0)
FONT = 11.0
"""Smallest font size of the names, in SVG units."""
NAME_LENGTH = 16
"""Columns drawn of a class name, of which a CJK character or emoji takes two; the tooltip has all of it."""
MAX_NUMBERED = 15
"""Most classes with a number in each cell."""


def heat_map(matrix_KK: np.ndarray, names: Sequence[str]) -> Markup:
    """Draw a confusion matrix: rows are labels, columns predictions.

    Args:
        matrix_KK: images, int64, in the order to draw.
        names: class names [K].

    Returns:
        An <svg> element.
    """
    num_classes = len(names)
    cell = float(np.clip(SIDE / num_classes, *CELL))
    font = max(FONT, 0.36 * cell)
    names = [printable(name) for name in names]
    short = [name if cell_len(name) <= NAME_LENGTH else f"{set_cell_size(name, NAME_LENGTH - 1)}…" for name in names]
    margin = 0.62 * font * max(map(cell_len, short)) + 8
    side = margin + cell * num_classes + 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side:.0f} {side:.0f}" font-size="{font:.1f}" '
        f'font-family="system-ui, Helvetica, Arial, sans-serif" fill="{INK}">'
        f'<rect x="{margin:.1f}" y="{margin:.1f}" width="{cell * num_classes:.1f}" height="{cell * num_classes:.1f}" '
        f'fill="{EMPTY}"/>'
    ]
    for index, (name, whole) in enumerate(zip(short, names, strict=True)):
        middle = margin + (index + 0.5) * cell
        titled = f"<title>{escape(whole)}</title>{escape(name)}"
        parts.append(
            f'<text x="{margin - 5:.1f}" y="{middle:.1f}" text-anchor="end" dominant-baseline="central">{titled}</text>'
            f'<text transform="translate({middle:.1f} {margin - 5:.1f}) rotate(-90)" dominant-baseline="central">'
            f"{titled}</text>"
        )
    support_K = matrix_KK.sum(axis=1)
    for row, column in np.argwhere(matrix_KK):
        number, total = int(matrix_KK[row, column]), int(support_K[row])
        left, top, strength = margin + column * cell, margin + row * cell, 0.12 + 0.88 * number / total
        tooltip = f"{names[row]}, predicted {names[column]}: {number:,} of {counted(total, 'image')}"
        parts.append(
            f'<g><title>{escape(tooltip)}</title><rect x="{left:.1f}" y="{top:.1f}" width="{cell:.1f}" '
            f'height="{cell:.1f}" fill="{RIGHT if row == column else WRONG}" fill-opacity="{strength:.2f}"/>'
        )
        if num_classes <= MAX_NUMBERED:
            colour = "#fff" if strength > 0.6 else INK
            parts.append(
                f'<text x="{left + cell / 2:.1f}" y="{top + cell / 2:.1f}" text-anchor="middle" '
                f'dominant-baseline="central" fill="{colour}">{number}</text>'
            )
        parts.append("</g>")
    return Markup("".join([*parts, "</svg>"]))
