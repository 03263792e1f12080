"""Measurements on disk: which rows count, what is said where none does, and files that are not what they should be."""

import logging
from importlib import metadata

import pytest
import torch
from fastdeitlt.kernels import _measured
from fastdeitlt.kernels._launch import LaunchConfig, say_once
from fastdeitlt.kernels._measured import Row, fastest, file_of, read, setting, trying, use, write

from fastdeitlt.errors import UserError

GPU = "NVIDIA Some-GPU 80GB"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DEFAULT, WON, OTHER = (LaunchConfig({"BLOCK": block}, 4, 1) for block in (64, 128, 256))
HERE = {"torch": "2.14.1", "triton": metadata.version("triton"), "date": "2026-11-25", "command": "tune", "gpu": GPU}


def setting_row(config, op="op", key=("forward", 198), **facts):
    blocks = {"blocks": dict(config.blocks), "num_warps": config.num_warps, "num_stages": config.num_stages}
    return Row(**{**HERE, "op": op, "key": key, "kind": "setting", "us": {"best": 1.5}, **blocks, **facts})


def fastest_row(impl, key=(198, 64), **facts):
    return Row(**{**HERE, "op": "op", "key": key, "kind": "fastest", "impl": impl, **facts})


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty cache, nothing shipped, and a GPU by name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_measured, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(_measured, "gpu_name", lambda index: GPU)
    monkeypatch.setattr(_measured, "_tried", {})
    monkeypatch.setattr(logging.getLogger("fastdeitlt"), "propagate", True)
    _measured.rows_of.cache_clear()
    say_once.cache_clear()
    yield tmp_path
    _measured.rows_of.cache_clear()


def test_what_is_measured_is_taken_and_the_rest_is_the_default():
    write(file_of(GPU), [setting_row(WON), fastest_row("triton")])
    assert setting("op", ("forward", 198), CUDA, DEFAULT) == WON
    assert setting("op", ("forward", 66), CUDA, DEFAULT) == setting("other", ("forward", 198), CUDA, DEFAULT) == DEFAULT
    assert fastest("op", (198, 64), CUDA, "torch") == "triton"
    assert (
        setting("op", ("forward", 198), CPU, DEFAULT) == DEFAULT and fastest("op", (198, 64), CPU, "torch") == "torch"
    )


def test_the_users_rows_win_over_those_that_ship(folders):
    write(file_of(GPU, folders / "shipped"), [setting_row(OTHER), setting_row(OTHER, key=("backward", 198))])
    assert setting("op", ("forward", 198), CUDA, DEFAULT) == OTHER
    write(file_of(GPU), [setting_row(WON)])
    assert setting("op", ("forward", 198), CUDA, DEFAULT) == WON
    assert setting("op", ("backward", 198), CUDA, DEFAULT) == OTHER


def test_a_second_measurement_replaces_the_first_and_leaves_the_others():
    write(file_of(GPU), [setting_row(OTHER), fastest_row("triton")])
    write(file_of(GPU), [setting_row(WON)])
    rows = read(file_of(GPU))
    assert [row.kind for row in rows] == ["setting", "fastest"] and rows[0].config == WON
    assert rows[0].us == {"best": 1.5} and rows[1].impl == "triton"


def test_rows_of_another_gpu_do_not_count():
    write(file_of(GPU), [setting_row(WON, gpu="NVIDIA some gpu 80GB")])
    assert setting("op", ("forward", 198), CUDA, DEFAULT) == DEFAULT


def test_rows_of_another_triton_do_not_count_and_that_is_said_once(caplog):
    write(file_of(GPU), [setting_row(WON, triton="2.0.0"), fastest_row("triton")])
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        assert [setting("op", ("forward", 198), CUDA, DEFAULT) for _ in range(2)] == [DEFAULT] * 2
    assert fastest("op", (198, 64), CUDA, "torch") == "triton"
    (record,) = caplog.records
    assert "Triton 2.0.0" in record.message and "'fastdeitlt tune CONFIG' measures again" in record.message


def test_an_op_that_nobody_measured_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        assert [fastest("op", (198, 64), CUDA, "torch") for _ in range(2)] == ["torch"] * 2
    (record,) = caplog.records
    assert f"nothing is measured on {GPU} at (198, 64)" in record.message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Invalid JSON"),
        (setting_row(WON).model_dump_json()[:-20], "Invalid JSON"),
        (setting_row(WON).model_dump_json().replace('"num_warps":4', '"num_warps":"four"'), "num_warps"),
        (setting_row(WON).model_dump_json().replace('"num_warps":4', '"num_warps":0'), "needs blocks, num_warps"),
        (fastest_row("triton").model_dump_json().replace('"impl":"triton"', '"impl":""'), "needs an impl"),
        (fastest_row("triton").model_dump_json().replace('"us"', '"seconds"'), "seconds"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_file_and_the_way_out(line, message):
    write(file_of(GPU), [setting_row(WON)])
    with file_of(GPU).open("a", encoding="utf-8") as out:
        out.write(line)
    with pytest.raises(UserError, match=rf"line 2: .*{message}.*delete the file and run 'fastdeitlt tune' again"):
        setting("op", ("forward", 198), CUDA, DEFAULT)


def test_trying_a_setting_ends_with_the_one_before():
    use("op", ("k",), WON)
    with trying("op", ("k",), OTHER):
        assert setting("op", ("k",), CPU, DEFAULT) == OTHER
    assert setting("op", ("k",), CPU, DEFAULT) == WON


def test_a_resumed_run_can_tell_that_measurements_changed():
    before = _measured.fingerprint(GPU)
    write(file_of(GPU), [setting_row(WON)])
    after = _measured.fingerprint(GPU)
    write(file_of(GPU), [setting_row(WON)])
    assert before != after == _measured.fingerprint(GPU)
