"""The first start on a GPU: what "auto" leaves open is measured once, kept, and the same on all ranks."""

import logging
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fastdeitlt.kernels import _measured, adamw_ema, bias_gelu
from fastdeitlt.kernels._launch import LaunchConfig, context_failure
from fastdeitlt.kernels._pick import pick

from fastdeitlt import config, distributed
from fastdeitlt.core import assemble
from fastdeitlt.core.measure import first_start
from fastdeitlt.core.measure.parts import SETTINGS, Part, attention
from fastdeitlt.core.measure.timer import Timing
from fastdeitlt.errors import UserError
from fastdeitlt.tools import tune
from fastdeitlt.tools.setup import set_up

pytestmark = pytest.mark.usefixtures("some_gpu")
GPU, CUDA = torch.cuda.is_available(), torch.device("cuda", 0)
SMALL = [
    "student.name=deit_tiny_distilled_patch16_32", "student.img_size=32", "student.depth=1", "teacher.arch=resnet8",
    "train.batch_size=2", "train.accumulate=1", "train.compile=false", "optim.ema_decay=0.9", "optim.clip_norm=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def steps():
    """``steps(*overrides)`` is a step in bfloat16, whatever the processor, assembled without measuring."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        device = torch.device("cuda" if GPU else "cpu")

        def step(*more):
            cfg = config.load("quickstart", [*SMALL, "train.precision=bf16", *more])
            unmeasured = cfg.train.model_copy(update={"measure_kernels": False})
            shapes = tune.shapes_of(set_up(cfg.model_copy(update={"train": unmeasured}), device, synthetic=True))
            return replace(shapes, cfg=cfg)

        yield step


@pytest.fixture
def timed(monkeypatch):
    """A timer by implementation; records what it was asked for."""
    asked = []
    times = {"triton": 1.0, "fastdeitlt": 1.0, "torch": 2.0, "sdpa": 2.0}

    def measure(calls, device, rounds, eager=frozenset()):
        asked.append(set(calls))
        return {name: Timing(times.get(name, 3.0), 0, 0, False) for name in calls}

    monkeypatch.setattr(first_start, "measure", measure)
    return asked


def plant(monkeypatch, **kernels):
    """Parts whose torch implementation gives ones; an op's kernel gives the number named, or raises an error."""

    def kernel(result):
        def call():
            if isinstance(result, Exception):
                raise result
            return torch.full((3,), result)

        return call

    def parts(shapes, only):
        for op in sorted(only):
            whole = {"triton": kernel(kernels.get(op, 1.0)), shapes.torchs(op): kernel(1.0)}
            yield Part(op, shapes.keys[op], {}, whole)

    monkeypatch.setattr(first_start, "parts", parts)


def chosen(rows):
    return {row.op: row.impl for row in rows}


def test_every_kernel_agrees_with_torch_at_its_default_setting_and_the_fastest_is_kept(steps, timed, monkeypatch):
    """The real ops at a small shape."""
    if not GPU:  # the weights in few programs: the interpreter runs one after the other
        monkeypatch.setattr(adamw_ema, "DEFAULT", LaunchConfig({"BLOCK": 1 << 17}))
    rows = first_start.current_rows(steps())
    assert chosen(rows) == dict.fromkeys(SETTINGS, "triton") | {"adamw_ema": "fastdeitlt"}
    assert all("triton" in names or "fastdeitlt" in names for names in timed)
    assert rows == _measured.read(_measured.file_of("some GPU"))
    assert {row.command for row in rows} == {_measured.FIRST_START}
    for row in rows:
        if row.op != "attention":
            assert pick(row.op, "auto", row.key, CUDA) == row.impl


@pytest.mark.parametrize("case", ["attention", "attention_first"])
def test_attention_is_compared_in_its_outputs_and_in_the_two_rows_of_the_last_block(case, steps, timed, monkeypatch):
    """The kernel is the fastest, and its gradients are right."""
    right = getattr(attention, case)

    def wrong(*arguments, impl, **options):
        out = right(*arguments, impl=impl, **options)
        return out + out.detach() if impl == "triton" else out

    monkeypatch.setattr(attention, case, wrong)
    others = [f"student.{op}=torch" for op in ("add_layernorm", "bias_gelu")]
    (row,) = first_start.current_rows(steps(*others, "loss.impl=torch", "optim.backend=torch"))
    assert row.op == "attention" and row.impl != "triton" and "triton" not in row.us


def test_a_second_start_measures_nothing_and_other_versions_or_shapes_do(steps, timed, monkeypatch, caplog):
    plant(monkeypatch)
    shapes = steps()
    with caplog.at_level(logging.INFO, "fastdeitlt"):
        rows = first_start.current_rows(shapes)
        assert len(timed) == len(rows) == len(SETTINGS) and first_start.current_rows(shapes) == rows
    (said,) = [record.message for record in caplog.records if "measured on" in record.message]
    assert "bias_gelu=triton" in said and "train.measure_kernels=false" in said
    assert len(timed) == len(SETTINGS)
    path = _measured.file_of("some GPU")
    for other in ({"torch": "2.0.0"}, {"triton": "2.0.0"}):
        timed.clear()
        _measured.write(path, [row.model_copy(update=other) for row in rows if row.op == "bias_gelu"])
        first_start.current_rows(shapes)
        assert len(timed) == 1
    timed.clear()
    first_start.current_rows(steps("student.name=deit_small_distilled_patch16_32"))
    assert len(timed) == 2  # the widths changed, not tokens, width of a head and classes


def test_what_the_configuration_names_or_forbids_is_not_measured(steps, timed, monkeypatch):
    plant(monkeypatch)
    assert first_start.current_rows(steps("train.measure_kernels=false")) == [] == timed
    rows = first_start.current_rows(steps("student.attention=sdpa", "loss.impl=torch", "optim.backend=torch"))
    assert {row.op for row in rows} == {"add_layernorm", "bias_gelu"}


def test_a_prior_of_the_same_compute_capability_is_replaced_by_a_measurement(steps, timed, monkeypatch):
    plant(monkeypatch)
    shapes = steps()
    prior = first_start.new_row(shapes, "bias_gelu", shapes.keys["bias_gelu"], "fastest", {"torch": 1}, impl="torch")
    _measured.write(_measured.file_of("other GPU"), [prior.model_copy(update={"gpu": "other GPU"})])
    assert chosen(first_start.current_rows(steps("train.measure_kernels=false"))) == {"bias_gelu": "torch"}
    assert chosen(first_start.current_rows(shapes))["bias_gelu"] == "triton"


def test_a_wrong_or_failing_kernel_is_left_out_with_a_warning(steps, timed, monkeypatch, caplog):
    plant(monkeypatch, add_layernorm=1.1, bias_gelu=float("nan"), joint_loss=RuntimeError("out of resources"))
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        rows = chosen(first_start.current_rows(steps()))
    torchs = dict.fromkeys(("add_layernorm", "bias_gelu", "joint_loss"), "torch")
    assert rows == torchs | {"attention": "triton", "adamw_ema": "triton"}
    said = [record.message for record in caplog.records]
    assert [" ".join(line.split()[:2]) for line in said] == [
        "add_layernorm: triton",
        "bias_gelu: triton",
        "joint_loss: triton",
    ]
    assert "please report this" in said[0] and "out of resources" in said[2]


@pytest.mark.parametrize(
    ("error", "rows"), [(RuntimeError("ptxas"), {"bias_gelu": "torch"}), (torch.OutOfMemoryError("full"), {})]
)
def test_a_kernel_that_fails_before_it_is_timed_does_not_stop_the_run(error, rows, steps, timed, monkeypatch, caplog):
    def fail(u, bias):
        raise error

    monkeypatch.setattr(bias_gelu, "_launch_forward", fail)
    others = [f"student.{op}=triton" for op in ("attention", "add_layernorm")]
    shapes = steps(*others, "loss.impl=torch", "optim.backend=torch")
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        assert chosen(first_start.current_rows(shapes)) == rows
    (record,) = caplog.records
    assert record.message.startswith("bias_gelu: ")


def test_a_kernel_that_breaks_the_cuda_context_is_named_and_the_next_start_runs(steps, timed, monkeypatch):
    """Every later call on the device fails, also those at the end of the stream."""
    broken = "CUDA error: an illegal memory access was encountered"

    @contextmanager
    def stream(device):
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(broken) from error

    shapes, kept = steps(), {"attention": "triton", "add_layernorm": "triton", "bias_gelu": "torch"}
    with monkeypatch.context() as patch:
        plant(patch, bias_gelu=RuntimeError(broken), joint_loss=RuntimeError(broken))
        patch.setattr(first_start, "capturing_stream", stream)
        patch.setattr(first_start, "context_failure", lambda device: broken)
        with pytest.raises(UserError, match=rf"^student\.bias_gelu=auto: .*{broken}.* set student\.bias_gelu=torch"):
            first_start.current_rows(shapes)
    assert chosen(_measured.read(_measured.file_of("some GPU"))) == kept
    plant(monkeypatch)
    assert chosen(first_start.current_rows(shapes)) == kept | dict.fromkeys(("joint_loss", "adamw_ema"), "triton")


@pytest.mark.parametrize("message", ["", "CUDA error: an illegal memory access\nwas encountered"])
def test_a_broken_context_fails_at_the_next_wait(message, monkeypatch):
    def synchronize():
        if message:
            raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=synchronize))
    assert context_failure(CUDA) == message.replace("\n", " ") and context_failure(torch.device("cpu")) == ""


def test_measuring_leaves_the_random_numbers_as_they_were(steps, timed, monkeypatch):
    if not GPU:
        monkeypatch.setattr(adamw_ema, "DEFAULT", LaunchConfig({"BLOCK": 1 << 17}))
    shapes = steps("student.attention=sdpa")
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    first_start.current_rows(shapes)
    assert torch.equal(torch.rand(4), expected)


def test_other_ranks_run_what_the_first_measured(steps, monkeypatch):
    """Rank 1, whose own cache says something else."""
    shapes = steps()
    key = shapes.keys["bias_gelu"]

    def row(impl):
        return first_start.new_row(shapes, "bias_gelu", key, "fastest", {impl: 1.0}, impl=impl)

    _measured.write(_measured.file_of("some GPU"), [row("torch")])
    monkeypatch.setattr(distributed, "get_world", lambda: 2)
    monkeypatch.setattr(distributed, "on_main", lambda work: [row("triton")])
    assemble.measure_kernels(shapes.cfg, shapes.student, shapes.teacher, shapes.num_classes, CUDA)
    assert pick("bias_gelu", "auto", key, CUDA) == "triton"


def test_without_a_gpu_nothing_is_measured(steps, monkeypatch):
    monkeypatch.setattr(distributed, "on_main", lambda work: pytest.fail("measured"))
    shapes = steps()
    assemble.measure_kernels(shapes.cfg, shapes.student, shapes.teacher, shapes.num_classes, torch.device("cpu"))
