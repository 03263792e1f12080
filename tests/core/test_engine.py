"""DeepSpeed at each ZeRO stage takes the plain engine's steps, on one, two and four ranks, and trades state with it."""

import functools
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from no_sync import NoSync
from ranks import free_port
from torch._dynamo.testing import CompileCounter

from fastdeitlt import config, distributed
from fastdeitlt.core import optim
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine import build_engine
from fastdeitlt.core.engine.finite_guard import FiniteGuard
from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.core.joint import JointForward
from fastdeitlt.data.sampler import Plan
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import num_parameters

CPU = torch.device("cpu")
STAGES = [(0, False), (1, False), (1, True), (2, False), (2, True)]
STEPS, VIRTUAL_RANKS, ACCUMULATE = 4, 4, 2
BF16_BOUND = 5e-3
"""On losses of about 2.4 over four steps: gradients are summed in another order, and bfloat16 rounds what follows."""
BF16_WEIGHT_BOUND = 1e-3
"""On weights that four steps move by up to 1e-2."""
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


class Varied(torch.nn.Module):
    """A teacher that decides otherwise for every image."""

    class_map = None

    def forward(self, images_BCHW):
        return images_BCHW[:, 0, 0, :11]


def _engine(cfg, rank=0, world=1, plan=None, teacher=None):
    torch.manual_seed(0)
    # odd widths of head and set: parts of unequal size on the ranks
    student = create_student("deit_tiny_distilled_patch16_32", 11, depth=1, drop_path=0.0).train()
    teacher = teacher or Teacher(create_teacher("resnet8", 11, "fastdeitlt"), 11)
    plan = plan or Plan(200, 4, ACCUMULATE, 1, VIRTUAL_RANKS, rank, world)
    return build_engine(JointForward(student, teacher, [5] * 11, cfg, CPU), cfg, plan)


def _batch(step, index, virtual_rank):
    generator = torch.Generator().manual_seed(100 * step + 10 * index + virtual_rank)
    labels = torch.randint(11, (4,), generator=generator)
    return Batch(torch.randn(4, 3, 32, 32, generator=generator), labels, labels.flip(0), torch.tensor(0.3))


WEIGHTS_K = torch.linspace(0.5, 1.5, 11)


def _run(engine, rank=0, world=1, steps=range(STEPS), poison=None):
    """{(step, micro-step, virtual rank): loss} of this rank, and the norm of every step."""
    each = VIRTUAL_RANKS // world
    losses, norms = {}, []
    for step in steps:
        for index in range(1 if step == SHORT else ACCUMULATE):
            for virtual_rank in range(rank * each, (rank + 1) * each):
                place = (step, index, virtual_rank)
                loss = engine.forward(_batch(*place), WEIGHTS_K, None).loss
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


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (1, True), (2, False)])
def test_every_stage_scales_the_learning_rate_by_layer(stage, offload):
    cfg = _config(engine="deepspeed", zero_stage=stage, offload=offload)
    decayed = cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"layer_decay": 0.3})})
    plain = decayed.model_copy(update={"train": _config(engine="plain").train})
    sharded, whole, alike = (_engine(each) for each in (decayed, plain, _config(engine="plain")))
    (losses, _), (expected, _), _ = (_run(engine, steps=range(2)) for engine in (sharded, whole, alike))
    assert losses == pytest.approx(expected, abs=1e-6)
    _assert_same(_state(sharded), _state(whole))
    weight = "patch_embed.proj.weight"
    assert not torch.allclose(whole.weights()[weight], alike.weights()[weight], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_buffer_of_the_exchange_has_the_size_of_the_student(stage):
    """DeepSpeed's default is 2 GB."""
    engine = _engine(_config(engine="deepspeed", zero_stage=stage))
    assert engine.zero.reduce_bucket_size == num_parameters(engine.student)


def _one_of_several(rank, world, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start("cpu", timeout_s=120)
    half = torch.load(folder / "half.pt", weights_only=True)
    found = {}
    for stage, offload in STAGES if world == 2 else [(stage, False) for stage in range(3)]:
        engine = _engine(_config(engine="auto", zero_stage=stage, offload=offload), rank, world)
        losses, norms = _run(engine, rank, world)
        end = _state(engine)
        engine.load(*half)
        again, _ = _run(engine, rank, world, range(2, STEPS))
        found[stage, offload] = (losses, norms, end, again, _state(engine))
    if world == 2:
        for stage in (0, 2):
            with _native_bf16():
                engine = _engine(_config(engine="auto", zero_stage=stage, precision="bf16"), rank, 2)
                found["bf16", stage] = (_run(engine, rank, 2)[0], _state(engine))
        for offload in (False, True):
            engine = _engine(_config(engine="auto", zero_stage=1, offload=offload), rank, 2)
            _run(engine, rank, 2, range(1))
            before = _state(engine)[0]
            norms = _run(engine, rank, 2, range(1, 2), poison=(1, 0, 0))[1]
            found["nan", offload] = (norms, before, _state(engine)[0])
        engine = _lamb_engine("auto", rank, 2)
        found["lamb"] = (*_run(engine, rank, 2), _state(engine))
        found["global"] = _run_globally(rank)
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.stop()


def _run_globally(rank):
    """Two steps of two ranks of four images whose weighted mean is one: losses, weights."""
    cfg = config.build(config.flatten(_config(zero_stage=1, virtual_ranks=2)) | {"loss.normalise": "global"})
    engine = _engine(cfg, plan=Plan(200, 4, ACCUMULATE, 1, 2, rank, 2), teacher=Varied())
    losses = []
    for step in range(2):
        for index in range(ACCUMULATE):
            found = engine.forward(_batch(step, index, rank), WEIGHTS_K, None)
            engine.backward(found.loss)
            losses.append([loss.item() for loss in found])
        engine.step(1e-3)
    return losses, _state(engine)[0]


@pytest.fixture(scope="module")
def several(plain, tmp_path_factory):
    """world -> what each rank found; the ranks are started once."""

    @functools.cache
    def found(world):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        torch.save(plain[2], folder / "half.pt")
        torch.multiprocessing.spawn(_one_of_several, (world, free_port(), folder), nprocs=world)
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

    return found


STAGES_AND_RANKS = [(2, *place) for place in STAGES] + [(4, stage, False) for stage in range(3)]


@pytest.mark.parametrize(("world", "stage", "offload"), STAGES_AND_RANKS)
def test_every_stage_takes_the_plain_steps_on_several_ranks(plain, several, world, stage, offload):
    losses, norms, _, end = plain
    ranks = [found[stage, offload] for found in several(world)]
    assert _joined(found[0] for found in ranks) == pytest.approx(losses, abs=1e-6)
    for rank in ranks:
        assert rank[1] == pytest.approx(norms, rel=1e-6)
        _assert_same([rank[2][0]], [end[0]])  # weights, on all
    _assert_same(ranks[0][2], end)  # whole moments, on rank 0


@pytest.mark.parametrize(("world", "stage", "offload"), STAGES_AND_RANKS)
def test_several_ranks_continue_what_one_began(plain, several, world, stage, offload):
    losses, _, _, end = plain
    ranks = [found[stage, offload] for found in several(world)]
    expected = {place: loss for place, loss in losses.items() if place[0] >= 2}
    assert _joined(found[3] for found in ranks) == pytest.approx(expected, abs=1e-6)
    _assert_same(ranks[0][4], end)


@contextmanager
def _native_bf16():
    """Compute in bfloat16, emulated where the processor has no instructions for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        yield


@pytest.fixture(scope="module")
def plain_bf16():
    with _native_bf16():
        engine = _engine(_config(engine="plain", precision="bf16"))
        losses, _ = _run(engine)
        yield losses, engine.weights()


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_bf16_stays_within_its_bounds_and_takes_no_hidden_step(plain_bf16, request, world, stage):
    """Losses, weights, and a step count of the steps taken: none was hidden before the first."""
    if world == 1:
        engine = _engine(_config(engine="deepspeed", zero_stage=stage, precision="bf16"))
        losses, (weights, moments) = _run(engine)[0], _state(engine)
    else:
        ranks = [found["bf16", stage] for found in request.getfixturevalue("several")(2)]
        losses, (weights, moments) = _joined(losses for losses, _ in ranks), ranks[0][1]
    assert losses == pytest.approx(plain_bf16[0], abs=BF16_BOUND)
    _assert_same([weights], [plain_bf16[1]], BF16_WEIGHT_BOUND)
    assert all(value == STEPS for name, value in moments.items() if name.endswith("/step"))


def test_a_hidden_step_would_break_the_bounds_of_bf16(plain_bf16):
    """What DeepSpeed's own bf16 mode does at stage 0: a step of zero gradients before training."""
    engine, (losses, weights) = _engine(_config(engine="plain", precision="bf16")), plain_bf16
    for parameter in engine.parameters:
        parameter.grad = torch.zeros_like(parameter)
    engine.step(1e-3)
    hidden = _run(engine)[0]
    assert max(abs(hidden[place] - loss) for place, loss in losses.items()) > 10 * BF16_BOUND
    assert max((engine.weights()[n] - value).abs().max() for n, value in weights.items()) > 5 * BF16_WEIGHT_BOUND


@pytest.mark.parametrize("offload", [False, True])
def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_weight_of_any(several, offload):
    for found in several(2):
        norms, before, after = found["nan", offload]
        assert not torch.tensor(norms).isfinite().any()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_global_mean_of_two_ranks_is_that_of_one_with_both_batches(several):
    cfg = _config(engine="plain", virtual_ranks=1, batch_size=8)
    engine = _engine(cfg, plan=Plan(200, 8, ACCUMULATE, 1, 1), teacher=Varied())
    expected = []
    for step in range(2):
        for index in range(ACCUMULATE):
            parts = [_batch(step, index, rank) for rank in range(2)]
            images, labels, partner = (torch.cat([getattr(p, name) for p in parts]) for name in FIELDS)
            found = engine.forward(Batch(images, labels, partner, torch.tensor(0.3)), WEIGHTS_K, None)
            engine.backward(found.loss)
            expected.append([loss.item() for loss in found])
        engine.step(1e-3)
    ranks = [found["global"] for found in several(2)]
    mean = torch.tensor([losses for losses, _ in ranks]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(expected), atol=1e-6, rtol=0)
    _assert_same([ranks[0][1]], [engine.weights()])
    own = _run_own_means(_engine(_config(engine="plain"), plan=Plan(200, 4, ACCUMULATE, 1, 2), teacher=Varied()))
    assert abs(own - mean[0, 0].item()) > 1e-4  # the means of each rank's own are something else


def _run_own_means(engine):
    return sum(engine.forward(_batch(0, 0, rank), WEIGHTS_K, None).loss.item() for rank in range(2)) / 2


FIELDS = ("images_BCHW", "labels_B", "partner_B")


def _joined(parts):
    return {place: loss for part in parts for place, loss in part.items()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_sharded_step_never_waits_for_the_device(stage):
    engine = _engine(_config(engine="deepspeed", zero_stage=stage))
    labels = torch.arange(4)
    batch = Batch(torch.randn(4, 3, 32, 32), labels, labels.flip(0), torch.tensor(0.3))
    with NoSync():
        engine.backward(engine.forward(batch, torch.ones(11), None).loss)
        engine.step(1e-3)


def test_student_teacher_and_loss_compile_to_one_graph_inside_deepspeed(monkeypatch):
    graphs, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, options=None, **kw: real(module, backend=graphs, **kw))
    compiled = _run(_engine(_config(engine="deepspeed", zero_stage=2, compile=True)), steps=range(1))
    assert graphs.frame_count == 1
    eager = _run(_engine(_config(engine="deepspeed", zero_stage=2)), steps=range(1))
    assert compiled[0] == pytest.approx(eager[0], abs=1e-6)


@pytest.mark.parametrize("autotune", [False, True])
def test_autotune_reaches_the_compiler_with_the_layout_kept(autotune, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda module, options, **kw: given.append(options) or module)
    _engine(_config(compile=True, autotune=autotune))
    assert given == [{"layout_optimization": False, "max_autotune": autotune}]


def test_the_teacher_is_neither_sharded_nor_saved():
    engine = _engine(_config(engine="deepspeed", zero_stage=2))
    student = create_student("deit_tiny_distilled_patch16_32", 11, depth=1)
    assert engine.weights().keys() == student.state_dict().keys()
    assert len(list(engine.engine.module.parameters())) == len(list(student.parameters()))


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        (
            {"engine": "plain", "virtual_ranks": 2},
            2,
            r"train\.engine=plain: .* one rank, got 2. Use train\.engine=auto",
        ),
        (
            {"engine": "auto", "offload": True},
            1,
            r"train\.offload: got true with the plain engine.*train\.offload=false",
        ),
        ({"engine": "deepspeed", "offload": True, "zero_stage": 0}, 1, r"train\.offload: .*zero_stage=0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(changes, world, message):
    with pytest.raises(UserError, match=message):
        _engine(_config(**changes), 0, world)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"loss\.normalise=global: got train\.virtual_ranks=4, .*Use train\.virtual_ranks=1"),
        ({"loss.reweight_cls": True, "train.virtual_ranks": 1}, r"got loss\.reweight_cls=true, expected"),
    ],
)
def test_a_global_mean_that_cannot_be_formed_is_refused(changes, message):
    cfg = config.build(config.flatten(_config()) | {"loss.normalise": "global"} | changes)
    with pytest.raises(UserError, match=message):
        _engine(cfg, plan=Plan(200, 4, ACCUMULATE, 1, cfg.train.virtual_ranks))


def test_bfloat16_weights_are_refused_with_the_reason():
    student = create_student("deit_tiny_distilled_patch16_32", 11, depth=1).to(torch.bfloat16)
    cfg = _config(engine="deepspeed", zero_stage=0)
    with pytest.raises(UserError, match=r"student: got torch\.bfloat16 weights, expected float32"):
        build_engine(JointForward(student, None, [5] * 11, cfg, CPU), cfg, Plan(200, 4, 1, 1, 1))


def _like_apex(model, cfg):
    """As apex and DeepSpeed's FusedAdam: the rate is a number, and nothing on the device can stop the step."""
    groups = optim.parameter_groups(model, cfg.optim.weight_decay)
    return torch.optim.Adam(groups, lr=1e-3, decoupled_weight_decay=True)


GUARDED = [("torch", 0), ("torch", 2), ("fastdeitlt", 0), ("fastdeitlt", 2), ("apex", 0), ("apex", 2)]


@pytest.mark.parametrize(("backend", "skips"), GUARDED)
def test_an_update_that_is_not_finite_is_left_out(backend, skips, monkeypatch):
    """Weights stay as they were; with skips the run goes on afterwards, without it nothing moves any more."""
    if backend == "apex":
        monkeypatch.setattr(optim, "build_optimizer", _like_apex)
    cfg = config.build(config.flatten(_config(engine="plain", nonfinite_skips=skips)) | {"optim.backend": backend})
    engine = _engine(cfg)
    _run(engine, steps=range(1))
    before = _state(engine)
    _run(engine, steps=range(1, 2), poison=(1, 1, 2))
    _assert_same([_state(engine)[0]], [before[0]], tolerance=0)
    if backend == "torch":
        _assert_same(_state(engine), before, tolerance=0)
    _run(engine, steps=range(2, 3))
    moved = any(not torch.equal(value, before[0][name]) for name, value in engine.weights().items())
    assert moved == (skips > 0)
    assert all(value.isfinite().all() for part in _state(engine) for value in part.values())


def test_guarding_a_rate_that_is_a_number_never_waits_for_the_device():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9, weight_decay=0.1)
    guard = FiniteGuard(optimizer, 1, CPU)
    seen = []
    for gradient in (1.0, float("nan"), float("inf")):
        weight.grad = torch.full((3,), gradient)
        with NoSync():
            guard.watch(weight.grad.norm())
            optimizer.step()
        seen.append(weight.detach().clone())
    assert not torch.equal(seen[0], torch.ones(3))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("stage", "optimizer", "message"),
    [
        (1, {"backend": "apex"}, r"optim\.backend: got apex.*optim\.backend=torch, or train\.zero_stage=0"),
        (2, {"backend": "deepspeed"}, r"optim\.backend: got deepspeed.*train\.zero_stage=2, expected torch"),
        (0, {"backend": "fastdeitlt"}, r"optim\.backend: got fastdeitlt.*Use optim\.backend=torch\.$"),
        (
            2,
            {"algorithm": "lamb"},
            r"optim\.algorithm=lamb: got train\.zero_stage=2, expected 0.*Use train\.zero_stage=0",
        ),
    ],
)
def test_an_optimizer_that_sharding_would_break_is_refused(stage, optimizer, message):
    cfg = _config(engine="deepspeed", zero_stage=stage)
    with pytest.raises(UserError, match=message):
        _engine(cfg.model_copy(update={"optim": cfg.optim.model_copy(update=optimizer)}))


class Lamb(torch.optim.Optimizer):
    """In the place of apex's, which needs a GPU: the rate is a number, the trust ratio one of each whole weight."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.setdefault(p, {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)})
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 0.01)
                update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-4) + group["weight_decay"] * p
                ratio = p.norm() / update.norm()
                p.sub_(group["lr"] * torch.where(ratio > 0, ratio, 1.0) * update)


def _lamb_engine(engine, rank=0, world=1):
    cfg = config.build(config.flatten(_config(engine=engine, zero_stage=0)) | {"optim.algorithm": "lamb"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "build_optimizer", lambda m, c: Lamb(optim.parameter_groups(m, 0.05), {"lr": 1e-3}))
        return _engine(cfg, rank, world)


def test_stage_0_on_two_ranks_takes_the_plain_steps_of_lamb(several):
    engine = _lamb_engine("plain")
    losses, norms = _run(engine)
    ranks = [found["lamb"] for found in several(2)]
    assert _joined(found[0] for found in ranks) == pytest.approx(losses, abs=1e-6)
    assert ranks[0][1] == pytest.approx(norms, rel=1e-6)
    _assert_same(ranks[0][2], _state(engine))


def test_auto_is_plain_on_one_rank_and_says_so(caplog):
    with caplog.at_level(logging.INFO, "fastdeitlt"):
        assert isinstance(_engine(_config(engine="auto")), PlainEngine)
    assert "engine: plain for 1 rank" in caplog.text


def test_deepspeed_asks_no_compiler_which_extensions_it_could_build():
    """Each rank would, at its start; nothing of what it would find out is used."""
    _engine(_config(engine="deepspeed"))
    assert sys.modules["deepspeed.ops"].__compatible_ops__ == {}


def test_a_plain_run_never_imports_deepspeed():
    code = "import sys, fastdeitlt.train; assert not [m for m in sys.modules if m.startswith('deepspeed')]"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
