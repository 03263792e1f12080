"""A teacher's run on two ranks, killed at moments that no hook chooses, ends with the bits of the untouched one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_run import records, tiny_run

from fastdeitlt import config
from fastdeitlt.store.checkpoint import read_manifest

TEACHER = {
    "train.log_every": 1,
    "train.save_every_steps": 3,
    "evaluate.every": 2,
    "teacher_training.arch": "resnet8",
    "teacher_training.img_size": 28,
    "teacher_training.epochs": 4,
    "teacher_training.drw_epoch": 2,
    "teacher_training.batch_size": 24,
    "teacher_training.lr": 0.02,
    "teacher_training.warmup_epochs": 1,
    "teacher_training.schedule": "cosine",
}


def _start_teacher(cfg, name, restarts=0):
    path = Path(cfg.runs_dir) / f"{name}.yaml"
    path.write_text(config.dump(cfg.model_copy(update={"name": name})))
    command = [sys.executable, "-P", "-m", "fastdeitlt.cli", "train-teacher", str(path), "--processes", "2"]
    log = (Path(cfg.runs_dir) / f"{name}.log").open("ab")
    return subprocess.Popen(
        [*command, "--restarts", str(restarts)], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def _kill_at(launcher, run, lines, rank=None):
    """SIGKILL, once the log has so many lines, of a rank or of the launcher, with which its ranks die."""
    log = run / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert launcher.poll() is None, (run.parent / f"{run.name}.log").read_text()
        time.sleep(0.005)
    ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    os.kill(launcher.pid if rank is None else ranks[rank], signal.SIGKILL)
    return ranks


def test_a_teacher_killed_on_two_ranks_twice_continues_bit_for_bit(tmp_path):
    cfg = config.build(config.flatten(tiny_run(tmp_path)) | TEACHER)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    untouched, launcher = _start_teacher(cfg, "whole"), _start_teacher(cfg, "killed", restarts=1)
    first = _kill_at(launcher, killed, 8, rank=1)
    while any(Path(f"/proc/{pid}").exists() for pid in first):  # the launcher ends the other one, then starts again
        time.sleep(0.01)
    _kill_at(launcher, killed, 17)
    assert launcher.wait() == -signal.SIGKILL
    assert _start_teacher(cfg, "killed").wait() == 0, (tmp_path / "killed.log").read_text()
    assert untouched.wait() == 0, (tmp_path / "whole.log").read_text()
    assert records(killed) == records(whole)
    assert (killed / "results.json").read_text() == (whole / "results.json").read_text()
    for place, parts in (("last", ("model", "optimizer")), ("best", ("model",))):
        got, expected = (read_manifest(run / "checkpoints" / place) for run in (killed, whole))
        assert got == expected  # with the hashes of all tensors
        assert all(f"{part}.safetensors" in got["files"] for part in parts)
