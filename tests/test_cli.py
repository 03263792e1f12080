"""The command line as a person meets it: codes, one-line errors, speed of --help."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stub_command

from fastdeitlt import cli

FASTDEITLT = Path(sys.executable).with_name("fastdeitlt")


def test_help_imports_nothing_heavy():
    code = "import sys\ntry:\n import fastdeitlt.cli as c; c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy={'torch','numpy','timm','nvidia.dali','deepspeed','triton','pydantic','rich'}&set(sys.modules)\n"
    code += "sys.exit(f'{heavy}' if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "quickstart", "train.epoch=3"], "did you mean train.epochs"),
        (["train", "quickstrat"], "did you mean quickstart"),
        (["config", "show", "quickstart", "optim.lr=fast"], "optim.lr: got 'fast', expected a valid number"),
        (["train", "quickstart", "teacher.path=/nowhere", "runs_dir=@"], "/nowhere"),
        (["train", "imagenet_lt", "data.root=/nowhere", "runs_dir=@"], "/nowhere"),
        (["data", "check", "imagenet_lt", "data.root=@"], "ILSVRC 2012"),
        (["data", "check", "places_lt"], "data_256"),
        (["data", "prepare", "cifar10"], "expected --root FOLDER"),
        (["data", "prepare", "cifar10", "--root", "@"], "data prepare cifar10 --root"),
        (["data", "prepare", "places_lt", "--root", "@"], "expected cifar10, cifar100 or fashion_mnist"),
        (["data", "check", "quickstart", "--root", "@"], "--root: no effect on 'data check', expected with 'data prep"),
        (["data", "stats", "quickstart", "--clear"], "--clear: no effect on 'data stats', expected with 'data cache'"),
        (["data", "prepare", "cifar10", "--root", "@", "train.seed=1"], "train.seed=1: no effect on 'data prepare'"),
        (["data", "cache", "quickstart"], "quickstart: no effect on 'data cache'"),
        (["data", "cache", "--json"], "--json: no effect on 'data cache', expected with 'data check' or 'data stats'"),
        (["config", "list", "quickstart"], "quickstart: no effect on 'config list', expected with 'config show'"),
        (["config", "list", "--changed"], "--changed: no effect on 'config list'"),
        (["eval", "/nowhere"], "/nowhere"),
        (["report", "/nowhere"], "/nowhere"),
        (["report", "/nowhere", "--out", "@/gone/a.html"], "gone/a.html: no such folder"),
        (["bench", "quickstart", "--json", "@/gone/a.json"], "gone/a.json: no such folder"),
        (["analyze", "student", "/nowhere", "--json", "@/gone/a.json"], "gone/a.json: no such folder"),
        (["export", "/nowhere", "@/out"], "/nowhere"),
        (["predict", "/nowhere", "x.png"], "/nowhere"),
        (["train", "quickstart", "runs_dir=@", "student.name=deit_tiny_distilled_patch5_32"], "patch5"),
        (["train", "quickstart", "runs_dir=@", "--resume", "must"], "no run in"),
        (["train", "quickstart", "runs_dir=@", "--dry-run", "--processes", "-3"], "--processes: got -3, expected 0 or"),
        (["train-teacher", "teacher/quickstart", "--dry-run", "--restarts", "-1"], "--restarts: got -1, expected 0 or"),
        (["bench", "imagenet_lt"], "Use --synthetic to measure"),
        (["bench", "imagenet_lt", "--synthetic", "data.dataset=folder"], "data.dataset=folder"),
        (["bench", "quickstart", "--synthetic", "--batches", "8", "0"], "--batches: got 0, expected at least 1"),
        (["bench", "quickstart", "--synthetic", "--ranks", "-1"], "--ranks: got -1, expected at least 1"),
        (["bench", "quickstart", "--with-teacher", "imagenet_lt"], "got imagenet_lt, which sets nothing of teacher_"),
        (["profile", "quickstart", "--steps", "0"], "--steps: got 0, expected at least 1"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(arguments, words, tmp_path, capsys):
    code = cli.main([argument.replace("@", str(tmp_path)) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert error.startswith("fastdeitlt: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "Free space, or write to another folder."),
        (errno.EACCES, "Change the permissions, or use another folder."),
        (errno.EFBIG, "Free space, or write to another folder."),
        (errno.EMFILE, "Raise the limit on open files (ulimit -n)."),
        (errno.EIO, "Check the system log, and start again."),
        (errno.ENOENT, "Restore it if it was moved, and start again."),
        (errno.EBADF, None),
    ],
)
def test_a_place_that_takes_no_file_is_one_line(number, cure, monkeypatch, capsys):
    def write(args):
        raise OSError(number, os.strerror(number), "/full/scores.json")

    monkeypatch.setitem(cli.VERBS, "doctor", write)
    if cure is None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            cli.main(["doctor"])
        return
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == f"fastdeitlt: error: /full/scores.json: {os.strerror(number)}. {cure}\n"


def test_ctrl_c_is_code_130(monkeypatch, capfd):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "rerun the same command to resume from the last checkpoint" in capfd.readouterr().err


def test_config_show_names_value_origin_and_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["config", "show", "quickstart", "train.epochs=9", "loss.drw_epoch=-1"]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "train.epochs" in line)
    assert "9" in row and "override" in row and "Passes over" in row


def test_settings_may_stand_on_both_sides_of_an_option(tmp_path, capsys):
    settings = ["train.batch_size=4", f"runs_dir={tmp_path}", "student.depth=1"]
    assert cli.main(["train", "quickstart", *settings[:2], "--resume", "never", settings[2], "train.epoch=3"]) == 2
    assert "did you mean train.epochs" in capsys.readouterr().err
    for strangers in (["--resme", "never"], ["--resume", "never", "stray"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", "quickstart", *settings, *strangers])
        assert stopped.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_the_installed_command_exists():
    done = subprocess.run([FASTDEITLT, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for verb in ("train", "train-teacher", "demo", "eval", "predict", "export", "report", "data", "config", "doctor"):
        assert f"    {verb}" in done.stdout


def test_memory_that_is_refused_is_one_line(monkeypatch, capsys):
    def load(args):
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setitem(cli.VERBS, "doctor", load)
    assert cli.main(["doctor"]) == 6
    assert capsys.readouterr().err.startswith(
        "fastdeitlt: error: out of memory (libtorch_cpu.so: failed to map segment"
    )


def _stub(what, folder, verb="demo", shell="", **streams):
    """A command of ``stub_command``, in a shell that takes away some of its streams."""
    program = [sys.executable, "-W", "error::ResourceWarning", stub_command.__file__, what, verb]
    program += ["--runs-dir", str(folder)] if verb == "demo" else ["show", str(folder)]
    return subprocess.Popen(["sh", "-c", f'exec "$@" {shell}', "sh", *program], **streams)


@pytest.mark.parametrize("shell", [">/dev/full", ">/dev/full 2>&1", ">&- 2>&- <&-", "2>&-", "| true", "| head -1"])
@pytest.mark.parametrize("verb", ["demo", "config"])
def test_output_that_cannot_be_written_changes_no_file_and_no_code_of_a_run(shell, verb, tmp_path):
    if "|" in shell:  # the reader ends, and the program meets the closed pipe
        command = _stub("talk", tmp_path, verb, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if "head" in shell:
            command.stdout.read(10)
        command.stdout.close()
        said = command.stderr.read()
        command.stderr.close()
    else:
        command = _stub("talk", tmp_path, verb, shell, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = command.communicate()[1]
    command.wait()
    assert (tmp_path / "results.json").exists()
    assert b"Logging error" not in said and b"BrokenPipe" not in said and b"Exception ignored" not in said
    lost = 0 if shell == "2>&-" else 141 if "|" in shell else 2
    assert command.returncode == (lost if verb == "config" else 0), said  # what config prints is all there is
    if verb == "config" and shell == ">/dev/full":
        assert said.count(b"fastdeitlt: error: standard output: No space left on device") == 1


@pytest.mark.parametrize(
    ("what", "number", "count", "code", "words"),
    [
        ("wait", signal.SIGTERM, 1, 75, b"stopped by SIGTERM"),
        ("wait", signal.SIGUSR1, 40, 75, b"stopped by SIGUSR1"),
        ("wait", signal.SIGINT, 1, 130, b"stopped by SIGINT"),
        ("native", signal.SIGTERM, 1, 75, b"stopped by SIGTERM"),
        ("callback", signal.SIGTERM, 1, 75, b"stopped by SIGTERM"),
        ("loop", signal.SIGTERM, 40, 75, b""),
    ],
)
def test_a_stop_signal_ends_a_command_with_its_code(what, number, count, code, words, tmp_path):
    command = _stub(what, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout.readline() == b"ready\n"
    for _ in range(count):
        command.send_signal(number)
        time.sleep(0.01)
    said = command.communicate()[1]
    assert command.returncode == code, said
    assert words in said and b"Traceback" not in said and said.count(b"\n") == bool(words)
    if what == "loop":
        assert int((tmp_path / "saved").read_text()) > 1  # the others came while it saved
    if what == "native":
        assert (tmp_path / "left").read_text() == str(int(number))


def test_a_second_ctrl_c_does_not_wait_for_the_save(tmp_path):
    command = _stub("impatient", tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in (b"ready\n", b"noted\n"):
        assert command.stdout.readline() == line
        command.send_signal(signal.SIGINT)
    assert b"stopped by SIGINT" in command.communicate()[1]
    assert command.returncode == 130


def test_a_closed_terminal_does_not_end_a_command(tmp_path):
    assert _stub("hangup", tmp_path).wait() == 0
