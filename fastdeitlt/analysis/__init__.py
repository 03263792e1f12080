"""What a finished run can still tell: one module a question, `fastdeitlt analyze <module> RUN...`.

A module has ``main``, what the verb does; it leaves its numbers in the run folder as analysis/<module>.json, from which
``section`` makes the part of the report.
"""

from importlib import import_module
from pathlib import Path

from fastdeitlt.page import Section
from fastdeitlt.run_files import read_json

REPORTED = ("student", "teacher")
"""Modules with a section in the report, in its order."""


def sections(run_dir: Path) -> list[Section]:
    """The report's sections of all analyses that were made of a run.

    Raises:
        UserError: a file of an analysis cannot be read.
    """
    found = {name: read_json(run_dir / "analysis" / f"{name}.json") for name in REPORTED}
    return [import_module(f"{__name__}.{name}").section(facts) for name, facts in found.items() if facts]
