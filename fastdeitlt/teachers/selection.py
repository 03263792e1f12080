"""Score a teacher, keep the best weights as a model folder, and test the chosen ones once at the end."""

# K classes, N images in the set

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdeitlt import checkpoint, distributed
from fastdeitlt.atomic import write_atomically
from fastdeitlt.config import Config
from fastdeitlt.data.batches import Source
from fastdeitlt.data.longtail import LongTailSet, Sets
from fastdeitlt.data.resident import open_source
from fastdeitlt.data.resize import resized_side
from fastdeitlt.evaluation.evaluate import OneHead, collect_logits
from fastdeitlt.evaluation.metrics import GROUPS, SELECT_BY, Result, score_single
from fastdeitlt.models.teacher import logit_scale
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.running.run import Run, console

log = logging.getLogger("fastdeitlt")
CLEAN_IMAGES = 10_000
"""Training images on which the clean accuracy is taken: all of a smaller set, else evenly spaced ones."""
READ_FILES = 256
"""Files whose content is part of a set's fingerprint."""


def score_teacher(
    network: nn.Module,
    source: Source,
    images: LongTailSet,
    counts: list[int],
    cfg: Config,
    device: torch.device,
    limit: int = 0,
) -> Result:
    """Accuracy of a teacher on a set under its own preprocessing (centre crop, ``cfg.augment``'s mean and std).

    Ranks share the images; each gets the whole result.

    Args:
        network: maps images_BCHW to logits_BK in the data set's class order.
        source: gives the images of ``images``.
        images: the set.
        counts: training images of each class.
        cfg: the teacher's run.
        device: where the network is.
        limit: use at most so many images, evenly spaced in the list. 0 = all.
    """
    size = cfg.teacher_training.img_size
    total = min(limit or len(images), len(images))
    chosen_N = np.linspace(0, len(images) - 1, total).astype(np.int64)
    logits_BK, _, labels_B = collect_logits(
        OneHead(network, logit_scale(network, cfg.teacher_training.model_dump())),
        source,
        images,
        size=size,
        resize=resized_side(size, cfg.evaluate.crop_pct),
        batch_size=cfg.evaluate.batch_size,
        mean=cfg.augment.mean,
        std=cfg.augment.std,
        device=device,
        autocast_dtype=autocast_dtype(cfg.train.precision, device),
        sample_N=chosen_N[distributed.rank() :: distributed.get_world()],
    )
    logits_NK, labels_N = (distributed.gather_interleaved(part, total, device) for part in (logits_BK, labels_B))
    return score_single(logits_NK, labels_N, counts, cfg.data.dataset, device)


def data_fingerprint(images: LongTailSet) -> str:
    """sha256 of a set's content, in order: names, labels, and the pixels of a set that comes decoded.

    Of files, the content of up to 256, evenly spaced in the list: a set that was resized or stored anew differs in all.
    """
    digest = hashlib.sha256("\n".join(images.paths).encode("utf-8", "surrogateescape"))
    digest.update(np.asarray(images.labels, dtype=np.int64).tobytes())
    if images.images_NHWC is not None:
        digest.update(np.ascontiguousarray(images.images_NHWC).data)
        return digest.hexdigest()
    for index in np.unique(np.linspace(0, len(images) - 1, READ_FILES).astype(np.int64)):
        path = Path(images.root) / images.paths[index]
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError:  # the reader says what is wrong with it, or leaves it out (data.on_error)
            digest.update(b"unreadable")
    return digest.hexdigest()


class TeacherSelector:
    """Evaluates a teacher in training and keeps the best as ``checkpoints/best``.

    Args:
        cfg: the run.
        run: its folder.
        sets: training, validation and test images.
        source: gives the training images.
        network: the teacher.
        device: where it is.
    """

    def __init__(
        self, cfg: Config, run: Run, sets: Sets, source: Source, network: nn.Module, device: torch.device
    ) -> None:
        self.cfg, self.run, self.sets, self.network, self.device = cfg, run, sets, network, device
        self.sources: dict[str, Source] = {"train": source}
        self.data_sha256 = data_fingerprint(sets.train)
        self.best: dict[str, Any] | None = None
        self.folder: Path = run.folder / "checkpoints" / "best"
        self.on = cfg.evaluate.select_on if getattr(sets, cfg.evaluate.select_on, None) is not None else "last"
        if self.on != cfg.evaluate.select_on:
            log.info("no %s images: the last weights are the chosen ones", cfg.evaluate.select_on)
        if self.on != "last":
            log.info("selection: highest %s on the %s set", SELECT_BY[cfg.evaluate.select_by], self.on)

    def evaluate(self, step: int, epoch: int, last: bool) -> None:
        """Score on the selection set, log, and keep the weights if none before were better."""
        accuracy = math.nan
        if self.on != "last":
            result = self._score(self.on)
            accuracy = result.selection_accuracy(self.cfg.evaluate.select_by)
            self._log(step, epoch, self.on, result, "model")
        better = self.best is None or accuracy >= self.best["accuracy"]
        if last if self.on == "last" else better:
            by = self.cfg.evaluate.select_by
            self.best = {
                "step": step,
                "epoch": epoch,
                "accuracy": accuracy,
                "on": self.on,
                "by": by,
            }
            self._keep({})

    def finish(self, step: int, epoch: int) -> None:
        """Score the chosen weights on clean training, validation and test images; complete the folder and the run."""
        self.network.load_state_dict(checkpoint.load_tensors(self.folder))
        names = [name for name in ("val", "test") if getattr(self.sets, name) is not None]
        results = {name: self._score(name) for name in ("train", *names)}
        for name, result in results.items():
            self._log(step, epoch, name, result, "selected")
        self._keep(
            {
                "accuracy": {name: result.accuracy("TEACHER") for name, result in results.items()},
                "balanced_accuracy": {name: r.heads["TEACHER"].balanced_accuracy for name, r in results.items()},
            }
        )
        shown = results[names[-1] if names else "train"]
        if self.run.is_main:
            console.print(shown.table("official"))
        self.close()
        selected = {"selected": self.best, "published": self.cfg.published}
        whole = selected | {name: result.to_json() for name, result in results.items()}
        if self.run.is_main:
            write_atomically(self.run.folder / "results.json", json.dumps(whole, indent=1))

    def manifest(self) -> dict[str, Any]:
        """What a reader of the weights needs to know."""
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
            "class_map": list(range(train.num_classes)),
            "class_names": train.class_names,
            "class_counts": train.counts,
            "dataset": cfg.data.title,
            "data_sha256": self.data_sha256,
            "preprocess": {
                "mean": cfg.augment.mean,
                "std": cfg.augment.std,
                "img_size": t.img_size,
                "crop_pct": cfg.evaluate.crop_pct,
                "exif": cfg.data.exif,
            },
            "recipe": t.model_dump(mode="json"),
        }

    def _keep(self, scores: dict[str, dict[str, float]]) -> None:
        facts = self.manifest() | {"selected": self.best} | scores
        distributed.on_main(lambda: checkpoint.save_model_folder(self.folder, self.network.state_dict(), facts))

    def close(self) -> None:
        """Close the sources that were opened here."""
        for name in self.sources.keys() - {"train"}:
            self.sources.pop(name).close()

    def _score(self, name: str) -> Result:
        images, limit = getattr(self.sets, name), CLEAN_IMAGES if name == "train" else 0
        if name not in self.sources:
            self.sources[name] = open_source(images, self.cfg.data, self.device, scored=True)
        counts = self.sets.train.counts
        return score_teacher(self.network, self.sources[name], images, counts, self.cfg, self.device, limit)

    def _log(self, step: int, epoch: int, name: str, result: Result, weights: str) -> None:
        scores = {f"teacher_{group}": result.accuracy("TEACHER", group, "official") for group in GROUPS}
        self.run.record("eval", step, epoch=epoch, weights=weights, set=name, **scores, result=result.to_json())
        self.run.summarise()
        balanced = f"mean of classes {result.selection_accuracy('balanced'):.1f} %"
        shown = "  ".join(f"{group} {scores[f'teacher_{group}']:.1f}" for group in GROUPS)
        self.run.show(step, f"epoch {epoch + 1}: {name} accuracy of {weights}: {shown} %, {balanced}")
