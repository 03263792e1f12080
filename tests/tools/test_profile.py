"""`fastdeitlt profile`: stages, a trace that Perfetto reads, counted bytes and FLOPs, and plain words without a GPU."""

import json

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from fastdeitlt.cli import main
from fastdeitlt.tools.profiling import AUTOGRAD, Costs, _proton, stage_times

ARGUMENTS = ["student.depth=1", "train.batch_size=4", "train.precision=fp32", "train.device=cpu", "augment.repeats=1"]


@pytest.fixture(autouse=True)
def peaks(monkeypatch):
    monkeypatch.setattr("fastdeitlt.tools.profiling.bandwidth", lambda device: 1e12)
    monkeypatch.setattr("fastdeitlt.tools.profiling.matmul_rate", lambda device, dtype: 1e12)


def test_a_profile_has_stages_operations_and_a_trace(tmp_path, capsys):
    assert main(["profile", "quickstart", *ARGUMENTS, "--steps", "2", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "operations.json").read_text())
    stages = written["stages_ms"]
    assert set(stages) == {"data", "forward", "student", "teacher", "backward", "optimizer", "average"}
    assert stages["student"] + stages["teacher"] < stages["forward"]
    rows = {row["name"]: row for row in written["operations"]}
    assert [row["time_ms"] for row in rows.values()] == sorted((r["time_ms"] for r in rows.values()), reverse=True)
    # patches, fc1, fc2 and proj of one block, key and value, query, two heads; two steps
    assert rows["aten::addmm"]["calls"] == 2 * 8 and rows["aten::addmm"]["flops"] > 0
    assert rows["aten::_scaled_dot_product_flash_attention_for_cpu"]["flops"] > 0
    mm = rows["aten::addmm"]
    least_ms = 1e3 * max(mm["bytes"], mm["flops"]) / 1e12
    assert mm["share_of_roofline"] == pytest.approx(least_ms / mm["time_ms"])
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert {"forward", "backward", "optimizer"} <= {event.get("name") for event in trace["traceEvents"]}
    said = " ".join(capsys.readouterr().out.split())
    assert "NVTX ranges, Proton and the memory snapshot are not available" in said


def test_costs_are_counted_exactly():
    x, layer = torch.randn(8, 16), nn.Linear(16, 32)
    with Costs() as costs:
        layer(x).relu_().view(-1)
    assert costs.flops == {"aten::addmm": 2 * 8 * 16 * 32}
    assert costs.bytes == {"aten::addmm": 4 * (8 * 16 + 16 * 32 + 32 + 8 * 32), "aten::relu_": 4 * 8 * 32}


def test_on_a_gpu_the_backward_stage_has_what_autograds_thread_launched():
    """As the profiler records it there: the kernels hang on events of another thread, and stages are events twice."""

    def event(name, thread, start, end, kernel_us=0, device=DeviceType.CPU):
        made = FunctionEvent(0, name, thread, start, end, use_device="cuda", device_type=device)
        if kernel_us:
            made.append_kernel("kernel", 0, kernel_us)
        return made

    main_thread, engine, data = 1, 2, 3
    events = [
        event("forward", main_thread, 0, 10, kernel_us=7000),
        event("forward", main_thread, 0, 10, device=DeviceType.CUDA),
        event(f"{AUTOGRAD}: MmBackward0", engine, 5, 6, kernel_us=100),  # of the backward pass before
        event("backward", main_thread, 20, 30),
        event(f"{AUTOGRAD}: MmBackward0", engine, 21, 22, kernel_us=2000),
        event(f"{AUTOGRAD}: AddBackward0", engine, 23, 24, kernel_us=3000),
        event("aten::add", data, 25, 26, kernel_us=400),  # of the next images
        event("backward", main_thread, 40, 50),
        event(f"{AUTOGRAD}: MmBackward0", engine, 41, 60, kernel_us=1000),
    ]
    assert stage_times(events[3:], gpu=True) == {"backward": 6.0}
    assert stage_times(events[:2], gpu=True) == {"forward": 7.0}


def test_a_profile_survives_proton(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Failed to execute cuptiSubscribe with error 39")

    monkeypatch.setattr("triton.profiler.start", refuse)
    _proton(lambda: None, 1, tmp_path)
    assert "Proton: no profile, Failed to execute cuptiSubscribe with error 39" in capsys.readouterr().out
