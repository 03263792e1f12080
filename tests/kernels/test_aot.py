"""The ahead-of-time gate: shipped kernels compile for every architecture, and a bad one is caught."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastdeitlt.kernels._attention_launch import SETTINGS_OF, architecture
from fastdeitlt.kernels._launch import ARCHITECTURES

from benchmarks.aot import SHARED_BYTES, blocks_at_once, gate, instruction_counts, ops

ROOT = Path(__file__).parents[2]

PLANTED = """
import triton
import triton.language as tl
from fastdeitlt.kernels._launch import AotConfig


@triton.jit
def scale(p_x, p_y, P, BLOCK: tl.constexpr):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o_p, tl.load(p_x + o_p, mask=o_p < P) * 2, mask=o_p < P)


@triton.jit
def centre(p_x, p_y, BLOCK: tl.constexpr):
    o_p = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_p)
    tl.store(p_y + o_p, (b_x - tl.sum(b_x, 0)) * tl.max(b_x, 0))


@triton.jit
def broken(p_x, BLOCK: tl.constexpr):
    tl.store(p_x, no_such_name)


@triton.jit
def misnamed(params, BLOCK: tl.constexpr):
    tl.store(params + tl.arange(0, BLOCK), 1.0)


def aot_configs():
    pointers = {"p_x": "*fp32", "p_y": "*fp32"}
    return [
        AotConfig(scale, pointers | {"P": "i64"}, {"BLOCK": 1024}, note="good"),
        AotConfig(scale, pointers | {"P": "i64"}, {"BLOCK": 1024}, mma=True, note="no tensor cores"),
        AotConfig(scale, pointers | {"P": "i64"}, {"BLOCK": 1024}, narrow_stores=0, note="narrow"),
        AotConfig(
            scale, pointers | {"P": "i64"}, {"BLOCK": 1024}, divisible_by_16=("P",), narrow_stores=0, note="wide"
        ),
        AotConfig(centre, pointers, {"BLOCK": 8192}, num_warps=1, note="spills"),
        AotConfig(broken, {"p_x": "*fp32"}, {"BLOCK": 16}, note="broken"),
        AotConfig(misnamed, {"params": "*fp32"}, {"BLOCK": 16}, note="misnamed"),
    ]
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "kernels.py").write_text(PLANTED)
    (tmp_path / "planted" / "empty.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("op", ops())
def test_shipped_configurations_compile_without_spills(op):
    """The first and the last of each kernel; ``python -m benchmarks.aot`` compiles all, on sm_86 and sm_89 too."""
    rows = gate([op], [80, 90, 100], sample=2) + gate([op], [120], sample=1)
    assert {f"{row.kernel} sm_{row.sm} {row.configuration}": row.problems for row in rows if row.problems} == {}
    assert {row.sm for row in rows} == {80, 90, 100, 120} and all(row.registers > 0 for row in rows)


def test_every_compiled_architecture_has_settings_and_a_limit_of_shared_memory():
    assert set(ARCHITECTURES) == set(SETTINGS_OF) == set(SHARED_BYTES)
    small = {sm for sm, size in SHARED_BYTES.items() if size < 100 * 1024}
    assert small == {sm for sm, settings in SETTINGS_OF.items() if settings == 86}


@pytest.mark.parametrize(
    ("capability", "settings"),
    [
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 7), 80),
        ((8, 9), 86),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 86),
    ],
)
def test_a_gpu_takes_the_settings_of_its_compute_capability(capability, settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(torch.device("cuda", 0)) == settings


def test_planted_bad_configurations_fail_and_the_good_one_passes(planted):
    problems = {row.configuration.split(" fp32")[0]: "; ".join(row.problems) for row in gate(["planted.kernels"], [80])}
    assert problems["good"] == problems["wide"] == ""
    assert "8 stores of less than 8 bytes, expected at most 0" in problems["narrow"]
    assert "no tensor-core instruction" in problems["no tensor cores"]
    assert "bytes of stack" in problems["spills"]
    assert "does not compile" in problems["broken"] and "no_such_name" in problems["broken"]
    assert "cannot be launched" in problems["misnamed"]  # the launcher has a variable of that name


def test_gelu_has_fewer_instructions_than_its_bytes_leave_time_for():
    """The budgets are docs/kernels.md's; the backward's outside its loop is a matter of how many rows there are."""
    rows = [row for row in gate(["bias_gelu"], [90]) if re.search("WIDTH=3072 .*bf16", row.configuration)]
    counts = {row.kernel: row.loop_instructions if "bwd" in row.kernel else row.instructions for row in rows}
    elements = 16  # of a thread: ROWS * BLOCK / (32 warps)
    assert counts["bias_gelu_fwd_kernel"] <= 27 * elements and counts["bias_gelu_bwd_kernel"] <= 41 * elements


def test_instructions_are_counted_with_their_loops():
    code = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   FADD R1, R1, R0 ;
        /*0020*/              @!P0 FMUL R1, R1, R0 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   NOP ;
.L_x_2:
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""
    assert instruction_counts(code) == (7, 3)


@pytest.mark.parametrize(
    ("sm", "warps", "registers", "shared", "tensor_memory", "blocks", "limit"),
    [
        (90, 8, 255, 0, 0, 1, "registers"),
        (90, 4, 128, 0, 0, 4, "registers"),
        (90, 32, 32, 0, 0, 2, "warps"),
        (89, 16, 32, 0, 0, 3, "warps"),
        (80, 1, 16, 0, 0, 32, "blocks"),
        (80, 4, 32, 100 * 1024, 0, 1, "shared memory"),
        (90, 4, 32, 100 * 1024, 0, 2, "shared memory"),
        (100, 4, 32, 1024, 256, 2, "tensor memory"),
    ],
)
def test_what_limits_the_blocks_of_a_multiprocessor(sm, warps, registers, shared, tensor_memory, blocks, limit):
    assert blocks_at_once(sm, warps, registers, shared, tensor_memory) == blocks


def test_a_kernel_file_without_configurations_fails(planted):
    (row,) = gate(["planted.empty"], [90])
    assert row.problems == ["planted.empty has no aot_configs()"]


def test_the_command_ends_with_one_on_failure_and_prints_the_reason(planted):
    environment = {**os.environ, "PYTHONPATH": str(planted)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.aot", "planted.empty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert "has no aot_configs()" in done.stdout and "1 failed" in done.stdout
