"""Trackers: each gets the run's numbers, continues with a resumed run, and stops nothing when it fails."""

import json
import logging
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb
from mlflow.tracking import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record

from fastdeitlt import config
from fastdeitlt.errors import StoppedError, UserError
from fastdeitlt.run import trackers
from fastdeitlt.run.folder import Run
from fastdeitlt.run.trackers import KINDS, MLFLOW_VALUE_LENGTH, PROJECT
from fastdeitlt.tools import demo


def _config(tmp_path, **flat):
    return config.build({"name": "r", "runs_dir": str(tmp_path), "train.seed": 7, **flat})


def _record(run, first, last):
    for step in range(first, last + 1):
        run.record("step", step, loss=1 / step, note="text", flag=True)


@pytest.fixture
def warnings(caplog):
    """Text of the warnings so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


class Recorder:
    """A tracker that keeps what it is given, in place of a library."""

    def __init__(self, run):
        self.run, self.numbers, self.outcome = run, [], None
        self.made.append(self)

    def log(self, numbers, step):
        self.numbers.append((step, dict(numbers)))

    def close(self, outcome):
        self.outcome = outcome


@pytest.fixture
def recorded(monkeypatch):
    made = Recorder.made = []
    for name in KINDS:
        monkeypatch.setitem(KINDS, name, Recorder)
    return made


def test_every_tracker_gets_the_numbers_by_kind_set_and_weights(tmp_path, recorded):
    with Run(_config(tmp_path, track=["wandb", "mlflow"])) as run:
        run.record("step", 1, loss=0.5, epoch=0, note="text", flag=True)
        run.record("eval", 2, set="val", weights="ema", avg_all=70.0, result={"a": 1})
        run.record("signs", 2, weights="ema", signs=[])
    assert len(recorded) == 2
    for tracker in recorded:
        assert tracker.numbers == [(1, {"step/loss": 0.5, "step/epoch": 0.0}), (2, {"eval/val/ema/avg_all": 70.0})]
        assert tracker.run.settings["train.seed"] == 7 and tracker.run.folder == run.folder
        assert tracker.outcome == "finished"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(UserError("bad"), "failed"), (StoppedError("stop"), "stopped"), (KeyboardInterrupt(), "stopped")],
)
def test_trackers_are_told_how_a_run_ended(tmp_path, recorded, error, outcome):
    with pytest.raises(type(error)), Run(_config(tmp_path)) as run:
        _record(run, 1, 1)
        raise error
    assert [tracker.outcome for tracker in recorded] == [outcome]


def test_one_name_or_several_or_none(tmp_path, recorded):
    assert _config(tmp_path, track="wandb").track == ("wandb",)
    assert _config(tmp_path).track == ("tensorboard",)
    with pytest.raises(UserError, match=r"track\.0: got 'comet', expected 'tensorboard', 'wandb' or 'mlflow'"):
        _config(tmp_path, track="comet")
    with Run(_config(tmp_path, track=[])) as run:
        _record(run, 1, 1)
    assert recorded == [] and (run.folder / "metrics.jsonl").is_file()
    with Run(_config(tmp_path, track=["mlflow", "mlflow"])) as run:  # may change in a run that has begun
        _record(run, 2, 2)
    assert len(recorded) == 1


def test_a_copied_run_has_its_own_identity(tmp_path, monkeypatch):
    def identity(name):
        return trackers.TrackedRun(Path(name), name, 1).identity("wandb", lambda: f"id of {name}")

    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    assert [identity("a") for _ in range(2)] == [("id of a", False), ("id of a", True)]
    shutil.copytree("a", "b")
    assert [identity(name) for name in "bba"] == [("id of b", False), ("id of b", True), ("id of a", True)]
    Path("b", ".tracker-wandb").write_text("earlier")  # a file of version 0.2
    assert identity("b") == ("earlier", True)
    monkeypatch.chdir("a")
    assert identity(".") == ("id of a", True)


def test_the_teacher_of_a_student_is_tracked_alike(monkeypatch):
    trained = []
    monkeypatch.setattr(demo, "train_teacher", lambda cfg: trained.append(cfg) or "best")
    monkeypatch.setattr(demo, "train", lambda cfg, resume: trained.append(cfg))
    for track in ("tensorboard", "wandb"):
        demo.train_both(config.load("quickstart", [f"track={track}"]), config.load("teacher/quickstart"))
    assert [cfg.track for cfg in trained] == [("tensorboard",)] * 2 + [("wandb",)] * 2
    assert trained[0].name == trained[2].name  # it is the same teacher


def test_no_library_is_imported_before_the_first_record():
    code = "import sys, fastdeitlt.run.folder; print({'tensorboard', 'wandb', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _wandb_records(folder: Path) -> list[Record]:
    """The records of every offline run: LevelDB's log format in blocks of 32 KB, after a header of 7 bytes."""
    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, place, parts = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            if not kind:
                break
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                records.append(Record.FromString(parts))
                parts = b""
    return records


def test_weights_and_biases_offline_gets_all_and_a_resumed_run_continues(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "canary-7f3a")
    monkeypatch.setattr(sys, "argv", ["fastdeitlt", "--token=canary-7f3a"])
    cfg = _config(tmp_path, track="wandb")
    for first, last in ((1, 3), (3, 4)):
        with Run(cfg) as run:
            run.rewind(first - 1, ended=False)
            _record(run, first, last)
    wandb.teardown()
    records = _wandb_records(run.folder)
    rows = [{i.key or ".".join(i.nested_key): i.value_json for i in r.history.item} for r in records if r.history.item]
    numbers = [(int(row["step"]), float(row["step/loss"])) for row in rows]
    assert numbers == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 3, 4)]
    runs = [record.run for record in records if record.run.run_id]
    assert {r.run_id for r in runs} == {(run.folder / ".tracker-wandb").read_text().split()[0]}
    assert {(r.project, r.display_name) for r in runs} == {(PROJECT, "r")}
    assert any(
        '"train.seed"' in json.dumps(update.key) and update.value_json == "7"
        for r in runs
        for update in r.config.update
    )
    assert not any(b"canary" in p.read_bytes() for p in run.folder.rglob("*") if p.is_file())


def test_mlflow_files_get_all_and_a_resumed_run_continues(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    cfg = _config(tmp_path, track="mlflow", **{"data.root": "/images/" + "x" * 600})
    with Run(cfg) as run:
        _record(run, 1, 2)
    with Run(cfg) as run:
        run.rewind(2, ended=False)
        _record(run, 3, 3)
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(PROJECT)
    (stored,) = client.search_runs([experiment.experiment_id])
    assert stored.info.run_name == "r" and stored.info.status == "FINISHED"
    history = client.get_metric_history(stored.info.run_id, "step/loss")
    assert [(m.step, m.value) for m in history] == [(step, 1 / step) for step in (1, 2, 3)]
    assert set(stored.data.params) == set(config.flatten(cfg))
    assert stored.data.params["train.seed"] == "7" and len(stored.data.params["data.root"]) == MLFLOW_VALUE_LENGTH


def test_a_library_that_is_absent_is_one_warning(tmp_path, monkeypatch, warnings):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Run(_config(tmp_path, track=["wandb"])) as run:
        _record(run, 1, 5)
    (warning,) = warnings()
    assert warning.startswith("track: wandb:") and "pip install 'fastdeitlt[wandb]'" in warning
    assert [line["step"] for line in run.records()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("method", ["__init__", "log", "close"])
def test_a_tracker_that_fails_is_one_warning_and_the_others_continue(tmp_path, recorded, monkeypatch, warnings, method):
    def fail(*_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(KINDS, "wandb", type("Failing", (Recorder,), {method: fail}))
    with Run(_config(tmp_path, track=["wandb", "mlflow"])) as run:
        _record(run, 1, 5)
    assert warnings() == [
        "track: wandb: ConnectionError: no route to host; continuing without this tracker (metrics.jsonl is complete)"
    ]
    healthy = next(tracker for tracker in recorded if type(tracker) is Recorder)
    assert len(healthy.numbers) == 5 and healthy.outcome == "finished" and len(run.records()) == 5


def test_a_tracker_that_hangs_holds_up_neither_the_steps_nor_the_end(tmp_path, recorded, monkeypatch, warnings):
    release = threading.Event()
    monkeypatch.setitem(KINDS, "wandb", type("Hanging", (Recorder,), {"log": lambda *_: release.wait(60)}))
    monkeypatch.setattr(trackers, "QUEUE_LENGTH", 20)
    real, waited = threading.Thread.join, []

    def join(self, timeout=None):
        if self.name == "tracker wandb":
            waited.append(timeout)
            timeout = 0.0
        real(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    with Run(_config(tmp_path, track=["wandb"])) as run:
        _record(run, 1, 50)
    release.set()
    assert waited == [0.0]
    assert [text.split(";")[0] for text in warnings()] == ["track: wandb: too slow, 20 records queued"]
    assert len(run.records()) == 50


def test_the_end_of_a_run_waits_so_long_and_no_longer(recorded, monkeypatch, tmp_path, warnings):
    release = threading.Event()
    monkeypatch.setitem(KINDS, "wandb", type("Hanging", (Recorder,), {"close": lambda *_: release.wait(60)}))
    fed = trackers.Trackers(["wandb"], trackers.TrackedRun(tmp_path, "r", 1))
    fed.log("step", 1, {"loss": 1.0})
    fed.close("finished", timeout_s=0.2)
    release.set()
    assert [text.split(";")[0] for text in warnings()] == ["track: wandb: not finished in time"]
    fed.close("finished")  # nothing is left to close


def test_a_server_that_is_not_there_is_one_warning(tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Run(_config(tmp_path, track=["mlflow"])) as run:
        _record(run, 1, 2)
    (warning,) = warnings()
    assert warning.startswith("track: mlflow: MlflowException: ") and "127.0.0.1" in warning


def test_weights_and_biases_without_a_key_asks_nobody(tmp_path, monkeypatch, warnings):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    wandb.teardown()
    with Run(_config(tmp_path, track=["wandb"])) as run:
        _record(run, 1, 2)
    (warning,) = warnings()
    assert "not logged in. Run `wandb login`, or set WANDB_MODE=offline" in warning


def test_event_files_that_cannot_be_written_are_one_warning(tmp_path, warnings, capfd):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "tensorboard").write_text("")
    with Run(_config(tmp_path)) as run:
        _record(run, 1, 3)
    (warning,) = warnings()
    assert warning.startswith("track: tensorboard: FileExistsError") and len(run.records()) == 3
    assert "Traceback" not in capfd.readouterr().err


def test_event_files_that_vanish_are_one_warning(tmp_path, warnings, capfd):
    """TensorBoard's own thread meets the error; its traceback is left out."""
    hook = threading.excepthook
    fed = trackers.Trackers(["tensorboard"], trackers.TrackedRun(tmp_path, "r", 1))
    fed.log("step", 1, {"loss": 0.5})
    while not list(tmp_path.glob("tensorboard/events*")):
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(2, 40):
        fed.log("step", step, {f"loss{i}": 0.5 for i in range(50)})
        time.sleep(0.01)
    fed.close("finished")
    (warning,) = warnings()
    assert warning.startswith("track: tensorboard: ")
    assert "Traceback" not in capfd.readouterr().err and threading.excepthook is hook
