"""doctor: finds what is broken, says how to mend it, and never breaks itself."""

import json
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastdeitlt.kernels import _measured

from fastdeitlt.tools import doctor
from fastdeitlt.tools.doctor import Report, Row


def test_only_a_broken_requirement_fails(capsys):
    fine = [Row("a", "ok", "1"), Row("b", "warn", "2", "do"), Row("c", "missing", "3", "get")]
    assert Report(fine).exit_code == 0
    report = Report([*fine, Row("d", "broken", "[bold]4[/bold]", "mend")])
    assert report.exit_code == 1
    report.print(as_json=True)
    assert json.loads(capsys.readouterr().out)[3] == {
        "name": "d", "status": "broken", "detail": "[bold]4[/bold]", "fix": "mend"
    }  # fmt: skip
    report.print()
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("missing", "warn", "broken", "[bold]4[/bold]", "mend"))


def test_the_doctor_starts_where_torch_does_not():
    code = (
        "import sys; sys.modules['torch'] = None; import fastdeitlt.tools.doctor; "
        "print(sorted({'dali', 'timm', 'numpy'} & "
    )
    done = subprocess.run([sys.executable, "-c", code + "set(sys.modules)))"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]")


def test_the_doctor_accepts_the_python_versions_of_the_package(monkeypatch):
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    requires = tomllib.loads(pyproject.read_text())["project"]["requires-python"]
    version = namedtuple("version", "major minor micro")
    accepted = []
    for minor in range(9, 20):
        monkeypatch.setattr(doctor.sys, "version_info", version(3, minor, 0))
        accepted += [minor] if doctor.python().status == "ok" else []
    assert requires == f">=3.{accepted[0]},<3.{accepted[-1] + 1}"
    assert accepted == list(range(accepted[0], accepted[-1] + 1))


def test_a_free_threaded_python_is_told_how_to_stay_so(monkeypatch):
    monkeypatch.setattr(doctor.sysconfig, "get_config_var", {"Py_GIL_DISABLED": 1}.get)
    rows = []
    for lock in (None, 1, 0):  # not said, turned on, turned off
        monkeypatch.setattr(doctor.sys, "flags", SimpleNamespace(gil=lock))
        rows.append(doctor.python())
    assert [row.status for row in rows] == ["warn", "warn", "ok"]
    assert "PYTHON_GIL=0" in rows[0].fix and rows[2].fix == ""


def test_a_probe_survives_an_exception_a_crash_and_silence(monkeypatch):
    assert doctor.probe("print('noise'); print('4.2')") == (True, "4.2")
    assert doctor.probe("import absent_package") == (False, "ModuleNotFoundError: No module named 'absent_package'")
    works, said = doctor.probe("import os; os.abort()")
    assert not works and said
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.2)
    assert doctor.probe("import time; time.sleep(5)") == (False, "timed out after 0.2 s")


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (doctor.torch, "broken"),
        (doctor.torchvision, "broken"),
        (doctor.dali_on_cpu, "broken"),
        (doctor.triton, "warn"),
        (doctor.deepspeed, "warn"),
        (doctor.onnx, "warn"),
    ],
)
def test_a_package_that_does_not_import_is_told_with_its_remedy(monkeypatch, check, status):
    monkeypatch.setattr(doctor, "probe", lambda code: (False, "ImportError: libcudart.so.13: cannot open"))
    row = check()
    assert row.status == status and "libcudart" in row.detail and row.fix


@pytest.mark.parametrize("check", [doctor.deepspeed, doctor.onnx])
def test_an_absent_optional_package_is_missing_and_not_broken(monkeypatch, check):
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    row = check()
    assert row.status == "missing" and "pip install" in row.fix
    assert doctor.packages().status == "broken" and "nvidia-dali-cuda130" in doctor.packages().detail


def test_dali_decodes_the_embedded_image():
    row = doctor.dali_on_cpu()
    assert row.status == "ok", row


def test_a_decoder_that_gives_other_pixels_is_broken(monkeypatch):
    wrong = doctor.DECODE.replace('.convert("RGB"))', '.convert("RGB")) // 2 + 7')
    assert wrong != doctor.DECODE
    monkeypatch.setattr(doctor, "DECODE", wrong)
    row = doctor.dali_on_cpu()
    assert row.status == "broken" and "pixels differ" in row.detail


def test_pypi_s_apex_is_not_taken_for_nvidia_s(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert doctor.apex().status == "missing"
    (tmp_path / "apex.py").write_text("raise RuntimeError('Pyramid')")
    row = doctor.apex()
    assert row.status == "warn" and "unrelated" in row.detail and "pip uninstall apex" in row.fix
    (tmp_path / "amp_C.py").write_text("")
    assert doctor.apex().status == "ok"


def test_a_top_level_kernels_folder_that_hides_pypi_s_package_is_told(monkeypatch):
    assert doctor.kernels_name().status == "ok"
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0")
    ours = doctor.find_spec("fastdeitlt.kernels")
    monkeypatch.setattr(doctor, "find_spec", lambda name: ours)
    row = doctor.kernels_name()
    assert row.status == "warn" and "hides PyPI's kernels 1.0" in row.detail


def test_more_threads_than_cores_is_told(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    row = doctor.cores()
    assert row.status == "warn" and "4,096 threads" in row.detail and row.fix.startswith("export OMP_NUM_THREADS=")
    for value in ("1", "1,4096", " 1 , 2"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert doctor.cores().status == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "many")  # which OpenMP ignores
    assert doctor.cores().status in ("ok", "warn")
    monkeypatch.setattr("os.cpu_count", lambda: 4096)  # of which a Slurm job may use some
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert doctor.cores().detail == "1 usable, 1 thread per process"


@pytest.mark.parametrize(("num_rows", "status"), [(0, "warn"), (10, "ok")])
def test_a_gpu_without_kernel_measurements_is_told(monkeypatch, capsys, num_rows, status):
    def probe(code):
        exec(code, {})  # noqa: S102
        return True, capsys.readouterr().out.strip()

    rows = dict.fromkeys(range(num_rows), SimpleNamespace(gpu="NVIDIA H200"))
    monkeypatch.setattr(_measured, "gpu_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(_measured, "rows_of", lambda index: rows)
    monkeypatch.setattr(doctor, "_has_gpu", lambda: True)
    monkeypatch.setattr(doctor, "probe", probe)
    row = doctor.kernel_choice()
    assert (row.status, row.detail) == (status, f"{num_rows} measurements on NVIDIA H200")


def test_the_quick_checks_run_here_and_name_their_row():
    for check in (doctor.python, doctor.packages, doctor.memory, doctor.shared_memory, doctor.open_files, doctor.disk):
        row = check()
        assert row.status in ("ok", "warn") and row.detail and bool(row.fix) == (row.status == "warn")
