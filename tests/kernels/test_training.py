"""The whole trainer with every kernel of the step on, in Triton's interpreter, against the same run in torch."""

import pytest
import torch
from fastdeitlt.kernels import adamw_ema
from fastdeitlt.kernels._launch import LaunchConfig
from tiny_run import SMALLEST, random_teacher, records, tensors

from fastdeitlt import config
from fastdeitlt.data.sets import embedded
from fastdeitlt.train import train

GPU = torch.cuda.is_available()
KERNELS = {
    "student.attention": "triton",
    "student.add_layernorm": "triton",
    "student.bias_gelu": "triton",
    "loss.impl": "triton",
    "optim.backend": "fastdeitlt",
}
TORCH = {
    "student.attention": "sdpa",
    "student.add_layernorm": "torch",
    "student.bias_gelu": "torch",
    "loss.impl": "torch",
    "optim.backend": "torch",
}
RUN = SMALLEST | {
    "student.depth": 2,
    "student.drop_path": 0.4,
    "train.batch_size": 4,
    "train.epochs": 2,
    "train.precision": "bf16" if GPU else "fp32",
    "train.device": "auto",
    "train.log_every": 1,
    "loss.drw_epoch": 1,
    "optim.clip_norm": 1.0,
}
LOSS_TOLERANCE, WEIGHT_TOLERANCE = (5e-2, 1e-1) if GPU else (2e-5, 2e-3)
"""Relative error of a step's losses; largest error of a weight tensor as a share of its largest value."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Lists of 16 training images and a few others, and a random teacher."""
    pytest.importorskip("nvidia.dali", reason="DALI decodes the images")
    folder, root = tmp_path_factory.mktemp("data"), embedded.unpack()
    settings = {"data.root": str(root), "runs_dir": str(folder / "runs")} | random_teacher(folder / "teacher")
    for split, count in (("train", 16), ("val", 10), ("test", 10)):
        of_class: dict[str, list[str]] = {}
        for line in (root / f"{split}.txt").read_text().splitlines():
            of_class.setdefault(line.rsplit(None, 1)[1], []).append(line)
        # of every class: re-weighting has no weight for a decision for a class without training images
        chosen = [lines[i] for i in range(2) for lines in of_class.values()][:count]
        (folder / f"{split}.txt").write_text("\n".join(chosen))
        settings[f"data.{split}_list"] = str(folder / f"{split}.txt")
    return RUN | settings


def test_training_with_every_kernel_follows_torch(base, monkeypatch):
    if not GPU:  # the weights in few programs: the interpreter runs one after the other
        monkeypatch.setattr(adamw_ema, "DEFAULT", LaunchConfig({"BLOCK": 1 << 17}))
    losses, weights = [], []
    for name, choice in (("kernels", KERNELS), ("torch", TORCH)):
        run = train(config.build(base | choice | {"name": name}))
        keys = ("loss", "cls_loss", "dist_loss")
        losses.append([[row[key] for key in keys] for row in records(run) if row["kind"] == "step"])
        weights.append({k: v for k, v in tensors(run).items() if not k.startswith("optimizer")})
    assert len(losses[0]) == 8
    for got, expected in zip(*losses, strict=True):
        assert got == pytest.approx(expected, rel=LOSS_TOLERANCE)
    for name, expected in weights[1].items():
        if "qkv.bias" not in name:  # the keys' bias has no gradient but rounding, which AdamW scales up
            error = (weights[0][name] - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
            assert error <= WEIGHT_TOLERANCE, f"{name}: {error}"
