"""Reading of run folders: config, environment, records, results, each optional."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeitlt import config
from fastdeitlt.config import Config
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import Result
from fastdeitlt.evaluation.posthoc import PostHoc
from fastdeitlt.evaluation.recommend import Recommendation
from fastdeitlt.store.checkpoint import step_folders
from fastdeitlt.store.files import read_json

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run folder; missing files are None or empty."""

    folder: Path
    name: str
    """Name of the folder."""
    cfg: Config | None
    environment: dict[str, Any]
    steps: list[Record]
    evaluations: list[Record]
    signs: list[Record]
    """Checks for signs of failure, one record per evaluation since re-weighting began."""
    results: dict[str, Any]
    class_names: list[str] | None

    @property
    def tested(self) -> Result | None:
        """Scores of the selected weights on test images, else on validation images."""
        scores = self.results.get("test") or self.results.get("val")
        return Result.from_json(scores) if scores else None

    @property
    def tested_on(self) -> str:
        """Set of ``tested`` in words: "test" or "validation"."""
        return "test" if self.results.get("test") else "validation"

    @property
    def teacher(self) -> Result | None:
        """Scores of the teacher on the same set."""
        return Result.from_json(self.results["teacher"]) if self.results.get("teacher") else None

    @property
    def post_hoc(self) -> PostHoc | None:
        """Post-hoc methods fitted on validation images, scored on test images."""
        return PostHoc.from_json(self.results["posthoc"]) if self.results.get("posthoc") else None

    @property
    def recommendation(self) -> Recommendation | None:
        """Best of teacher, AVG, CLS and DIST on validation images."""
        stored = self.results.get("recommendation")
        return Recommendation.from_json(stored) if stored else None

    @property
    def is_teacher(self) -> bool:
        """Whether the run trained a flat teacher."""
        scores = [self.results.get("test"), self.results.get("val"), *(e["result"] for e in self.evaluations[:1])]
        return any(score and "TEACHER" in score["heads"] for score in scores)

    @property
    def published(self) -> dict[str, float]:
        """Published accuracies in per cent by group."""
        return self.results.get("published") or (self.cfg.published if self.cfg else {})

    def selection_curve(self) -> tuple[str, str, list[tuple[float, Result]]]:
        """Return (weights, set, [(completed epochs, scores)]) of the selection."""
        weights = (self.results.get("selected") or {}).get("weights", "model")
        curve = [e for e in self.evaluations if e.get("weights") == weights] or self.evaluations
        if not curve:
            return weights, "", []
        weights, split = curve[0]["weights"], curve[0]["set"]
        points = [e for e in curve if e["weights"] == weights and e["set"] == split]
        return weights, split, [(e["epoch"] + 1, Result.from_json(e["result"])) for e in points]

    def class_name(self, index: int) -> str:
        """Return the name of a class, or its number."""
        return self.class_names[index] if self.class_names else f"class {index}"


def read_run(folder: str | Path) -> RunFiles:
    """Read a run folder.

    Raises:
        UserError: no such folder, no run in it, or an unreadable file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"run folder {folder}: no such folder, expected runs/<name>")
    config_file = folder / "config.yaml"
    records = _read_records(folder / "metrics.jsonl")
    results = read_json(folder / "results.json")
    if not (config_file.is_file() or records or results):
        raise UserError(f"run folder {folder}: no config.yaml, metrics.jsonl or results.json, expected runs/<name>")
    models = [folder / "checkpoints" / "best", *step_folders(folder / "checkpoints")]
    manifests = [read_json(model / "manifest.json") for model in models]
    return RunFiles(
        folder=folder,
        name=folder.resolve().name,
        cfg=config.load(str(config_file)) if config_file.is_file() else None,
        environment=read_json(folder / "env.json"),
        steps=_place_in_epochs([record for record in records if record.get("kind") == "step"]),
        evaluations=[record for record in records if record.get("kind") == "eval"],
        signs=[record for record in records if record.get("kind") == "signs"],
        results=results,
        class_names=next((m["class_names"] for m in manifests if m.get("class_names")), None),
    )


def _read_records(path: Path) -> list[Record]:
    """Read the complete lines of metrics.jsonl, ignoring a truncated last line."""
    records: list[Record] = []
    if not path.is_file():
        return records
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number}: not JSON ({error}). Remove the line.") from None
        if isinstance(record, dict) and record.get("kind") == "step" and not isinstance(record.get("epoch"), int):
            raise UserError(f"{path} line {number}: a step without an epoch. Remove the line.")
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number}: got {line.strip()[:40]!r}, expected an object. Remove the line.")
        records.append(record)
    return records


def _place_in_epochs(steps: list[Record]) -> list[Record]:
    """Add "time", a fractional epoch: records of one epoch are evenly spaced."""
    by_epoch: dict[int, list[Record]] = {}
    for record in steps:
        by_epoch.setdefault(record["epoch"], []).append(record)
    return [
        record | {"time": epoch + (index + 1) / len(records)}
        for epoch, records in by_epoch.items()
        for index, record in enumerate(records)
    ]


def column(records: list[Record], name: str) -> list[float]:
    """Return a field of each record as a number, NaN if missing."""
    return [math.nan if record.get(name) is None else float(record[name]) for record in records]
