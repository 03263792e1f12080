"""Soak test: a run that is killed repeatedly must end bit for bit like an uninterrupted one.

    python -m benchmarks.soak --minutes 30      # kills every 20 to 60 s
    python -m benchmarks.soak --minutes 1       # a quick look: kills every 3 to 8 s

Two ranks train the embedded images with a checkpoint every few steps. In turn, SIGKILL ends the launcher and all ranks
or one rank, SIGTERM ends the launcher (all ranks save and stop with exit code 75), or SIGKILL is timed to a checkpoint
being written or an evaluation just logged; then the same command is rerun. At the end weights, moving average,
optimizer state, the best checkpoint, every logged loss and evaluation and the test results are compared bit for bit
with the uninterrupted run. The seconds between kills count from the first new step after a restart; time in which this
process is suspended does not count.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastdeitlt import config
from fastdeitlt.data.sets import embedded
from fastdeitlt.errors import counted
from fastdeitlt.models import create_teacher
from fastdeitlt.store.checkpoint import load_tensors, read_manifest, save_model_folder

TIMES = ("images_per_s", "data_wait", "eta_s")
KINDS = ("kill all", "kill one rank", "stop by signal", "kill while saving", "kill after an evaluation")
TICK_S = 0.05
LINE, EVALUATION = b"\n", b'"kind": "eval"'
"""Marks of a line and of an evaluation in metrics.jsonl."""
SETTINGS = {
    "data.dataset": "list",
    "student.name": "deit_tiny_distilled_patch16_32",
    "student.depth": 1,
    "student.drop_path": 0.2,
    "augment.crop_scale": [0.5, 1.0],
    "teacher.img_size": 28,
    "teacher.check": False,  # its weights are random
    "train.batch_size": 16,
    "train.virtual_ranks": 2,
    "train.compile": False,
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.log_every": 1,
    "train.save_every_steps": 8,  # of 24 in an epoch: its last step is saved before its evaluation, which is then due
    "train.save_every_epochs": 0,
    "train.timeout_s": 3600,
    "optim.ema_decay": 0.99,
    "evaluate.crop_pct": 1.0,
}


class AwakeClock:
    """Clock of the seconds in which this process ran."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> float:
        """Sleep a tick and count it, but never more than ten of them."""
        time.sleep(TICK_S)
        now = time.monotonic()
        self.seconds += min(now - self._last, 10 * TICK_S)
        self._last = now
        return self.seconds


def settings(folder: Path, steps: int) -> Path:
    """Write a configuration of about ``steps`` steps, with a teacher and DRW."""
    root = embedded.unpack()
    torch.manual_seed(1)
    manifest = {
        "kind": "teacher",
        "model": {"arch": "resnet8", "num_classes": 10, "img_size": 28},
        "preprocess": {"mean": [0.286] * 3, "std": [0.353] * 3, "img_size": 28, "crop_pct": 1.0},
    }
    teacher = save_model_folder(folder / "teacher", create_teacher("resnet8", 10, "fastdeitlt").state_dict(), manifest)
    flat: dict[str, Any] = SETTINGS | {"data.root": str(root), "runs_dir": str(folder), "teacher.path": str(teacher)}
    for split, every in (("train", 3), ("val", 11), ("test", 7)):
        path = folder / f"{split}.txt"
        path.write_text("\n".join((root / f"{split}.txt").read_text().splitlines()[::every]))
        flat[f"data.{split}_list"] = str(path)
    images = len((folder / "train.txt").read_text().splitlines())
    epochs = max(4, math.ceil(steps / (images // 256 * 256 // 32)))
    flat |= {"train.epochs": epochs, "loss.drw_epoch": epochs * 2 // 3, "evaluate.every": max(1, epochs // 40)}
    flat["optim.warmup_epochs"] = 1
    path = folder / "soak.yaml"
    path.write_text(config.dump(config.build(flat)))
    return path


def start(path: Path, name: str, log: Path) -> subprocess.Popen[bytes]:
    """Start the training command, with its output appended to ``log``."""
    command = [sys.executable, "-P", "-m", "fastdeitlt.cli", "train", str(path), f"name={name}", "--processes", "2"]
    return subprocess.Popen(command, stdout=log.open("ab"), stderr=subprocess.STDOUT, env=os.environ | THREADS)


THREADS = {"OMP_NUM_THREADS": "1"}


def children(pid: int) -> list[int]:
    """Return the running ranks of a launcher."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # the launcher has ended
        return []


def alive(pids: list[int]) -> list[int]:
    """Return the processes that are still running, without zombies."""
    return [p for p in pids if (stat := Path(f"/proc/{p}/stat")).exists() and stat.read_text().split(") ")[1][0] != "Z"]


def logged(run: Path, mark: bytes) -> int:
    """Count the occurrences of ``mark`` in the run's log."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(mark) if path.exists() else 0


def strike(kind: str, launcher: subprocess.Popen[bytes], ranks: list[int], run: Path, clock: AwakeClock) -> None:
    """End the run in one of the ways of ``KINDS``."""
    before = logged(run, EVALUATION)
    moments = {
        "kill while saving": lambda: any((run / "checkpoints").glob(".step-*.tmp-*")),
        "kill after an evaluation": lambda: logged(run, EVALUATION) > before,
    }
    if kind in moments:
        patience = clock.seconds + 10
        while not moments[kind]() and clock.seconds < patience:
            clock.seconds += 0.001
            time.sleep(0.001)
    if kind == "stop by signal":
        launcher.send_signal(signal.SIGTERM)
        return
    for pid in [random.choice(ranks)] if kind == "kill one rank" else [launcher.pid, *ranks]:
        with suppress(ProcessLookupError):  # Linux kills the ranks once their launcher is gone
            os.kill(pid, signal.SIGKILL)


def soak(path: Path, folder: Path, gap_s: tuple[float, float], clock: AwakeClock) -> dict[str, Any]:
    """Run to the end through kills; return counts, exit codes and times."""
    run, codes, kills, seconds = folder / "killed", [], dict.fromkeys(KINDS, 0), []
    while True:
        launcher, begun = start(path, "killed", folder / "killed.log"), logged(run, LINE)
        while launcher.poll() is None and logged(run, LINE) <= begun + 1:  # a life begins with its first new step
            begun = min(begun, logged(run, LINE))
            clock.tick()
        end = clock.seconds + random.uniform(*gap_s)
        while launcher.poll() is None and clock.seconds < end:
            clock.tick()
        kind, ranks = KINDS[sum(kills.values()) % len(KINDS)], children(launcher.pid)
        if ranks:
            strike(kind, launcher, ranks, run, clock)
        struck = clock.seconds
        while launcher.poll() is None or alive(ranks):
            clock.tick()
        if not ranks or launcher.returncode == 0:  # it came to its end before the strike
            codes.append(launcher.returncode)
            break
        kills[kind] += 1
        codes.append(launcher.returncode)
        seconds.append(round(clock.seconds - struck, 2))
        print(f"{clock.seconds:7.0f} s  {kind:18} exit {launcher.returncode:4} after {seconds[-1]} s", flush=True)
        if kind == "stop by signal" and launcher.returncode != 75:
            raise SystemExit(f"SIGTERM: exit code {launcher.returncode}, expected 75; see {folder / 'killed.log'}")
    return {"kills": kills, "exit_codes": codes, "longest_end_s": max(seconds, default=0.0)}


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two runs, compared bit for bit."""
    diffs = []
    for folder, parts in (("last", ("model", "ema", "optimizer")), ("before-drw", ("model",)), ("best", ("model",))):
        manifests = [read_manifest(run / "checkpoints" / folder) for run in (one, other)]
        if manifests[0] != manifests[1]:
            diffs.append(f"{folder}: manifest ({', '.join(str(m.get('selected', m['step'])) for m in manifests)})")
        for part in parts:
            a, b = (load_tensors(run / "checkpoints" / folder, part) for run in (one, other))
            names = a.keys() | b.keys()
            diffs += [f"{folder}: {part} {k}" for k in names if k not in a or k not in b or not torch.equal(a[k], b[k])]
    logs = []
    for run in (one, other):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k not in TIMES} for line in lines])
    for kind in sorted({line["kind"] for log in logs for line in log}):
        ours, theirs = ([line for line in log if line["kind"] == kind] for log in logs)
        if ours != theirs:
            diffs.append(f"log: {kind} records ({len(ours)} and {len(theirs)})")
    if logs[0] != logs[1]:
        diffs.append("log: as a whole")
    for name in ("results.json", "summary.csv"):
        if len({(run / name).read_text() for run in (one, other)}) > 1:
            diffs.append(name)
    return diffs + [f"{run.name}: no report" for run in (one, other) if not (run / "report.html").is_file()]


def main() -> int:
    """Run the command line; return 1 if the runs differ or one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="approximate length of the killed run")
    parser.add_argument(
        "--steps-per-second", type=float, default=10.0, help="steps per second of this machine, to set the length"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--folder", type=Path, help="folder of the runs; default: a new temporary folder")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    gap_s = (20.0, 60.0) if arguments.minutes >= 5 else (3.0, 8.0)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = settings(folder, round(arguments.minutes * 60 * arguments.steps_per_second))
    clock = AwakeClock()
    whole = start(path, "whole", folder / "whole.log")
    outcome = soak(path, folder, gap_s, clock)
    lasted = clock.seconds
    while whole.poll() is None:
        clock.tick()
    if whole.returncode or outcome["exit_codes"][-1]:
        print(f"exit codes: untouched {whole.returncode}, killed {outcome['exit_codes'][-1]}; see {folder}")
        return 1
    wrong = differences(folder / "whole", folder / "killed")
    steps = read_manifest(folder / "whole" / "checkpoints" / "last")["step"]
    left = [p.name for p in (folder / "killed" / "checkpoints").glob(".*")]
    due = (folder / "killed.log").read_text(errors="replace").count("next: end of epoch")
    facts = {"steps": steps, "awake_minutes": round(lasted / 60, 1), **outcome, "evaluations_due": due}
    print(json.dumps(facts | {"drafts_left": left}))
    print(f"{counted(len(wrong), 'difference')}{': ' + ', '.join(wrong[:5]) if wrong else ', bit-identical'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
