"""Recommendation of a finished run, for the report and the final log lines."""

import json
import shlex
from pathlib import Path

from fastdeitlt.evaluation.metrics import cell
from fastdeitlt.evaluation.recommend import METHOD
from fastdeitlt.reporting.page import Code, Section, Table
from fastdeitlt.run.run_files import RunFiles


def recommendation_section(run: RunFiles) -> Section:
    """Return the section that ranks teacher and heads on validation images."""
    advice = run.recommendation
    if advice is None:
        return Section("Recommendation", "", [])
    rows = [[s.name, cell(s.accuracy), f"{cell(s.low)} to {cell(s.high)}"] for s in advice.scored]
    note = f"{_capital(advice.sentence())}. Balanced accuracy is the mean of the class accuracies. Interval: {METHOD}."
    table = Table("Balanced validation accuracy", ["", "accuracy", "interval"], rows, best=frozenset({(rows[0][0], 1)}))
    return Section("Recommendation", note, [table, Code(command(run, advice.best.name))])


def recommended_lines(run: RunFiles) -> list[str]:
    """Return the recommendation and its command; none without validation images."""
    advice = run.recommendation
    return [advice.sentence(), command(run, advice.best.name)] if advice else []


def command(run: RunFiles, name: str) -> str:
    """Return the `predict` command for the teacher or a head of the student.

    A released teacher, which states no architecture or input, is converted first.
    """
    place = run.cfg.teacher.path if run.cfg and name == "TEACHER" else str(run.folder)
    convert = ""
    if Path(place).is_file():
        place = str(run.folder / "teacher")
        call = f"import_teacher({json.dumps(str(run.folder))}, {json.dumps(place)})"
        convert = f"python -c {shlex.quote(f'from fastdeitlt.teachers.convert import import_teacher; {call}')} && "
    head = f" --head {name}" if name in ("CLS", "DIST") else ""
    return f"{convert}fastdeitlt predict {shlex.quote(place)} IMAGES{head}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
