"""FlatAdamW against torch.optim.AdamW with clipping and a moving average."""

import copy

import pytest
import torch
from torch import nn

from fastdeitlt.core.flat_adamw import FlatAdamW
from fastdeitlt.errors import UserError

WEIGHT_DECAY, EMA_DECAY, CLIP_NORM = 0.05, 0.9, 0.3


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def groups(network):
    plain = [p for p in network.parameters() if p.ndim <= 1]
    decayed = [p for p in network.parameters() if p.ndim > 1]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]


def flat(network, **options):
    return FlatAdamW(groups(network), lr=torch.tensor(1e-2), **{"ema_decay": EMA_DECAY, **options})


def backward(network, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 5, generator=generator)
    (network(x).square().sum() * 3).backward()


def train(network, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        backward(network, step)
        optimizer.step()


def assert_same_weights(a, b, tolerance=1e-6):
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(left.data, right.data, rtol=tolerance, atol=tolerance)


def test_ten_clipped_steps_and_their_average_equal_torch():
    ours, theirs = model(), model()
    optimizer, peer = flat(ours), torch.optim.AdamW(groups(theirs), lr=1e-2)
    average = [p.detach().clone() for p in theirs.parameters()]
    for step in range(10):
        optimizer.zero_grad()
        backward(ours, step)
        our_norm = optimizer.gather()
        optimizer.grad_scale = (CLIP_NORM / (our_norm + 1e-6)).clamp(max=1)
        optimizer.step()
        peer.zero_grad()
        backward(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), CLIP_NORM)
        peer.step()
        for mean, p in zip(average, theirs.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - EMA_DECAY)
        torch.testing.assert_close(our_norm, norm, rtol=1e-4, atol=0)
    assert_same_weights(ours, theirs, 2e-6)
    for p, mean in zip(ours.parameters(), average, strict=True):
        torch.testing.assert_close(optimizer.ema[p], mean, rtol=2e-6, atol=2e-6)


def test_a_scale_of_0_leaves_one_step_out_and_moves_the_average():
    network = model()
    optimizer = flat(network)
    train(network, optimizer, [0])
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    average = [mean.clone() for mean in optimizer.ema.values()]
    optimizer.zero_grad()
    backward(network, 1)
    next(network.parameters()).grad.fill_(torch.nan)
    optimizer.gather()
    optimizer.grad_scale = torch.zeros(())
    optimizer.step()
    torch.testing.assert_close((network.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    for (p, mean), old in zip(optimizer.ema.items(), average, strict=True):
        torch.testing.assert_close(mean, old.lerp(p.detach(), 1 - EMA_DECAY))
    train(network, optimizer, [2])
    assert not torch.equal(network[0].weight, before[0]["0.weight"])


def test_the_learning_rate_is_one_tensor_that_may_be_filled_or_replaced():
    ours, theirs = model(), model()
    optimizer, peer = flat(ours), torch.optim.AdamW(groups(theirs), lr=1e-2)
    for step, lr in enumerate((1e-2, 3e-3, 1e-4)):
        for ours_group, their_group in zip(optimizer.param_groups, peer.param_groups, strict=True):
            their_group["lr"] = lr
            if step == 1:
                ours_group["lr"].fill_(lr)
            else:
                ours_group["lr"] = lr
        train(ours, optimizer, [step])
        train(theirs, peer, [step])
    assert_same_weights(ours, theirs)


def test_resume_from_a_state_dict_is_bit_exact():
    straight, resumed = model(), model()
    optimizer = flat(straight)
    train(straight, optimizer, range(3))
    weights, state = copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(straight, optimizer, range(3, 6))
    again = flat(resumed)
    train(resumed, again, [99])
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(resumed, again, range(3, 6))
    assert_same_weights(straight, resumed, 0.0)


def test_state_moves_to_torch_adamw_and_back():
    ours, theirs = model(), model()
    optimizer, peer = flat(ours), torch.optim.AdamW(groups(theirs), lr=1e-2)
    train(ours, optimizer, range(2))
    theirs.load_state_dict(ours.state_dict())
    peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(theirs, peer, range(2, 4))
    train(ours, optimizer, range(2, 4))
    assert_same_weights(ours, theirs)
    third = model()
    back = flat(third, ema_decay=0.0)
    third.load_state_dict(theirs.state_dict())
    back.load_state_dict(peer.state_dict())
    train(third, back, [4])
    train(ours, optimizer, [4])
    assert_same_weights(third, ours)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FlatAdamW(model().double().parameters()), "torch.float64 on cpu, expected float32"),
        (
            lambda: FlatAdamW([{"params": [nn.Parameter(torch.ones(2))], "weight_decay": d} for d in (0.1, 0.2)]),
            r"got weight decays \[0.1, 0.2\], expected one",
        ),
    ],
)
def test_parameters_it_cannot_hold_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_parameter_without_gradient_is_named():
    network = model()
    optimizer = flat(network)
    with pytest.raises(UserError, match=r"a parameter of shape \(7, 5\) has no gradient"):
        optimizer.step()


def test_a_step_without_gather_takes_no_norm(monkeypatch):
    """Nobody would read it; the weights are those of a step that had one."""
    asked, alone = model(), model()
    optimizers = flat(asked), flat(alone)
    for network, optimizer in zip((asked, alone), optimizers, strict=True):
        backward(network, 0)
        if network is asked:
            optimizer.gather()
    monkeypatch.setattr(torch.linalg, "vector_norm", None)
    for optimizer in optimizers:
        optimizer.step()
    assert_same_weights(asked, alone, tolerance=0)
