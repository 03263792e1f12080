"""train.cuda_graphs without a GPU: the compiler's graphs have a stand-in whose passes overwrite their last outputs."""

import pytest
import torch
import triton

from fastdeitlt import config
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine import build_engine
from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.loss import JointLoss
from fastdeitlt.data.sampler import Plan
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.teacher import Teacher

CPU = torch.device("cpu")
CLASSES, BATCH, MICRO_BATCHES, STEPS = 11, 4, 3, 3
WEIGHTS_K = torch.linspace(0.5, 1.5, CLASSES)


class Replay(torch.autograd.Function):
    """A graph's two passes; what they return shares its memory with what they return next time."""

    @staticmethod
    def forward(ctx, graphs, *parameters):
        ctx.graphs, ctx.parameters = graphs, parameters
        with torch.enable_grad():
            graphs.recorded = graphs.joint(*graphs.inputs)
        return graphs.write("forward", graphs.recorded)

    @staticmethod
    def backward(ctx, *upstream):
        gradients = torch.autograd.grad(ctx.graphs.recorded, ctx.parameters, upstream)
        return None, *ctx.graphs.write("backward", gradients)


class Graphs:
    """What ``torch.compile`` returns with CUDA graphs: fixed memory for the batch, the losses and the gradients."""

    def __init__(self, joint):
        self.joint, self.parameters = joint, list(joint.student.parameters())
        self.memory, self.order = {}, []

    def __call__(self, *inputs):
        self.inputs = inputs
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        copies = iter(self.write("inputs", tensors))
        self.inputs = [next(copies) if isinstance(x, torch.Tensor) else x for x in inputs]
        return JointLoss(*Replay.apply(self, *self.parameters))

    def write(self, name, values):
        """Copy the values to the memory of this name and return new tensors on it, as a replay does."""
        self.order.append(name)
        memory = self.memory.setdefault(name, [torch.empty_like(value) for value in values])
        for place, value in zip(memory, values, strict=True):
            place.copy_(value.detach())
        return tuple(place.detach() for place in memory)


@pytest.fixture
def compiles(monkeypatch):
    """The options given to the compiler, and the stand-ins that it returned."""
    options, made = [], []

    def compile(joint, **given):
        options.append(given)
        made.append(Graphs(joint))
        return made[-1]

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: made[-1].order.append("begin"))
    return options, made


def _engine(build=None, **settings):
    cfg = config.build(
        {"train.precision": "fp32", "optim.clip_norm": 0.5, "optim.eps": 1e-4, "train.device": "cpu"} | settings
    )
    torch.manual_seed(0)
    student = create_student("deit_tiny_distilled_patch16_32", CLASSES, depth=1, drop_path=0.0).train()
    teacher = Teacher(create_teacher("resnet8", CLASSES, "fastdeitlt"), CLASSES)
    joint = JointForward(student, teacher, [5] * CLASSES, cfg, CPU)
    return build(joint, cfg, Plan(200, BATCH, MICRO_BATCHES, 1, 1)) if build else PlainEngine(joint, cfg, MICRO_BATCHES)


def _batch(index):
    generator = torch.Generator().manual_seed(index)
    labels_B = torch.randint(CLASSES, (BATCH,), generator=generator)
    return Batch(torch.randn(BATCH, 3, 32, 32, generator=generator), labels_B, labels_B.flip(0), torch.tensor(0.3))


def _run(engine):
    """Losses of every micro-batch, read after the last one, norms, weights."""
    losses, norms = [], []
    for step in range(STEPS):
        for index in range(MICRO_BATCHES):
            each = engine.forward(_batch(MICRO_BATCHES * step + index), WEIGHTS_K, None)
            engine.backward(each.loss)
            losses += [part.detach() for part in each]
        norms.append(engine.step(1e-3))
    return torch.stack(losses), torch.stack(norms), torch.cat([p.detach().flatten() for p in engine.parameters])


@pytest.fixture(scope="module")
def eager():
    return _run(_engine(**{"train.compile": False}))


@pytest.mark.parametrize("backend", ["torch", "fastdeitlt"])
def test_replays_that_overwrite_each_other_take_the_eager_steps(backend, eager, compiles, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)  # too slow for all weights
    engine = _engine(**{"train.cuda_graphs": True, "optim.backend": backend})
    (options,), (graphs,) = compiles
    assert options["fullgraph"] and options["options"]["triton.cudagraphs"] is True
    places = [p.grad.data_ptr() for p in engine.parameters]
    tolerance = 0 if backend == "torch" else 1e-5  # another order of sums
    for got, expected in zip(_run(engine), eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert [p.grad.data_ptr() for p in engine.parameters] == places and not any(p.grad.any() for p in engine.parameters)
    assert graphs.order == ["begin", "inputs", "forward", "backward"] * MICRO_BATCHES * STEPS


def test_an_engine_that_does_not_expect_replays_would_take_other_steps(eager, compiles):
    """The stand-in is strict: without fixed gradients and copied losses, results are wrong."""
    losses, _, weights = _run(_engine(**{"train.cuda_graphs": False}))
    assert "triton.cudagraphs" not in compiles[0][0]["options"]
    assert not torch.allclose(losses, eager[0]) and not torch.allclose(weights, eager[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("engine", "where"), [("plain", "a student on cpu"), ("deepspeed", "the DeepSpeed engine")])
def test_graphs_are_refused_where_there_are_none(engine, where):
    with pytest.raises(UserError, match=rf"train\.cuda_graphs: got true with {where}.*Use train\.cuda_graphs=false"):
        _engine(build_engine, **{"train.cuda_graphs": True, "train.engine": engine})
