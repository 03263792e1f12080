"""The add+LayerNorm kernels against float64: both outputs, all gradients, drop path, mixed types, odd widths."""

import hypothesis
import pytest
import torch
from fastdeitlt.kernels import add_layernorm as module
from fastdeitlt.kernels.add_layernorm import add_layernorm, reference
from hypothesis import strategies as st

from fastdeitlt.errors import UserError

GPU = torch.cuda.is_available()
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TOLERANCES = {FULL: 3e-6, HALF: 3e-3, BRAIN: 2e-2}
"""Type -> largest error, as a share of the largest value."""
NAMES = ("x", "branch", "weight", "bias", "branch_bias")


def example(shape, device, kinds=(FULL, FULL), seed=0, keep=0.6):
    """x, branch, weight, bias and drop-path scales (None for keep 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    x, y = normal(*shape).to(device, kinds[0]), normal(*shape).to(device, kinds[1])
    weight, bias = (normal(shape[-1]).to(device) for _ in range(2))
    scale = (torch.rand(shape[0], generator=generator) < keep).float().to(device) / keep if keep < 1 else None
    return [t.detach().requires_grad_() for t in (x + 3, y, weight, bias)], scale


def close(got, expected, kind, name):
    assert got.dtype == kind and got.shape == expected.shape, name
    assert torch.isfinite(got).all(), name
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= TOLERANCES[kind], name


def check_against_float64(tensors, scale, branch_samples_K=None, normed_samples_K=None, branch_bias=None):
    samples = {"branch_samples_K": branch_samples_K, "normed_samples_K": normed_samples_K}
    outputs = add_layernorm(*tensors, scale, impl="triton", branch_bias=branch_bias, **samples)
    tensors = [*tensors, branch_bias]
    upstream = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outputs)]
    inputs = [t for t in tensors if t is not None]
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    # the residual is rounded to its type before it is normalised: let the exact one round alike
    rounded = outputs[0].detach().double()
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    residual, _ = reference(*exact[:4], scale, branch_bias=exact[4], branch_samples_K=branch_samples_K)
    close(outputs[0].detach(), residual.detach(), outputs[0].dtype, "residual")
    residual = residual + (rounded - residual).detach()
    normed = torch.nn.functional.layer_norm(residual, residual.shape[-1:], *exact[2:4], 1e-6)
    normed = normed if normed_samples_K is None else normed[normed_samples_K]
    close(outputs[1].detach(), normed.detach(), outputs[1].dtype, "normalised")
    expected = torch.autograd.grad(
        (residual, normed), [t for t in exact if t is not None], [g.double() for g in upstream]
    )
    names = [name for name, tensor in zip(NAMES, tensors, strict=True) if tensor is not None]
    for name, tensor, gradient, value in zip(names, inputs, gradients, expected, strict=True):
        close(gradient, value, tensor.dtype, f"gradient of {name}")
    return outputs, dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("width", [192, 384, 768, 1024, 4096, 40, 1])
def test_outputs_and_gradients_match_float64_at_any_width(width, device):
    check_against_float64(*example((2, 3, width), device))


@pytest.mark.parametrize("keep", [0.6, 1.0], ids=["drop_path", "no_drop_path"])
@pytest.mark.parametrize("kinds", [(BRAIN, BRAIN), (HALF, HALF), (FULL, BRAIN), (BRAIN, FULL)], ids=str)
def test_types_of_stream_and_branch_are_kept(kinds, keep, device):
    (residual, normed), _ = check_against_float64(*example((3, 5, 192), device, kinds, keep=keep))
    assert residual.dtype == kinds[0] and normed.dtype == kinds[1]


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    batch=st.integers(1, 4), tokens=st.integers(1, 30), width=st.integers(2, 300),
    keep=st.sampled_from([0.3, 1.0]), flat=st.booleans(),
)  # fmt: skip
def test_any_shape_matches_float64(batch, tokens, width, keep, flat):
    shape = (batch, width) if flat else (batch, tokens, width)
    check_against_float64(*example(shape, torch.device("cuda" if GPU else "cpu"), keep=keep))


def test_more_rows_than_programs_hold_are_all_summed(device, monkeypatch):
    monkeypatch.setattr(module, "num_sms", lambda device: 1)
    check_against_float64(*example((7, 41, 20), device))


def test_dropped_samples_leave_the_stream_alone_and_their_branch_is_never_read(device):
    (x, branch, weight, bias), _ = example((4, 3, 24), device)
    with torch.no_grad():
        branch[1:3] = float("nan")
    scale = torch.tensor([2.0, 0.0, 0.0, 2.0], device=device)
    residual, normed = add_layernorm(x, branch, weight, bias, scale, impl="triton")
    assert torch.equal(residual[1:3], x[1:3]) and torch.isfinite(normed).all()
    _, gradient = torch.autograd.grad((residual.sum() + normed.sum()), (x, branch))
    assert (gradient[1:3] == 0).all() and gradient[0].abs().sum() > 0


def test_with_all_samples_dropped_nothing_but_the_norm_remains(device):
    tensors, _ = example((3, 4, 24), device)
    outputs, gradients = check_against_float64(tensors, torch.zeros(3, device=device))
    assert torch.equal(outputs[0], tensors[0]) and (gradients["branch"] == 0).all()


@pytest.fixture(params=["kernel", "cpu_reference"])
def implementation(request, monkeypatch):
    if request.param == "cpu_reference":
        if GPU:
            pytest.skip("the reference of the op runs on a CPU")
        monkeypatch.setattr(module, "interpreted", lambda: False)


@pytest.mark.parametrize("keep", [0.6, 1.0], ids=["scaled", "unscaled"])
@pytest.mark.parametrize(("branch", "normed"), [([0, 3, 4], None), (None, [1, 4]), ([4, 0], [2, 0, 1]), ([2], [2])])
def test_branch_and_output_may_hold_some_samples_only(branch, normed, keep, implementation, device):
    (x, y, weight, bias), scale = example((5, 3, 40), device, keep=keep)
    samples = [None if s is None else torch.tensor(s, device=device) for s in (branch, normed)]
    y = y if branch is None else y[: len(branch)].detach().requires_grad_()
    check_against_float64([x, y, weight, bias], scale, *samples)


@pytest.mark.parametrize("keep", [0.6, 1.0], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("branch", [None, [4, 0, 3]], ids=["all", "some"])
@pytest.mark.parametrize("kinds", [(FULL, BRAIN), (FULL, FULL)], ids=str)
def test_the_branchs_bias_is_added_to_what_the_branch_has_and_its_gradient_summed(
    kinds, branch, keep, implementation, device
):
    (x, y, weight, bias), scale = example((5, 3, 40), device, kinds, keep=keep)
    samples = None if branch is None else torch.tensor(branch, device=device)
    y = y if branch is None else y[: len(branch)].detach().requires_grad_()
    branch_bias = torch.linspace(-2, 2, 40, device=device).requires_grad_()
    check_against_float64([x, y, weight, bias], scale, samples, branch_bias=branch_bias)


def test_no_sample_chosen_leaves_the_stream_alone(device):
    (x, y, weight, bias), _ = example((3, 4, 24), device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    residual, normed = add_layernorm(
        x, y[:0], weight, bias, branch_samples_K=none, normed_samples_K=none, impl="triton"
    )
    assert torch.equal(residual, x) and normed.shape == (0, 4, 24)
    gradients = torch.autograd.grad(residual.sum() + normed.sum(), (x, weight, bias))
    assert (gradients[0] == 1).all() and not gradients[1].any() and not gradients[2].any()


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_gives_the_right_gradients(used, device):
    tensors, scale = example((2, 5, 24), device)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    got = torch.autograd.grad(add_layernorm(*tensors, scale, impl="triton")[used].square().sum(), tensors[:2])
    expected = torch.autograd.grad(reference(*exact, scale)[used].square().sum(), exact[:2])
    for gradient, value in zip(got, expected, strict=True):
        close(gradient, value, FULL, "gradient")


def test_a_large_offset_does_not_cancel_the_variance(device):
    (x, branch, weight, bias), _ = example((1, 3, 768), device)
    with torch.no_grad():
        x += 4096.0
    _, normed = add_layernorm(x, branch, weight, bias, impl="triton")
    _, expected = reference(*(t.detach().double() for t in (x, branch, weight, bias)))
    assert (normed - expected).abs().max() < 5e-3


def test_equal_rows_have_variance_zero_and_stay_finite(device):
    (x, _, weight, bias), _ = example((1, 2, 32), device)
    ones = torch.ones_like(x).requires_grad_()
    _, normed = add_layernorm(ones, torch.ones_like(x), weight, bias, impl="triton")
    assert torch.equal(normed, bias.expand_as(normed))
    assert torch.isfinite(torch.autograd.grad(normed.sum(), ones)[0]).all()


def test_two_runs_are_equal_bit_for_bit(device):
    tensors, scale = example((5, 33, 40), device, (BRAIN, BRAIN))
    runs = [add_layernorm(*tensors, scale, impl="triton") for _ in range(2)]
    gradients = [torch.autograd.grad(sum(o.float().square().sum() for o in run), tensors) for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_ops_pass_opcheck(device):
    (x, branch, weight, bias), scale = example((2, 3, 16), device)
    rows, op = torch.tensor([-1, 0], dtype=torch.int32, device=device), torch.ops.fastdeitlt.add_layernorm
    for arguments in (
        (x, branch, weight, bias, scale, None, None, 2, 1e-6, None),
        (x, branch[:1].detach(), weight, bias, None, rows, rows, 1, 1e-6, None),
        (x, branch, weight, bias, scale, None, None, 2, 1e-6, bias.detach().clone().requires_grad_()),
    ):
        torch.library.opcheck(op.default, arguments)
        detached = [t.detach() if torch.is_tensor(t) else t for t in arguments]
        _, normed, mean, rstd = op(*detached)
        rest = (2 if arguments[5] is None else 1, weight.detach(), mean, rstd, BRAIN, arguments[9] is not None)
        backward = (None, normed, x.detach(), scale, *arguments[5:7], *rest)
        torch.library.opcheck(torch.ops.fastdeitlt.add_layernorm_backward.default, backward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x: got shape \(4,\), expected \(samples, \.\.\., width\), not empty"),
        ({"x": torch.zeros(2, 3, 8).double()}, "x: got dtype float64"),
        ({"branch": torch.zeros(2, 4, 8)}, r"branch: got shape \(2, 4, 8\), expected \(2, 3, 8\)"),
        ({"x": torch.zeros(3, 2, 8).transpose(0, 1)}, "x: got strides .* expected contiguous"),
        ({"weight": torch.zeros(9)}, r"weight: got shape \(9,\), expected \(8,\)"),
        ({"bias": torch.zeros(8).half()}, "bias: got dtype float16, expected float32"),
        ({"branch_bias": torch.zeros(9)}, r"branch_bias: got shape \(9,\), expected \(8,\)"),
        ({"scale_B": torch.zeros(3)}, r"scale_B: got shape \(3,\), expected \(2,\)"),
        ({"branch": torch.zeros(2, 3, 8, device="meta")}, "branch: got device meta, expected cpu"),
        ({"branch_samples_K": torch.arange(1)}, r"branch: got shape \(2, 3, 8\), expected \(1, 3, 8\)"),
        ({"normed_samples_K": torch.arange(2).int()}, "normed_samples_K: got dtype int32, expected int64"),
        ({"impl": "fast"}, "got impl 'fast', expected one of auto, torch, triton"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(change, message):
    good = {"x": torch.zeros(2, 3, 8), "branch": torch.zeros(2, 3, 8), "weight": torch.zeros(8), "bias": torch.zeros(8)}
    with pytest.raises(UserError, match=message):
        add_layernorm(**good | {"impl": "triton"} | change)


def test_rows_wider_than_4096_are_refused_by_the_kernel_and_taken_by_auto(device):
    (x, branch, weight, bias), _ = example((1, 1, 4100), device)
    with pytest.raises(UserError, match="got width 4100, expected at most 4096"):
        add_layernorm(x, branch, weight, bias, impl="triton")
    assert torch.equal(add_layernorm(x, branch, weight, bias)[1], reference(x, branch, weight, bias)[1])


def test_a_test_that_does_not_fit_into_the_gpu_is_skipped(request):
    plugins = request.config.pluginmanager
    (of_kernels,) = [p for p in plugins.get_plugins() if getattr(p, "poisoned_memory", None)]
    running = of_kernels.pytest_runtest_call()
    next(running)
    with pytest.raises(pytest.skip.Exception, match="out of GPU memory: 20 GiB"):
        running.throw(torch.OutOfMemoryError("20 GiB"))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_offsets_beyond_two_to_the_31_elements_are_right(device):
    batch = 2**31 // (198 * 768) + 2
    x, branch = (torch.randn(batch, 198, 768, device=device, dtype=BRAIN).requires_grad_() for _ in range(2))
    weight, bias = torch.randn(768, device=device).requires_grad_(), torch.zeros(768, device=device).requires_grad_()
    outputs = add_layernorm(x, branch, weight, bias, impl="triton")
    gradient = torch.autograd.grad(outputs[1], x, torch.ones_like(x))[0][-1:]
    last = [t.detach().double().requires_grad_() for t in (outputs[0][-1:].detach(), weight, bias)]
    expected = torch.nn.functional.layer_norm(last[0], (768,), *last[1:], 1e-6)
    close(outputs[1][-1:].detach(), expected.detach(), BRAIN, "normalised")
    close(gradient, torch.autograd.grad(expected.sum(), last[0])[0], BRAIN, "gradient")
