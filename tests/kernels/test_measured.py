"""Measurements on disk: which rows count and win, what is logged, and damaged files."""

import logging
from importlib import metadata

import pytest
import torch
from fastdeitlt.kernels import _measured, _pick
from fastdeitlt.kernels._launch import LaunchConfig
from fastdeitlt.kernels._measured import FIRST_START, Row, file_of, prefer, read, setting, trying, use, write
from fastdeitlt.kernels._pick import pick

from fastdeitlt.errors import UserError

GPU = "some GPU"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DEFAULT, WON, OTHER = (LaunchConfig({"BLOCK": block}, 4, 1) for block in (64, 128, 256))
HERE = {"torch": "2.14.1", "triton": metadata.version("triton"), "date": "2026-11-25", "command": "tune"}
HERE |= {"gpu": GPU, "capability": (9, 0)}


def setting_row(config, op="bias_gelu", key=("forward", 198), **facts):
    blocks = {"blocks": dict(config.blocks), "num_warps": config.num_warps, "num_stages": config.num_stages}
    return Row(**{**HERE, "op": op, "key": key, "kind": "setting", "us": {"best": 1.5}, **blocks, **facts})


def fastest_row(impl, key=(198, 64), **facts):
    return Row(**{**HERE, "op": "bias_gelu", "key": key, "kind": "fastest", "impl": impl, **facts})


def picked(device=CUDA, **options):
    return pick("bias_gelu", "auto", (198, 64), device, **options)


@pytest.fixture(autouse=True)
def folders(some_gpu, tmp_path, monkeypatch):
    """Nothing shipped."""
    monkeypatch.setattr(_measured, "SHIPPED", tmp_path / "shipped")
    return tmp_path


def test_what_is_measured_is_taken_and_the_rest_is_the_default():
    write(file_of(GPU), [setting_row(WON), fastest_row("triton")])
    assert setting("bias_gelu", ("forward", 198), CUDA, DEFAULT) == WON
    assert (
        setting("bias_gelu", ("forward", 66), CUDA, DEFAULT)
        == setting("other", ("forward", 198), CUDA, DEFAULT)
        == DEFAULT
    )
    assert picked() == "triton"
    assert setting("bias_gelu", ("forward", 198), CPU, DEFAULT) == DEFAULT and picked(CPU) == "torch"


def test_the_users_rows_win_over_those_that_ship(folders):
    write(file_of(GPU, folders / "shipped"), [setting_row(OTHER), setting_row(OTHER, key=("backward", 198))])
    assert setting("bias_gelu", ("forward", 198), CUDA, DEFAULT) == OTHER
    write(file_of(GPU), [setting_row(WON)])
    assert setting("bias_gelu", ("forward", 198), CUDA, DEFAULT) == WON
    assert setting("bias_gelu", ("backward", 198), CUDA, DEFAULT) == OTHER


def test_a_tuned_row_wins_over_the_users_of_a_first_start(folders):
    """As after ``tune --out kernels/measured`` in a checkout."""
    write(file_of(GPU), [fastest_row("torch", command=FIRST_START)])
    write(file_of(GPU, folders / "shipped"), [fastest_row("triton")])
    assert picked() == "triton"


def test_a_first_start_of_this_torch_wins_over_a_tuned_row_of_another(folders):
    """Else every start would measure, because the row in effect is not of this torch."""
    write(file_of(GPU, folders / "shipped"), [fastest_row("triton", torch="2.0.0")])
    write(file_of(GPU), [fastest_row("torch", torch=metadata.version("torch"), command=FIRST_START)])
    assert picked() == "torch"


def test_a_second_measurement_replaces_the_first_and_leaves_the_others():
    write(file_of(GPU), [setting_row(OTHER), fastest_row("triton")])
    write(file_of(GPU), [setting_row(WON)])
    rows = read(file_of(GPU))
    assert [row.kind for row in rows] == ["setting", "fastest"] and rows[0].config == WON
    assert rows[0].us == {"best": 1.5} and rows[1].impl == "triton"


OTHERS = {
    "another Triton": {"triton": "2.0.0"},
    "another GPU of the same compute capability": {"gpu": "NVIDIA Other-GPU"},
    "both": {"triton": "2.0.0", "gpu": "NVIDIA Other-GPU"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("shipped", [True, False])
def test_a_row_of_the_same_compute_capability_is_the_prior_and_an_exact_one_wins(other, shipped, folders):
    """Wherever the prior is: in a file of the user's, or in one that ships."""
    prior = [setting_row(OTHER, **other), fastest_row("triton", **other)]
    write(file_of(prior[0].gpu, folders / "shipped" if shipped else None), prior)
    assert setting("bias_gelu", ("forward", 198), CUDA, DEFAULT) == OTHER and picked() == "triton"
    path = file_of(GPU, folders / "shipped")
    write(path, [setting_row(WON), fastest_row("torch")])
    assert setting("bias_gelu", ("forward", 198), CUDA, DEFAULT) == WON and picked() == "torch"


def test_a_prior_of_the_same_gpu_wins_over_one_of_another():
    write(file_of("NVIDIA Other-GPU"), [setting_row(OTHER, gpu="NVIDIA Other-GPU")])
    write(file_of(GPU), [setting_row(WON, triton="2.0.0")])
    assert setting("bias_gelu", ("forward", 198), CUDA, DEFAULT) == WON


def test_rows_of_another_compute_capability_do_not_count():
    old = {"gpu": "NVIDIA Old", "capability": (8, 0)}
    write(file_of("NVIDIA Old"), [setting_row(WON, **old), fastest_row("triton", **old)])
    assert setting("bias_gelu", ("forward", 198), CUDA, DEFAULT) == DEFAULT and picked() == "torch"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], f"torch, not measured on {GPU}"),
        ([fastest_row("triton")], f"triton, measured on {GPU}"),
        ([fastest_row("triton", gpu="NVIDIA Other-GPU")], "triton, measured on NVIDIA Other-GPU"),
    ],
)
def test_the_choice_and_its_reason_are_logged_once(rows, said, caplog):
    write(file_of(GPU), rows)
    with caplog.at_level(logging.INFO, "fastdeitlt"):
        picked()
        picked()
    assert [record.message for record in caplog.records] == [f"bias_gelu at 198 64: {said}"]


def test_a_shape_without_a_kernel_and_a_refused_kernel_are_torchs(monkeypatch, caplog):
    monkeypatch.setattr(_pick, "_refused", set())
    write(file_of(GPU), [fastest_row("triton")])
    assert picked(fits=False) == "torch" and picked() == "triton"
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        _pick.refuse("bias_gelu", "it is wrong")
        _pick.refuse("bias_gelu", "it is wrong")
    assert picked() == "torch" and pick("bias_gelu", "triton", (198, 64), CUDA) == "triton"
    (record,) = caplog.records
    assert record.message == "bias_gelu: kernel not used, it is wrong; please report this"


def test_an_op_may_have_its_own_default_on_a_gpu():
    write(file_of(GPU), [fastest_row("torch")])
    assert picked(on_gpu="triton") == "triton" and picked(CPU, on_gpu="triton") == "torch"
    assert picked(on_gpu="triton", fits=False) == "torch"


def test_a_requested_kernel_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(_pick, "HAS_TRITON", False)
    with pytest.raises(UserError, match="got impl 'triton' without triton"):
        pick("bias_gelu", "triton", (1,), CPU)
    assert picked() == "torch"


def test_all_ranks_run_what_the_first_has():
    write(file_of(GPU), [setting_row(WON), fastest_row("torch")])
    prefer([fastest_row("triton")])
    assert picked() == "triton" and setting("bias_gelu", ("forward", 198), CUDA, DEFAULT) == WON
    prefer([])
    assert picked() == "torch"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Invalid JSON"),
        (setting_row(WON).model_dump_json()[:-20], "Invalid JSON"),
        (setting_row(WON).model_dump_json().replace('"num_warps":4', '"num_warps":"four"'), "num_warps"),
        (setting_row(WON).model_dump_json().replace('"num_warps":4', '"num_warps":0'), "expected blocks, num_warps"),
        (fastest_row("triton").model_dump_json().replace('"impl":"triton"', '"impl":""'), "expected an impl"),
        (fastest_row("triton").model_dump_json().replace('"us"', '"seconds"'), "seconds"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_file_and_the_way_out(line, message):
    write(file_of(GPU), [setting_row(WON)])
    with file_of(GPU).open("a", encoding="utf-8") as out:
        out.write(line)
    with pytest.raises(UserError, match=rf"line 2: .*{message}.*Delete the file and run 'fastdeitlt tune' again"):
        setting("bias_gelu", ("forward", 198), CUDA, DEFAULT)


def test_trying_a_setting_ends_with_the_one_before():
    use("bias_gelu", ("k",), WON)
    with trying("bias_gelu", ("k",), OTHER):
        assert setting("bias_gelu", ("k",), CPU, DEFAULT) == OTHER
    assert setting("bias_gelu", ("k",), CPU, DEFAULT) == WON


def test_a_resumed_run_can_tell_that_measurements_changed():
    before = _measured.fingerprint()
    write(file_of(GPU), [setting_row(WON)])
    after = _measured.fingerprint()
    write(file_of(GPU), [setting_row(WON)])
    assert before != after == _measured.fingerprint()
