"""SAM against the reference's numbers, and what a step must and must not change."""

import io

import golden
import pytest
import torch
import torch.nn.functional as F
from ranks import SGD, problem
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdeitlt.teachers import SAM
from fastdeitlt.teachers.sam import frozen_batch_stats


def steps(model: nn.Module, sam: SAM, x: Tensor, y: Tensor, count: int) -> None:
    for _ in range(count):
        F.cross_entropy(model(x), y).backward()
        sam.first_step()
        F.cross_entropy(model(x), y).backward()
        sam.second_step()


@pytest.mark.parametrize("case", golden.load("sam"))
@pytest.mark.parametrize("way", ["closure", "two steps", "ready optimizer"])
def test_sam_gives_the_reference_weights(case: dict, way: str) -> None:
    arrays = golden.arrays("sam", case)
    w1, w2, x, y = (arrays[name] for name in ("w1", "w2", "x", "y"))
    w1.requires_grad_(), w2.requires_grad_()
    options = {name: case[name] for name in ("lr", "momentum", "weight_decay")}
    if way == "ready optimizer":
        sam = SAM([w1, w2], torch.optim.SGD([w1, w2], **options), case["rho"], case["adaptive"])
    else:
        sam = SAM([w1, w2], torch.optim.SGD, case["rho"], case["adaptive"], **options)

    def closure() -> Tensor:
        loss = F.cross_entropy(torch.tanh(x @ w1.T) @ w2.T, y)
        loss.backward()
        return loss

    losses = []
    for _ in range(case["steps"]):
        if way == "closure":
            losses.append(sam.step(closure).item())
        else:
            losses.append(closure().item())
            sam.first_step()
            closure()
            sam.second_step()
    assert losses == pytest.approx(case["losses"], rel=1e-5)
    torch.testing.assert_close(w1.detach(), arrays["w1_after"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(w2.detach(), arrays["w2_after"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_perturbation_has_length_rho(adaptive: bool) -> None:
    model, x, y = problem()
    sam = SAM(model.parameters(), torch.optim.SGD, 0.3, adaptive, **SGD)
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(x), y).backward()
    sam.first_step()
    moved = [(p - w) / (w.abs() if adaptive else 1) for p, w in zip(model.parameters(), before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.3, rel=1e-4)
    sam.restore()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_micro_batches_give_the_step_of_the_whole_batch() -> None:
    whole, x, y = problem()
    parts, _, _ = problem()
    sam_whole, sam_parts = (SAM(m.parameters(), torch.optim.SGD, 0.5, **SGD) for m in (whole, parts))
    steps(whole, sam_whole, x, y, 2)
    for _ in range(2):
        for climb in (True, False):
            for part in (slice(0, 6), slice(6, 12)):
                (F.cross_entropy(parts(x[part]), y[part]) / 2).backward()
            sam_parts.first_step() if climb else sam_parts.second_step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_radius_zero_is_the_base_optimizer() -> None:
    model, x, y = problem()
    plain, _, _ = problem()
    sgd = torch.optim.SGD(plain.parameters(), **SGD)
    steps(model, SAM(model.parameters(), torch.optim.SGD, 0.0, **SGD), x, y, 3)
    for _ in range(3):
        F.cross_entropy(plain(x), y).backward()
        sgd.step()
        sgd.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_batch_norm_statistics_move_once_a_step_or_twice_when_asked() -> None:
    for frozen, passes in ((True, 1), (False, 2)):
        model, x, y = problem(norm=True)
        twin, _, _ = problem(norm=True)
        sam = SAM(model.parameters(), torch.optim.SGD, 0.1, **SGD)
        F.cross_entropy(model(x), y).backward()
        sam.first_step()
        with frozen_batch_stats(model, frozen):
            F.cross_entropy(model(x), y).backward()
        sam.second_step()
        twin(x)
        assert model[1].num_batches_tracked.item() == passes
        assert torch.equal(model[1].running_var, twin[1].running_var) == (passes == 1)
    twin.eval()
    assert twin(x).isfinite().all()


def test_frozen_statistics_do_not_change_what_training_computes() -> None:
    model, x, _ = problem(norm=True)
    with frozen_batch_stats(model):
        inside = model(x)
    assert torch.equal(inside, model(x))


def test_a_step_with_the_frozen_pass_failing_thaws_the_statistics() -> None:
    model, x, _ = problem(norm=True)
    with pytest.raises(KeyError), frozen_batch_stats(model):
        raise KeyError
    model(x)
    assert model[1].num_batches_tracked.item() == 1


def test_saved_state_continues_exactly() -> None:
    model, x, y = problem()
    sam = SAM(model.parameters(), torch.optim.SGD, 0.2, **SGD)
    steps(model, sam, x, y, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "sam": sam.state_dict()}, file)
    steps(model, sam, x, y, 2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, _, _ = problem(seed=1)
    other.load_state_dict(saved["model"])
    again = SAM(other.parameters(), torch.optim.SGD, 0.9, lr=9.0)
    again.load_state_dict(saved["sam"])
    assert again.param_groups[0]["rho"] == 0.2
    steps(other, again, x, y, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_schedules_reach_the_base_optimizer_and_each_group_has_its_radius() -> None:
    model, x, y = problem()
    groups = [{"params": model[0].parameters(), "rho": 0.0}, {"params": model[2].parameters()}]
    sam = SAM(groups, torch.optim.SGD, 0.4, **SGD)
    schedule = torch.optim.lr_scheduler.StepLR(sam.base_optimizer, 1, 0.5)
    first, second = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    F.cross_entropy(model(x), y).backward()
    sam.first_step()
    assert torch.equal(model[0].weight, first)
    assert not torch.equal(model[2].weight, second)
    F.cross_entropy(model(x), y).backward()
    sam.second_step()
    schedule.step()
    assert [group["lr"] for group in sam.param_groups] == [0.05, 0.05]
    sam.set_rho(0.7)
    assert [group["rho"] for group in sam.base_optimizer.param_groups] == [0.7, 0.7]


def test_layers_added_later_train_with_the_defaults_of_both_optimizers() -> None:
    model, x, y = problem()
    sam = SAM(model[2].parameters(), torch.optim.SGD, 0.4, **SGD)
    sam.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    reference, *_ = problem()
    both = [{"params": reference[2].parameters()}, {"params": reference[0].parameters(), "lr": 0.01}]
    steps(model, sam, x, y, 2)
    steps(reference, SAM(both, torch.optim.SGD, 0.4, **SGD), x, y, 2)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_a_zero_gradient_moves_nothing_and_unused_weights_are_left() -> None:
    model, x, _ = problem()
    unused = nn.Parameter(torch.ones(3))
    sam = SAM([*model.parameters(), unused], torch.optim.SGD, 0.5, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        (model(x) * 0).sum().backward()
        sam.first_step() if not sam._perturbed else sam.second_step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert torch.equal(unused, torch.ones(3))


def test_a_closure_in_torchs_own_style_works_too() -> None:
    model, x, y = problem()
    twin, _, _ = problem()
    sam = SAM(model.parameters(), torch.optim.SGD, 0.3, **SGD)
    steps(twin, SAM(twin.parameters(), torch.optim.SGD, 0.3, **SGD), x, y, 3)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        sam.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_misuse_is_refused_with_the_reason() -> None:
    model, x, y = problem()
    with pytest.raises(ValueError, match=r"rho: got -0\.1"):
        SAM(model.parameters(), torch.optim.SGD, -0.1, lr=0.1)
    with pytest.raises(ValueError, match="expected the 4 of the base optimizer"):
        SAM(model[0].parameters(), torch.optim.SGD(model.parameters(), lr=0.1), 0.1)
    with pytest.raises(ValueError, match="lr: got an optimizer instance, expected a class"):
        SAM(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), 0.1, lr=0.1)
    sam = SAM(model.parameters(), torch.optim.SGD, 0.1, lr=0.1)
    with pytest.raises(RuntimeError, match="no gradients"):
        sam.first_step()
    with pytest.raises(RuntimeError, match="before first_step"):
        sam.second_step()
    with pytest.raises(ValueError, match="closure: got None, expected a function"):
        sam.step()
    F.cross_entropy(model(x), y).backward()
    sam.first_step()
    with pytest.raises(RuntimeError, match="first_step: called twice"):
        sam.first_step()
    with pytest.raises(RuntimeError, match="Save after second_step"):
        sam.state_dict()


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_never_waits_for_the_device(adaptive: bool) -> None:
    """Fake tensors have no values, so anything that reads one on the host raises."""
    with FakeTensorMode():
        model, x, _ = problem(norm=True)
        labels = torch.zeros(12).long()
        sam = SAM(model.parameters(), torch.optim.SGD, 0.1, adaptive, **SGD)
        for _ in range(2):
            F.cross_entropy(model(x), labels).backward()
            sam.first_step()
            with frozen_batch_stats(model):
                F.cross_entropy(model(x), labels).backward()
            sam.second_step()
