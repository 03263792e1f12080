"""The building blocks of an HTML page and its one template, report.html, which escapes every text it is given."""

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
    """Rows of texts under a header; ``text`` tables are left-aligned and wrap, ``wide`` ones take the page's width."""

    kind: ClassVar[str] = "table"
    caption: str
    header: list[str]
    rows: list[list[str]]
    text: bool = False
    wide: bool = False
    commands: bool = False
    """The last column is for a shell."""
    quiet: frozenset[str] = frozenset()
    """First cells of the rows that are only there to compare with."""
    best: frozenset[tuple[str, int]] = frozenset()
    """(first cell, column) of the cells in bold."""


@dataclass(frozen=True)
class Figure:
    """An inline <svg> that this program drew; a ``wide`` one takes the page's width and scrolls on a phone."""

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
    """(address, caption); the address is a data: URI, which is all that the page may load."""
    small: bool = False
    """Single images rather than strips."""


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    kind: ClassVar[str] = "code"
    content: str


@dataclass(frozen=True)
class Fold:
    """A block that is shown on request."""

    kind: ClassVar[str] = "fold"
    summary: str
    block: "Table | Code"


Block = Table | Figure | Gallery | Code | Fold


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and blocks."""

    title: str
    note: str
    blocks: list[Block]


@dataclass(frozen=True)
class Page:
    """What report.html shows. ``tiles`` are (value, label) pairs under the title."""

    title: str
    lead: str
    sections: list[Section]
    tiles: list[tuple[str, str]] = field(default_factory=list)


def best_cells(rows: list[list[str]]) -> frozenset[tuple[str, int]]:
    """(first cell, column) of the largest number of each column as shown, ties included; '-' is no number."""
    found = set()
    for column in range(1, len(rows[0]) if rows else 0):
        numbers = {row[0]: float(row[column]) for row in rows if row[column] != "-"}
        found |= {(name, column) for name, number in numbers.items() if number == max(numbers.values())}
    return frozenset(found)


def for_terminal(table: Table) -> rich.table.Table:
    """Return a table as the terminal shows it."""
    shown = rich.table.Table(title=table.caption, title_justify="left")
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*(Text(printable(text)) for text in row))
    return shown


def _shown(value: object) -> object:
    """What the template shows: names without control characters; markup and the lines of a block stay."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(printable, value.split("\n")))


def write(page: Page, path: Path) -> Path:
    """Render ``page`` to ``path`` as one self-contained HTML file: no script, no external request.

    Raises:
        UserError: the file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("fastdeitlt.reporting", ""),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(page=page, version=__version__)
    try:
        write_atomically(path, html)
    except OSError as error:
        raise UserError(f"page {path}: cannot be written ({error.strerror}); choose another place with --out") from None
    return path
