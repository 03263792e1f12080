"""What to use of a finished run: the report's first section, and the lines at the end of training."""

import shlex

from fastdeitlt.evaluation.metrics import cell
from fastdeitlt.evaluation.recommend import METHOD
from fastdeitlt.reporting.page import Code, Section, Table
from fastdeitlt.run.run_files import RunFiles


def recommendation_section(run: RunFiles) -> Section:
    """The teacher and the student's heads by balanced validation accuracy, and the command that uses the best."""
    found = run.recommendation
    if found is None:
        return Section("Recommendation", "", [])
    rows = [[s.name, cell(s.accuracy), f"{cell(s.low)} to {cell(s.high)}"] for s in found.scored]
    note = f"{_capital(found.sentence())}. Balanced accuracy is the mean of the class accuracies. Interval: {METHOD}."
    table = Table("Balanced validation accuracy", ["", "accuracy", "interval"], rows, best=frozenset({(rows[0][0], 1)}))
    return Section("Recommendation", note, [table, Code(command(run, found.best.name))])


def recommended_lines(run: RunFiles) -> list[str]:
    """The recommendation and its command for a log; none without validation images."""
    found = run.recommendation
    return [found.sentence(), command(run, found.best.name)] if found else []


def command(run: RunFiles, name: str) -> str:
    """The command that classifies images with the teacher, or with a head of the student."""
    place = run.cfg.teacher.path if run.cfg and name == "TEACHER" else str(run.folder)
    head = f" --head {name}" if name in ("CLS", "DIST") else ""
    return f"fastdeitlt predict {shlex.quote(place)} IMAGES{head}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
