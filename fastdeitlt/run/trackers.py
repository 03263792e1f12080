"""Experiment trackers for the numbers of metrics.jsonl: TensorBoard, W&B, MLflow."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from fastdeitlt.store.files import write_atomically

log = logging.getLogger("fastdeitlt")
Outcome = Literal["finished", "stopped", "failed"]

PROJECT = "fastdeitlt"
"""Default W&B project and MLflow experiment; their environment variables take precedence."""
QUEUE_LENGTH = 10_000
"""Most queued records of a tracker before the run drops it."""
CLOSE_S = 60.0
"""Timeout in seconds for trackers at the end of a run."""
MLFLOW_VALUE_LENGTH = 500
"""Length of a parameter value supported by all MLflow versions, in characters."""
MLFLOW_BATCH = 100
"""Most parameters per MLflow request."""


@dataclass(frozen=True)
class TrackedRun:
    """Description of a run for its trackers."""

    folder: Path
    name: str
    first_step: int
    """Records from this step on replace those of an earlier start."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted name -> value."""

    def identity(self, tracker: str, create: Callable[[], str]) -> tuple[str, bool]:
        """Return the run's id in a tracker, and whether it existed before.

        The id is stored with the folder's name: a copy of the folder is another run.
        """
        path, folder = self.folder / f".tracker-{tracker}", self.folder.resolve().name  # not W&B's own .wandb
        identity, _, owner = path.read_text(encoding="utf-8").partition("\n") if path.is_file() else ("", "", "")
        if identity and owner in ("", folder):  # "": stored before version 0.3
            return identity, True
        identity = create()
        write_atomically(path, f"{identity}\n{folder}")
        return identity, False


class Tracker(Protocol):
    """A service or format for numbers by name and step. Any method may raise."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Store numbers of an optimizer step."""

    def close(self, outcome: Outcome) -> None:
        """Write pending numbers and the outcome of the run."""


class TensorBoard:
    """Event files in the run's ``tensorboard`` folder."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step)
        self._hook = threading.excepthook
        threading.excepthook = self._report

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, outcome: Outcome) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _report(self, failure: threading.ExceptHookArgs) -> None:
        """Suppress tracebacks of TensorBoard's thread: its next call raises the error."""
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self._hook(failure)


class WeightsAndBiases:
    """A W&B run, resumed with its run; arguments, code and git state are not sent.

    ``WANDB_MODE``, ``WANDB_PROJECT`` and ``WANDB_ENTITY`` apply.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise RuntimeError("not logged in. Run `wandb login`, or set WANDB_MODE=offline.")
        identity, _ = run.identity("wandb", lambda: uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=identity,
            resume="allow",
            dir=str(run.folder),
            config=run.settings,
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                x_disable_meta=True,
                init_timeout=CLOSE_S / 2,
                finish_timeout=CLOSE_S / 2,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own counter cannot go back to a checkpoint

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=int(outcome != "finished"))


class MLflow:
    """An MLflow run, resumed with its run.

    ``MLFLOW_TRACKING_URI`` (default: ``mlruns`` next to the run folder) and ``MLFLOW_EXPERIMENT_NAME`` apply.
    """

    STATUS: Mapping[Outcome, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the defaults wait for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # in maintenance mode, but needs no database
            uri = (run.folder.resolve().parent / "mlruns").as_uri()
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient(tracking_uri=uri)
        self._id, existed = run.identity("mlflow", lambda: self._create(run.name))
        if existed:
            self._client.update_run(self._id, status="RUNNING")
            return
        params = [Param(name, str(value)[:MLFLOW_VALUE_LENGTH]) for name, value in run.settings.items()]
        for start in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_BATCH])

    def _create(self, name: str) -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        existing = self._client.get_experiment_by_name(title)
        experiment = existing.experiment_id if existing else self._client.create_experiment(title)
        return self._client.create_run(experiment, run_name=name).info.run_id

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[self._metric(name, v, now, step) for name, v in numbers.items()])

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self._id, self.STATUS[outcome])


KINDS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""Value of ``track`` -> its tracker."""


class _Feed:
    """Queue and thread of one tracker, so that the run does not wait for it.

    After the first failure, logged as one warning, the run continues without the tracker.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name = name
        self._records: queue.Queue[tuple[Mapping[str, float], int] | Outcome] = queue.Queue(QUEUE_LENGTH)
        self._disabled = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, args=(run,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, numbers: Mapping[str, float], step: int) -> None:
        if not self._disabled.is_set():
            self._queue((numbers, step))

    def end(self, outcome: Outcome) -> None:
        """Request the close for which ``wait`` waits."""
        self._queue(outcome)

    def _queue(self, record: tuple[Mapping[str, float], int] | Outcome) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._give_up(f"too slow, {QUEUE_LENGTH:,} records queued")

    def wait(self, until: float) -> None:
        """Wait for the tracker, unless it was dropped as too slow."""
        is_too_slow = self._disabled.is_set() and self._records.full()
        self._thread.join(0.0 if is_too_slow else max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._give_up("not finished in time")

    def _pass_on(self, run: TrackedRun) -> None:
        tracker: Tracker | None = None
        outcome: Outcome = "failed"
        try:
            tracker = KINDS[self.name](run)
            while not self._disabled.is_set():
                record = self._records.get()
                if isinstance(record, str):
                    outcome = record
                    break
                tracker.log(*record)
        except ImportError as error:
            self._give_up(f"{error}; pip install 'fastdeitlt[{self.name}]'")
        except Exception as error:
            log.debug("track: %s", self.name, exc_info=True)
            self._give_up(_brief(error))
        try:
            if tracker:
                tracker.close(outcome)
        except Exception as error:
            log.debug("track: %s", self.name, exc_info=True)
            self._give_up(_brief(error))

    def _give_up(self, why: str) -> None:
        if not self._disabled.is_set():
            self._disabled.set()
            log.warning("track: %s: %s; continuing without this tracker (metrics.jsonl is complete)", self.name, why)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Trackers:
    """All trackers of a run.

    Args:
        names: keys of ``KINDS``.
        run: description of the run.
    """

    def __init__(self, names: Iterable[str], run: TrackedRun) -> None:
        self._feeds = [_Feed(name, run) for name in dict.fromkeys(names)]

    def log(self, kind: str, step: int, facts: Mapping[str, Any]) -> None:
        """Queue the numeric values of ``facts``.

        Their names have the kind and, if present, set and weights.
        """
        prefix = "/".join([kind, *(str(facts[key]) for key in ("set", "weights") if key in facts)])
        numbers = {
            f"{prefix}/{name}": float(value)
            for name, value in facts.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if numbers:
            for feed in self._feeds:
                feed.put(numbers, step)

    def close(self, outcome: Outcome, timeout_s: float = CLOSE_S) -> None:
        """Close all trackers within ``timeout_s``; a second call does nothing."""
        feeds, self._feeds = self._feeds, []
        for feed in feeds:
            feed.end(outcome)
        until = time.monotonic() + timeout_s
        for feed in feeds:
            feed.wait(until)
