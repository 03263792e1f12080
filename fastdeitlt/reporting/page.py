"""Building blocks of an HTML page, rendered by the template report.html."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import rich.table
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.text import Text

from fastdeitlt import __version__
from fastdeitlt.errors import UserError, printable
from fastdeitlt.store.files import write_atomically


@dataclass(frozen=True)
class Table:
    """A table; with ``text`` left-aligned and wrapped, with ``wide`` across the page."""

    kind: ClassVar[str] = "table"
    caption: str
    header: list[str]
    rows: list[list[str]]
    text: bool = False
    wide: bool = False
    commands: bool = False
    """Format the last column as shell commands."""
    quiet: frozenset[str] = frozenset()
    """First cells of reference rows."""
    best: frozenset[tuple[str, int]] = frozenset()
    """(first cell, column) of bold cells."""


@dataclass(frozen=True)
class Figure:
    """An inline <svg>; with ``wide`` across the page, scrolling on small screens."""

    kind: ClassVar[str] = "figure"
    caption: str
    svg: Markup
    wide: bool = False


@dataclass(frozen=True)
class Gallery:
    """Pictures with captions."""

    kind: ClassVar[str] = "gallery"
    caption: str
    pictures: list[tuple[str, str]]
    """(URL, caption); only data: URIs, because the page loads nothing else."""
    small: bool = False
    """Single images, not strips."""


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    kind: ClassVar[str] = "code"
    content: str


@dataclass(frozen=True)
class Fold:
    """A collapsible block."""

    kind: ClassVar[str] = "fold"
    summary: str
    block: "Table | Code"


Block = Table | Figure | Gallery | Code | Fold


@dataclass(frozen=True)
class Section:
    """A heading, a note and blocks."""

    title: str
    note: str
    blocks: list[Block]


@dataclass(frozen=True)
class Page:
    """Content of report.html; ``tiles`` are (value, label) pairs under the title."""

    title: str
    lead: str
    sections: list[Section]
    tiles: list[tuple[str, str]] = field(default_factory=list)


def best_cells(rows: list[list[str]]) -> frozenset[tuple[str, int]]:
    """Return (first cell, column) of each column's largest displayed numbers."""
    best = set()
    for column in range(1, len(rows[0]) if rows else 0):
        numbers = {row[0]: float(row[column]) for row in rows if row[column] != "-"}
        best |= {(name, column) for name, number in numbers.items() if number == max(numbers.values())}
    return frozenset(best)


def for_terminal(table: Table) -> rich.table.Table:
    """Convert a table for the terminal."""
    rich_table = rich.table.Table(title=table.caption, title_justify="left")
    for number, name in enumerate(table.header):
        rich_table.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        rich_table.add_row(*(Text(printable(text)) for text in row))
    return rich_table


def _escaped(value: object) -> object:
    """Escape control characters in template values, except line breaks and markup."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(printable, value.split("\n")))


def write(page: Page, path: Path) -> Path:
    """Render ``page`` to one HTML file without scripts or external requests.

    Raises:
        UserError: the file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("fastdeitlt.reporting", ""),
        autoescape=True,
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(page=page, version=__version__)
    try:
        write_atomically(path, html)
    except OSError as error:
        raise UserError(f"page {path}: cannot be written ({error.strerror}). Set another file with --out.") from None
    return path
