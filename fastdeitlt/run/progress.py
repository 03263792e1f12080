"""Terminal output of a running command: console, headings, progress bars."""

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from fastdeitlt import distributed
from fastdeitlt.errors import printable

T = TypeVar("T")
log = logging.getLogger("fastdeitlt")
console = Console()


def start_bar(total: int, done: int = 0) -> Progress:
    """Start a full-width progress bar between a description and the field ``brief``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(None),
        TaskProgressColumn(),
        TextColumn("{task.fields[brief]}"),
    )
    progress = Progress(*columns, console=console, expand=True)
    progress.add_task("", total=total, completed=done, brief="")
    progress.start()
    return progress


def tracked(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yield items with a progress bar on a terminal; elsewhere log the title first."""
    if not console.is_terminal:
        log.info("%s", title)
        yield from items
        return
    bar = start_bar(total)
    try:
        for number, item in enumerate(items):
            bar.update(bar.task_ids[0], completed=number, description=title)
            yield item
        bar.update(bar.task_ids[0], completed=total)
    finally:
        bar.stop()


def heading(text: str) -> None:
    """Show a heading on rank 0."""
    if distributed.rank() == 0 and console.is_terminal:
        console.rule(printable(text), align="left")
    else:
        log.info("%s", text)
