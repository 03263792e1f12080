"""The run folder: one owner, no secrets, a log that reads as if nothing had stopped."""

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import tiny_run

from fastdeitlt import config, train
from fastdeitlt.core import assemble
from fastdeitlt.errors import CheckpointError, StorageError, UserError
from fastdeitlt.run import folder as run_module
from fastdeitlt.run import launch
from fastdeitlt.run.folder import Run, environment, set_up_logging
from fastdeitlt.run.process import LAUNCH, RERUN, say_stopped
from fastdeitlt.run.records import Records


def _config(tmp_path, **flat):
    return config.build({"name": "r", "runs_dir": str(tmp_path), **flat})


def test_second_process_in_the_folder_is_refused(tmp_path):
    with Run(_config(tmp_path)):
        code = "import sys; from fastdeitlt import config; from fastdeitlt.run.folder import Run;"
        code += "Run(config.build({'name': 'r', 'runs_dir': sys.argv[1]}))"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "in use by another process" in done.stderr
    with Run(_config(tmp_path)):
        pass


def test_a_refused_start_releases_the_folder_though_its_error_is_kept(tmp_path):
    with Run(_config(tmp_path)) as run:
        run.rewind(0, ended=True)
        run.record("step", 1, loss=1.0)
    with pytest.raises(UserError, match="other settings") as kept:  # as a notebook keeps it
        Run(_config(tmp_path, **{"optim.lr": 0.1}))
    with Run(_config(tmp_path)):
        assert kept.traceback


def test_resume_never_takes_a_new_folder_and_must_needs_an_old_one(tmp_path):
    with pytest.raises(UserError, match="no run in"), Run(_config(tmp_path), "must"):
        pass
    with Run(_config(tmp_path)) as first:
        pass
    with Run(_config(tmp_path), "never") as second, Run(_config(tmp_path), "never") as third:
        assert [r.folder.name for r in (first, second, third)] == ["r", "r-2", "r-3"]
    with Run(_config(tmp_path), str(second.folder)) as again:
        assert again.folder == second.folder


def test_a_restart_with_resume_never_continues_in_the_folder_of_its_launch(tmp_path, monkeypatch):
    note, folders = tmp_path / "note", []
    code = f"import os; print(os.environ[{LAUNCH!r}], file=open({str(note)!r}, 'a')); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(launch, "PROGRAM", [sys.executable, "-c", code])
    monkeypatch.setattr(launch, "RESTARTABLE", (7,))
    for _ in range(2):
        assert launch.launch(1, [], restarts=1) == 7
    for start in note.read_text().split():
        monkeypatch.setenv(LAUNCH, start)
        with Run(_config(tmp_path), "never") as run:
            folders.append(run.folder.name)
    assert folders == ["r", "r", "r-2", "r-2"]


def test_a_stop_with_resume_never_names_the_folder_to_resume(tmp_path, capfd):
    for mode, said in (("never", f"rerun with --resume {tmp_path}/r to resume"), ("auto", f"{RERUN} to resume")):
        with Run(_config(tmp_path), mode) as run:
            assert said in str(run.stopped(signal.SIGTERM, 3))
            say_stopped(signal.SIGTERM)
            assert said in capfd.readouterr().err
        with pytest.raises(StorageError) as caught, Run(_config(tmp_path), str(run.folder)) as run:
            run.rewind(0, ended=False)
            raise OSError(errno.EIO, "failed", "/data/1.png")
        assert f"{RERUN} to resume" in str(caught.value)
    say_stopped(signal.SIGTERM)
    assert RERUN in capfd.readouterr().err


@pytest.mark.parametrize("name", ["../out", "a/b", "/etc", "", ".", "x\ny"])
def test_run_names_cannot_leave_the_runs_folder(tmp_path, name):
    with pytest.raises(UserError, match="name"):
        _config(tmp_path, name=name)


def test_harmless_settings_may_change_and_others_not(tmp_path):
    with Run(_config(tmp_path)) as run:
        run.record("step", 1, loss=0.5)
    with Run(_config(tmp_path, **{"train.log_every": 3})):
        pass
    with pytest.raises(UserError, match=r"train\.seed: 0 -> 4.*--resume never"):
        Run(_config(tmp_path, **{"train.seed": 4}))


def test_a_teacher_may_move_with_the_runs_folder(tmp_path):
    def begin(runs, teacher):
        with Run(_config(tmp_path / runs, track=[], **{"teacher.path": str(tmp_path / teacher)})) as run:
            run.record("step", 1, loss=0.5)

    begin("runs", "runs/t/best")
    (tmp_path / "runs").rename(tmp_path / "runs2")
    begin("runs2", "runs2/t/best")
    for other in ("runs2/u/best", "t/best"):
        with pytest.raises(UserError, match=r"teacher\.path: '.*/runs2/t/best' -> "):
            begin("runs2", other)


def test_a_start_that_was_refused_does_not_hold_its_settings(tmp_path):
    with Run(_config(tmp_path)):
        pass  # data that is not there, a wrong teacher
    with Run(_config(tmp_path, **{"train.seed": 4})) as run:
        assert "seed: 4" in (run.folder / "config.yaml").read_text()


def test_selected_weights_hold_the_settings_of_a_run_that_lost_its_log(tmp_path):
    with Run(_config(tmp_path)) as run:
        (run.folder / "checkpoints" / "best").mkdir()
    with pytest.raises(UserError, match=r"other settings \(train\.seed: 0 -> 4\)"):
        Run(_config(tmp_path, **{"train.seed": 4}))


def test_a_start_of_a_finished_run_changes_none_of_its_files(tmp_path, caplog, monkeypatch):
    with Run(_config(tmp_path, track=[])) as run:
        run.record("step", 1, loss=0.5)
        (run.folder / "results.json").write_text("{}")
    described = {name: (run.folder / name).read_bytes() for name in ("config.yaml", "env.json")}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with Run(_config(tmp_path, track=[], **{"data.test_list": "test2.txt"})) as again:
        assert again.finished and not again.cfg.data.test_list
    assert described == {name: (run.folder / name).read_bytes() for name in described}
    assert "changed settings are ignored (data.test_list: '' -> 'test2.txt')" in caplog.text
    assert f"fastdeitlt eval {run.folder} SETTING=VALUE" in caplog.text and "threads" not in caplog.text


def test_environment_has_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-7f3a")
    monkeypatch.setattr(sys, "argv", ["fastdeitlt", "--token=canary-7f3a"])
    with Run(_config(tmp_path)) as run:
        run.record("step", 1, loss=0.5)
    assert "canary" not in json.dumps(environment())
    assert not any(b"canary" in p.read_bytes() for p in run.folder.rglob("*") if p.is_file())


def test_names_in_messages_cannot_drive_a_terminal(capsys):
    set_up_logging()
    logging.getLogger("fastdeitlt").warning("class %s: 100%% new", "\x1b[2J\n")
    assert capsys.readouterr().out.endswith(r" class \x1b[2J\n: 100% new" + "\n")


def test_threads_of_another_number_are_told_at_the_next_start(tmp_path, caplog, monkeypatch):
    for threads in (2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        with Run(_config(tmp_path)):
            pass
    assert "threads 2 -> 3" in caplog.text


def test_rewinding_drops_later_records_and_half_lines(tmp_path):
    with Run(_config(tmp_path)) as run:
        for step in (1, 2, 3):
            run.record("step", step, loss=float(step))
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "step", "step": 2, "lo')
            file.write('\n{"step": 1}\n')
        run.rewind(2, ended=False)
        assert [line["step"] for line in run.records()] == [1, 2]


@pytest.mark.parametrize(("ended", "kept"), [(False, ["step"]), (True, ["step", "eval", "signs"])])
def test_rewinding_to_an_epochs_last_step_keeps_its_evaluation_only_when_the_epoch_has_ended(tmp_path, ended, kept):
    with Run(_config(tmp_path)) as run:
        for step in (1, 2):
            run.record("step", step, loss=1.0)
            run.record("eval", step, epoch=step - 1, weights="model", avg_all=10.0)
            run.record("signs", step, epoch=step - 1, signs=[])
        run.record("eval", 2, epoch=1, weights="selected", avg_all=10.0)
        run.summarise()
        run.rewind(2, ended)
        assert [line["kind"] for line in run.records() if line["step"] == 2] == kept
        assert (run.folder / "summary.csv").read_text().count("\n") == 2 + ended


def test_summary_has_one_row_an_evaluation(tmp_path):
    with Run(_config(tmp_path)) as run:
        run.record("eval", 1, epoch=0, avg_all=10.0, result={"a": 1})
        run.record("eval", 2, epoch=1, avg_all=20.0, result={"a": 1})
        run.summarise()
    assert (run.folder / "summary.csv").read_text() == "step,epoch,avg_all\n1,0,10.0\n2,1,20.0\n"


def test_a_group_without_images_is_null_in_the_records_and_empty_in_the_summary(tmp_path):
    with Run(_config(tmp_path, track=[])) as run:
        run.record("eval", 1, avg_all=50.0, avg_mid=float("nan"))
        run.summarise()
    (line,) = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert line == '{"kind": "eval", "step": 1, "avg_all": 50.0, "avg_mid": null}'
    assert (run.folder / "summary.csv").read_text() == "step,avg_all,avg_mid\n1,50.0,\n"


def test_a_runs_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        Run(_config(tmp_path / "file"))


def test_kernels_are_measured_before_the_step_is_built_and_the_folder_knows_their_measurements(tmp_path, monkeypatch):
    """What a resumed run compares its measurements with."""
    order = []

    def measure(cfg, student, teacher, num_classes, device):
        order.append("measure")
        now = environment() | {"kernel measurements": "measured at this start"}
        monkeypatch.setattr(run_module, "environment", lambda: now)

    def build(joint, cfg, plan):
        order.append("build")
        return SimpleNamespace(optimizer=None)

    def stop(*_):
        raise UserError("stop here")

    monkeypatch.setattr(assemble, "measure_kernels", measure)
    monkeypatch.setattr(assemble, "build_engine", build)
    monkeypatch.setattr(assemble, "Ema", lambda *_: None)
    monkeypatch.setattr(train, "Selector", stop)
    cfg = tiny_run(tmp_path)
    with pytest.raises(UserError, match="stop here"):
        train.train(cfg)
    assert order == ["measure", "build"]
    noted = json.loads((tmp_path / cfg.name / "env.json").read_text())
    assert noted["kernel measurements"] == "measured at this start"


def test_tensorboard_shows_a_resumed_run_without_what_was_dropped(tmp_path):
    with Run(_config(tmp_path)) as run:
        for step in (1, 2, 3):
            run.record("step", step, loss=float(step))
    with Run(_config(tmp_path)) as run:
        run.rewind(1, ended=False)
        run.record("step", 2, loss=20.0)
    files = (run.folder / "tensorboard").iterdir()  # events.out.tfevents.<second>.<host>.<process>.<counter>
    for second, file in enumerate(sorted(files, key=lambda file: int(file.name.rpartition(".")[2]))):
        file.rename(file.with_name(f"events.out.tfevents.{second:010d}"))  # as if not started within one second
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.ENOSPC])
def test_files_that_fail_in_mid_run_are_a_crash_that_a_restart_may_heal(tmp_path, number):
    failed = OSError(number, os.strerror(number), "/data/1.png")
    with pytest.raises(OSError, match="png"), Run(_config(tmp_path)):
        raise failed  # at the start nothing is to be continued
    with pytest.raises(StorageError, match=r"/data/1\.png: .*to resume from the last checkpoint") as caught:  # noqa: SIM117
        with Run(_config(tmp_path)) as run:
            run.count_start(0, 0)
            run.rewind(0, ended=False)
            raise failed
    assert caught.value.exit_code in launch.RESTARTABLE
    assert json.loads((run.folder / "starts.json").read_text())["died"] == 0  # counts for the crash loop


@pytest.mark.parametrize(("kind", "code"), [(UserError, 1), (CheckpointError, 4)])
def test_an_image_that_vanishes_in_mid_run_is_a_crash_too(tmp_path, kind, code):
    with pytest.raises(UserError, match="image 7: gone") as caught, Run(_config(tmp_path)) as run:
        run.rewind(0, ended=False)
        raise kind("image 7: gone") from FileNotFoundError(errno.ENOENT, "gone")
    assert caught.value.exit_code == code


def test_a_run_folder_that_is_moved_in_mid_run_is_not_started_anew(tmp_path):
    with pytest.raises(UserError, match=r"moved or deleted\. Restore it") as caught:  # noqa: SIM117
        with Run(_config(tmp_path)) as run:
            run.rewind(0, ended=False)
            run.folder.rename(tmp_path / "elsewhere")
            run.record("step", 1, loss=0.5)
    assert caught.value.exit_code not in launch.RESTARTABLE
    assert not run.folder.exists()


def test_log_lines_that_the_disk_refuses_are_written_later_and_whole(tmp_path, caplog):
    records = Records(tmp_path / "metrics.jsonl")
    records.append({"step": 1, "kind": "step"})
    size = records.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # stops in the middle of the next line
    try:
        for step in (2, 3):
            records.append({"step": step, "kind": "step"})
        with pytest.raises(OSError, match="File too large"):
            records.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert records.path.stat().st_size == size and caplog.text.count("cannot be written") == 1
    assert [line["step"] for line in records.read()] == [1, 2, 3]
    records.flush()
    assert [json.loads(line)["step"] for line in records.path.read_text().splitlines()] == [1, 2, 3]


def test_the_log_is_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    flushed, real = [], os.fsync
    with Run(_config(tmp_path)) as run:
        run.record("step", 1, loss=0.5)
        monkeypatch.setattr(
            os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}")) or real(file)
        )
        run.checkpoints.save(1, {"model": {"w": torch.ones(2)}}, {"best": None}, wait=True)
    assert flushed[0] == str(run.folder / "metrics.jsonl") and "model.safetensors" in flushed[1]


def test_a_table_of_evaluations_that_cannot_be_written_ends_no_run(tmp_path, caplog, monkeypatch):
    with Run(_config(tmp_path)) as run:
        run.record("eval", 1, avg_all=50.0)
        monkeypatch.setattr(run_module, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        run.summarise()
    assert "the next evaluation retries" in caplog.text
