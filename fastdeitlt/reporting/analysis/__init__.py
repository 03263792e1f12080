"""Analyses of finished runs, one per module: `fastdeitlt analyze <module> RUN...`.

A module has ``diagnose`` for the verb, ``after_training`` for the end of training, which both return the content of
analysis/<module>.json in the run folder, and ``section`` for its part of the report.
"""

import base64
import json as json_module
import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from fastdeitlt.errors import UserError
from fastdeitlt.models.saved import run_of
from fastdeitlt.reporting.page import Fold, Section, Table, for_terminal
from fastdeitlt.store.checkpoint import find_model_folder
from fastdeitlt.store.files import expect_folder, read_json, write_atomically

log = logging.getLogger("fastdeitlt")
REPORTED = ("student", "teacher")
"""Modules with a section in the report, in order."""


def main(name: str, runs: Sequence[str], overrides: Sequence[str], *, json: Path | None, **options: Any) -> None:
    """Run an analysis: print its tables, and write its results to each run folder.

    Results of a checkpoint other than the best are only printed: the run's report is of its best weights.

    Args:
        name: the module.
        runs, overrides, options: arguments of its ``diagnose``.
        json: file for the results of all runs, by RUN.

    Raises:
        UserError: see ``diagnose``; or no folder for ``json``.
    """
    expect_folder(json)
    analysis, all_facts = _module(name), {}
    for run in runs:
        facts = all_facts[run] = analysis.diagnose(run, overrides, **options)
        for block in analysis.section(facts).blocks:
            table = block.block if isinstance(block, Fold) else block
            if isinstance(table, Table):
                Console().print(for_terminal(table))
        if (folder := run_of(Path(run))) and find_model_folder(run) == find_model_folder(folder):
            log.info("%s", write(name, facts, folder))
    if json:
        write_atomically(json, json_module.dumps(all_facts, indent=1))


def write(name: str, facts: dict[str, Any], run_dir: Path) -> Path:
    """Write results and pictures of an analysis; return RUN/analysis/<name>.json."""
    path = run_dir / "analysis" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    for index, item in enumerate(facts.get("gallery", ())):
        picture = path.parent / "attention" / f"{index:02d}-{item['group']}.png"
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(base64.b64decode(item["picture"].partition(",")[2]))
    write_atomically(path, json_module.dumps(facts, indent=1))
    return path


def look_into(run_dir: Path, num_images: int, names: Sequence[str] = REPORTED) -> None:
    """Write analyses of a student's run, on ``num_images`` images each; 0: none.

    A failed analysis is logged, and the report shows the command that repeats it.
    """
    for name in names if num_images else ():
        try:
            if facts := _module(name).after_training(run_dir, num_images):
                write(name, facts, run_dir)
        except Exception as error:  # the run is complete without its analysis
            trace = not isinstance(error, UserError)
            log.warning("analyze %s: %s; continuing without this analysis", name, error, exc_info=trace)


def sections(run_dir: Path) -> list[Section]:
    """Return the report sections of a run's existing analyses.

    Raises:
        UserError: an analysis file cannot be read.
    """
    all_facts = {name: read_json(run_dir / "analysis" / f"{name}.json") for name in REPORTED}
    return [_module(name).section(facts) for name, facts in all_facts.items() if facts]


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")
