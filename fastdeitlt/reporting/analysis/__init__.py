"""Analyses of finished runs, one per module: `fastdeitlt analyze <module> RUN...`.

A module has ``main`` for the verb and ``leave`` for the end of training, which both write analysis/<module>.json in the
run folder, and ``section`` for its part of the report.
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
"""Modules with a section in the report, in order."""


def look_into(run_dir: Path, num_images: int, names: Sequence[str] = REPORTED) -> None:
    """Write analyses of a student's run.

    On up to ``num_images`` images each; 0: none.

    A failed analysis is logged, and the report shows the command that repeats it.
    """
    for name in names if num_images else ():
        try:
            import_module(f"{__name__}.{name}").leave(run_dir, num_images)
        except Exception as error:  # the run is complete without its analysis
            trace = not isinstance(error, UserError)
            log.warning("analyze %s: %s; continuing without this analysis", name, error, exc_info=trace)


def sections(run_dir: Path) -> list[Section]:
    """Return the report sections of a run's existing analyses.

    Raises:
        UserError: an analysis file cannot be read.
    """
    all_facts = {name: read_json(run_dir / "analysis" / f"{name}.json") for name in REPORTED}
    return [import_module(f"{__name__}.{name}").section(facts) for name, facts in all_facts.items() if facts]
