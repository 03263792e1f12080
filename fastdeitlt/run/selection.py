"""Evaluation during training, selection of the best weights, and their final test."""

# N images in the set

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from rich.table import Table
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.data.sets.fingerprint import fingerprint
from fastdeitlt.data.sets.types import LongTailSet, Sets
from fastdeitlt.errors import CheckpointError, DamagedError, UserError, counted
from fastdeitlt.evaluation import signs
from fastdeitlt.evaluation.metrics import GROUPS, SELECT_BY, Result, cell
from fastdeitlt.run.folder import Run
from fastdeitlt.run.progress import console
from fastdeitlt.store import checkpoint
from fastdeitlt.store.files import write_atomically
from fastdeitlt.store.manifest import preprocess_of

log = logging.getLogger("fastdeitlt")


@dataclass(frozen=True)
class Tested:
    """Scores of the selected weights."""

    scores: dict[str, Result]
    """Scores by split."""
    table: Table | None
    """Table for the terminal."""
    others: dict[str, Any]
    """Further entries of results.json."""
    facts: dict[str, Any]
    """Manifest entries of the selected weights."""
    images: dict[str, Any] = field(default_factory=dict)
    """Content of analysis/images.json, see ``per_image.image_facts``."""


class Scorer(Protocol):
    """Evaluation interface of a model in training."""

    candidates: Sequence[str]
    """Evaluated weights: "model", "ema". The first is selected without a selection set."""
    later_wins: bool
    """Whether the later of equal evaluations is the best."""
    drw_epoch: int
    """First epoch with re-weighting; -1 = never."""
    identity: str | None
    """Hash of further inputs, besides the data, that must not change when the run resumes."""

    def manifest(self) -> dict[str, Any]:
        """Return the manifest entries of the weights."""

    def score(self, weights: str, split: str) -> tuple[Result, dict[str, Any]]:
        """Return the scores of weights on a split and further log entries, on every rank."""

    def load(self, weights: dict[str, Tensor]) -> None:
        """Load the selected weights."""

    def test(self) -> Tested:
        """Score the loaded weights on the reported splits."""


def data_facts(cfg: Config, train: LongTailSet, img_size: int) -> dict[str, Any]:
    """Return manifest entries on data and preprocessing; ``img_size`` in pixels."""
    return {
        "class_map": list(range(train.num_classes)),
        "class_names": train.class_names,
        "class_counts": train.counts,
        "dataset": cfg.data.title,
        "preprocess": preprocess_of(cfg, img_size).model_dump(),
    }


def selection_set(cfg: Config, sets: Sets) -> str:
    """Return ``evaluate.select_on``, or "last" if there is no such set.

    Raises:
        UserError: ``train.patience`` without a set.
    """
    select_on = cfg.evaluate.select_on
    if getattr(sets, select_on, None) is not None:
        return select_on
    if cfg.train.patience:
        raise UserError(
            f"train.patience: got {cfg.train.patience} without a selection set (evaluate.select_on={select_on}), "
            "expected a validation set. Set data.val_holdout=0.1, or train.patience=0."
        )
    return "last"


class Selector:
    """Evaluation on the selection set, and the best weights for the next checkpoint.

    Args:
        cfg: the run.
        run: folder of the run.
        sets: training, validation and test images.
        scorer: evaluation of the model.
    """

    def __init__(self, cfg: Config, run: Run, sets: Sets, scorer: Scorer) -> None:
        self.cfg, self.run, self.sets, self.scorer = cfg, run, sets, scorer
        self.best: dict[str, Any] | None = None
        """Step, epoch, state-dict name ("weights") and accuracy of the best weights so far."""
        self.recent: dict[str, float] = {}
        """Best accuracy since re-weighting began, and evaluations since without improvement ("without")."""
        select_on, self.by = cfg.evaluate.select_on, cfg.evaluate.select_by
        self.on = selection_set(cfg, sets)
        if self.on == "last":
            reason = "" if select_on == "last" else f" (no {select_on} set)"
            log.info("selection: final weights%s", reason)
        else:
            log.info("selection: highest %s on the %s set", SELECT_BY[self.by], self.on)
        self.fingerprint: dict[str, str | None] = distributed.on_main(self._fingerprint)

    @property
    def is_stale(self) -> bool:
        """Whether ``train.patience`` evaluations brought no improvement since DRW began."""
        return 0 < self.cfg.train.patience <= self.recent.get("without", 0)

    def evaluate(self, step: int, epoch: int, last: bool) -> None:
        """Score on the selection set and update the best weights; no set: the last."""
        if self.on == "last":
            if last:
                self._choose(step, epoch, self.scorer.candidates[0], None)
            return
        accuracies = []
        for weights in self.scorer.candidates:
            result, facts = self.scorer.score(weights, self.on)
            self._log(step, epoch, weights, self.on, result, facts)
            accuracy = result.selection_accuracy(self.by)
            accuracies.append(accuracy)
            best = self.best["accuracy"] if self.best else -1.0
            if accuracy > best or (accuracy == best and self.scorer.later_wins):
                self._choose(step, epoch, weights, accuracy)
        if epoch >= self.scorer.drw_epoch:
            self._count(max(accuracies))
        if self.run.is_main and 0 <= self.cfg.loss.drw_epoch <= epoch:
            self._watch(step, epoch)

    def finish(self, step: int, epoch: int) -> None:
        """Test the selected weights, complete their folder and write results.json.

        Raises:
            CheckpointError: the folder is damaged or has other weights; the next start restores it.
        """
        folder = self.run.folder / "checkpoints" / "best"
        try:
            selected = distributed.on_main(lambda: checkpoint.read_manifest(folder)).get("selected")
        except DamagedError as error:
            reason = str(error).rstrip(".")
            raise CheckpointError(f"{reason}; {self.run.rerun} to restore the folder") from None
        if selected != self.best:
            raise CheckpointError(
                f"{folder}: got {selected}, expected {self.best}; {self.run.rerun} to restore the folder"
            )
        self.scorer.load(checkpoint.load_tensors(folder))
        tested = self.scorer.test()
        for split, result in tested.scores.items():
            self._log(step, epoch, "selected", split, result, {})
        if tested.facts:
            distributed.on_main(lambda: checkpoint.add_facts(folder, tested.facts))
        results = {"selected": {**(self.best or {}), "on": self.on}, "published": self.cfg.published}
        results |= {split: result.to_json() for split, result in tested.scores.items()} | tested.others
        if self.run.is_main:
            if tested.table:
                console.print(tested.table)
            (self.run.folder / "analysis").mkdir(exist_ok=True)
            write_atomically(self.run.folder / "analysis" / "images.json", json.dumps(tested.images))
            write_atomically(self.run.folder / "results.json", json.dumps(results, indent=1))

    def manifest(self) -> dict[str, Any]:
        """Return the manifest entries of the weights, with the training set's hash."""
        return self.scorer.manifest() | {"data_sha256": self.fingerprint["train"]}

    def check_fingerprint(self, saved: Mapping[str, str | None], folder: str) -> None:
        """Refuse to resume a run with other images, labels or another teacher.

        Raises:
            UserError: one of them differs from the checkpoint's.
        """
        now = self.fingerprint
        changed = [name for name in {**now, **saved} if saved.get(name) != now.get(name)]
        if changed:
            listed = ", ".join(
                "the teacher's weights" if name == "teacher" else f"images or labels of the {name} set"
                for name in changed
            )
            raise UserError(
                f"run folder {folder}: {listed} changed since the checkpoint. Restore the old files, or use --resume "
                "never for a new folder."
            )

    def _fingerprint(self) -> dict[str, str | None]:
        """Return hashes of training set, selection set and teacher (not the test set)."""
        names = ["train", *([self.on] if self.on != "last" else [])]
        hashes: dict[str, str | None] = {name: fingerprint(getattr(self.sets, name)) for name in names}
        return hashes | {"teacher": self.scorer.identity}

    def _count(self, accuracy: float) -> None:
        """Count an evaluation for ``train.patience``."""
        if accuracy > self.recent.get("accuracy", -1.0):
            self.recent = {"accuracy": accuracy, "without": 0}
        else:
            self.recent = {**self.recent, "without": self.recent["without"] + 1}
        if self.is_stale:
            log.info(
                "train.patience: no accuracy above %.1f %% in %s, training stops early",
                self.recent["accuracy"],
                counted(self.cfg.train.patience, "evaluation"),
            )

    def _choose(self, step: int, epoch: int, weights: str, accuracy: float | None) -> None:
        self.best = {"step": step, "epoch": epoch, "weights": weights, "accuracy": accuracy, "by": self.by}

    def _log(self, step: int, epoch: int, weights: str, split: str, result: Result, facts: dict[str, Any]) -> None:
        scores = {
            f"{head.lower()}_{group}": result.accuracy(head, group, "official")
            for head in result.heads
            for group in GROUPS
        }
        balanced = result.selection_accuracy("balanced")
        record = {"set": split, **scores, "balanced": balanced, "result": result.to_json(), **facts}
        self.run.record("eval", step, epoch=epoch, weights=weights, **record)
        self.run.summarise()
        columns = {head: scores[f"{head.lower()}_all"] for head in result.heads}
        if len(columns) == 1:
            columns = {group: scores[f"{result.main.lower()}_{group}"] for group in GROUPS}
        table = "  ".join(f"{name} {cell(value)}" for name, value in columns.items())
        log.info("epoch %d: %s accuracy of %s: %s %%, balanced %.1f %%", epoch + 1, split, weights, table, balanced)

    def _watch(self, step: int, epoch: int) -> None:
        """Warn of signs of failure in this evaluation's better weights (signs.py)."""
        records = [r for r in self.run.records() if r["kind"] == "eval" and r.get("tail_seen")]
        now = [(Result.from_json(r["result"]).selection_accuracy(self.by), r) for r in records if r["step"] == step]
        if not now:
            return
        weights = max(now, key=lambda pair: pair[0])[1]["weights"]
        readings = [
            signs.Reading(r["epoch"], Result.from_json(r["result"]), Result.from_json(r["tail_seen"]))
            for r in records
            if r["weights"] == weights
        ]
        checked = signs.check(readings, self.cfg.loss.drw_epoch, self.cfg.evaluate.baseline_head)
        for sign in checked:
            if sign.seen:
                log.warning("epoch %d, %s weights: %s", epoch + 1, weights, sign.text)
        self.run.record("signs", step, epoch=epoch, weights=weights, signs=[asdict(sign) for sign in checked])
