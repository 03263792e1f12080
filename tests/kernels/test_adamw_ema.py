"""The AdamW + EMA kernel against torch.optim.AdamW and the reference."""

import hypothesis
import pytest
import torch
import torch._dynamo.testing
from fastdeitlt.kernels.adamw_ema import adamw_ema, reference
from hypothesis import strategies as st

from fastdeitlt.errors import UserError

GPU = torch.cuda.is_available()
TOLERANCE = 1e-5 if GPU else 1e-6
"""A GPU's exponential, root and division are right to a few units in the last place; these add up."""
OPTIONS = {"weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8}


def buffers(size, device, seed=0):
    """weights, gradients, first and second moments."""
    generator = torch.Generator().manual_seed(seed)
    weights, grads, exp_avg, exp_avg_sq = (torch.randn(size, generator=generator).to(device) for _ in range(4))
    return weights, grads, exp_avg / 10, exp_avg_sq.square() / 100


def scalar(value, device):
    return torch.tensor(float(value), device=device)


def assert_equals_reference(size, device, *, num_decayed, step=3, seed=0, **on):
    weights, grads, *moments = buffers(size, device, seed)
    extra = {}
    if on.get("ema"):
        extra |= {"ema": torch.linspace(-1, 1, size, device=device), "ema_decay": 0.99}
    if on.get("scale"):
        extra["scale"] = scalar(0.37, device)
    clock = {"lr": scalar(1e-2, device), "step": scalar(step, device), "num_decayed": num_decayed}
    results = []
    for run in (adamw_ema, reference):
        state = [x.clone() for x in (weights, grads, *moments)]
        own = {k: v.clone() if k == "ema" else v for k, v in extra.items()}
        run(*state, **clock, **OPTIONS, **own)
        results.append([*state, *(own[k] for k in own if k == "ema")])
    torch.testing.assert_close(*results, rtol=TOLERANCE, atol=TOLERANCE / 10)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_eight_steps_equal_torch_adamw(weight_decay, device):
    weights, _, *_ = buffers(1500, device)
    parameter = torch.nn.Parameter(weights.clone())
    theirs = torch.optim.AdamW([parameter], lr=3e-3, weight_decay=weight_decay)
    exp_avg, exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
    for step in range(1, 9):
        grads = buffers(1500, device, seed=step)[1] * 10.0 ** (step - 5)
        parameter.grad = grads.clone()
        theirs.step()
        clock = {"lr": scalar(3e-3, device), "step": scalar(step, device), "num_decayed": 1500}
        adamw_ema(weights, grads, exp_avg, exp_avg_sq, **clock, weight_decay=weight_decay)
    state = theirs.state[parameter]
    torch.testing.assert_close(weights, parameter.data, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("size", [1, 7, 1023, 1025, 3000])
def test_odd_sizes_with_everything_on_equal_the_reference(size, device):
    assert_equals_reference(size, device, num_decayed=size // 2, ema=True, scale=True)


@pytest.mark.parametrize("num_decayed", [0, 1, 1024, 1100])
def test_weight_decay_ends_at_the_given_weight(num_decayed, device):
    assert_equals_reference(1100, device, num_decayed=num_decayed)


@pytest.mark.parametrize("step", [1, 2, 249, 251, 10_000, 10_000_000])
def test_bias_correction_is_exact_at_every_step_number(step, device):
    assert_equals_reference(64, device, num_decayed=64, step=step)


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.integers(1, 2100), st.floats(0, 1), st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_size_split_and_option_equals_the_reference(size, share, ema, scale, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert_equals_reference(size, device, num_decayed=int(share * size), ema=ema, scale=scale, seed=seed)


def test_weights_without_gradient_and_history_only_decay(device):
    weights, zero = torch.ones(50, device=device), torch.zeros(50, device=device)
    exp_avg, exp_avg_sq = zero.clone(), zero.clone()
    clock = {"lr": scalar(0.1, device), "step": scalar(1, device), "num_decayed": 20}
    adamw_ema(weights, zero, exp_avg, exp_avg_sq, **clock, weight_decay=0.5)
    torch.testing.assert_close(weights, torch.tensor([0.95] * 20 + [1.0] * 30, device=device))


def test_a_nan_gradient_stays_in_its_own_weight(device):
    weights, grads, *moments = buffers(10, device)
    grads[3] = torch.nan
    adamw_ema(weights, grads, *moments, lr=scalar(1, device), step=scalar(1, device), num_decayed=0, weight_decay=0)
    assert weights.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("step", [0, 5])
def test_a_scale_of_0_leaves_the_step_out_and_only_moves_the_average(step, device):
    weights, grads, *moments = buffers(1300, device)
    grads[7], grads[1200] = torch.nan, torch.inf
    before = [x.clone() for x in (weights, *moments)]
    ema = torch.zeros(1300, device=device)
    clock = {"lr": scalar(1, device), "step": scalar(step, device), "num_decayed": 600, "scale": scalar(0, device)}
    adamw_ema(weights, grads, *moments, **clock, **OPTIONS, ema=ema, ema_decay=0.75)
    for got, expected in zip((weights, *moments), before, strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(ema, weights / 4)


def test_the_op_is_registered_correctly(device):
    weights, grads, *moments = buffers(40, device)
    ema = weights.clone()
    arguments = (scalar(1e-2, device), scalar(1, device), None, 20, 0.05, 0.9, 0.999, 1e-8, 0.99)
    torch.library.opcheck(torch.ops.fastdeitlt.adamw_ema, (weights, grads, *moments, ema, *arguments))
    torch.library.opcheck(torch.ops.fastdeitlt.adamw_ema, (weights, grads, *moments, None, *arguments))


def test_the_compiled_step_is_one_graph_and_does_not_recompile_with_the_rate(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(adamw_ema, fullgraph=True, backend=counter)
    states = [buffers(40, device), buffers(40, device)]
    for step in (1, 2, 3):
        clock = {"lr": scalar(0.1 / step, device), "step": scalar(step, device), "num_decayed": 10}
        for run, state in zip((compiled, adamw_ema), states, strict=True):
            run(*state, **clock, weight_decay=0.05)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": lambda x: x.double()}, "weights: got dtype float64, expected float32"),
        ({"weights": lambda x: x.view(4, 5)}, r"got weights of shape \(4, 5\) .* expected a flat buffer"),
        ({"grads": lambda x: x[:7]}, r"grads: got shape \(7,\), expected \(20,\)"),
        ({"exp_avg": lambda x: x.repeat(2)[::2]}, r"exp_avg: got strides \(2,\), expected contiguous"),
        ({"exp_avg_sq": lambda x: x.to("meta")}, "exp_avg_sq: got device meta, expected"),
        ({"lr": lambda x: x[None]}, r"lr: got shape \(1,\), expected \(\)"),
        ({"num_decayed": lambda x: 21}, "num_decayed=21, expected"),
        ({"betas": lambda x: (0.9, 1.0)}, "decays < 1"),
    ],
)
def test_arguments_the_kernel_cannot_take_are_named_before_any_write(change, message, device):
    weights, grads, exp_avg, exp_avg_sq = buffers(20, device)
    named = {"weights": weights, "grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    named |= {"lr": scalar(1, device), "step": scalar(1, device), "num_decayed": 3, **OPTIONS}
    before = weights.clone()
    named |= {name: alter(named[name]) for name, alter in change.items()}
    with pytest.raises(UserError, match=message):
        adamw_ema(**named)
    assert torch.equal(weights, before)
