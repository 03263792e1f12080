"""Schedule, parameter groups and moving average against the reference."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdeitlt import config, optim
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("case", json.loads((DATA / "lr_schedule.json").read_text()), ids=lambda c: f"{c['epochs']}ep")
def test_learning_rate_is_the_references(case):
    cfg = config.build(
        {
            "train.epochs": case["epochs"],
            "train.batch_size": case["batch_size"],
            "train.virtual_ranks": case["world"],
            "train.accumulate": case["accum"],
            "optim.warmup_epochs": case["warmup_epochs"],
        }
    )
    assert optim.peak_learning_rate(cfg) == pytest.approx(case["base_lr"], abs=1e-12)
    for epoch, iteration, expected in case["points"]:
        got = optim.learning_rate(epoch + iteration / case["steps_per_epoch"], cfg)
        assert got == pytest.approx(expected, abs=1e-9), (epoch, iteration)


def test_effective_scaling_counts_accumulation_and_none_scales_nothing():
    base = {"train.batch_size": 128, "train.accumulate": 4, "train.virtual_ranks": 2}
    peaks = {
        s: optim.peak_learning_rate(config.build(base | {"optim.lr_scale": s}))
        for s in ("official", "effective", "none")
    }
    assert peaks == pytest.approx({"official": 2.5e-4, "effective": 1e-3, "none": 5e-4})


def test_learning_rate_ends_at_min_lr():
    cfg = config.build({"train.epochs": 20})
    assert optim.learning_rate(20, cfg) == optim.learning_rate(25, cfg) == cfg.optim.min_lr


def test_parameter_groups_are_the_references():
    golden = json.loads((DATA / "trajectory.json").read_text())
    student = create_student("deit_base_distilled_patch16_224", golden["arch"]["classes"], depth=2)
    groups = optim.parameter_groups(student, 0.05)
    got = [
        {"weight_decay": g["weight_decay"], "n": len(g["params"]), "numel": sum(p.numel() for p in g["params"])}
        for g in groups
    ]
    assert got == golden["optimizer"]["param_groups"]


def test_ema_follows_its_formula_and_swaps_there_and_back():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    ema = optim.Ema(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update()
    weight = model[0].weight.detach().clone()
    expected = 0.9 * start["0.weight"] + 0.1 * weight
    torch.testing.assert_close(ema.state["0.weight"], expected)
    ema.swap()
    torch.testing.assert_close(model[0].weight.detach(), expected)
    ema.swap()
    torch.testing.assert_close(model[0].weight.detach(), weight)
    assert "1.num_batches_tracked" not in ema.state


def test_ema_refuses_another_models_state():
    ema = optim.Ema(nn.Linear(3, 2), 0.9)
    with pytest.raises(UserError, match=r"weight has \(2, 4\), expected \(2, 3\)"):
        ema.load(optim.Ema(nn.Linear(4, 2), 0.9).state)


@pytest.mark.parametrize("backend", ["apex", "deepspeed"])
def test_missing_optimizer_backend_says_how_to_get_another(backend):
    cfg = config.build({"optim.backend": backend})
    with pytest.raises(UserError, match=r"use optim\.backend=torch"):
        optim.build_optimizer(nn.Linear(3, 2), cfg)
