"""`python -m benchmarks.gpu`: stages in time, on a bare machine too, results in one folder, goals that are matched."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from benchmarks import bench_add_layernorm, bench_attention, budget, gpu, gpu_ops, peers, portable
from fastdeitlt.models import create_student
from fastdeitlt.models.vit import num_parameters

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
IN_PROCESSES = ("prepare", "parts")
"""Stages that run pytest, or what tests/tools/test_bench.py tests."""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    return gpu.Place(tmp_path / "out", tmp_path / "scratch", dict(os.environ))


def test_it_needs_a_gpu_and_lists_its_stages(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no visible GPU" in capsys.readouterr().err
    assert gpu.main(["--list"]) == 0
    listed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    checks = [f"check {name}" for name in gpu.COMPILED]
    assert listed[:9] == ["facts", "tests", "compile", *checks, "step", "ops", "arrays"]
    first = [stage for stage in gpu.stages(False, ROOT).values() if stage.until]
    assert [stage.until for stage in first] == sorted(stage.until for stage in first) and first[-1].until == gpu.MINUTES


class InProcess:
    """A worker process's stand-in that runs the command in this process, which has imported everything already."""

    def __init__(self, command, *, stdout, **_):
        python, m, module, *arguments = command
        assert (python, m) == (sys.executable, "-m")
        log = io.TextIOWrapper(stdout, write_through=True)
        with contextlib.redirect_stdout(log):
            try:
                self.code = importlib.import_module(module).main(arguments)
            except SystemExit as end:  # --help
                self.code = end.code
        log.detach()

    def wait(self, timeout=None):
        return self.code

    def poll(self):
        return self.code


def test_a_dry_run_leaves_rows_log_and_table(tmp_path, capsys, monkeypatch):
    """Every stage but the collection of the kernels' tests and `fastdeitlt bench`."""
    out = tmp_path / "out"
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": InProcess}))
    monkeypatch.setenv("BENCHMARK_ROWS", str(out / "rows.jsonl"))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)  # the interpreter's bfloat16 is wrong
    stages = [name for name, stage in gpu.stages(True, out).items() if not stage.again and name not in IN_PROCESSES]
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # bench_step raises it
        assert gpu.main([*stages, "--dry", "--out", str(out), "--minutes", "5"]) == 0
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["op"] for row in rows} >= {"backends", "floors", "attention", "add_layernorm", "step", "train"}
    kernel = [row for row in rows if row["op"] == "backends" and row["candidate"] == "triton"]
    assert len(kernel) == 4 and all(row["error"] <= gpu_ops.TOLERANCE for row in kernel)
    assert {row["candidate"] for row in rows if row["op"] == "train"} == {"ours, resident", "ours, no data"}
    results = json.loads((out / "stages.json").read_text())
    assert list(results) == stages and all(result.startswith("done") for result in results.values())
    assert "== ops: python -m benchmarks.gpu_ops" in (out / "log.txt").read_text()
    table = (out / "table.txt").read_text()
    assert table in capsys.readouterr().out and "full step, images/s" in table and "WRONG" not in table


def test_commands_run_side_by_side_and_end_with_their_workers_when_the_time_is_up(place, tmp_path):
    note = tmp_path / "worker"
    worker = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(600)"
    waiting = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    commands = {"slow": ["-c", waiting], "quick": ["-c", "print('said')"], "broken": ["-c", "1 / 0"]}
    gpu.run(gpu.Stage(commands), place, time.monotonic() + 5)
    assert place.results["slow"].startswith("stopped, no time") and place.results["broken"].startswith("FAILED")
    assert place.results["quick"].startswith("done") and place.results["quick"].endswith(": said")
    gpu.run(gpu.Stage({"late": ["-c", "print('ran')"]}), place, time.monotonic())
    assert place.results["late"] == "skipped, no time"
    state, until = Path(f"/proc/{note.read_text()}/cmdline"), time.monotonic() + 20
    with contextlib.suppress(OSError):
        while state.read_bytes():  # empty once the process has ended
            assert time.monotonic() < until, "the worker is still there"
            time.sleep(0.01)


def test_what_is_measured_beside_other_processes_is_not_kept(place):
    """``auto`` measures kernels into the user cache, in the check of the step and in tests that train."""
    place.environment = {**os.environ, "XDG_CACHE_HOME": "theirs"}
    assert gpu.stages(False, ROOT)["prepare"].crowded
    commands = {"cache": ["-c", "from fastdeitlt.store.files import user_cache; print(user_cache('kernels'))"]}
    for crowded, folder in ((True, place.scratch / "cache"), (False, "theirs")):
        gpu.run(gpu.Stage(commands, crowded=crowded), place, float("inf"))
        assert place.results["cache"].endswith(f": {folder}/fastdeitlt/kernels")


def test_what_is_not_installed_is_left_out_and_does_not_fail(place, tmp_path):
    stage = gpu.Stage({"decode": ["-c", "1 / 0"]}, needs=("no-such-package",))
    gpu.run(stage, place, float("inf"))
    assert place.results["decode"] == "skipped, no-such-package is not installed"
    place.wheels = tmp_path / "wheels"
    place.wheels.mkdir()
    (place.wheels / "no_such_package-1.0-py3-none-any.whl").touch()
    gpu.run(stage, place, float("inf"))
    assert place.results["decode"].startswith("FAILED")


def test_the_second_command_takes_what_failed_and_one_kernel_off_at_a_time():
    known = gpu.stages(False, ROOT)
    results = {"facts": "done by 3 s", "tests": "FAILED by 9 s", "compile": "done", "step": "stopped, no time by 5 s"}
    results |= {"ops": "skipped, no time", "train": "skipped, nvidia-dali-cuda130 is not installed"}
    results |= {f"check {name}": "FAILED by 9 s" for name in gpu.COMPILED} | {"tune-ops": "skipped, no time"}
    chosen = [name for stage in gpu.chosen_stages(known, (), results, True) for name in stage.commands]
    assert chosen == ["step", "ops", "tests", *gpu.ONE_OFF]
    assert set(gpu.ONE_OFF) == {"as shipped, fused teacher", "as shipped, fp8", *peers.ONE_OFF}
    first = [name for stage in gpu.chosen_stages(known, (), {}, False) for name in stage.commands]
    assert not set(first) & set(gpu.ONE_OFF) and first[0] == "facts"


def test_ops_whose_tests_fail_are_known_by_the_report(tmp_path):
    (tmp_path / "test_add_layernorm.py").write_text("def test_a(): assert False\n")
    (tmp_path / "test_attention.py").write_text("import no_such_package\n")
    (tmp_path / "test_bias_gelu.py").write_text("def test_a(): pass\n")
    junit = tmp_path / "tests.xml"
    options = [option for option in gpu._tests(False, tmp_path) if option.startswith(("--junitxml", "--continue"))]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, *options, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 1
    assert gpu.red_ops(junit, "FAILED by 9 s") == ["add_layernorm", "attention"]


@pytest.mark.parametrize(
    ("outcome", "all_are"),
    [
        ("FAILED by 1 s: No module named 'hypothesis'", True),
        ("skipped, hypothesis is not installed", True),
        ("stopped, no time by 180 s", False),
        ("", False),
    ],
)
def test_without_a_report_no_op_counts_as_tested(outcome, all_are, tmp_path):
    """Unless the tests were slow, or nobody ran them: then the ops are measured whose tests did not fail until then."""
    red = set(gpu.red_ops(tmp_path / "no such file", outcome))
    assert red >= set(gpu_ops.OPS) - {"floors"} if all_are else not red
    log = "[gw1] [ 3%] FAILED tests/kernels/test_augment.py::test_a\n[gw0] [ 3%] PASSED tests/kernels/test_attention.py"
    red = set(gpu.red_ops(tmp_path / "no such file", outcome, log))
    assert red >= set(gpu_ops.OPS) - {"floors"} if all_are else red == {"augment"}


def test_the_step_is_timed_without_kernels_whose_tests_fail():
    known = gpu.stages(False, ROOT)
    for red, kernels in (([], True), (["augment"], True), (["joint_loss"], False)):
        step = gpu.without_red(known["step"], red).commands["step"]
        assert ("+ kernels" in step) is kernels and "as shipped (auto)" in step
        (one_off,) = gpu.without_red(known[gpu.ONE_OFF[1]], red).commands.values()
        assert ("+ kernels" in one_off) is kernels and gpu.ONE_OFF[1] in one_off
        options = gpu.without_red(known["ops"], red).commands["ops"]
        assert options[options.index("ops") + 1 :] == ["--red", *red] * bool(red)


def test_the_checkout_is_importable_without_installing_it(tmp_path):
    """``-S`` leaves out installed packages, as on a machine that has none of ours."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("carried.py", "WORD = 'carried here'")
    environment = portable.environment(tmp_path / "scratch", wheels)
    code = (
        "import importlib.util as u, carried, benchmarks; print(carried.WORD); "
        "print(u.find_spec('fastdeitlt.kernels').origin, u.find_spec('fastdeitlt.core').origin)"
    )
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    word, paths = done.stdout.splitlines()
    assert word == "carried here"
    assert [Path(path).resolve() for path in paths.split()] == [
        ROOT / "kernels" / "__init__.py", ROOT / "fastdeitlt" / "core" / "__init__.py"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wheel", "fit"),
    [
        ("pydantic-2.12-py3-none-any.whl", True),
        ("pydantic_core-2.4-cp38-cp38-manylinux_2_17_x86_64.whl", False),
        (f"pydantic_core-2.4-cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-manylinux_2_17_x86_64.whl", True),
        ("nanobind-1.0-cp39-abi3-manylinux_2_17_x86_64.whl", True),
        ("old-1.0-py2.py3-none-any.whl", True),
    ],
)
def test_a_wheel_of_another_python_is_refused(wheel, fit, tmp_path):
    assert portable.fits(wheel) == fit
    (tmp_path / wheel).write_bytes(b"")
    with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
        archive.writestr("x.py", "")
    if not fit:
        with pytest.raises(ValueError, match=f"{wheel}: not for Python 3.{sys.version_info.minor}"):
            portable.environment(tmp_path / "scratch", tmp_path)


def test_an_empty_folder_of_wheels_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["facts", "--dry", "--out", str(tmp_path / "out"), "--wheels", str(tmp_path)])
    assert "no *.whl file" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [20, gpu_ops.ROWS_OF_LAST_BLOCK])
def test_a_wrong_gradient_is_seen(rows, monkeypatch):
    """The kernel's reference agrees with float64; values 5 % too large, and NaN in a gradient alone, do not."""
    monkeypatch.setattr(
        "fastdeitlt.kernels.attention.interpreted", lambda: False
    )  # the interpreter's bfloat16 is wrong
    errors = dict(gpu_ops.gradient_errors(20, rows, CPU))
    assert {"triton", "sdpa"} <= set(errors) and all(error <= gpu_ops.TOLERANCE for error in errors.values())
    name = "attention" if rows == 20 else "attention_first"
    right = getattr(gpu_ops, name)
    monkeypatch.setattr(gpu_ops, name, lambda *a, **k: right(*a, **k) * (1.05 if k["impl"] == "triton" else 1))
    errors = dict(gpu_ops.gradient_errors(20, rows, CPU))
    assert errors["triton"] > gpu_ops.TOLERANCE >= errors["sdpa"]

    def with_nan(*tensors, impl):
        if impl == "triton":
            tensors[-1].register_hook(lambda gradient: gradient * float("nan"))
        return right(*tensors, impl=impl)

    monkeypatch.setattr(gpu_ops, name, with_nan)
    errors = dict(gpu_ops.gradient_errors(20, rows, CPU))
    assert errors["triton"] != errors["triton"] and errors["sdpa"] <= gpu_ops.TOLERANCE


def test_goals_bound_by_memory_move_with_the_copy(capsys):
    rows = {("floors", "copy", "copy"): {"gb_per_s": budget.H200_COPY / 2}}
    for key, column, got in (
        (("add_layernorm", f"forward {budget.STREAM}", "triton"), "gb_per_s", 3650 / 2),
        (("adamw_ema", "87.3 M weights float32", "fastdeitlt"), "median_ms", 1.8),
        (("joint_loss", "B=1024 K=1000 bfloat16", "triton"), "median_ms", 0.02),
    ):
        rows[key] = {column: got}
    budget.budget(rows)
    ratios = [line.split("ratio ")[1] for line in capsys.readouterr().out.splitlines() if "ratio" in line]
    assert ratios == ["1.00", "0.50", "1.00"]  # in the budget's order; the joint loss at K = 1000 is bound by launches


def test_the_budget_reads_every_row_that_is_there():
    rows = budget.measured(ROOT / "benchmarks" / "results", None)
    assert ("train", "ours, resident") in {(op, candidate) for op, _, candidate in rows}


def test_the_budget_is_met_only_when_everything_is_measured_and_good(capsys):
    rows = {}
    for _, op, case, candidate, column, goal, _more in budget.BUDGET:
        key = op, case or "any"
        row = rows.setdefault((*key, candidate), {"median_ms": 1.0})
        if column.startswith("over "):
            rows.setdefault((*key, column.removeprefix("over ")), {})["median_ms"] = max(goal, 1.0)
        else:
            row[column] = goal
    assert budget.budget(rows)
    forward = "attention", f"forward {budget.ATTENTION}"
    rows |= {(*forward, "cudnn"): {"median_ms": 1.4}, (*forward, "flash"): {"median_ms": 1.2}}
    assert not budget.budget(rows) and "goal       1.3   measured       1.2" in capsys.readouterr().out
    del rows[*forward, "flash"]
    assert budget.budget(rows)
    rows["step", "b16-224", "as shipped (auto)"]["images_per_s"] = 4299
    assert not budget.budget(rows)
    del rows["bench", "gpu-budget", "teacher only"]
    assert not budget.budget(rows) and "not measured" in capsys.readouterr().out


def test_the_budget_matches_whole_case_names(capsys):
    """A case whose name begins with another's must not replace that one's row."""
    goals = {(op, case): (candidate, column, goal) for _, op, case, candidate, column, goal, _ in budget.BUDGET if case}
    rows = {}
    for (op, case), (candidate, column, goal) in goals.items():
        rows[op, case, candidate] = {"median_ms": 1.0, column: goal}
        rows[op, f"{case} M=2", candidate] = {"median_ms": 1.0, column: 1e-9}
    budget.budget(rows)
    found = [line for line in capsys.readouterr().out.splitlines() if "ratio" in line]
    assert len(found) == len({(op, case) for op, case in goals}) and not any("ratio 0.00" in line for line in found)


def test_the_budget_names_real_cases():
    """Whole names as the benchmarks make them; the optimizer's is of a student's number of weights."""
    cases = {(op, case) for _, op, case, *_ in budget.BUDGET}
    batch, tokens, heads, width = bench_attention.SHAPES[0]
    assert ("attention", f"forward B={batch} N={tokens} H={heads} D={width}") in cases
    assert ("add_layernorm", "forward B={} N={} D={}".format(*bench_add_layernorm.SHAPES[2])) in cases
    student = create_student("deit_base_distilled_patch16_224", 1000)
    assert ("adamw_ema", f"{num_parameters(student) / 1e6:.1f} M weights float32") in cases


def test_a_part_whose_package_is_missing_does_not_fail_the_budget(monkeypatch, capsys):
    monkeypatch.setattr(budget, "BUDGET", [part for part in budget.BUDGET if part[3] in budget.NEEDS])
    assert not budget.budget({})
    monkeypatch.setattr(budget, "installed", lambda module: False)
    assert budget.budget({}) and "deepspeed is not installed" in capsys.readouterr().out
