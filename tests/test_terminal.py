"""What a person at a terminal of 80 columns sees: bars, headings, help, settings."""

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny_run import tiny_run

from fastdeitlt import __version__, cli, config
from fastdeitlt.run import folder as run_folder
from fastdeitlt.run import progress
from fastdeitlt.run.folder import Run
from fastdeitlt.tools.examples import EXAMPLES

FASTDEITLT = Path(sys.executable).with_name("fastdeitlt")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def terminal(monkeypatch):
    """A console of 80 columns that keeps what it shows."""
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    for module in (progress, run_folder):
        monkeypatch.setattr(module, "console", console)
    return lambda: re.split(r"[\r\n]+", CONTROL.sub("", console.file.getvalue()))


def test_bar_loss_speed_and_time_left_fit_80_columns(terminal, tmp_path):
    with Run(config.build({"runs_dir": str(tmp_path)})) as run:
        run.start_progress(1200 * 904, 0)
        facts = {"loss": 12.345, "images_per_s": 12345.6, "eta_s": 400000.0}
        run.show(904 * 1198, "the plain line", "epoch 1199/1200", facts)
    line = next(line for line in terminal() if "img/s" in line)
    assert len(line) <= 80
    assert re.search(r"epoch 1199/1200 ━+\S* +\d+% loss 12\.345  12,346 img/s  111:06:40 left", line)


def test_passes_of_a_command_have_a_bar_on_a_terminal_and_a_line_elsewhere(terminal, monkeypatch, caplog):
    assert list(progress.tracked("abc", "clean images", 3)) == ["a", "b", "c"]
    assert any("clean images" in line and "100%" in line for line in terminal())
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO()))
    with caplog.at_level("INFO", "fastdeitlt"):
        assert list(progress.tracked("abc", "mixed images", 3)) == ["a", "b", "c"]
    assert caplog.messages == ["mixed images"]


def _on_a_terminal(arguments, folder):
    """Run the program on a pseudo-terminal of 80 columns; its exit code and the lines that it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    program = subprocess.Popen(
        [FASTDEITLT, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the last writer has gone
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return program.wait(), re.split(r"[\r\n]+", CONTROL.sub("", shown.decode()))


def test_teacher_and_student_have_headings_bars_and_evaluations_that_stay(tmp_path):
    (tmp_path / "s.yaml").write_text(config.dump(tiny_run(tmp_path)))
    short = ["train.epochs=2", "loss.drw_epoch=1", "teacher.path=", "evaluate.every=1"]
    short += ["teacher_training.epochs=1", "teacher_training.drw_epoch=-1", "teacher_training.arch=resnet8"]
    short += ["teacher_training.img_size=28", "name=s"]
    code, lines = _on_a_terminal(["train", "s.yaml", *short, "--with-teacher", "teacher/quickstart"], tmp_path)
    shown = "\n".join(lines)
    assert code == 0, shown
    order = [shown.index(text) for text in ("part 1 of 2: teacher", "part 2 of 2: student s", "epoch 2: val accuracy")]
    assert order == sorted(order)
    bars = [line for line in lines if re.search(r"epoch 2/2 .*━.*% loss \d+\.\d+  [\d,]+ img/s  0:00:\d\d left", line)]
    assert bars and all(len(line) <= 80 for line in bars)


def test_every_example_of_the_help_is_a_command():
    assert EXAMPLES.keys() - {""} <= cli.VERBS.keys()
    assert {"train", "train-teacher", "predict", "export", "config", "data"} <= EXAMPLES.keys()
    for verb, lines in EXAMPLES.items():
        for line in lines:
            if not line.endswith("--help"):
                parsed = cli.parse(shlex.split(line))
                assert parsed.verb == verb or not verb


def test_help_shows_the_examples_of_its_verb(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "  fastdeitlt train quickstart --with-teacher teacher/quickstart\n" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"fastdeitlt {__version__}\n")


def shown(capsys, *arguments):
    assert cli.main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_config_list_has_every_recipe(capsys):
    text = shown(capsys, "list")
    assert all(name in text for name in config.recipes())
    assert re.search(r"teacher/inat18_paco +. teacher +. inat18 +. 400", text)
    assert len(text.splitlines()) == len(config.recipes()) + 4


def test_config_show_filters_by_section_setting_and_change(capsys):
    alone = shown(capsys, "show", "loss", "--yaml")
    assert alone.startswith("loss:\n  distillation: hard\n") and "optim" not in alone
    some = shown(capsys, "show", "quickstart", "optim.lr", "loss", "loss.alpha=0.2", "--yaml")
    assert "alpha: 0.2" in some and "optim:\n  lr:" in some and "betas" not in some
    changed = shown(capsys, "show", "quickstart", "--changed", "--yaml")
    assert config.flatten(config.load("quickstart")) == config.flatten(_loaded(changed))
    assert len(changed.splitlines()) < 50
    assert "override" in shown(capsys, "show", "optim.lr", "optim.lr=0.1")


def _loaded(text):
    return config.load(config.Config(), yaml.safe_load(text))


def test_config_show_names_the_nearest_setting(capsys):
    assert cli.main(["config", "show", "quickstart", "optimm"]) == 2
    assert "no section or setting 'optimm'; did you mean optim" in capsys.readouterr().err
