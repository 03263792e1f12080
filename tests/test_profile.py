"""`fastdeitlt profile`: stages, a trace that Perfetto reads, counted bytes and FLOPs, and plain words without a GPU."""

import json

import pytest
import torch
from torch import nn

from fastdeitlt.cli import main
from fastdeitlt.profiling import Costs

ARGUMENTS = ["student.depth=1", "train.batch_size=4", "train.precision=fp32", "train.device=cpu", "augment.repeats=1"]


@pytest.fixture(autouse=True)
def peaks(monkeypatch):
    monkeypatch.setattr("fastdeitlt.profiling.bandwidth", lambda device: 1e12)
    monkeypatch.setattr("fastdeitlt.profiling.matmul_rate", lambda device, dtype: 1e12)


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
    assert "NVTX ranges, Proton and the memory snapshot cannot be had here" in said


def test_costs_are_counted_exactly():
    x, layer = torch.randn(8, 16), nn.Linear(16, 32)
    with Costs() as costs:
        layer(x).relu_().view(-1)
    assert costs.flops == {"aten::addmm": 2 * 8 * 16 * 32}
    assert costs.bytes == {"aten::addmm": 4 * (8 * 16 + 16 * 32 + 32 + 8 * 32), "aten::relu_": 4 * 8 * 32}
