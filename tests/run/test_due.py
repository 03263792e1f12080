"""What is due when a run dies is done by the next start: evaluation, best, milestone, results, report."""

import json
import logging
import shutil

import pytest
import torch
from snapshots import END, EVALUATION, Snapshots
from tiny_run import records, tiny_run

from fastdeitlt import config
from fastdeitlt.errors import CheckpointError, UserError
from fastdeitlt.evaluation.metrics import Result
from fastdeitlt.reporting import report
from fastdeitlt.run.checkpoints import Checkpoints
from fastdeitlt.run.selection import Selector
from fastdeitlt.store.checkpoint import load_tensors, read_manifest, save_model_folder, step_folders
from fastdeitlt.train import train
from fastdeitlt.train_teacher import train_teacher

SPINES = {"student": train, "teacher": train_teacher}
EPOCH_END = 3
"""Steps of an epoch, the same for both; there are two epochs."""
SHORT = {
    "train.epochs": 2,
    "train.save_every_steps": 1,
    "loss.drw_epoch": 1,
    "evaluate.every": 1,
    "teacher_training.arch": "resnet8",
    "teacher_training.img_size": 28,
    "teacher_training.epochs": 2,
    "teacher_training.drw_epoch": 1,
    "teacher_training.batch_size": 50,
    "teacher_training.lr": 0.02,
    "teacher_training.warmup_epochs": 0,
    "teacher_training.schedule": "cosine",
}


@pytest.fixture(scope="module", params=SPINES)
def untouched(request, tmp_path_factory):
    """(kind, its settings, the folder of its runs): a run that came to its end, and its snapshots beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = tiny_run(folder)
    cfg = config.build(config.flatten(cfg) | SHORT | {"name": "untouched"})
    with pytest.MonkeyPatch.context() as monkeypatch:
        Snapshots(monkeypatch, folder / "untouched", folder).take(EPOCH_END)
        SPINES[request.param](cfg)
    return request.param, cfg, folder


def resume(untouched, moment, name):
    """Continue a copy of a snapshot to its end."""
    kind, cfg, folder = untouched
    shutil.copytree(folder / moment, folder / name, symlinks=True)
    SPINES[kind](cfg.model_copy(update={"name": name}))
    return folder / name


def outcome(run):
    """All that a run leaves, without its speed."""
    found = {"log": records(run)} | {name: (run / name).read_text() for name in ("results.json", "summary.csv")}
    folders = [p for p in (run / "checkpoints").iterdir() if p.is_dir() and not p.is_symlink()]
    found |= {p.name: read_manifest(p) for p in folders}
    return found | {"files": sorted(p.name for p in run.iterdir())}


@pytest.mark.parametrize("moment", [*EVALUATION, *END])
def test_a_run_killed_at_any_moment_ends_as_the_untouched_one(untouched, moment, monkeypatch):
    kind, _, folder = untouched
    if kind == "teacher" and moment == END[2]:
        assert not (folder / moment).exists()  # a teacher's run has no report
        return
    assert not (folder / moment / "report.html").exists()
    pages = ("report.html", "report-confusion.csv")  # making them is half of so small a run's time
    monkeypatch.setattr(report, "write_report", lambda run: [(run / page).touch() for page in pages])
    assert outcome(resume(untouched, moment, f"killed-{moment}".replace(",", "").replace(" ", "-"))) == outcome(
        folder / "untouched"
    )


def test_results_name_the_weights_that_were_tested_when_a_resumed_run_differs(untouched, monkeypatch):
    """As on a GPU: ``best`` is of an evaluation whose checkpoint is lost, and which is not repeated exactly."""
    kind, cfg, folder = untouched
    run = folder / "other"
    shutil.copytree(folder / END[0], run, symlinks=True)
    (run / "checkpoints" / f"step-{2 * EPOCH_END:08d}" / "optimizer.safetensors").write_bytes(b"")
    first, later = {"step": EPOCH_END, "epoch": 0}, {"step": 2 * EPOCH_END, "epoch": 1}
    best, facts = load_tensors(run / "checkpoints" / "best"), read_manifest(run / "checkpoints" / "best")
    before = run / "checkpoints" / f"step-{2 * EPOCH_END - 1:08d}"
    assert read_manifest(before)["best"].items() >= first.items()
    facts["selected"] |= later
    save_model_folder(run / "checkpoints" / "best", best, {k: v for k, v in facts.items() if k != "files"})
    monkeypatch.setattr(Result, "selection_accuracy", lambda *_: -0.5)  # now it would not be the best
    SPINES[kind](cfg.model_copy(update={"name": "other"}))
    selected = json.loads((run / "results.json").read_text())["selected"]
    assert selected.items() >= later.items()
    assert read_manifest(run / "checkpoints" / "best")["selected"] | {"on": "val"} == selected
    expected = load_tensors(step_folders(run / "checkpoints")[0], selected["weights"])
    assert all(torch.equal(v, expected[k]) for k, v in load_tensors(run / "checkpoints" / "best").items())


def test_lost_best_weights_are_chosen_again_at_the_end(untouched, monkeypatch):
    _, _, folder = untouched
    monkeypatch.setattr(Checkpoints, "restore_best", lambda *_: False)
    run = resume(untouched, END[0], "lost")
    selected = json.loads((run / "results.json").read_text())["selected"]
    assert selected["step"] == 2 * EPOCH_END
    assert read_manifest(run / "checkpoints" / "best")["selected"] | {"on": "val"} == selected
    assert outcome(run)["summary.csv"].count("\n") == outcome(folder / "untouched")["summary.csv"].count("\n")


def test_flipped_bits_in_best_are_found_before_it_is_loaded(untouched, monkeypatch):
    kind, cfg, folder = untouched
    real, name = Selector.finish, f"flipped-{kind}"

    def finish(self, step, epoch):
        weights = self.run.folder / "checkpoints" / "best" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-3] ^= 64
        weights.write_bytes(content)
        real(self, step, epoch)

    monkeypatch.setattr(Selector, "finish", finish)
    with pytest.raises(CheckpointError, match=r"is damaged \(wrong sha256\).*rerun the same command") as caught:
        resume(untouched, END[0], name)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    monkeypatch.undo()
    SPINES[kind](cfg.model_copy(update={"name": name}))
    assert (folder / name / "results.json").exists()


def test_a_start_after_the_results_writes_the_report_once(untouched, caplog):
    kind, cfg, _ = untouched
    caplog.set_level(logging.INFO, logger="fastdeitlt")
    SPINES[kind](cfg)
    assert "is finished" in caplog.text and "report:" not in caplog.text
    assert ("fastdeitlt predict" in caplog.text) == (kind == "student")


def test_a_report_made_during_training_is_replaced_by_that_of_the_results(untouched, monkeypatch):
    kind, cfg, folder = untouched
    run = folder / "reported"
    shutil.copytree(folder / EVALUATION[0], run, symlinks=True)
    assert "No test results yet" in report.write_report(run).read_text()
    looked_into = []
    monkeypatch.setattr("fastdeitlt.train.analysis.look_into", lambda *_: looked_into.append(1))
    SPINES[kind](cfg.model_copy(update={"name": "reported"}))
    is_student = kind == "student"  # a teacher's run writes no report
    assert ("No test results yet" in (run / "report.html").read_text()) != is_student
    assert len(looked_into) == is_student


@pytest.mark.parametrize("factor", [2, 4, 0.5])
def test_a_branch_with_other_steps_per_epoch_is_refused_and_can_be_mended(untouched, factor):
    kind, cfg, folder = untouched
    name, point = f"branch-{factor}", f"step-{EPOCH_END:08d}"
    copy = folder / name / "checkpoints" / point
    shutil.copytree(folder / EVALUATION[5] / "checkpoints" / point, copy)
    if factor != 2:  # a checkpoint of an earlier version: detected unless the step can be of such an epoch
        facts = json.loads((copy / "manifest.json").read_text())
        assert facts.pop("epoch_steps") == EPOCH_END
        (copy / "manifest.json").write_text(json.dumps(facts))
    size = "train.batch_size" if kind == "student" else "teacher_training.batch_size"
    flat = config.flatten(cfg) | {"name": name}
    with pytest.raises(UserError, match=r"step 3 after 1 epoch, got \d steps? per epoch, expected .*\. Use the batch"):
        accumulate = {"train.accumulate": 2} if factor == 4 else {}  # of two micro-batches
        SPINES[kind](config.build(flat | accumulate | {size: int(flat[size] * factor)}))
    SPINES[kind](config.build(flat))
    assert records(folder / name)[-1]["step"] == 2 * EPOCH_END
