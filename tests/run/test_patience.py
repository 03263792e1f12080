"""Early stopping: which evaluations count, where the run ends, and that a resumed run ends there too."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from snapshots import Killed
from tiny_run import records, tiny_run

from fastdeitlt import config
from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.errors import UserError
from fastdeitlt.run import student_scorer
from fastdeitlt.run.selection import Selector
from fastdeitlt.train import train

ACCURACIES = [9, 1, 2, 5, 4, 5, 8, 8]
"""Of ten validation images, one a class; by epoch. Re-weighting begins in epoch 2."""
STEPS = 3
"""Of an epoch."""


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Build a run whose evaluations have ``ACCURACIES``."""
    labels = torch.arange(10)
    script = iter(ACCURACIES)

    def decided(model, source, images, *_, **__):
        correct = next(script, 0) if len(images) == 10 else 10
        logits_NK = torch.nn.functional.one_hot(torch.where(labels < correct, labels, (labels + 1) % 10), 10).float()
        return logits_NK, logits_NK, labels

    monkeypatch.setattr("fastdeitlt.train.report.write_report", lambda folder: folder)  # half of the run's time
    monkeypatch.setattr(student_scorer, "gather_logits", decided)
    monkeypatch.setattr(student_scorer.WithCosine, "cosine_N", lambda *_: torch.zeros(10))
    flat = config.flatten(tiny_run(tmp_path)) | {
        "train.epochs": 8, "evaluate.every": 1, "evaluate.weights": "model", "train.patience": 2,
    }  # fmt: skip
    sets = open_sets(config.build(flat).data)
    val = replace(sets.val, labels=labels.numpy(), paths=sets.val.paths[:10])
    monkeypatch.setattr(student_scorer.signs, "tail_images", lambda *_: val.take(np.arange(0)))
    monkeypatch.setattr("fastdeitlt.core.assemble.open_training_sets", lambda data: replace(sets, val=val, test=None))
    return lambda **settings: config.build(flat | settings)


def epochs(run):
    return [r["epoch"] for r in records(run) if r["kind"] == "eval" and r["weights"] == "model"]


def test_training_ends_after_evaluations_without_a_better_accuracy_since_reweighting(run_of):
    """An equal accuracy is no better one, and that of epoch 0, before re-weighting, chooses the weights alone."""
    run = train(run_of(name="stops"))
    assert epochs(run) == [0, 1, 2, 3, 4, 5]
    assert json.loads((run / "results.json").read_text())["selected"]["epoch"] == 0


def test_without_patience_all_epochs_are_trained(run_of):
    assert epochs(train(run_of(name="goes-on", **{"train.patience": 0}))) == list(range(8))


@pytest.mark.parametrize("kill_at", ["step", "finish"])
def test_a_resumed_run_ends_at_the_same_point(run_of, monkeypatch, kill_at):
    real, count = PlainEngine.step, [0]

    def step(self, rate):
        count[0] += 1
        if kill_at == "step" and count[0] == 5 * STEPS + 2:
            raise Killed
        return real(self, rate)

    monkeypatch.setattr(PlainEngine, "step", step)
    cfg = run_of(name="killed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if kill_at == "finish":
            patch.setattr(Selector, "finish", lambda *_, **__: (_ for _ in ()).throw(Killed))
        train(cfg)
    run = train(cfg, "must")
    assert epochs(run) == [0, 1, 2, 3, 4, 5]
    assert count[0] == 6 * STEPS + (1 if kill_at == "step" else 0)  # the one that died
    assert (run / "results.json").exists()


def test_patience_without_a_set_to_select_on_is_refused(run_of):
    with pytest.raises(UserError, match=r"train\.patience: got 2 without a selection set"):
        train(run_of(name="none", **{"evaluate.select_on": "last"}))
