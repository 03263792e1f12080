"""Evaluation of a student in training: its weights and their EMA, on both heads."""

# K classes, N images in the set

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core.optim import Ema
from fastdeitlt.data.pixels.source import Source, open_source
from fastdeitlt.data.sets.counts import shot_groups
from fastdeitlt.data.sets.types import LongTailSet, Sets
from fastdeitlt.evaluation import signs
from fastdeitlt.evaluation.evaluate import OneHead, WithCosine, gather_logits
from fastdeitlt.evaluation.metrics import Result, heads_of, readable, score, score_heads
from fastdeitlt.evaluation.per_image import image_facts
from fastdeitlt.evaluation.posthoc import post_hoc, temperatures
from fastdeitlt.evaluation.recommend import recommend
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.run.selection import Tested, data_facts
from fastdeitlt.store.manifest import Preprocess, preprocess_of


class StudentScorer:
    """Scores a student's weights and their moving average.

    Args:
        cfg: the run.
        sets: training, validation and test images.
        student, teacher: the models; teacher may be None.
        ema: the moving average, or None.
        device: device of the models.
    """

    later_wins = False

    def __init__(
        self,
        cfg: Config,
        sets: Sets,
        student: DistilledViT,
        teacher: Teacher | None,
        ema: Ema | None,
        device: torch.device,
    ) -> None:
        self.cfg, self.sets, self.device = cfg, sets, device
        self.student, self.teacher, self.ema = student, teacher, ema
        candidates = ("model", "ema") if cfg.evaluate.weights == "both" else (cfg.evaluate.weights,)
        self.candidates: Sequence[str] = [weights for weights in candidates if weights == "model" or ema]
        self.drw_epoch = cfg.loss.drw_epoch
        self.identity: str | None = teacher.sha256() if teacher else None
        self.tail = signs.tail_images(sets.train, cfg.data.dataset)
        self._preprocess = preprocess_of(cfg, student.img_size)
        self._sources: dict[tuple[int, str], Source] = {}

    def score(self, weights: str, split: str) -> tuple[Result, dict[str, Any]]:
        """Return scores on a split, feature cosines, and scores on tail training images."""
        images, model = getattr(self.sets, split), WithCosine(self.student)
        with self._installed(weights):
            result = self._score(self._logits(images, model))
            tail = self._score(self._logits(self.tail, self.student)) if len(self.tail) else None
        facts: dict[str, Any] = self._cosines(model.cosine_N(len(images), self.device), torch.as_tensor(images.labels))
        return result, facts | ({"tail_seen": tail.to_json()} if tail else {})

    def load(self, weights: dict[str, Tensor]) -> None:
        """Load the selected weights."""
        self.student.load_state_dict(weights)

    def test(self) -> Tested:
        """Score student and teacher on test (else validation) images, and calibrate."""
        images = self.sets.test or self.sets.val
        if images is None:
            return Tested({}, None, {}, {})
        split, counts = "test" if self.sets.test else "val", self.sets.train.counts
        logits = self._logits(images, self.student)
        result = self._score(logits)
        teacher = self._score_teacher(images, self.teacher) if self.teacher else None
        others: dict[str, Any] = {"teacher": teacher.to_json() if teacher else None}
        facts: dict[str, Any] = {}
        if self.sets.val:
            val = logits if split == "val" else self._logits(self.sets.val, self.student)
            fitted = {"temperatures": temperatures(val, counts), "num_fitted": len(readable(*val)[2])}
            facts = {"calibration": fitted}
            others["recommendation"] = self._recommend(result if split == "val" else self._score(val), teacher)
            if split == "test":
                others["posthoc"] = post_hoc(val, logits, counts, self.cfg.data.dataset).to_json()
        image_results = distributed.on_main(
            lambda: image_facts(
                heads_of(*logits[:2]),
                logits[2],
                images,
                self._source(images, self._preprocess),
                self._preprocess,
                facts.get("calibration", {}).get("temperatures"),
            )
        )
        self.close()
        return Tested({split: result}, result.table("official", teacher), others, facts, image_results)

    def _recommend(self, student: Result, tested_teacher: Result | None) -> dict[str, Any] | None:
        """Return the best of teacher, AVG, CLS and DIST on validation images."""
        val, teacher = self.sets.val, tested_teacher
        if self.teacher and val and self.sets.test:
            teacher = self._score_teacher(val, self.teacher)
        recommendation = recommend(student, teacher)
        return recommendation.to_json() if recommendation else None

    def close(self) -> None:
        """Close the sources of images."""
        while self._sources:
            self._sources.popitem()[1].close()

    def manifest(self) -> dict[str, Any]:
        """Return the manifest entries of the weights."""
        train, cfg = self.sets.train, self.cfg
        return {
            "kind": "student",
            "model": {**cfg.student.architecture, "img_size": self.student.img_size, "num_classes": train.num_classes},
            **data_facts(cfg, train, self.student.img_size),
        }

    @contextmanager
    def _installed(self, weights: str) -> Iterator[None]:
        if weights == "ema" and self.ema:
            self.ema.swap()
        try:
            yield
        finally:
            if weights == "ema" and self.ema:
                self.ema.swap()

    def _source(self, images: LongTailSet, preprocess: Preprocess) -> Source:
        """Return the source of a set, opened at its first evaluation."""
        key = id(images), preprocess.exif
        if key not in self._sources:
            data = self.cfg.data.model_copy(update={"exif": preprocess.exif})
            self._sources[key] = open_source(images, data, self.device, scored=True)
        return self._sources[key]

    def _logits(
        self, images: LongTailSet, model: nn.Module, preprocess: Preprocess | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (cls_logits_NK, dist_logits_NK, labels_N), equal on every rank.

        Preprocessing is the student's by default.
        """
        preprocess = preprocess or self._preprocess
        return gather_logits(model, self._source(images, preprocess), images, preprocess, self.cfg, self.device)

    def _score(self, logits: tuple[Tensor, Tensor, Tensor]) -> Result:
        return score(*logits, self.sets.train.counts, self.cfg.data.dataset, self.device)

    def _score_teacher(self, images: LongTailSet, teacher: Teacher) -> Result:
        """Score a teacher with the preprocessing of its folder, else with the student's."""
        teacher, preprocess = teacher.alone(self._preprocess)
        logits_NK, _, labels_N = self._logits(images, OneHead(teacher, teacher.logit_scale), preprocess)
        if teacher.class_map is not None:
            logits_NK = logits_NK[:, teacher.class_map.cpu().argsort()]
        return score_heads({"TEACHER": logits_NK}, labels_N, self.sets.train.counts, self.cfg.data.dataset, self.device)

    def _cosines(self, cosine_N: Tensor, labels_N: Tensor) -> dict[str, float]:
        """Return the mean cosine of CLS and DIST features, per official group."""
        groups = shot_groups(self.sets.train.counts, signs.SPLIT, self.cfg.data.dataset)
        masks = {"all": torch.ones_like(labels_N, dtype=torch.bool)}
        masks |= {group: torch.isin(labels_N, ids) for group, ids in groups.items()}
        return {f"cosine_{group}": float(cosine_N[mask].mean()) for group, mask in masks.items() if mask.any()}
