"""What a finished run can still tell: one module a question, `fastdeitlt analyze <module> RUN...`.

A module has ``main``, what the verb does, and ``leave``, what the end of training does; both leave their numbers in the
run folder as analysis/<module>.json, from which ``section`` makes the part of the report.
"""

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from fastdeitlt.errors import UserError
from fastdeitlt.reporting.page import Section
from fastdeitlt.store.files import read_json

log = logging.getLogger("fastdeitlt")
REPORTED = ("student", "teacher")
"""Modules with a section in the report, in its order."""


def look_into(run_dir: Path, num_images: int, names: Sequence[str] = REPORTED) -> None:
    """Leave analyses of a finished student's run in its folder, each on up to ``num_images`` images; 0: none.

    One that fails is told in the log and spoils nothing: the report then names the command that tries it again.
    """
    for name in names if num_images else ():
        try:
            import_module(f"{__name__}.{name}").leave(run_dir, num_images)
        except Exception as error:  # whatever it is, the run is trained and tested
            trace = not isinstance(error, UserError)
            log.warning("analyze %s: %s; going on without it", name, error, exc_info=trace)


def sections(run_dir: Path) -> list[Section]:
    """The report's sections of all analyses that were made of a run.

    Raises:
        UserError: a file of an analysis cannot be read.
    """
    found = {name: read_json(run_dir / "analysis" / f"{name}.json") for name in REPORTED}
    return [import_module(f"{__name__}.{name}").section(facts) for name, facts in found.items() if facts]
