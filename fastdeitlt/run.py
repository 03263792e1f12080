"""The run folder, what is written into it, and what the person at the terminal sees."""

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from fastdeitlt import config, distributed
from fastdeitlt.checkpoint import Checkpoints
from fastdeitlt.config import Config
from fastdeitlt.errors import UserError

log = logging.getLogger("fastdeitlt")
console = Console()

# A resumed run may differ from the saved one in these alone; anything else would not be the same run.
MAY_CHANGE = (
    "runs_dir",
    "published",
    "data.root",
    "data.residency",
    "data.num_threads",
    "train.device",
    "train.compile",
    "train.engine",
    "train.zero_stage",
    "train.offload",
    "train.timeout_s",
    "train.log_every",
    "train.save_every_epochs",
    "train.save_every_steps",
    "evaluate.batch_size",
)
PACKAGES = ("torch", "torchvision", "triton", "timm", "nvidia-dali-cuda130", "deepspeed", "numpy", "pillow")


def set_up_logging() -> None:
    """Messages through rich on a terminal; plain lines with a time elsewhere, and only from rank 0."""
    log.setLevel(logging.INFO if distributed.rank() == 0 else logging.ERROR)
    log.propagate = False
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%X")
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers = [handler]


def environment() -> dict[str, Any]:
    """What the run ran on: an allow-list, never the process's environment or its arguments."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "world": distributed.get_world(),
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    git = shutil.which("git")
    if not git:
        return None
    root = Path(__file__).parent.parent
    found = subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


class Run:
    """One run's folder: config.yaml, env.json, metrics.jsonl, summary.csv, tensorboard/, checkpoints/.

    Args:
        cfg: the resolved configuration; the folder is cfg.runs_dir/cfg.name.
        resume: auto (continue if there is something), never (a new folder beside an old one), must, or the path of a
            run folder.

    Raises:
        UserError: another process has the folder, resume=must finds nothing, or the configuration differs from the
            saved one in a way that would make it another run.
    """

    def __init__(self, cfg: Config, resume: str = "auto") -> None:
        self.cfg = _with_ranks(cfg)
        self.is_main = distributed.rank() == 0
        self.folder = distributed.on_main(lambda: self._take(resume))
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self._progress: Progress | None = None
        self._board: SummaryWriter | None = None
        self.started = time.perf_counter()

    def _take(self, resume: str) -> Path:
        """Rank 0: choose the folder, make it, lock it, and write what the run is."""
        folder = Path(self.cfg.runs_dir) / self.cfg.name
        if resume not in ("auto", "never", "must"):
            folder = Path(resume)
        elif resume == "never":
            folder = _unused(folder)
        saved = folder / "config.yaml"
        if resume not in ("auto", "never") and not saved.is_file():
            raise UserError(f"resume: {folder} holds no run; use --resume auto to start one")
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {folder}: cannot be made ({error}); choose another runs_dir") from None
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"run folder {folder}: another process is using it; wait, or set name=...") from None
        if saved.exists():
            _refuse_changes(config.load(str(saved)), self.cfg, folder)
        write_atomically(saved, config.dump(self.cfg))
        write_atomically(folder / "env.json", json.dumps(environment(), indent=1))
        return folder

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()
        if self._board:
            self._board.close()
        if self.is_main:
            self._lock.release()

    @property
    def finished(self) -> bool:
        """The run has its results."""
        return (self.folder / "results.json").exists()

    def rewind(self, step: int) -> None:
        """Drop logged records after ``step``, so that a resumed run's log reads as if it had never stopped."""
        path = self.folder / "metrics.jsonl"
        if self.is_main and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomically(path, "".join(kept))

    def start_progress(self, total: int, step: int) -> None:
        """Show a bar of optimizer steps when on a terminal."""
        if self.is_main and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=console)
            self._progress.add_task(self.cfg.name, total=total, completed=step)
            self._progress.start()

    def record(self, kind: str, step: int, **facts: Any) -> None:
        """Append one line to metrics.jsonl, and its numbers to TensorBoard."""
        if not self.is_main:
            return
        line = {"kind": kind, "step": step, **facts}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is None:
            self._board = SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in facts.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def show(self, step: int, text: str) -> None:
        """Advance the bar, or print a plain line where there is none."""
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, description=text)
        else:
            log.info(text)

    def summarise(self) -> None:
        """Rewrite summary.csv: one row an evaluation."""
        if self.is_main:
            rows = [line for line in self.records() if line["kind"] == "eval"]
            head = [key for key, value in rows[-1].items() if isinstance(value, int | float | str) and key != "kind"]
            table = [",".join(head), *(",".join(str(row.get(key, "")) for key in head) for row in rows)]
            write_atomically(self.folder / "summary.csv", "\n".join(table) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _with_ranks(cfg: Config) -> Config:
    """The run with its virtual ranks named, so that other real ranks continue the same run or are refused."""
    ranks = cfg.train.virtual_ranks or distributed.get_world()
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"virtual_ranks": ranks})})


def _unused(folder: Path) -> Path:
    number = 2
    candidate = folder
    while candidate.exists():
        candidate = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return candidate


def _refuse_changes(saved: Config, now: Config, folder: Path) -> None:
    before, after = config.flatten(saved), config.flatten(now)
    changed = [name for name in before if before[name] != after[name] and name not in (*MAY_CHANGE, "name")]
    if changed:
        listed = ", ".join(f"{name}: {before[name]!r} -> {after[name]!r}" for name in changed[:4])
        raise UserError(
            f"run folder {folder}: holds a run with other settings ({listed}); "
            "use --resume never for a new folder, or the saved settings"
        )
