"""`fastdeitlt bench` and the benchmarks around it: every part measured, peers that agree, a model that adds up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pynvml import NVMLError

from benchmarks import bench_step, peers
from fastdeitlt import config
from fastdeitlt.arguments import parse
from fastdeitlt.cli import main
from fastdeitlt.core.measure import timer
from fastdeitlt.run.meter import peak_flops
from fastdeitlt.tools.bench import _at_ranks, _take_steps, bench
from fastdeitlt.tools.setup import set_up

ROOT = Path(__file__).parents[2]
TINY = ["student.depth=1", "train.batch_size=8", "train.precision=fp32", "train.device=cpu", "augment.repeats=1"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here is about the numbers."""
    monkeypatch.setattr(timer, "WARM_UP_CALLS", 1)
    monkeypatch.setattr("fastdeitlt.tools.bench.QUICK_ROUNDS", 2)
    monkeypatch.setattr("fastdeitlt.tools.bench.QUICK_DATA_BATCHES", 3)
    monkeypatch.setattr("fastdeitlt.tools.bench.matmul_rate", lambda device, dtype: 1e9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_part_is_measured_and_written(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "quickstart", *TINY, "--quick", "--batches", "4", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    rows = {row["candidate"]: row for row in written["rows"]}
    assert list(rows) == ["full step", "student only", "teacher only", "data only", "end to end", "batch 4"]
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(1e3 * row["images"] / row["median_ms"])
    assert rows["batch 4"]["images"] == 4 and rows["full step"]["images"] == 8
    facts = written["facts"]
    assert 0 <= facts["data wait, share of the end-to-end time"] <= 1
    flops = facts["model GFLOP an image (student x 3, teacher x 1)"]
    assert facts["achieved GFLOP/s"] == pytest.approx(rows["full step"]["images_per_s"] * flops)
    assert facts["MFU against the measured matmul"] == pytest.approx(facts["achieved GFLOP/s"])
    assert facts["power W (NVML)"] is None and "scaling over ranks" in written["left_out"]
    said = capsys.readouterr().out
    assert "not available" in said and "not measured" in said


def test_power_is_that_of_steps_alone_and_a_failed_step_leaves_no_thread(monkeypatch):
    class Event:
        def record(self):
            pass

        synchronize = record

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 650_000)  # milliwatts
    for name, seconds in (("POWER_S", 0.3), ("SENSOR_S", 0.0), ("POWER_PERIOD_S", 0.01)):
        monkeypatch.setattr(f"fastdeitlt.tools.bench.{name}", seconds)
    taken = []
    watts = _take_steps(lambda: taken.append(time.sleep(0.01)), torch.device("cuda", 0))
    assert taken and watts and set(watts) == {650.0}
    with pytest.raises(ZeroDivisionError):
        _take_steps(lambda: 1 / 0, torch.device("cuda", 0))

    def refuse(device):
        raise NVMLError(3)  # not supported

    monkeypatch.setattr(torch.cuda, "power_draw", refuse)
    assert _take_steps(lambda: time.sleep(0.01), torch.device("cuda", 0)) == []


@pytest.mark.parametrize(("precision", "impl"), [("bf16", "triton"), ("bf16", "torch"), ("fp32", "triton")])
def test_the_batch_is_laid_out_as_trainings(precision, impl, native_bf16):
    """On a GPU the fused kernel gives bfloat16, and every batch of training is channels last."""
    settings = {"student.name": "deit_tiny_distilled_patch16_32", "student.depth": 1, "teacher.arch": "resnet8"}
    settings |= {
        "train.batch_size": 4,
        "train.precision": precision,
        "augment.impl": impl,
        "data.dataset": "cifar10_lt",
    }
    images_BCHW = set_up(config.build(settings), CPU, synthetic=True).assemble().noise_batch().images_BCHW
    half = native_bf16 and (precision, impl) == ("bf16", "triton")
    assert images_BCHW.dtype is (torch.bfloat16 if half else torch.float32)
    assert images_BCHW.is_contiguous(memory_format=torch.channels_last) and not images_BCHW.is_contiguous()


def test_without_the_data_set_the_step_is_still_measured():
    result = bench("imagenet_lt", [*TINY, "student.name=deit_tiny_distilled_patch16_32", "teacher.arch=resnet8",
                                   "teacher.img_size=32", "train.accumulate=2", "train.virtual_ranks=2"],
                   quick=True, synthetic=True, batches=[])  # fmt: skip
    rows = {row["candidate"]: row for row in result["rows"]}
    assert list(rows) == ["full step", "student only", "teacher only"]
    assert rows["full step"]["images"] == 8 * 2 * 2, "an optimizer step is all micro-batches of all virtual ranks"
    assert set(result["left_out"]) == {"data only", "end to end", "scaling over ranks"}


BARE = """
import sys
for name in ("nvidia.dali", "deepspeed", "apex", "onnx"):
    sys.modules[name] = None
"""
"""An image without the packages that decode, shard or export."""

WITHOUT_DATA = (
    BARE
    + """
import tempfile
from fastdeitlt.core.measure import timer
from fastdeitlt.tools import tune
from fastdeitlt.tools.bench import bench
from fastdeitlt.tools.profiling import profile
timer.WARM_UP_CALLS = 1
bench("quickstart", sys.argv[1:], quick=True, synthetic=True, batches=[])
with tempfile.TemporaryDirectory() as folder:
    profile("quickstart", [*sys.argv[1:], "train.compile=false"], folder, num_steps=1, synthetic=True)
"""
)

FROM_ARRAYS = (
    BARE
    + """
import numpy as np
import torch
from fastdeitlt import config
from fastdeitlt.core.batches import train_batches
from fastdeitlt.data.longtail import LongTailSet
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sampler import MicroBatch
from fastdeitlt.tools.setup import set_up, step_of
cfg = config.load("quickstart", [*sys.argv[1:], "train.compile=false", "train.accumulate=1", "train.virtual_ranks=1"])
setup = set_up(cfg, torch.device("cpu"), synthetic=True)
parts = setup.assemble()
images_NHWC, labels = np.zeros((8, 40, 40, 3), np.uint8), np.arange(8) % 2
images = LongTailSet([str(i) for i in range(8)], labels, [4, 4], images_NHWC=images_NHWC)
source = open_source(images, config.DataConfig(residency="device", num_threads=1), setup.device)
micro_batches = [MicroBatch(0, i, 0, np.arange(8), np.zeros(8, int)) for i in range(2)]
batches = train_batches(micro_batches, source, images, cfg, mixing=True, size=parts.size)
print("norm", float(step_of(parts, batches)()))
"""
)

KERNEL_TESTS = (
    BARE
    + """
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/kernels"]))
"""
)


@pytest.mark.parametrize(
    ("code", "said"),
    [(WITHOUT_DATA, "operations"), (FROM_ARRAYS, "norm"), (KERNEL_TESTS, "test_attention.py")],
    ids=["bench, profile and tune", "a step from arrays", "the kernels' tests"],
)
def test_what_decodes_and_shards_nothing_runs_without_those_packages(code, said, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0 and said in done.stdout, done.stdout[-1000:] + done.stderr[-2000:]


@pytest.mark.parametrize("verb", ["bench", "profile"])
@pytest.mark.parametrize(
    ("settings", "arch"),
    [([], "resnet32"), (["--with-teacher", "teacher/quickstart"], "resnet8"), (["teacher.arch=resnet20"], "resnet20")],
)
def test_the_teacher_whose_time_is_measured_is_said(verb, settings, arch, tmp_path, monkeypatch, capsys):
    class EnoughError(Exception):
        """The line is printed; nothing need be measured."""

    def stop(*_):
        raise EnoughError

    monkeypatch.setattr("fastdeitlt.tools.bench._calls", stop)
    monkeypatch.setattr("fastdeitlt.tools.profiling._step", stop)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnoughError):
        main([verb, "quickstart", *TINY, *settings, "--synthetic"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"teacher: {arch} with random weights" in said and "--with-teacher RECIPE, teacher.arch or" in said


def test_two_ranks_are_started_and_counted_together():
    settings = [*TINY, "train.virtual_ranks=2"]
    result = bench("quickstart", settings, quick=True, synthetic=True, batches=[], ranks=[2])
    row = result["rows"][-1]
    assert row["candidate"] == "2 ranks" and "failed" not in row, row
    assert row["images_per_s"] == pytest.approx(2 * 1e3 * row["images"] / row["median_ms"])


def test_memory_is_given_back_before_ranks_take_the_gpu(monkeypatch):
    """The first of them has the GPU of the process that starts it."""
    happened = []
    ended = SimpleNamespace(stderr="Error", stdout="", returncode=1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("given back"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: happened.append("started") or ended)
    assert "failed" in _at_ranks("quickstart", [], 2, quick=True, synthetic=True)
    assert happened == ["given back", "started"]


@pytest.mark.parametrize(("images", "sizes"), [(1, [1, 2]), (6, [3, 6, 12])])
def test_usual_batch_sizes_are_half_one_and_two_times_the_recipe_s(images, sizes, monkeypatch):
    measured = []
    monkeypatch.setattr("fastdeitlt.tools.bench._at_batch", lambda setup, size, rounds: measured.append(size) or {})
    monkeypatch.setattr("fastdeitlt.tools.bench._calls", lambda *_: {"full step": lambda: None})
    monkeypatch.setattr("fastdeitlt.tools.bench._facts", lambda *_: {})
    monkeypatch.setattr("fastdeitlt.tools.bench.show", lambda _: None)
    bench("quickstart", [*TINY, f"train.batch_size={images}", "mixup.prob=0"], synthetic=True, ranks=[])
    assert measured == sizes


@pytest.mark.parametrize("options", [[], ["--quick"]], ids=" ".join)
def test_ranks_are_measured_as_one_process_is(options, monkeypatch, tmp_path):
    """--quick compiles nothing on a CPU."""
    started = []

    def run(command, **_):
        if "bench" in command:
            started.append(parse(command[command.index("bench") :]))
        return SimpleNamespace(stderr="Error", stdout="", returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("fastdeitlt.tools.bench._calls", lambda *_: {"full step": lambda: None})
    monkeypatch.setattr("fastdeitlt.tools.bench._facts", lambda *_: {})
    settings = [*TINY, "train.compile=true"]
    assert main(["bench", "quickstart", *settings, *options, "--synthetic", "--batches", "--ranks", "2"]) == 0
    assert [(args.quick, args.ranks, args.batches) for args in started] == [(bool(options), [], [])]
    assert started[0].overrides == settings


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 836e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", None),
    ],
)
def test_a_gpus_rate_is_found_by_its_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak


EAGER = [
    "timm, eager",
    "official loop",
    "ours, eager, whole last block",
    "+ last-block shortcut",
    "as shipped, DeepSpeed",
]


def test_peers_take_the_same_steps_and_a_wrong_one_is_caught(monkeypatch):
    eager = peers.ours

    def ours(work, **settings):
        return eager(work, **settings | {"train__compile": False})

    monkeypatch.setattr(peers, "ours", ours)
    work = bench_step.CASES["dry"]
    steps, reasons = bench_step.contestants(work, EAGER)
    assert set(steps) == set(EAGER) and not reasons
    losses, reasons = peers.check_equal(steps, work)
    assert set(losses) == set(EAGER) and not reasons
    assert losses["timm, eager"][0] != losses["timm, eager"][1], "weights move"


def test_a_peer_that_fails_or_differs_is_reported_and_the_others_are_timed(monkeypatch, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"

    def step(factor):
        return lambda work: lambda batch: factor * torch.ones(())

    def broken(error):
        def fail(batch):
            raise error

        return lambda work: fail

    def unbuilt(work):
        raise RuntimeError("no engine")

    levers = {"official loop": step(1.0), "timm, compiled": broken(ValueError("no\nkernel")), "wrong": step(1.001)}
    levers |= {"unbuilt": unbuilt, "nan": step(float("nan")), "fine": step(1.0)}
    monkeypatch.setattr(bench_step, "KNOWN", levers)
    monkeypatch.setattr(peers.Workload, "batch", lambda *_: None)
    monkeypatch.setenv("BENCHMARK_ROWS", str(rows))
    assert bench_step.main(["--case", "dry", "--rounds", "2", "--only", *bench_step.KNOWN]) == 1
    said = capsys.readouterr().out
    for name in ("timm, compiled: NOT TIMED, ValueError: no kernel", "wrong: NOT TIMED, got losses", "nan: NOT TIMED",
                 "unbuilt: NOT TIMED, RuntimeError: no engine"):  # fmt: skip
        assert f"dry {name}" in said
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["candidate"], row["baseline"]) for row in written] == [
        (name, "official loop") for name in ("official loop", "fine")
    ]
