"""Stage 9 in training: evaluate at intervals, name the best weights, and test them once at the end."""

# N images in the set

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.table import Table
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.data.sets.fingerprint import fingerprint
from fastdeitlt.data.sets.types import LongTailSet, Sets
from fastdeitlt.errors import CheckpointError, DamagedError, UserError
from fastdeitlt.evaluation import signs
from fastdeitlt.evaluation.metrics import GROUPS, SELECT_BY, Result
from fastdeitlt.run.folder import Run
from fastdeitlt.run.progress import console
from fastdeitlt.store import checkpoint
from fastdeitlt.store.files import write_atomically
from fastdeitlt.store.manifest import preprocess_of

log = logging.getLogger("fastdeitlt")


@dataclass(frozen=True)
class Tested:
    """Scores of the chosen weights."""

    scores: dict[str, Result]
    """By split."""
    table: Table | None
    """For the terminal."""
    others: dict[str, Any]
    """More for results.json."""
    facts: dict[str, Any]
    """For the manifest of the chosen weights."""


class Scorer(Protocol):
    """A model in training as the selection sees it."""

    candidates: Sequence[str]
    """Weights that are evaluated: "model", "ema". The first is taken where no set can choose."""
    later_wins: bool
    """Which of equal evaluations is the best."""
    drw_epoch: int
    """First epoch with re-weighting; -1 = never."""
    identity: str | None
    """Hash of what else, besides the data, must not change when the run is resumed."""

    def manifest(self) -> dict[str, Any]:
        """What a reader of the weights needs to know."""

    def score(self, weights: str, split: str) -> tuple[Result, dict[str, Any]]:
        """Score some weights on a split; more facts for the log. Every rank gets the same."""

    def load(self, weights: dict[str, Tensor]) -> None:
        """Install the chosen weights."""

    def test(self) -> Tested:
        """Score the installed weights on what is reported."""


def data_facts(cfg: Config, train: LongTailSet, img_size: int) -> dict[str, Any]:
    """Return what a model folder states of its training set and of the preprocessing, ``img_size`` in pixels."""
    return {
        "class_map": list(range(train.num_classes)),
        "class_names": train.class_names,
        "class_counts": train.counts,
        "dataset": cfg.data.title,
        "preprocess": preprocess_of(cfg, img_size).model_dump(),
    }


class Selector:
    """Evaluates weights on the selection set and names the best, which the next checkpoint keeps as ``best``.

    Args:
        cfg: the run.
        run: its folder.
        sets: training, validation and test images.
        scorer: the model.
    """

    def __init__(self, cfg: Config, run: Run, sets: Sets, scorer: Scorer) -> None:
        self.cfg, self.run, self.sets, self.scorer = cfg, run, sets, scorer
        self.best: dict[str, Any] | None = None
        """Step, epoch and part of its checkpoint ("weights") of the best weights so far, and their accuracy."""
        self.recent: dict[str, float] = {}
        """Best accuracy since re-weighting began, and the evaluations in a row that did not exceed it ("without")."""
        select_on, self.by = cfg.evaluate.select_on, cfg.evaluate.select_by
        self.on = select_on if getattr(sets, select_on, None) is not None else "last"
        if self.on == "last" and cfg.train.patience:
            raise UserError(
                f"train.patience: got {cfg.train.patience}, but no set to select on (evaluate.select_on={select_on}), "
                "expected a validation set; set data.val_holdout=0.1, or train.patience=0"
            )
        if self.on == "last":
            why = "" if select_on == "last" else f": there is no {select_on} set"
            log.info("selection: the last weights%s", why)
        else:
            log.info("selection: highest %s on the %s set", SELECT_BY[self.by], self.on)
        self.fingerprint: dict[str, str | None] = distributed.on_main(self._fingerprint)

    @property
    def is_stale(self) -> bool:
        """Whether ``train.patience`` evaluations in a row did not exceed the best accuracy since re-weighting began."""
        return 0 < self.cfg.train.patience <= self.recent.get("without", 0)

    def evaluate(self, step: int, epoch: int, last: bool) -> None:
        """Score on the selection set, log, and note the best weights so far; those of the last epoch without a set."""
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
        """Test the chosen weights, once; complete their folder, print the table and write results.json.

        Raises:
            CheckpointError: the folder is not whole or has other weights; the next start makes it again.
        """
        folder = self.run.folder / "checkpoints" / "best"
        try:
            found = distributed.on_main(lambda: checkpoint.read_manifest(folder)).get("selected")
        except DamagedError as error:
            raise CheckpointError(f"{error}; run the same command again: it makes the folder again") from None
        if found != self.best:
            raise CheckpointError(f"{folder}: got {found}, expected {self.best}; run the same command again")
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
            write_atomically(self.run.folder / "results.json", json.dumps(results, indent=1))

    def manifest(self) -> dict[str, Any]:
        """What a reader of the weights needs to know."""
        return self.scorer.manifest() | {"data_sha256": self.fingerprint["train"]}

    def check_fingerprint(self, saved: Mapping[str, str | None], folder: str) -> None:
        """Refuse to continue a run on other images, labels or another teacher.

        Raises:
            UserError: one of them is not what the checkpoint was trained with.
        """
        now = self.fingerprint
        changed = [name for name in {**now, **saved} if saved.get(name) != now.get(name)]
        if changed:
            listed = ", ".join(
                "the teacher's weights" if name == "teacher" else f"images or labels of the {name} set"
                for name in changed
            )
            raise UserError(
                f"run folder {folder}: {listed} changed since the checkpoint; bring back the old files, or use "
                "--resume never for a new folder"
            )

    def _fingerprint(self) -> dict[str, str | None]:
        """Hashes of all that the trained and chosen weights depend on; a set that is only tested on may change."""
        names = ["train", *([self.on] if self.on != "last" else [])]
        found: dict[str, str | None] = {name: fingerprint(getattr(self.sets, name)) for name in names}
        return found | {"teacher": self.scorer.identity}

    def _count(self, accuracy: float) -> None:
        """Count an evaluation for ``train.patience``."""
        if accuracy > self.recent.get("accuracy", -1.0):
            self.recent = {"accuracy": accuracy, "without": 0}
        else:
            self.recent = {**self.recent, "without": self.recent["without"] + 1}
        if self.is_stale:
            log.info(
                "train.patience: %d evaluations without more than %.1f %%, training ends here",
                self.cfg.train.patience,
                self.recent["accuracy"],
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
        shown = {head: scores[f"{head.lower()}_all"] for head in result.heads}
        if len(shown) == 1:
            shown = {group: scores[f"{result.main.lower()}_{group}"] for group in GROUPS}
        table = "  ".join(f"{name} {value:.1f}" for name, value in shown.items())
        log.info(
            "epoch %d: %s accuracy of %s: %s %%, mean of classes %.1f %%", epoch + 1, split, weights, table, balanced
        )

    def _watch(self, step: int, epoch: int) -> None:
        """Warn of the signs of failure in the better weights of this evaluation (signs.py)."""
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
        found = signs.check(readings, self.cfg.loss.drw_epoch, self.cfg.evaluate.baseline_head)
        for sign in found:
            if sign.seen:
                log.warning("epoch %d, %s weights: %s", epoch + 1, weights, sign.text)
        self.run.record("signs", step, epoch=epoch, weights=weights, signs=[sign.to_json() for sign in found])
