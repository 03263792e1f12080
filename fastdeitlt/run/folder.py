"""The run folder and its files, logging and the progress bar."""

import json
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.logging import RichHandler
from rich.progress import Progress

from fastdeitlt import config, distributed
from fastdeitlt.config import Config
from fastdeitlt.errors import (
    CrashLoopError,
    MemoryFullError,
    RankLostError,
    StoppedError,
    StorageError,
    UserError,
    printable,
    storage_failure,
)
from fastdeitlt.machine import usable_cores
from fastdeitlt.run.checkpoints import Checkpoints, sweep
from fastdeitlt.run.choice import begun, changes, choose_folder, mark_of_launch, refuse_changes, with_ranks
from fastdeitlt.run.process import LAUNCH, RERUN, STOP, Stopped, stop_code
from fastdeitlt.run.progress import console, start_bar
from fastdeitlt.run.records import Records
from fastdeitlt.run.trackers import Outcome, TrackedRun, Trackers
from fastdeitlt.store.files import read_json, write_atomically

log = logging.getLogger("fastdeitlt")

RESTARTS = 3
"""Failed starts from one step before the run refuses another."""
STOP_TRACKERS_S = 5.0
"""Seconds that a stop by a signal waits for the trackers."""
PACKAGES = ("torch", "torchvision", "triton", "timm", "nvidia-dali-cuda130", "deepspeed", "numpy", "pillow")


def set_up_logging() -> None:
    """Configure logging: rich on a terminal, else plain lines; info from rank 0."""
    log.setLevel(logging.INFO if distributed.rank() == 0 else logging.ERROR)
    log.propagate = False
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%X")
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_escape)
    log.handlers = [handler]


def _escape(record: logging.LogRecord) -> bool:
    """Escape control characters in a log message."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def environment() -> dict[str, Any]:
    """Describe hardware and software, without environment variables or arguments."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpu = measurements = None
    if torch.cuda.is_available():
        from fastdeitlt.kernels._measured import fingerprint

        gpu, measurements = torch.cuda.get_device_name(), fingerprint()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "world": distributed.get_world(),
        "kernel measurements": measurements,
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(Path(__file__).parents[2]), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


class Run:
    """A run folder: config, environment, records, summary, TensorBoard, checkpoints.

    Files: config.yaml, env.json, metrics.jsonl, summary.csv, tensorboard/, checkpoints/. ``PREEMPTED`` exists after a
    signal stopped the run, until it resumes; ``starts.json`` counts failed starts from the same step.

    Args:
        cfg: the resolved configuration; the folder is cfg.runs_dir/cfg.name.
        resume: auto (resume if possible), never (a new folder next to an existing one), must, or the path of a run
            folder.

    Raises:
        UserError: another process uses the folder, resume=must finds no run, or the configuration differs from the
            saved one in a setting not in ``MAY_CHANGE``.
    """

    def __init__(self, cfg: Config, resume: str = "auto") -> None:
        self.cfg = with_ranks(cfg)
        self.is_main = distributed.rank() == 0
        self.folder = distributed.on_main(lambda: self._take(resume))
        self.rerun = f"rerun with --resume {self.folder}" if resume == "never" else RERUN
        self._records = Records(self.folder / "metrics.jsonl")
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.cfg.train.keep, before=self._records.flush)
        self._begun = False
        self._progress: Progress | None = None
        self._trackers: Trackers | None = None
        self._restored = 0

    def _take(self, resume: str) -> Path:
        """Choose, create and lock the folder, and open it (rank 0)."""
        folder = choose_folder(self.cfg, resume)
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {folder}: cannot be created ({error}). Set another runs_dir.") from None
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            owner = folder / ".owner"
            by = f" ({owner.read_text(encoding='utf-8')})" if owner.is_file() else ""
            raise UserError(f"run folder {folder}: in use by another process{by}. Wait, or set name=...") from None
        try:
            self._open(folder, resume)
        except BaseException:  # a notebook keeps the error, and with it this object
            self._lock.release()
            raise
        return folder

    def _open(self, folder: Path, resume: str) -> None:
        """Compare the settings with the saved ones; write config.yaml and env.json."""
        write_atomically(folder / ".owner", f"process {os.getpid()} on {socket.gethostname()}")
        if LAUNCH in os.environ and resume == "never":
            mark_of_launch(folder).touch()
        sweep(folder / "checkpoints")
        if before := begun(folder):
            refuse_changes(before, self.cfg, folder)
            if (folder / "results.json").exists():  # these files describe the training of its weights
                if ignored := changes(before, self.cfg, ("name", "runs_dir")):
                    log.warning(
                        "run folder %s: finished, changed settings are ignored (%s). To score other images: "
                        "fastdeitlt eval %s SETTING=VALUE", folder, ", ".join(ignored.values()), folder,
                    )  # fmt: skip
                self.cfg = before
                return
        write_atomically(folder / "config.yaml", config.dump(self.cfg))
        now = environment()
        _warn_of_changes(read_json(folder / "env.json"), now)
        write_atomically(folder / "env.json", json.dumps(now, indent=1))

    def note_environment(self) -> None:
        """Rewrite env.json with kernel measurements made since the start."""
        if self.is_main:
            write_atomically(self.folder / "env.json", json.dumps(environment(), indent=1))

    def __enter__(self) -> "Run":
        STOP.cleanup, STOP.rerun = self._leave, self.rerun
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Stopped):
                self._leave(STOP.first)
            if self._progress:
                self._progress.stop()
            if self._trackers:
                self._trackers.close(_outcome(error))
            self.checkpoints.finish(must=error is None)
            if self.is_main and error is None and self._begun:
                self._records.flush()
            if self._begun and (message := _storage_failure(error)):
                if not self.folder.is_dir():
                    gone = f"run folder {self.folder}: moved or deleted. Restore it, and start again."
                    raise UserError(gone) from error
                raise StorageError(f"{message} ({self.rerun} to resume from the last checkpoint)") from error
        finally:
            STOP.cleanup, STOP.rerun = None, RERUN
            if self.is_main:
                if _is_clean(error):
                    (self.folder / "starts.json").unlink(missing_ok=True)
                if error is None:
                    (self.folder / "PREEMPTED").unlink(missing_ok=True)
                self._lock.release()

    def count_start(self, step: int, epoch: int) -> None:
        """Count a start in starts.json, which a clean end removes (rank 0).

        Args:
            step, epoch: completed optimizer steps and epochs of the restored state.

        Raises:
            CrashLoopError: too many starts from this state died.
        """
        self._restored = step
        path, state = self.folder / "starts.json", {"step": step, "epoch": epoch}
        before = read_json(path)
        died = before.get("died", 0) + 1 if before.items() >= state.items() else 0
        if died > RESTARTS:
            raise CrashLoopError(
                f"run folder {self.folder}: {died} starts from step {step} died before the next checkpoint. Find the "
                f"cause in the run's messages or the system log, then delete {path} to try again."
            )
        write_atomically(path, json.dumps({**state, "died": died}))
        (self.folder / "PREEMPTED").unlink(missing_ok=True)

    def stopped(self, number: int, step: int) -> StoppedError:
        """Return the error of a run stopped by a signal and saved; write PREEMPTED."""
        self._mark(number, step)
        name = signal.Signals(number).name
        return StoppedError(
            f"{self.folder}: stopped by {name}, saved at step {step}; {self.rerun} to resume",
            stop_code(number),
        )

    def _leave(self, number: int) -> None:
        """Finish the current save and write PREEMPTED, for a stop without a new save."""
        if self._progress:
            self._progress.stop()
        self.checkpoints.finish()
        if self._trackers:
            self._trackers.close("stopped", STOP_TRACKERS_S)
        self._mark(number, max(self.checkpoints.step, self._restored))
        if self.is_main:
            (self.folder / "starts.json").unlink(missing_ok=True)

    def _mark(self, number: int, step: int) -> None:
        if self.is_main:
            facts = {"signal": signal.Signals(number).name, "step": step}
            write_atomically(self.folder / "PREEMPTED", json.dumps(facts))

    @property
    def finished(self) -> bool:
        """Whether the run has results."""
        return (self.folder / "results.json").exists()

    def rewind(self, step: int, ended: bool) -> None:
        """Drop records logged after the restored state, which would be duplicates.

        Args:
            step: completed optimizer steps.
            ended: whether this step ended an epoch, including its evaluation.
        """
        self._restored = step
        self._begun = True
        if self.is_main and self._records.path.exists():
            self._records.keep(lambda line: _is_before(line, step, ended))
            self.summarise()

    def start_progress(self, total: int, step: int) -> None:
        """Show a progress bar of optimizer steps on a terminal."""
        if self.is_main and console.is_terminal:
            self._progress = start_bar(total, step)

    def record(self, kind: str, step: int, **facts: Any) -> None:
        """Append a line to metrics.jsonl and pass its numbers to the trackers."""
        if not self.is_main:
            return
        self._records.append({"kind": kind, "step": step, **facts})
        if self._trackers is None:  # not before ``rewind``
            tracked = TrackedRun(self.folder, self.folder.name, self._restored + 1, config.flatten(self.cfg))
            self._trackers = Trackers(self.cfg.track, tracked)
        self._trackers.log(kind, step, facts)

    def show(self, step: int, text: str, where: str, facts: Mapping[str, float]) -> None:
        """Update the progress bar, or log a line without one.

        Args:
            step: completed optimizer steps.
            text: the line.
            where: the epoch, shown before the bar.
            facts: ``loss``, ``images_per_s`` and ``eta_s``, shown after the bar.
        """
        if self._progress:
            minutes, seconds = divmod(round(facts["eta_s"]), 60)
            left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
            brief = f"loss {facts['loss']:.3f}  {facts['images_per_s']:,.0f} img/s  {left}"
            self._progress.update(self._progress.task_ids[0], completed=step, description=where, brief=brief)
        else:
            log.info(text)

    def summarise(self) -> None:
        """Rewrite summary.csv, one row per evaluation."""
        rows = [line for line in self.records() if line["kind"] == "eval"] if self.is_main else []
        if rows:
            kinds = int | float | str | None
            head = [key for key, value in rows[-1].items() if isinstance(value, kinds) and key != "kind"]
            cells = [[row.get(key) for key in head] for row in rows]
            table = [",".join(head), *(",".join("" if cell is None else str(cell) for cell in row) for row in cells)]
            try:
                write_atomically(self.folder / "summary.csv", "\n".join(table) + "\n")
            except OSError as error:
                log.warning("%s: summary.csv cannot be written (%s); the next evaluation retries", self.folder, error)

    def records(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl so far."""
        return self._records.read()


def _is_before(line: str, step: int, ended: bool) -> bool:
    """Return whether a record belongs to the state after ``step``; corrupt: False."""
    try:
        record = json.loads(line)
        at, kind = float(record["step"]), record["kind"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    if at == step and kind != "step":  # an evaluation; that of the selected weights is repeated until results exist
        return ended and record.get("weights") != "selected"
    return at <= step


def _storage_failure(error: BaseException | None) -> str | None:
    """Return the message of a file-system error, also as the cause of an image's."""
    if type(error) is UserError and isinstance(error.__cause__, OSError) and error.__cause__.errno:
        return str(error)
    return storage_failure(error)


def _outcome(error: BaseException | None) -> Outcome:
    """Return the outcome of a run for its trackers."""
    if error is None:
        return "finished"
    return "stopped" if isinstance(error, KeyboardInterrupt | StoppedError) else "failed"


def _is_clean(error: BaseException | None) -> bool:
    """Return whether the run ended without a crash that the next start could repeat."""
    crashes = (RankLostError, MemoryFullError, CrashLoopError)
    return (
        error is None
        or isinstance(error, KeyboardInterrupt)
        or (isinstance(error, UserError) and not isinstance(error, crashes))
    )


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if a run resumes on other hardware or software: last bits may differ."""
    flat = [{**e, **e["packages"]} for e in (before, now) if isinstance(e.get("packages"), dict)]
    if len(flat) < 2:
        return
    changed = [name for name in flat[0] if name in flat[1] and flat[0][name] != flat[1][name] and name != "packages"]
    if changed:
        listed = ", ".join(f"{name} {flat[0][name]} -> {flat[1][name]}" for name in changed)
        log.warning("resumed with other hardware or software (%s): results may differ in the last bits", listed)
