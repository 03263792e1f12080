"""Stage 9 in training: evaluate at intervals, keep the best weights, and test the chosen ones once at the end."""

# K classes, N images in the set

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastdeitlt import checkpoint, distributed
from fastdeitlt.config import Config
from fastdeitlt.data.batches import Source
from fastdeitlt.data.longtail import LongTailSet, Sets
from fastdeitlt.data.resident import open_source
from fastdeitlt.evaluate import OneHead, collect_logits
from fastdeitlt.metrics import GROUPS, Result, score, score_single
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.optim import Ema
from fastdeitlt.run import Run, console, write_atomically

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
        self._sources: dict[int, Source] = {}
        self.on = cfg.evaluate.select_on if getattr(sets, cfg.evaluate.select_on, None) is not None else "last"
        if self.on != cfg.evaluate.select_on:
            log.info("no %s images: the last weights are the chosen ones", cfg.evaluate.select_on)

    def evaluate(self, step: int, epoch: int, last: bool) -> None:
        """Score on the selection set, log, and keep the weights if they are the best so far."""
        for weights in self._candidates():
            with self._installed(weights):
                accuracy = math.nan
                if self.on != "last":
                    result = self._score(getattr(self.sets, self.on))
                    accuracy = result.accuracy()
                    self._log(step, epoch, weights, self.on, result)
                better = self.best is None or accuracy > self.best["accuracy"] or self.on == "last"
                if better and (self.on != "last" or (last and weights == self._preferred())):
                    self.best = {"step": step, "epoch": epoch, "weights": weights, "accuracy": accuracy}
                    self._keep()
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
            result = self._score(images)
            teacher = self._score(images, self.teacher) if self.teacher else None
            self._log(step, epoch, "selected", split, result)
            results[split] = result.to_json()
            results["teacher"] = teacher.to_json() if teacher else None
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
            "dataset": cfg.data.dataset,
            "preprocess": {
                "mean": cfg.augment.mean,
                "std": cfg.augment.std,
                "img_size": self.student.img_size,
                "crop_pct": cfg.evaluate.crop_pct,
            },
        }

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
            self._sources[id(images)] = open_source(images, self.cfg.data, self.device)
        return self._sources[id(images)]

    def _score(self, images: LongTailSet, teacher: Teacher | None = None) -> Result:
        """Each rank runs its share of the images; every rank scores them all, and so chooses the same weights."""
        cfg, size = self.cfg, self.student.img_size
        source = self._source(images)
        model = OneHead(teacher) if teacher else self.student
        *parts, _ = collect_logits(
            model,
            source,
            images,
            size=size,
            resize=round(size / cfg.evaluate.crop_pct),
            batch_size=cfg.evaluate.batch_size,
            mean=cfg.augment.mean,
            std=cfg.augment.std,
            device=self.device,
            autocast_dtype=torch.bfloat16 if cfg.train.precision == "bf16" else None,
            sample_N=np.arange(distributed.rank(), len(images), distributed.get_world()),
        )
        cls_logits_NK, dist_logits_NK = (distributed.gather_interleaved(x, len(images), self.device) for x in parts)
        labels_N = torch.as_tensor(images.labels)
        counts, dataset = self.sets.train.counts, cfg.data.dataset
        if teacher:
            class_map = teacher.class_map
            logits_NK = cls_logits_NK if class_map is None else cls_logits_NK[:, class_map.cpu().argsort()]
            return score_single(logits_NK, labels_N, counts, dataset)
        return score(cls_logits_NK, dist_logits_NK, labels_N, counts, dataset)

    def _log(self, step: int, epoch: int, weights: str, split: str, result: Result) -> None:
        scores = {
            f"{head.lower()}_{group}": result.accuracy(head, group, "official")
            for head in ("AVG", "CLS", "DIST")
            for group in GROUPS
        }
        self.run.record("eval", step, epoch=epoch, weights=weights, set=split, **scores, result=result.to_json())
        self.run.summarise()
        table = "  ".join(f"{head} {scores[f'{head.lower()}_all']:.1f}" for head in ("AVG", "CLS", "DIST"))
        self.run.show(step, f"epoch {epoch + 1}: {split} accuracy of {weights}: {table} %")
