"""Schedule, parameter groups and moving average against the reference; optimizer state comes back whole."""

import sys
import types

import golden
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fastdeitlt import config
from fastdeitlt.core import optim
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.core.joint import JointForward
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student

LARGE = ("imagenet_lt", "inat18", "places_lt")


@pytest.mark.parametrize("case", golden.load("lr_schedule"), ids=lambda c: f"{c['epochs']}ep")
def test_learning_rate_is_the_references(case):
    cfg = config.build(
        {
            "train.epochs": case["epochs"],
            "train.batch_size": case["batch_size"],
            "train.virtual_ranks": case["world"],
            "train.accumulate": case["accum"],
            "optim.warmup_epochs": case["warmup_epochs"],
        }
    )
    assert optim.peak_learning_rate(cfg) == pytest.approx(case["base_lr"], abs=1e-12)
    for epoch, iteration, expected in case["points"]:
        got = optim.learning_rate(epoch + iteration / case["steps_per_epoch"], cfg)
        assert got == pytest.approx(expected, abs=1e-9), (epoch, iteration)


def test_effective_scaling_counts_accumulation_and_none_scales_nothing():
    base = {"train.batch_size": 128, "train.accumulate": 4, "train.virtual_ranks": 2}
    peaks = {
        s: optim.peak_learning_rate(config.build(base | {"optim.lr_scale": s}))
        for s in ("official", "effective", "none")
    }
    assert peaks == pytest.approx({"official": 2.5e-4, "effective": 1e-3, "none": 5e-4})


def test_learning_rate_ends_at_min_lr():
    cfg = config.build({"train.epochs": 20})
    assert optim.learning_rate(20, cfg) == optim.learning_rate(25, cfg) == cfg.optim.min_lr


def test_parameter_groups_are_the_references():
    official = golden.load("trajectory")
    student = create_student("deit_base_distilled_patch16_224", official["arch"]["classes"], depth=2)
    groups = optim.parameter_groups(student, 0.05)
    got = [
        {"weight_decay": g["weight_decay"], "n": len(g["params"]), "numel": sum(p.numel() for p in g["params"])}
        for g in groups
    ]
    assert got == official["optimizer"]["param_groups"]


def test_layer_decay_gives_the_groups_of_timm():
    """Those of timm's distilled ViT of the same depth: names, learning-rate scales and weight decay."""
    ours = create_student("deit_tiny_distilled_patch16_32", 5, depth=3)
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=5, depth=3)
    groups = param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.6)

    def facts(model, groups):
        name_of = {parameter: name for name, parameter in model.named_parameters()}
        return {name_of[p]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    got = facts(ours, optim.parameter_groups(ours, 0.05, 0.6))
    assert got == facts(theirs, groups)
    scales = [got[name][0] for name in ("pos_embed", "blocks.0.norm1.bias", "norm.bias", "head_dist.weight")]
    assert scales == pytest.approx([0.6**4, 0.6**3, 0.6, 1.0])


@pytest.mark.parametrize("backend", ["torch", "fastdeitlt"])
def test_layer_decay_scales_each_layers_rate_in_every_step(backend):
    """Against one plain AdamW a layer, whose rate is the schedule's times the layer's scale."""
    cfg = config.build({"optim.layer_decay": 0.5, "optim.backend": backend, "optim.eps": 1e-4})
    model, peer = (create_student("deit_tiny_distilled_patch16_32", 3, depth=2, drop_path=0.0) for _ in range(2))
    peer.load_state_dict(model.state_dict())
    optimizer = optim.build_optimizer(model, cfg)
    groups = optim.parameter_groups(peer, cfg.optim.weight_decay, 0.5)
    peers = [(g["lr_scale"], torch.optim.AdamW(g["params"], weight_decay=g["weight_decay"], eps=1e-4)) for g in groups]
    for rate in (1e-2, 3e-3, 1e-4):
        optim.set_learning_rate(optimizer, rate)
        for scale, one in peers:
            one.param_groups[0]["lr"] = rate * scale
        for network in (model, peer):
            network.zero_grad()
            torch.manual_seed(int(rate * 1e5))
            sum(logits.square().sum() for logits in network.forward_heads(torch.randn(4, 3, 32, 32))).backward()
        for one in (optimizer, *(one for _, one in peers)):
            one.step()
    for ours, theirs in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_ema_follows_its_formula_and_swaps_there_and_back():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    ema = optim.Ema(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update()
    weight = model[0].weight.detach().clone()
    expected = 0.9 * start["0.weight"] + 0.1 * weight
    torch.testing.assert_close(ema.state["0.weight"], expected)
    ema.swap()
    torch.testing.assert_close(model[0].weight.detach(), expected)
    ema.swap()
    torch.testing.assert_close(model[0].weight.detach(), weight)
    assert "1.num_batches_tracked" not in ema.state


@pytest.mark.parametrize("name", ["cifar10_lt_r50", "cifar10_lt_r100", "cifar100_lt_r50", "cifar100_lt_r100", *LARGE])
def test_the_average_of_the_official_recipes_has_the_references_time_constant(name):
    """The reference updates it at every micro-step; after 14,400 updates by 0.99996, 56 % are the initial weights."""
    cfg = config.load(name)
    assert cfg.train.accumulate == 4
    assert cfg.optim.ema_decay == pytest.approx(0.99996**cfg.train.accumulate, abs=1e-7)


def test_ema_refuses_another_models_state():
    ema = optim.Ema(nn.Linear(3, 2), 0.9)
    with pytest.raises(UserError, match=r"weight has \(2, 4\), expected \(2, 3\)"):
        ema.load(optim.Ema(nn.Linear(4, 2), 0.9).state)


class _Recorded(torch.optim.SGD):
    """Stands for apex's optimizers: their ``zero_grad`` takes no argument, their rate is a number."""

    def __init__(self, groups, lr, **options):
        super().__init__(groups, lr)
        self.options = options

    def zero_grad(self):
        raise AssertionError("the engine clears the gradients")


@pytest.mark.parametrize(
    ("algorithm", "backend", "name", "more"),
    [("adamw", "apex", "FusedAdam", {}), ("lamb", "auto", "FusedLAMB", {"max_grad_norm": float("inf")})],
)
def test_apex_gets_every_setting_and_takes_a_step(algorithm, backend, name, more, monkeypatch):
    kinds = {kind: type(kind, (_Recorded,), {}) for kind in ("FusedAdam", "FusedLAMB")}
    for module, content in (("amp_C", {}), ("apex", {}), ("apex.optimizers", kinds)):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules[module].__dict__.update(content)
    monkeypatch.setattr(optim, "_needs_gpu", lambda backend, device: None)
    options = {"optim.backend": backend, "optim.algorithm": algorithm, "optim.betas": [0.8, 0.99], "optim.eps": 1e-7}
    cfg = config.build(options | {"train.compile": False, "train.precision": "fp32"})
    student = create_student("deit_tiny_distilled_patch16_32", 3, depth=1).train()
    engine = PlainEngine(JointForward(student, None, [1] * 3, cfg, torch.device("cpu")), cfg, 1)
    assert type(engine.optimizer).__name__ == name
    assert engine.optimizer.options == {"adam_w_mode": True, "betas": (0.8, 0.99), "eps": 1e-7, **more}
    before = student.head.weight.detach().clone()
    engine.backward(
        engine.forward(Batch(torch.randn(2, 3, 32, 32), torch.arange(2), None, None), torch.ones(3), None)[0]
    )
    engine.step(0.5)
    assert engine.optimizer.param_groups[0]["lr"] == 0.5 and not torch.equal(before, student.head.weight)
    assert all(p.grad is None for p in student.parameters())


def test_lamb_by_another_backend_is_refused():
    cfg = config.build({"optim.algorithm": "lamb", "optim.backend": "torch"})
    with pytest.raises(UserError, match=r"optim\.backend: got torch with optim\.algorithm=lamb, expected apex"):
        optim.build_optimizer(nn.Linear(3, 2), cfg)


@pytest.mark.parametrize("backend", ["apex", "deepspeed"])
def test_missing_optimizer_backend_says_how_to_get_another(backend):
    cfg = config.build({"optim.backend": backend})
    with pytest.raises(UserError, match=r"[Uu]se optim\.backend=torch"):
        optim.build_optimizer(nn.Linear(3, 2), cfg)


def test_deepspeeds_adam_that_does_not_compile_is_one_line(monkeypatch):
    """It is compiled when it is made; without a toolkit of torch's CUDA it cannot be."""
    errors = {name: type(name, (Exception,), {}) for name in ("MissingCUDAException", "CUDAMismatchException")}

    def refuse(*_, **__):
        raise errors["MissingCUDAException"]("CUDA_HOME does not exist,\n unable to compile CUDA op(s)")

    parts = ("deepspeed", "deepspeed.ops", "deepspeed.ops.adam", "deepspeed.ops.op_builder")
    for module in (*parts, "deepspeed.ops.op_builder.builder"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules[module].__dict__.update({"FusedAdam": refuse, **errors})
    monkeypatch.setattr(optim, "_needs_gpu", lambda backend, device: None)
    said = r"FusedAdam does not compile \(CUDA_HOME does not exist, unable to compile.*use optim\.backend=torch"
    with pytest.raises(UserError, match=said):
        optim.build_optimizer(nn.Linear(3, 2), config.build({"optim.backend": "deepspeed"}))


def test_another_models_optimizer_state_is_refused():
    one, other = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(one.parameters())
    one(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optim.optimizer_tensors(one, optimizer)
    with pytest.raises(UserError, match="belongs to other parameters"):
        optim.load_optimizer(other, torch.optim.AdamW(other.parameters()), state)


class GroupAdam(torch.optim.Optimizer):
    """Counts steps in its groups, as apex's and DeepSpeed's FusedAdam do."""

    adam_w_mode = 1

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["exp_avg"] = state.get("exp_avg", 0) * 0.9 + parameter.grad * 0.1
                parameter.sub_(group["lr"] * state["exp_avg"] / (1 - 0.9 ** group["step"]))


def test_optimizers_that_count_in_groups_keep_their_bias_correction():
    def run(steps, tensors=None, weights=None):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.full_like(p, 0.1 * i) if weights is None else weights[i])
        optimizer = GroupAdam(model.parameters())
        if tensors:
            optim.load_optimizer(model, optimizer, tensors)
        for _ in range(steps):
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()], optim.optimizer_tensors(model, optimizer)

    whole, _ = run(5)
    half, tensors = run(2)
    rest, _ = run(3, tensors, half)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))
