"""The smallest run that has everything: a teacher, two virtual ranks, accumulation, re-weighting, odd test images."""

import json

import torch

from fastdeitlt import config
from fastdeitlt.data.sets import embedded
from fastdeitlt.models import create_teacher
from fastdeitlt.store.checkpoint import load_tensors, read_manifest, save_model_folder

SMALLEST = {
    "data.dataset": "list",
    "student.name": "deit_tiny_distilled_patch16_32",
    "student.depth": 1,
    "student.drop_path": 0.2,
    "augment.crop_scale": [0.5, 1.0],
    "train.epochs": 3,
    "train.compile": False,
    "train.precision": "fp32",
    "train.device": "cpu",
    "loss.drw_epoch": 2,
    "optim.lr_scale": "none",
    "optim.ema_decay": 0.9,
    "optim.warmup_epochs": 1,
    "evaluate.every": 2,
    "evaluate.crop_pct": 1.0,
    "evaluate.analyze_images": 0,
}
# 8 micro-steps of a virtual rank in an epoch, three to an optimizer step: the third has two. 77 test images: odd.
SETTINGS = SMALLEST | {
    "train.batch_size": 8,
    "train.accumulate": 3,
    "train.virtual_ranks": 2,
    "train.log_every": 1,
    "train.save_every_steps": 2,
    "train.zero_stage": 2,
    "train.timeout_s": 120,
    "optim.eps": 1e-4,
    "optim.clip_norm": 1.0,
    "evaluate.batch_size": 16,
}
TIMES = ("images_per_s", "data_wait", "eta_s")
"""Fields of a log record that no two runs share."""


def records(run):
    """The log of a run, without ``TIMES``."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def tensors(run):
    """All that a student's newest checkpoint holds, whose files are intact."""
    last = run / "checkpoints" / "last"
    read_manifest(last)
    return {f"{part}.{k}": v for part in ("model", "ema", "optimizer") for k, v in load_tensors(last, part).items()}


def random_teacher(folder):
    """Save a teacher that knows nothing; return the settings that name it."""
    torch.manual_seed(1)
    manifest = {
        "kind": "teacher",
        "model": {"arch": "resnet8", "num_classes": 10, "img_size": 28},
        "preprocess": {"mean": [0.286] * 3, "std": [0.353] * 3, "img_size": 28, "crop_pct": 1.0},
    }
    path = save_model_folder(folder, create_teacher("resnet8", 10, "fastdeitlt").state_dict(), manifest)
    return {"teacher.path": str(path), "teacher.img_size": 28, "teacher.check": False}


def embedded_lists(folder, **steps):
    """Settings of every so many-th of the embedded images of each split; the lists lie in ``folder``."""
    root = embedded.unpack()
    settings = {"data.dataset": "list", "data.root": str(root)}
    for split, every in steps.items():
        lines = (root / f"{split}.txt").read_text().splitlines()
        kept = lines[::every] if split != "train" else sorted({*lines[::every], *lines[-20::2]}, key=lines.index)
        (folder / f"{split}.txt").write_text("\n".join(kept))
        settings[f"data.{split}_list"] = str(folder / f"{split}.txt")
    return settings


def tiny_data(folder):
    """Settings of 130 of the embedded images, 77 of them to test on, and of a teacher; the files lie in ``folder``."""
    return embedded_lists(folder, train=19, val=11, test=13) | random_teacher(folder / "teacher")


def tiny_run(folder):
    """A run of 3 epochs of 3 optimizer steps on ``tiny_data``; it lies in ``folder`` too."""
    return config.build(SETTINGS | tiny_data(folder) | {"runs_dir": str(folder)})
