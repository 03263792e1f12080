"""DeepSpeed at every ZeRO stage takes the plain engine's steps, on one rank and on two, and trades state with it."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeitlt import config, distributed
from fastdeitlt.data.batches import Batch
from fastdeitlt.data.sampler import Plan
from fastdeitlt.engine import JointForward, PlainEngine, build_engine
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.teacher import Teacher

CPU = torch.device("cpu")
STAGES = [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]
STEPS, VIRTUAL_RANKS, ACCUMULATE = 4, 2, 2
SHORT = 2
"""The step with fewer micro-batches, as an epoch's last may have."""


def _config(**changes):
    # the gradient of the keys' bias is zero but for rounding, which a small eps would blow up to whole steps
    settings = {
        "train.precision": "fp32",
        "train.compile": False,
        "train.device": "cpu",
        "train.batch_size": 4,
        "train.accumulate": ACCUMULATE,
        "train.virtual_ranks": VIRTUAL_RANKS,
        "optim.clip_norm": 0.5,
        "optim.eps": 1e-4,
    }
    return config.build(settings | {f"train.{name}": value for name, value in changes.items()})


def _engine(cfg, rank=0, world=1):
    torch.manual_seed(0)
    # odd widths of head and set: parts of unequal size on two ranks
    student = create_student("deit_tiny_distilled_patch16_32", 11, depth=1, drop_path=0.0).train()
    teacher = Teacher(create_teacher("resnet8", 11, "fastdeitlt"), 11)
    plan = Plan(200, 4, ACCUMULATE, 1, VIRTUAL_RANKS, rank, world)
    return build_engine(JointForward(student, teacher, [5] * 11, cfg, CPU), cfg, plan)


def _run(engine, rank=0, world=1, steps=range(STEPS), poison=None):
    """{(step, micro-step, virtual rank): loss} of this rank, and the norm of every step."""
    mine = range(VIRTUAL_RANKS) if world == 1 else (rank,)
    losses, norms = {}, []
    for step in steps:
        for index in range(1 if step == SHORT else ACCUMULATE):
            for virtual_rank in mine:
                place = (step, index, virtual_rank)
                generator = torch.Generator().manual_seed(100 * step + 10 * index + virtual_rank)
                labels = torch.randint(11, (4,), generator=generator)
                images = torch.randn(4, 3, 32, 32, generator=generator)
                batch = Batch(images, labels, labels.flip(0), torch.tensor(0.3))
                loss = engine.forward(batch, torch.linspace(0.5, 1.5, 11), None).loss
                engine.backward(loss * float("nan") if place == poison else loss)
                losses[place] = loss.item()
        norms.append(engine.step(1e-3 * (step + 1)).item())
    return losses, norms


def _state(engine):
    """Weights and optimizer state, detached from the engine."""
    parts = (engine.weights(), engine.optimizer_tensors())
    return [{name: tensor.detach().clone() for name, tensor in part.items()} for part in parts]


@pytest.fixture(scope="module")
def plain():
    """What the plain engine does: (losses, norms, state after two steps, state at the end)."""
    engine = _engine(_config(engine="plain"))
    losses, norms = _run(engine, steps=range(2))
    half = _state(engine)
    more_losses, more_norms = _run(engine, steps=range(2, STEPS))
    return losses | more_losses, norms + more_norms, half, _state(engine)


def _assert_same(got, expected, tolerance=1e-6):
    for got_part, expected_part in zip(got, expected, strict=True):
        assert got_part.keys() == expected_part.keys()
        for name, value in expected_part.items():
            torch.testing.assert_close(got_part[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_every_stage_takes_the_plain_steps_on_one_rank(plain, stage, offload):
    losses, norms, half, end = plain
    engine = _engine(_config(engine="deepspeed", zero_stage=stage, offload=offload))
    got_losses, got_norms = _run(engine)
    assert got_losses == pytest.approx(losses, abs=1e-6)
    assert got_norms == pytest.approx(norms, rel=1e-6)
    _assert_same(_state(engine), end)
    engine.load(*half)  # back to the middle, with a plain engine's state
    got_losses, _ = _run(engine, steps=range(2, STEPS))
    assert got_losses == pytest.approx({k: v for k, v in losses.items() if k[0] >= 2}, abs=1e-6)
    _assert_same(_state(engine), end)


@pytest.mark.parametrize("stage", [0, 2])
def test_bf16_takes_no_hidden_step_before_training(stage):
    plain, sharded = (_engine(_config(engine=e, zero_stage=stage, precision="bf16")) for e in ("plain", "deepspeed"))
    losses, norms = _run(plain)
    got_losses, got_norms = _run(sharded)
    assert got_losses == losses
    assert got_norms == pytest.approx(norms, rel=1e-6)
    _assert_same(_state(sharded), _state(plain))


def _one_of_two(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start("cpu", timeout_s=60)
    half = torch.load(folder / "half.pt", weights_only=True)
    found = {}
    for stage, offload in STAGES:
        engine = _engine(_config(engine="auto", zero_stage=stage, offload=offload), rank, 2)
        losses, norms = _run(engine, rank, 2)
        end = _state(engine)
        engine.load(*half)
        again, _ = _run(engine, rank, 2, range(2, STEPS))
        found[stage, offload] = (losses, norms, end, again, _state(engine))
    engine = _engine(_config(engine="auto", zero_stage=2), rank, 2)
    found["nan"] = _run(engine, rank, 2, range(2), poison=(1, 0, 0))[1]
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def two_ranks(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.save(plain[2], folder / "half.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, folder), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_every_stage_takes_the_plain_steps_on_two_ranks(plain, two_ranks, stage, offload):
    losses, norms, _, end = plain
    both = [found[stage, offload] for found in two_ranks]
    assert both[0][0] | both[1][0] == pytest.approx(losses, abs=1e-6)
    for rank in both:
        assert rank[1] == pytest.approx(norms, rel=1e-6)
        _assert_same([rank[2][0]], [end[0]])  # weights, on both
    _assert_same(both[0][2], end)  # whole moments, on rank 0


@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_two_ranks_continue_what_one_began(plain, two_ranks, stage, offload):
    losses, _, _, end = plain
    both = [found[stage, offload] for found in two_ranks]
    assert both[0][3] | both[1][3] == pytest.approx({k: v for k, v in losses.items() if k[0] >= 2}, abs=1e-6)
    _assert_same(both[0][4], end)


def test_a_gradient_that_is_not_finite_on_one_rank_is_seen_by_both(two_ranks):
    for found in two_ranks:
        finite = [torch.tensor(norm).isfinite().item() for norm in found["nan"]]
        assert finite == [True, False]


SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "item")


class NoSync(TorchDispatchMode):
    """Fails on operators that make the host wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(name.startswith(sync) for sync in SYNCS), f"host sync: {function}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_sharded_step_never_waits_for_the_device(stage):
    engine = _engine(_config(engine="deepspeed", zero_stage=stage))
    labels = torch.arange(4)
    batch = Batch(torch.randn(4, 3, 32, 32), labels, labels.flip(0), torch.tensor(0.3))
    with NoSync():
        engine.backward(engine.forward(batch, torch.ones(11), None).loss)
        engine.step(1e-3)


def test_student_teacher_and_loss_compile_to_one_graph_inside_deepspeed(monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **kw: real(module, backend=count, **kw))
    compiled = _run(_engine(_config(engine="deepspeed", zero_stage=2, compile=True)), steps=range(1))
    assert len(graphs) == 1
    eager = _run(_engine(_config(engine="deepspeed", zero_stage=2)), steps=range(1))
    assert compiled[0] == pytest.approx(eager[0], abs=1e-6)


def test_the_teacher_is_neither_sharded_nor_saved():
    engine = _engine(_config(engine="deepspeed", zero_stage=2))
    student = create_student("deit_tiny_distilled_patch16_32", 11, depth=1)
    assert engine.weights().keys() == student.state_dict().keys()
    assert len(list(engine.engine.module.parameters())) == len(list(student.parameters()))


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"engine": "plain"}, 2, r"train\.engine=plain: .* 2 ranks; use train\.engine=auto"),
        ({"engine": "deepspeed", "zero_stage": 3, "compile": True}, 1, r"train\.zero_stage=3: .*train\.compile=false"),
        ({"engine": "auto", "offload": True}, 1, r"train\.offload: .*got the plain engine.*train\.offload=false"),
        ({"engine": "deepspeed", "offload": True, "zero_stage": 0}, 1, r"train\.offload: .*zero_stage=0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(changes, world, message):
    with pytest.raises(UserError, match=message):
        _engine(_config(**changes), 0, world)


def test_another_adamw_than_torchs_is_refused():
    cfg = _config(engine="deepspeed")
    cfg = cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"backend": "apex"})})
    with pytest.raises(UserError, match=r"optim\.backend: got apex.*optim\.backend=torch"):
        _engine(cfg)


def test_auto_is_plain_on_one_rank_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fastdeitlt"), "propagate", True)
    with caplog.at_level(logging.INFO, "fastdeitlt"):
        assert isinstance(_engine(_config(engine="auto")), PlainEngine)
    assert "engine: plain, because there is one rank" in caplog.text


def test_a_plain_run_never_imports_deepspeed():
    code = "import sys, fastdeitlt.train; assert not [m for m in sys.modules if m.startswith('deepspeed')]"
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
