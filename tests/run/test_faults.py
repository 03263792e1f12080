"""Every fault ends in seconds with its exit code, leaves no process, and the run goes on bit for bit afterwards.

One run on two ranks meets them in turn, each start continuing what the last one left; at the end it is compared with a
run that nothing touched. ``pytest tests/run/test_faults.py -s -k seconds`` prints how long each took to end.
"""

import argparse
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fault_ranks
import numpy as np
import pytest
import torch
from fault_ranks import FAULTS, SLOW_STEPS
from PIL import Image
from tiny_run import records, tensors, tiny_run
from torch.distributed import DistBackendError

from fastdeitlt import cli, config, distributed
from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.data.sampler import MicroBatch, plan_of
from fastdeitlt.data.sets.opening import open_training_sets
from fastdeitlt.errors import CrashLoopError, MemoryFullError, NonFiniteError, UserError
from fastdeitlt.run import watch
from fastdeitlt.run.folder import RESTARTS, Run
from fastdeitlt.run.process import STOP, Stopped
from fastdeitlt.run.watch import Norms, dump, memory_hint
from fastdeitlt.store.checkpoint import load_tensors, read_manifest, save_model_folder
from fastdeitlt.train import train

HANG_TIMEOUT_S = 12


class Launch:
    """One start of the program on two ranks, with a fault that rank 1 meets once."""

    def __init__(self, cfg, name, fault):
        folder = Path(cfg.runs_dir)
        path, self.note, log = folder / "config.yaml", folder / f"{name}-{fault}", folder / f"{name}-{fault}.log"
        timeout = HANG_TIMEOUT_S if fault == "hang" else cfg.train.timeout_s
        path.write_text(config.dump(cfg))
        command = [sys.executable, fault_ranks.__file__, fault, str(self.note), "train", str(path), f"name={name}"]
        command += [f"train.timeout_s={timeout}", "--processes", "2", "--restarts", "1" if fault == "kill" else "0"]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        if fault == "none":  # nothing is to hang on a stream
            command = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *command]
        with log.open("wb") as out:
            self.code = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, env=env | {"OMP_NUM_THREADS": "1"}, check=False
            ).returncode
        self.seconds = time.time() - float(self.note.read_text()) if self.note.exists() else 0.0
        self.said = log.read_text()


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """{fault: Launch} in order, `none` for the untouched run; the last one finishes what the faults interrupted."""
    folder = tmp_path_factory.mktemp("faults")
    cfg = tiny_run(folder)
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"epochs": 4, "save_every_steps": 1})})
    launches = {"folder": folder}
    for fault in FAULTS:
        with ThreadPoolExecutor(1) as pool:
            launched = pool.submit(Launch, cfg, "faulty", fault)
            if fault == "hang":  # while the other ranks wait for the one that hangs
                while not (folder / "faulty-hang").exists() and not launched.done():
                    time.sleep(0.1)
                launches["none"] = Launch(cfg, "whole", "none")
            launches[fault] = launched.result()
    return launches


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_all_ranks_with_its_code_and_says_why(story, fault):
    _, code, said = FAULTS[fault]
    assert story[fault].note.exists(), story[fault].said
    assert story[fault].code == code, story[fault].said
    assert said in story[fault].said
    assert story[fault].said.count(said) == 1  # one rank says it


@pytest.mark.parametrize("fault", ["sigterm", "sigint", "memory", "nan", "gone"])
def test_an_expected_end_has_no_traceback(story, fault):
    assert "Traceback" not in story[fault].said


def test_seconds_from_each_fault_to_the_end_of_the_launch(story):
    for fault in FAULTS:
        print(f"\n{fault:8} exit {story[fault].code:4}  {story[fault].seconds:6.1f} s", end="")
    assert all(story[fault].seconds < 120 for fault in FAULTS)


def test_no_process_is_left(story):
    mine = str(story["folder"]).encode()
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if mine in _bytes(p)]
    assert not left


def _bytes(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_run_through_all_faults_ends_as_the_untouched_one_bit_for_bit(story):
    faulty, whole = story["folder"] / "faulty", story["folder"] / "whole"
    torch.testing.assert_close(tensors(faulty), tensors(whole), atol=0, rtol=0)
    assert records(faulty) == records(whole)
    assert (faulty / "results.json").read_text() == (whole / "results.json").read_text()
    assert not list((faulty / "checkpoints").glob(".*"))
    assert not (faulty / "PREEMPTED").exists() and not (faulty / "starts.json").exists()


def test_a_straggler_is_named(story):
    last = SLOW_STEPS[-1]
    assert f"steps {last} to {last}: rank 1 is a straggler: it waited for data" in story["none"].said
    assert story["none"].said.count("is a straggler") == 1  # in the second period alone


def test_the_images_of_a_loss_that_is_not_finite_are_named(story):
    found = json.loads((story["folder"] / "faulty" / "nonfinite.rank1.json").read_text())
    (entry,) = found["micro_batches"][:1]
    assert found["step"] == entry["step"] == 9 and len(entry["images"]) == 8 and entry["virtual_rank"] == 1


def test_a_stop_leaves_a_mark_for_wrappers(tmp_path, monkeypatch):
    """One rank, in this process: SIGUSR1 after the third step."""
    cfg, real = tiny_run(tmp_path), PlainEngine.step

    def step(self, rate):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, rate)

    monkeypatch.setattr(PlainEngine, "step", step)
    with pytest.raises(UserError, match="SIGUSR1, saved at step 3") as caught:
        train(cfg)
    assert caught.value.exit_code == 75
    run = tmp_path / cfg.name
    assert json.loads((run / "PREEMPTED").read_text()) == {"signal": "SIGUSR1", "step": 3}
    assert read_manifest(run / "checkpoints" / "last")["step"] == 3
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    # on other images of the same names: refused
    labels = (tmp_path / "train.txt").read_text().splitlines()
    (tmp_path / "train.txt").write_text("\n".join([*labels[1:], labels[0]]))
    with pytest.raises(UserError, match=r"images or labels of the train set changed.*--resume never"):
        train(cfg)
    (tmp_path / "train.txt").write_text("\n".join(labels))
    weights = tmp_path / "teacher"
    other = {k: v + 1 if v.is_floating_point() else v for k, v in load_tensors(weights).items()}
    save_model_folder(weights, other, {k: v for k, v in read_manifest(weights).items() if k != "files"})
    with pytest.raises(UserError, match=r"the teacher's weights changed"):
        train(cfg)


def test_a_skipped_step_is_left_out_and_too_many_stop_the_run(tmp_path, monkeypatch):
    cfg, real = tiny_run(tmp_path), PlainEngine.backward
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"nonfinite_skips": 1})})
    bad = {7}  # micro-steps; six make a step

    def backward(self, loss):
        self.count = getattr(self, "count", 0) + 1
        real(self, loss * float("nan") if self.count in bad else loss)

    monkeypatch.setattr(PlainEngine, "backward", backward)
    train(cfg.model_copy(update={"name": "one"}))
    bad.update({13, 19})
    with pytest.raises(NonFiniteError, match="non-finite gradient from step 2;"):
        train(cfg.model_copy(update={"name": "three"}))


def test_memory_that_the_host_refuses_is_one_line(tmp_path, monkeypatch):
    def huge(self, *rest):
        torch.empty(2**55)

    monkeypatch.setattr(PlainEngine, "forward", huge)
    with pytest.raises(MemoryFullError, match=r"train\.batch_size=4 train\.virtual_ranks=4, which halves the memory"):
        train(tiny_run(tmp_path))


def test_a_run_resumes_with_the_settings_that_its_errors_advise(tmp_path, monkeypatch):
    """An image that is found unreadable late, a step that is not finite, data that moves: none ends a run for good."""
    cfg, real = tiny_run(tmp_path), PlainEngine.backward
    root = shutil.copytree(cfg.data.root, tmp_path / "images")
    flat = config.flatten(cfg) | {"data.root": str(root), "data.residency": "stream"}
    images = open_training_sets(config.build(flat).data).train
    plan = plan_of(cfg, len(images), labels_N=images.labels)
    early, later = ({int(i) for step in plan.steps(e) for m in step.micro_batches for i in m.sample_B} for e in (0, 1))
    late = min(later - early)
    content = bytearray((root / images.paths[late]).read_bytes())
    content[60:-20] = bytes(len(content) - 80)  # its first and last bytes are checked before training
    (root / images.paths[late]).write_bytes(content)
    name = re.escape(images.paths[late])

    def backward(self, loss):
        self.count = getattr(self, "count", 0) + 1
        real(self, loss * float("nan") if self.count == 1 else loss)  # in the first step of a start

    with pytest.raises(UserError, match=f"{name}: .* set data\\.on_error=skip"):
        train(config.build(flat))
    monkeypatch.setattr(PlainEngine, "backward", backward)
    with pytest.raises(NonFiniteError, match=r"To skip that update, resume with train\.nonfinite_skips=1$"):
        train(config.build(flat | {"data.on_error": "skip"}))
    moved = {"data.root": shutil.move(root, tmp_path / "moved")}
    for split in ("train", "val", "test"):
        moved[f"data.{split}_list"] = shutil.move(flat[f"data.{split}_list"], tmp_path / "moved" / f"{split}.txt")
    moved = {name: str(path) for name, path in moved.items()}
    folder = train(config.build(flat | moved | {"data.on_error": "skip", "train.nonfinite_skips": 1}))
    assert sorted({record["step"] for record in records(folder)}) == [*range(1, 10)]


def test_an_evaluation_without_memory_resumes_with_smaller_batches(tmp_path, monkeypatch):
    def huge(*inputs, **options):
        torch.empty(2**55)

    cfg = tiny_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fastdeitlt.evaluation.evaluate.collect_logits", huge)
        words = r"with evaluate\.batch_size=16 .*Resume with evaluate\.batch_size=8$"
        with pytest.raises(MemoryFullError, match=words):
            train(cfg)
    smaller = {"evaluate.batch_size": 8}
    assert (train(config.build(config.flatten(cfg) | smaller)) / "results.json").exists()


@pytest.mark.parametrize(
    ("settings", "world", "words"),
    [
        ({"train.batch_size": 12, "train.virtual_ranks": 2}, 1, r"Use train\.batch_size=6 train\.virtual_ranks=4,"),
        (
            {"train.ranks_per_forward": 9},
            1,
            r"with train\.batch_size=128 train\.ranks_per_forward=9 .*Resume with train\.ranks_per_forward=3$",
        ),
        ({"train.batch_size": 2}, 1, r"Use a smaller student or train\.batch_size \("),
        ({"train.batch_size": 2}, 2, r"train\.batch_size, or train\.zero_stage=2 \("),
        ({"train.batch_size": 2, "train.zero_stage": 2}, 2, r"Use a smaller student or train\.batch_size \("),
        ({"loss.normalise": "global"}, 1, r"Use a smaller student or train\.batch_size \("),
        (
            {"teacher_training.batch_size": 16},
            2,
            r"with teacher_training\.batch_size=16 .*teacher_training\.accumulate=2,",
        ),
        ({"teacher_training.batch_size": 4}, 2, r"Use a smaller teacher_training\.arch or teacher_training\.img_size"),
    ],
)
def test_what_needs_less_memory_is_possible_where_it_is_advised(settings, world, words, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "get_world", lambda: world)
    cfg, section = config.build(settings), next(iter(settings)).partition(".")[0].replace("loss", "train")
    with pytest.raises(MemoryFullError, match=words), memory_hint(cfg, tmp_path, section):
        raise MemoryError


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Error in MIXED operator `image_slice`: Can't allocate 9 bytes on device 0."),
        DistBackendError("NCCL error: ncclUnhandledCudaError. Last error: Cuda failure 2 'out of memory'"),
        MemoryError("Unable to allocate 9 TiB"),
    ],
)
def test_memory_that_is_refused_outside_torchs_allocator_is_one_line(error, tmp_path):
    with pytest.raises(MemoryFullError, match="out of memory with"), memory_hint(config.Config(), tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="bug"), memory_hint(config.Config(), tmp_path):
        raise RuntimeError("bug")


def test_a_crash_loop_stops_after_three_restarts_without_a_checkpoint(tmp_path):
    cfg = config.build({"name": "r", "runs_dir": str(tmp_path)})

    def crash(step):
        with pytest.raises(RuntimeError, match="bug"), Run(cfg) as run:
            run.count_start(step, 0)
            raise RuntimeError("bug")

    for _ in range(RESTARTS + 1):
        crash(5)
    with pytest.raises(CrashLoopError, match=r"4 starts from step 5 died.*starts\.json"), Run(cfg) as run:
        run.count_start(5, 0)
    crash(6)  # progress
    with pytest.raises(UserError, match="typo"), Run(cfg) as run:  # an end that explains itself
        run.count_start(6, 0)
        raise UserError("typo")
    assert not (tmp_path / "r" / "starts.json").exists()


def test_a_stop_before_the_first_step_is_no_crash_and_leaves_its_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(STOP, "first", signal.SIGTERM)
    with pytest.raises(Stopped), Run(config.build({"name": "r", "runs_dir": str(tmp_path)})) as run:
        run.count_start(5, 0)
        raise Stopped
    assert json.loads((tmp_path / "r" / "PREEMPTED").read_text()) == {"signal": "SIGTERM", "step": 5}
    assert not (tmp_path / "r" / "starts.json").exists() and STOP.cleanup is None


def test_a_disk_that_fills_up_is_survived_until_the_third_save(tmp_path, capsys):
    """A real limit on the size of files stops the writes half-way; training itself goes on."""
    cfg = tiny_run(tmp_path)
    often = cfg.train.model_copy(update={"save_every_steps": 1})
    (tmp_path / "config.yaml").write_text(config.dump(cfg.model_copy(update={"train": often})))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        code = cli.main(["train", str(tmp_path / "config.yaml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capsys.readouterr()
    assert code == 4, out + err
    assert out.count("training continues") == 2
    assert "(3 consecutive failed saves)" in err and "Traceback" not in err
    assert "step 3/9" in out
    assert not list((tmp_path / cfg.name / "checkpoints").iterdir())


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("verb", "form"),
    [
        ("train", "zip"), ("train", "before torch 1.6"), ("eval", "zip"), ("eval", "before torch 1.6"),
        ("predict", "pickle"), ("export", "pickle"),
    ],
)  # fmt: skip
def test_pickled_code_in_a_checkpoint_never_runs(tmp_path, verb, form, capsys):
    """``train`` reads a teacher, the others a student."""
    canary, evil = tmp_path / "canary", tmp_path / "evil.pth.tar"
    content = {"state_dict": {"w": torch.zeros(1)}, "args": argparse.Namespace(x=Canary(canary))}
    if form == "pickle":
        evil.write_bytes(pickle.dumps(content["args"], protocol=2))
    else:
        torch.save(content, evil, _use_new_zipfile_serialization=form == "zip")
    (tmp_path / "config.yaml").write_text(config.dump(tiny_run(tmp_path)))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    arguments = {
        "train": ["train", str(tmp_path / "config.yaml"), f"teacher.path={evil}"],
        "eval": ["eval", str(evil)],
        "predict": ["predict", str(evil), str(tmp_path / "image.png")],
        "export": ["export", str(evil), str(tmp_path / "out")],
    }
    assert cli.main(arguments[verb]) == 2
    assert not canary.exists()
    said = capsys.readouterr().err
    assert said.startswith("fastdeitlt: error: ")
    assert re.search(r"contains (posix|nt)\.system, expected only tensors \(nothing was executed\)", said), said


def test_norms_say_spikes_and_count_what_is_left_out(caplog):
    norms = Norms(skips=1)
    assert norms.failure([1.0, 1.1, 30.0, 1.0], 1) is None
    assert "step 3: gradient norm 30, moving average 1.01" in caplog.text
    assert norms.failure([float("nan"), 1.0, float("inf")], 5) is None
    assert caplog.text.count("update skipped") == 2
    assert norms.failure([float("nan")], 8) == 7  # with the one of the window before


def test_a_straggler_is_one_over_periods_of_seconds(caplog):
    for wait_R in ([0.1, 0.1, 0.1], [30.0]):
        for _ in range(4):
            watch.Stragglers().add(wait_R, 30.0, 2)
    one_hiccup, chance, slow = watch.Stragglers(), watch.Stragglers(), watch.Stragglers()
    for step in range(1, 9):
        one_hiccup.add([0.1, 30.0 if step == 3 else 0.1], 40.0, step)
    for step in range(1, 5001):  # steps of 20 ms, of which either rank is late at times
        chance.add([0.004, 0.0] if step % 5 else [0.0, 0.02], 0.02, step)
    assert not caplog.text
    for step in range(1, 6):
        slow.add([0.1, 6.0, 0.1], 11.2, step)
    assert caplog.text.count("rank 1 is a straggler") == 2  # after two periods and after four
    said = "steps 2 to 2: rank 1 is a straggler: it waited for data 6.0 s of 11.2 s, the median rank 0.1 s"
    assert said in caplog.text


def test_a_gradient_that_is_not_finite_without_a_loss_that_is_lists_the_whole_step(tmp_path):
    micro = [MicroBatch(0, i, 0, np.array([i, 9]), np.array([0, 0])) for i in range(3)]
    file = dump(tmp_path, 2, [(1, 0.5), (2, 0.5), (2, 0.6)], micro, lr=0.1)
    found = json.loads(file.read_text())
    assert [entry["images"] for entry in found["micro_batches"]] == [[1, 9], [2, 9]]
