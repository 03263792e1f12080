"""Model folders are whole or absent, and what is read back is what was written."""

import errno
import json
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastdeitlt.errors import CheckpointError, UserError
from fastdeitlt.run import checkpoints
from fastdeitlt.run.checkpoints import Checkpoints, sweep
from fastdeitlt.store import checkpoint
from fastdeitlt.store.checkpoint import load_tensors, read_manifest, save_model_folder

STATE = {
    "w": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "n": torch.tensor(3),
}


def test_tensors_and_facts_come_back_bit_for_bit(tmp_path):
    save_model_folder(tmp_path / "m", STATE, {"kind": "student", "step": 7}, ema={"w": STATE["w"].t()})
    manifest = read_manifest(tmp_path / "m")
    assert (manifest["kind"], manifest["step"], manifest["format"]) == ("student", 7, "fastdeitlt")
    back = load_tensors(tmp_path / "m")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in STATE.items())
    assert torch.equal(load_tensors(tmp_path / "m", "ema")["w"], STATE["w"].t())


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove", "manifest", "foreign", "no-files", "deep"])
def test_a_damaged_folder_is_refused(tmp_path, harm):
    folder = save_model_folder(tmp_path / "m", STATE, {})
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    content = bytearray(weights.read_bytes())
    if harm == "flip":
        content[-3] ^= 4
        weights.write_bytes(content)
    elif harm == "truncate":
        weights.write_bytes(content[: len(content) // 2])
    elif harm == "empty":
        weights.write_bytes(b"")
    elif harm == "remove":
        weights.unlink()
    else:
        text = {"manifest": '{"format": ', "foreign": '{"format": "other"}', "no-files": '{"format": "fastdeitlt"}'}
        manifest.write_text(text.get(harm, "[" * 100_000))
    with pytest.raises(UserError) as caught:
        read_manifest(folder)
    assert str(folder) in str(caught.value)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    folder = save_model_folder(tmp_path / "m", STATE, {})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"sha256": "0", "bytes": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is missing"):
        read_manifest(folder)


SAVE_TWICE = """
import os, sys
from pathlib import Path
import torch
from fastdeitlt.store import checkpoint
from fastdeitlt.run.checkpoints import Checkpoints
folder, point = Path(sys.argv[1]), sys.argv[2]
found = Checkpoints(folder)

def save(step):
    parts = {"model": {"w": torch.full((2,), float(step))}}
    best = {"step": step, "epoch": 0, "weights": "model"}
    facts = {"epoch": 0, "best": best, "recent": {}, "fingerprint": {}}
    found.save(step, parts, facts, wait=True, milestone="before-drw")

save(1)
rename, replace = Path.rename, Path.replace
if point == "before the rename":
    Path.rename = lambda self, to: os._exit(9)
elif point.startswith("renaming "):
    draft = f".{point.removeprefix('renaming ')}*.tmp-*"
    Path.rename = lambda self, to: os._exit(9) if self.match(draft) else rename(self, to)
elif point == "before last":
    Path.replace = lambda self, to: os._exit(9)
else:
    setattr(checkpoint, point, lambda *rest, **more: os._exit(9))
save(2)
"""


@pytest.mark.parametrize(
    ("point", "survivor", "milestone", "best"),
    [
        ("save_file", 1, 1, 1),
        ("flush", 1, 1, 1),
        ("before the rename", 1, 1, 1),
        ("renaming before-drw", 1, 1, 1),
        ("renaming step", 1, 2, 1),
        ("renaming best", 2, 2, 1),
        ("before last", 2, 2, 2),
    ],
)
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, point, survivor, milestone, best):
    """The process ends at a named point, as with kill -9; what is there loads, and the next start cleans up."""
    done = subprocess.run([sys.executable, "-c", SAVE_TWICE, str(tmp_path), point], check=False)
    assert done.returncode == 9
    sweep(tmp_path)
    assert not list(tmp_path.glob(".*"))
    path, manifest = Checkpoints(tmp_path).newest()
    assert manifest["step"] == survivor
    assert torch.equal(load_tensors(path)["w"], torch.full((2,), float(survivor)))
    assert read_manifest(tmp_path / "last")["step"] == 1
    assert read_manifest(tmp_path / "before-drw")["step"] == milestone
    assert read_manifest(tmp_path / "best")["selected"]["step"] == best
    assert Checkpoints(tmp_path).restore_best(manifest)  # made again where the checkpoint names other weights
    assert read_manifest(tmp_path / "best")["selected"]["step"] == survivor
    assert torch.equal(load_tensors(tmp_path / "best")["w"], torch.full((2,), float(survivor)))


FACTS = {"epoch": 0, "best": None, "recent": {}, "fingerprint": {}}


def _save(found, step, value=0.0, best=None, **options):
    found.save(step, {"model": {"w": torch.full((3,), value)}}, FACTS | {"best": best}, **options)


def test_a_save_in_the_background_holds_the_weights_of_its_step(tmp_path, monkeypatch):
    go, real = threading.Event(), checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *rest: (go.wait(10), real(*rest)))
    found, weights = Checkpoints(tmp_path), torch.zeros(3)
    found.save(1, {"model": {"w": weights}}, FACTS)
    weights.fill_(7.0)  # the next step, while the writer waits
    assert not list(tmp_path.glob("step-*"))
    go.set()
    found.finish()
    assert torch.equal(load_tensors(tmp_path / "last")["w"], torch.zeros(3))


def test_one_save_is_in_flight_at_a_time(tmp_path, monkeypatch):
    running, most = [], []
    real = checkpoints.save_model_folder

    def slow(*rest, **parts):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return real(*rest, **parts)

    monkeypatch.setattr(checkpoints, "save_model_folder", slow)
    found = Checkpoints(tmp_path)
    for step in range(4):
        _save(found, step)
    found.finish()
    assert most == [1, 1, 1, 1] and read_manifest(tmp_path / "last")["step"] == 3


def test_a_stop_signals_thread_may_wait_while_a_save_begins(tmp_path, monkeypatch):
    found, start = Checkpoints(tmp_path), threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (found.finish(), start(thread)))
    _save(found, 1, wait=True)
    assert read_manifest(tmp_path / "last")["step"] == 1


def test_failed_saves_are_told_at_the_next_call_and_the_third_in_a_row_stops(tmp_path, monkeypatch, caplog):
    found, real = Checkpoints(tmp_path), checkpoint.save_file

    def full(*rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    _save(found, 1)
    _save(found, 2)
    assert "training continues (failed save 1 of 3)" in caplog.text
    monkeypatch.setattr(checkpoint, "save_file", real)
    _save(found, 3)  # reports the second
    _save(found, 4, wait=True)
    monkeypatch.setattr(checkpoint, "save_file", full)
    _save(found, 5)
    _save(found, 6)
    _save(found, 7)
    with pytest.raises(CheckpointError, match=r"No space left.*3 consecutive failed saves"):
        _save(found, 8)
    with pytest.raises(CheckpointError, match="4 consecutive failed saves"):
        _save(found, 9, wait=True)
    assert read_manifest(tmp_path / "last")["step"] == 4


def test_the_two_newest_checkpoints_are_kept_and_a_milestone_whose_checkpoint_goes(tmp_path):
    found = Checkpoints(tmp_path)
    for step in (1, 2, 3, 10):
        _save(found, step, float(step), wait=True, milestone="before-drw" if step == 1 else "")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000010"]
    assert read_manifest(tmp_path / "last")["step"] == found.newest()[1]["step"] == 10
    assert read_manifest(tmp_path / "before-drw")["step"] == 1
    assert torch.equal(load_tensors(tmp_path / "before-drw")["w"], torch.ones(3))


def test_a_run_without_a_whole_checkpoint_does_not_start_over(tmp_path):
    found = Checkpoints(tmp_path)
    assert found.newest() is None  # none yet
    for step in (1, 2):
        _save(found, step, wait=True)
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    for _ in range(2):  # nor the next time, when both are set aside
        with pytest.raises(CheckpointError, match=r"no intact checkpoint.*--resume never") as caught:
            found.newest()
        assert caught.value.exit_code == 4
        assert len(list(tmp_path.glob("*.damaged-*"))) == 2


@pytest.mark.parametrize("what", ["listing", "manifest", "weights"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_read_that_fails_is_no_damage(tmp_path, monkeypatch, what, times):
    """ESTALE, as a network file system gives it: tried again, then one line; the checkpoint stays where it is."""
    found, left = Checkpoints(tmp_path), [times]
    _save(found, 1, wait=True)
    monkeypatch.setattr(checkpoint, "RETRY_S", 0)

    def failing(real):
        def read(*arguments):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(errno.ESTALE, "Stale file handle")
            return real(*arguments)

        return read

    owner, name = {"listing": (checkpoint.os, "listdir"), "manifest": (checkpoint.Path, "read_bytes")}.get(
        what, (checkpoint.hashlib, "file_digest")
    )
    monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    if times < checkpoint.READ_TRIES:
        assert found.newest()[1]["step"] == 1
    else:
        with pytest.raises(CheckpointError, match=r"Stale file handle.*nothing was changed") as caught:
            found.newest()
        assert caught.value.exit_code == 4
    monkeypatch.undo()
    assert found.newest()[1]["step"] == 1
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_checkpoint_of_an_older_version_is_refused_in_one_line(tmp_path):
    save_model_folder(tmp_path / "step-00000003", STATE, {"step": 3, "best": None, "version": "0.1"})
    with pytest.raises(CheckpointError, match=r"written by version 0\.1.*Use that version"):
        Checkpoints(tmp_path).newest()
    assert (tmp_path / "step-00000003").is_dir()


BEST = {"step": 1, "epoch": 0, "weights": "model", "accuracy": 50.0}


@pytest.mark.parametrize("harm", ["missing", "flipped bit", "other weights"])
@pytest.mark.parametrize("there", [True, False], ids=["its step is there", "its step is gone"])
def test_best_is_made_again_from_its_step_or_given_up(tmp_path, caplog, harm, there):
    found = Checkpoints(tmp_path)
    _save(found, 1, 1.0, BEST, wait=True)
    _save(found, 2, 2.0, BEST, wait=True)
    weights = tmp_path / "best" / "model.safetensors"
    if harm == "missing":
        shutil.rmtree(tmp_path / "best")
    elif harm == "flipped bit":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    else:
        save_model_folder(tmp_path / "best", STATE, {"selected": BEST | {"step": 9}})
    if not there:
        shutil.rmtree(tmp_path / "step-00000001")
    _, manifest = found.newest()
    assert found.restore_best(manifest) is there
    if there:
        assert read_manifest(tmp_path / "best")["selected"] == BEST
        assert torch.equal(load_tensors(tmp_path / "best")["w"], torch.ones(3))
    said = "restored from step-00000001" if there else "are lost, the next evaluation selects new ones"
    assert said in caplog.text


def test_best_is_written_after_a_save_that_failed(tmp_path, monkeypatch):
    found, real = Checkpoints(tmp_path), checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    _save(found, 1, 1.0, BEST)
    found.finish()
    monkeypatch.setattr(checkpoint, "save_file", real)
    _save(found, 2, 2.0, BEST, wait=True)
    assert read_manifest(tmp_path / "best")["selected"] == BEST
    assert torch.equal(load_tensors(tmp_path / "best")["w"], torch.ones(3))


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), TypeError("a bug"), MemoryError()])
def test_an_error_of_any_kind_is_a_failed_save(tmp_path, monkeypatch, caplog, error):
    found = Checkpoints(tmp_path)
    monkeypatch.setattr(found, "_write", lambda *_: (_ for _ in ()).throw(error))
    _save(found, 1)
    _save(found, 2)
    assert f"could not be written ({type(error).__name__}" in caplog.text
    assert "training continues (failed save 1 of 3)" in caplog.text
    with pytest.raises(CheckpointError, match="2 consecutive failed saves"):
        found.finish(must=True)
    assert found.step == -1


@pytest.mark.parametrize("reason", ["a folder in its place", "no links"])
def test_checkpoints_need_no_symbolic_link(tmp_path, monkeypatch, caplog, reason):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    found = Checkpoints(tmp_path / "run" / "checkpoints")
    if reason == "no links":
        monkeypatch.setattr(checkpoint.Path, "symlink_to", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no")))
    else:
        (found.folder / "last").mkdir()
    for step in (1, 2):
        _save(found, step, wait=True)
    assert caplog.text.count("cannot link to step-00000001") == 1
    assert found.newest()[1]["step"] == 2
    assert checkpoint.find_model_folder(tmp_path / "run") == found.folder / "step-00000002"
    assert not list(found.folder.glob(".*"))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: _Disk)
    with pytest.raises(UserError, match=r"0 MiB free.*MiB. Free space"):
        save_model_folder(tmp_path / "m", STATE, {})
    assert not list(tmp_path.glob("**/*.safetensors"))


class _Disk:
    free = 10


def test_a_failed_write_keeps_the_old_folder_and_leaves_no_draft(tmp_path, monkeypatch):
    save_model_folder(tmp_path / "m", STATE, {"step": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*previous checkpoint is kept"):
        save_model_folder(tmp_path / "m", STATE, {"step": 2})
    assert read_manifest(tmp_path / "m")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
