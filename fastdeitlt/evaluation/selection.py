"""Stage 9 in training: evaluate at intervals, keep the best weights, and test the chosen ones once at the end."""

# K classes, N images in the set

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdeitlt import checkpoint, distributed
from fastdeitlt.atomic import write_atomically
from fastdeitlt.config import Config
from fastdeitlt.data.batches import Source
from fastdeitlt.data.longtail import LongTailSet, Sets, shot_groups
from fastdeitlt.data.resident import open_source
from fastdeitlt.data.resize import resized_side
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation import signs
from fastdeitlt.evaluation.evaluate import OneHead, WithCosine, gather_logits
from fastdeitlt.evaluation.metrics import GROUPS, SELECT_BY, Result, readable, score, score_single
from fastdeitlt.evaluation.posthoc import post_hoc, temperatures
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.optim import Ema
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.running.run import Run, console

log = logging.getLogger("fastdeitlt")


class Selector:
    """Evaluates the weights and their average on the selection set and keeps the better as ``checkpoints/best``.

    Args:
        cfg: the run.
        run: its folder.
        sets: training, validation and test images.
        student, teacher: the models; teacher may be None.
        ema: the moving average, or None.
        device: where the step runs.
    """

    def __init__(
        self,
        cfg: Config,
        run: Run,
        sets: Sets,
        student: DistilledViT,
        teacher: Teacher | None,
        ema: Ema | None,
        device: torch.device,
    ) -> None:
        self.cfg, self.run, self.sets, self.device = cfg, run, sets, device
        self.student, self.teacher, self.ema = student, teacher, ema
        self.best: dict[str, Any] | None = None
        self.tail = signs.tail_images(sets.train, cfg.data.dataset)
        self._sources: dict[int, Source] = {}
        self.on = cfg.evaluate.select_on if getattr(sets, cfg.evaluate.select_on, None) is not None else "last"
        # of a set that does not choose the weights the list may be corrected, so that training was not in vain
        self.fingerprint = {name: _hash_set(images) for name, images in sets if name in ("train", self.on)}
        self.fingerprint["teacher"] = teacher.sha256() if teacher else None
        if self.on != cfg.evaluate.select_on:
            log.info("no %s images: the last weights are the chosen ones", cfg.evaluate.select_on)
        if self.on != "last":
            log.info("selection: highest %s on the %s set", SELECT_BY[cfg.evaluate.select_by], self.on)

    def evaluate(self, step: int, epoch: int, last: bool) -> None:
        """Score on the selection set, log, and keep the weights if they are the best so far."""
        for weights in self._candidates():
            with self._installed(weights):
                accuracy = math.nan
                if self.on != "last":
                    images, model = getattr(self.sets, self.on), WithCosine(self.student)
                    result = self._score(self._logits(images, model))
                    accuracy = result.selection_accuracy(self.cfg.evaluate.select_by)
                    seen = self._score(self._logits(self.tail, self.student)) if len(self.tail) else None
                    cosine_N = model.cosine_N(len(images), self.device)
                    self._log(step, epoch, weights, self.on, result, seen, cosine_N)
                better = self.best is None or accuracy > self.best["accuracy"] or self.on == "last"
                if better and (self.on != "last" or (last and weights == self._preferred())):
                    by = self.cfg.evaluate.select_by
                    self.best = {
                        "step": step,
                        "epoch": epoch,
                        "weights": weights,
                        "accuracy": accuracy,
                        "by": by,
                    }
                    self._keep()
        if self.run.is_main and self.on != "last" and 0 <= self.cfg.loss.drw_epoch <= epoch:
            self._watch(step, epoch)
        self.student.train()

    def finish(self, step: int, epoch: int) -> None:
        """Test the chosen weights, once, beside the teacher; print the table and write results.json."""
        folder = self.run.folder / "checkpoints" / "best"
        self.student.load_state_dict(checkpoint.load_tensors(folder))
        images = self.sets.test or self.sets.val
        results: dict[str, Any] = {"selected": {**(self.best or {}), "on": self.on}, "published": self.cfg.published}
        if images is None:
            log.info("no test or validation images: nothing to report")
        else:
            split = "test" if self.sets.test else "val"
            logits = self._logits(images, self.student)
            result = self._score(logits)
            teacher = self._score_teacher(images, self.teacher) if self.teacher else None
            self._log(step, epoch, "selected", split, result)
            results[split] = result.to_json()
            results["teacher"] = teacher.to_json() if teacher else None
            if self.sets.val:
                val = logits if split == "val" else self._logits(self.sets.val, self.student)
                fitted = {
                    "temperatures": temperatures(val, self.sets.train.counts),
                    "num_fitted": len(readable(*val)[2]),
                }
                distributed.on_main(lambda: checkpoint.add_facts(folder, {"calibration": fitted}))
                if split == "test":
                    results["posthoc"] = post_hoc(val, logits, self.sets.train.counts, self.cfg.data.dataset).to_json()
            if self.run.is_main:
                console.print(result.table("official", teacher))
        for source in self._sources.values():
            source.close()
        if self.run.is_main:
            write_atomically(self.run.folder / "results.json", json.dumps(results, indent=1))

    def manifest(self) -> dict[str, Any]:
        """What a reader of the weights needs to know."""
        train, cfg = self.sets.train, self.cfg
        return {
            "kind": "student",
            "model": {**cfg.student.model_dump(), "img_size": self.student.img_size, "num_classes": train.num_classes},
            "class_map": list(range(train.num_classes)),
            "class_names": train.class_names,
            "class_counts": train.counts,
            "dataset": cfg.data.title,
            "preprocess": {
                "mean": cfg.augment.mean,
                "std": cfg.augment.std,
                "img_size": self.student.img_size,
                "crop_pct": cfg.evaluate.crop_pct,
                "exif": cfg.data.exif,
            },
        }

    def check_fingerprint(self, manifest: dict[str, Any], folder: Path) -> None:
        """Refuse to continue a run on other training or selection images, labels or another teacher.

        Raises:
            UserError: one of them is not what the checkpoint was trained with; files of the same name may differ.
        """
        saved = manifest.get("fingerprint", self.fingerprint)
        changed = [name for name, found in self.fingerprint.items() if saved.get(name) != found]
        if changed:
            what = {"teacher": "the teacher's weights"} | dict.fromkeys(("train", "val", "test"), "images or labels of")
            listed = ", ".join(what[n] if n == "teacher" else f"{what[n]} the {n} set" for n in changed)
            raise UserError(
                f"run folder {folder}: {listed} changed since the checkpoint; bring back the old files, or use "
                "--resume never for a new folder"
            )

    def _candidates(self) -> list[str]:
        wanted = ("model", "ema") if self.cfg.evaluate.weights == "both" else (self.cfg.evaluate.weights,)
        return [weights for weights in wanted if weights == "model" or self.ema]

    def _preferred(self) -> str:
        """The weights taken where no set can choose: the model's own, unless only the average is evaluated."""
        return self._candidates()[0]

    @contextmanager
    def _installed(self, weights: str) -> Iterator[None]:
        if weights == "ema" and self.ema:
            self.ema.swap()
        try:
            yield
        finally:
            if weights == "ema" and self.ema:
                self.ema.swap()

    def _keep(self) -> None:
        facts, folder = self.manifest() | {"selected": self.best}, self.run.folder / "checkpoints" / "best"
        distributed.on_main(lambda: checkpoint.save_model_folder(folder, self.student.state_dict(), facts))

    def _source(self, images: LongTailSet) -> Source:
        """The images' source, opened at their first evaluation and kept."""
        if id(images) not in self._sources:
            self._sources[id(images)] = open_source(images, self.cfg.data, self.device, scored=True)
        return self._sources[id(images)]

    def _logits(self, images: LongTailSet, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """(cls_logits_NK, dist_logits_NK, labels_N) on every rank, so that all choose the same weights."""
        cfg, size = self.cfg, self.student.img_size
        return gather_logits(
            model,
            self._source(images),
            images,
            size=size,
            resize=resized_side(size, cfg.evaluate.crop_pct),
            batch_size=cfg.evaluate.batch_size,
            mean=cfg.augment.mean,
            std=cfg.augment.std,
            device=self.device,
            autocast_dtype=autocast_dtype(cfg.train.precision, self.device),
        )

    def _score(self, logits: tuple[Tensor, Tensor, Tensor]) -> Result:
        return score(*logits, self.sets.train.counts, self.cfg.data.dataset, self.device)

    def _score_teacher(self, images: LongTailSet, teacher: Teacher) -> Result:
        logits_NK, _, labels_N = self._logits(images, OneHead(teacher, teacher.logit_scale))
        if teacher.class_map is not None:
            logits_NK = logits_NK[:, teacher.class_map.cpu().argsort()]
        return score_single(logits_NK, labels_N, self.sets.train.counts, self.cfg.data.dataset, self.device)

    def _watch(self, step: int, epoch: int) -> None:
        """Warn of the signs of failure in the better weights of this evaluation (signs.py)."""
        records = [r for r in self.run.records() if r["kind"] == "eval" and r.get("tail_seen")]
        now = [record for record in records if record["step"] == step]
        if not now:
            return
        by = self.cfg.evaluate.select_by
        weights = max(now, key=lambda record: Result.from_json(record["result"]).selection_accuracy(by))["weights"]
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

    def _cosines(self, cosine_N: Tensor, labels_N: Tensor) -> dict[str, float]:
        """Mean cosine of CLS and DIST features: of all images, and of each group (official split) that has any."""
        groups = shot_groups(self.sets.train.counts, signs.SPLIT, self.cfg.data.dataset)
        masks = {"all": torch.ones_like(labels_N, dtype=torch.bool)}
        masks |= {group: torch.isin(labels_N, ids) for group, ids in groups.items()}
        return {f"cosine_{group}": float(cosine_N[mask].mean()) for group, mask in masks.items() if mask.any()}

    def _log(
        self,
        step: int,
        epoch: int,
        weights: str,
        split: str,
        result: Result,
        seen: Result | None = None,
        cosine_N: Tensor | None = None,
    ) -> None:
        scores = {
            f"{head.lower()}_{group}": result.accuracy(head, group, "official")
            for head in ("AVG", "CLS", "DIST")
            for group in GROUPS
        }
        facts: dict[str, Any] = {"set": split, **scores, "result": result.to_json()}
        if cosine_N is not None:
            facts |= self._cosines(cosine_N, torch.as_tensor(getattr(self.sets, split).labels))
        if seen:
            facts["tail_seen"] = seen.to_json()
        self.run.record("eval", step, epoch=epoch, weights=weights, **facts)
        self.run.summarise()
        table = "  ".join(f"{head} {scores[f'{head.lower()}_all']:.1f}" for head in ("AVG", "CLS", "DIST"))
        balanced = f"mean of classes {result.selection_accuracy('balanced'):.1f} %"
        self.run.show(step, f"epoch {epoch + 1}: {split} accuracy of {weights}: {table} %, {balanced}")


def _hash_set(images: LongTailSet) -> str | None:
    """Of which images in which order, and their labels; of pixels only where the set came decoded."""
    digest = hashlib.sha256(np.asarray(images.labels, dtype=np.int64).tobytes())
    for path in images.paths:
        digest.update(f"{path}\n".encode("utf-8", "surrogateescape"))
    if images.images_NHWC is not None:
        digest.update(np.ascontiguousarray(images.images_NHWC).data)
    return digest.hexdigest()
