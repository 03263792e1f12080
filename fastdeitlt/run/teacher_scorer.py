"""Evaluation of a teacher in training, with its own preprocessing."""

# K classes, N images in the set

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.data.pixels.source import Source, open_source
from fastdeitlt.data.sets.types import Sets
from fastdeitlt.evaluation.evaluate import OneHead, gather_logits
from fastdeitlt.evaluation.metrics import Result, score_heads
from fastdeitlt.evaluation.per_image import image_facts
from fastdeitlt.models.teacher import logit_scale
from fastdeitlt.run.selection import Tested, data_facts
from fastdeitlt.store.manifest import preprocess_of

CLEAN_IMAGES = 10_000
"""Most training images for the clean accuracy, evenly spaced."""


class TeacherScorer:
    """Scores a teacher in training.

    Args:
        cfg: the run.
        sets: training, validation and test images.
        source: pixel source of the training images.
        network: the teacher.
        device: device of the teacher.
    """

    candidates: Sequence[str] = ("model",)
    later_wins = True
    identity: str | None = None

    def __init__(self, cfg: Config, sets: Sets, source: Source, network: nn.Module, device: torch.device) -> None:
        self.cfg, self.sets, self.network, self.device = cfg, sets, network, device
        self.drw_epoch = cfg.teacher_training.drw_epoch
        self.sources: dict[str, Source] = {"train": source}

    def score(self, weights: str, split: str) -> tuple[Result, dict[str, Any]]:
        """Score on a split; on up to 10,000 training images."""
        return self._score(self._logits(split)), {}

    def _logits(self, split: str) -> tuple[Tensor, Tensor]:
        """Return (logits_NK, labels_N) on every rank, with the teacher's preprocessing."""
        images, cfg, t = getattr(self.sets, split), self.cfg, self.cfg.teacher_training
        if split not in self.sources:
            self.sources[split] = open_source(images, cfg.data, self.device, scored=True)
        logits_NK, _, labels_N = gather_logits(
            OneHead(self.network, logit_scale(self.network, t.model_dump())),
            self.sources[split],
            images,
            preprocess_of(cfg, t.img_size),
            cfg,
            self.device,
            most=CLEAN_IMAGES if split == "train" else 0,
        )
        return logits_NK, labels_N

    def _score(self, logits: tuple[Tensor, Tensor]) -> Result:
        heads, labels_N = {"TEACHER": logits[0]}, logits[1]
        return score_heads(heads, labels_N, self.sets.train.counts, self.cfg.data.dataset, self.device)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Load the selected weights."""
        self.network.load_state_dict(weights)

    def test(self) -> Tested:
        """Score on clean images of every split; accuracies are added to the manifest."""
        logits = {split: self._logits(split) for split, _ in self.sets}
        scores = {split: self._score(outputs) for split, outputs in logits.items()}
        last = list(scores)[-1]
        image_results = distributed.on_main(lambda: self._image_results(last, logits[last]))
        self.close()
        facts = {
            "accuracy": {split: result.accuracy("TEACHER") for split, result in scores.items()},
            "balanced_accuracy": {split: r.heads["TEACHER"].balanced_accuracy for split, r in scores.items()},
        }
        return Tested(scores, scores[last].table("official"), {}, facts, image_results)

    def _image_results(self, split: str, logits: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Return the report's per-image results, of test (else validation) images."""
        if split == "train":
            return {}
        logits_NK, labels_N = logits
        return image_facts(
            {"TEACHER": logits_NK},
            labels_N,
            getattr(self.sets, split),
            self.sources[split],
            preprocess_of(self.cfg, self.cfg.teacher_training.img_size),
        )

    def close(self) -> None:
        """Close the sources opened by this object."""
        for split in self.sources.keys() - {"train"}:
            self.sources.pop(split).close()

    def manifest(self) -> dict[str, Any]:
        """Return the manifest entries of the weights."""
        cfg, t, train = self.cfg, self.cfg.teacher_training, self.sets.train
        return {
            "kind": "teacher",
            "model": {
                "arch": t.arch,
                "num_classes": train.num_classes,
                "img_size": t.img_size,
                "style": "official_paco" if t.loss == "paco" else "fastdeitlt",
                "normed_head": t.normed_head,
            },
            **data_facts(cfg, train, t.img_size),
            "recipe": t.model_dump(mode="json"),
        }
