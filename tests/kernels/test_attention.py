"""The attention kernels against float64: outputs and gradients, odd token counts, both layouts, extreme logits."""

import logging
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from fastdeitlt.kernels import _attention_launch as launch
from fastdeitlt.kernels import _measured, _pick
from fastdeitlt.kernels import attention as module
from fastdeitlt.kernels._launch import LaunchConfig
from fastdeitlt.kernels._pick import pick_attention, say_once, torch_backend
from fastdeitlt.kernels.attention import attention, attention_first, reference
from hypothesis import strategies as st

from fastdeitlt.errors import UserError

GPU = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16] if GPU else [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Type -> largest error, as a share of the largest value."""
ROUNDED_LOGITS = 2e-2 if GPU else 5e-3
"""Near 1e4 a float32 logit is known to 1e-3, so its exponential is too."""
# batch, tokens, heads, width: one program a head with unequal tiles; one tile; keys streamed, two kernels; padded width
SHAPES = [(2, 198, 1, 64), (1, 66, 3, 64), (3, 5, 1, 32), (1, 258, 1, 32), (1, 70, 1, 96), (1, 130, 1, 128)]


def packed(batch, tokens, heads, width, device, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator) * scale
    return qkv.to(device, dtype).requires_grad_()


def close(got, expected, dtype, tolerance=None):
    assert got.dtype == dtype and got.shape == expected.shape
    assert torch.isfinite(got).all()
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= (tolerance or TOLERANCES[dtype])


def first_rows(qkv, rows):
    """Queries of the first rows, and keys and values, as ``attention_first`` takes them."""
    return [x.detach().contiguous().requires_grad_() for x in (qkv[:, :rows, 0], qkv[:, :, 1:])]


def attend(tensors, **options):
    return (attention if len(tensors) == 1 else attention_first)(*tensors, **options)


def check_against_float64(*tensors, tolerance=None):
    out, dtype = attend(tensors, impl="triton"), tensors[0].dtype
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, tensors, upstream)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = reference(*exact)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    close(out.detach(), expected.detach(), dtype, tolerance)
    whole, expected_whole = (torch.cat([g.flatten() for g in g_all]) for g_all in (gradients, expected_gradients))
    close(whole, expected_whole, dtype, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_match_float64(shape, dtype, device):
    check_against_float64(packed(*shape, device, dtype))


@pytest.mark.skipif(GPU, reason="a GPU runs its own settings")
@pytest.mark.parametrize("sm", sorted(set(launch.SETTINGS_OF.values())))
def test_every_architectures_tiles_cover_all_rows(sm, device, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: sm)
    for shape in ((1, 198, 1, 64), (1, 65, 1, 64)):
        check_against_float64(packed(*shape, device))


def test_a_backward_in_two_launches_equals_the_one_in_one(device):
    qkv = packed(2, 198, 1, 64, device, DTYPES[0])
    problem = launch.Problem.of(qkv, None)
    assert launch.one_program(problem, launch.backward_config(problem, 90))
    setting = LaunchConfig({"ROWS": 64, "BLOCK_N": 64, "TAIL": 16}, 4, 2)
    assert not launch.one_program(problem, setting)
    with _measured.trying("attention", problem.key("backward"), setting):
        check_against_float64(qkv)


def check_the_biass_gradient(shape, rows, device, impl="triton", dtype=None):
    """Beside float64, which differentiates through the sum of projection and bias."""
    qkv, upstream_seed = packed(*shape, device, dtype or DTYPES[0]), torch.Generator().manual_seed(1)
    heads, width = shape[2:]
    bias = torch.randn(3 * heads * width, device=device).requires_grad_()
    exact_bias = bias.detach().double().requires_grad_()
    biased = (qkv.detach().double() + bias.detach().double().view(3, heads, width)).to(qkv.dtype)
    tensors = [biased] if rows is None else first_rows(biased, rows)
    out = attend(tensors, qkv_bias=bias, impl=impl)
    upstream = torch.randn(out.shape, generator=upstream_seed).to(out)
    (gradient,) = torch.autograd.grad(out, bias, upstream)
    zeros = (exact_bias - exact_bias.detach()).view(3, heads, width)
    zeros = [zeros] if rows is None else [zeros[0], zeros[1:]]
    exact = [x.detach().double() + zero for x, zero in zip(tensors, zeros, strict=True)]
    expected = torch.autograd.grad(reference(*exact), exact_bias, upstream.double())[0]
    of_keys = expected.view(3, -1)[1]
    assert of_keys.abs().max() <= 1e-9 * expected.abs().max()
    close(gradient, expected, torch.float32, TOLERANCES[qkv.dtype])
    return gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rows"), [(shape, None) for shape in SHAPES] + [((2, 37, 2, 64), 2), ((1, 258, 1, 32), 3)], ids=str
)
def test_the_projections_bias_gets_its_gradient(shape, rows, dtype, device):
    gradient = check_the_biass_gradient(shape, rows, device, dtype=dtype)
    assert (gradient.view(3, -1)[1] == 0).all()


def test_the_biass_gradient_of_a_backward_in_two_launches(device):
    problem = launch.Problem(198, 198, 1, 64, packed=True)
    with _measured.trying("attention", problem.key("backward"), LaunchConfig({"ROWS": 64, "BLOCK_N": 64, "TAIL": 0})):
        check_the_biass_gradient((2, 198, 1, 64), None, device)


@pytest.mark.skipif(GPU, reason="torch's CPU implementations")
def test_the_biass_gradient_without_the_kernel(monkeypatch):
    check_the_biass_gradient((2, 37, 2, 32), None, torch.device("cpu"), impl="sdpa", dtype=torch.float32)
    check_the_biass_gradient((2, 37, 2, 32), 2, torch.device("cpu"), impl="math", dtype=torch.float32)
    monkeypatch.setattr(module, "interpreted", lambda: False)
    check_the_biass_gradient((2, 37, 2, 32), 2, torch.device("cpu"))


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    batch=st.integers(1, 2), tokens=st.integers(1, 90), heads=st.integers(1, 2), width=st.sampled_from(module.WIDTHS),
    few=st.integers(1, 16) | st.none(),
)  # fmt: skip
def test_any_shape_matches_float64(batch, tokens, heads, width, few):
    device = torch.device("cuda" if GPU else "cpu")
    qkv = packed(batch, tokens, heads, width, device, DTYPES[0])
    check_against_float64(*([qkv] if few is None or few > tokens else first_rows(qkv, few)))


@pytest.mark.parametrize("tokens", [198, 258])
def test_first_rows_equal_the_slice_of_all(tokens, device):
    qkv = packed(2, tokens, 1, 64, device, DTYPES[0])
    first = first_rows(qkv, 2)
    check_against_float64(*first)
    full = attention(qkv, impl="triton")
    torch.testing.assert_close(attend(first, impl="triton"), full[:, :2], rtol=0, atol=TOLERANCES[DTYPES[0]])


def test_two_runs_are_equal_bit_for_bit(device):
    qkv = packed(2, 70, 2, 64, device, DTYPES[0])
    runs = [attention(qkv, impl="triton") for _ in range(2)]
    gradients = [torch.autograd.grad(out.square().sum(), qkv)[0] for out in runs]
    assert torch.equal(*runs) and torch.equal(*gradients)


@pytest.mark.parametrize("tokens", [38, 270])
def test_logits_of_ten_thousand_stay_finite_and_exact(tokens, device):
    qkv = packed(1, tokens, 1, 32, device, DTYPES[0], scale=64)
    scores = qkv[0, :, 0, 0].double() @ qkv[0, :, 1, 0].double().T * 32**-0.5
    assert scores.abs().max() > 1e4
    check_against_float64(qkv, tolerance=ROUNDED_LOGITS)


def test_all_logits_far_below_zero_do_not_overflow_in_the_masked_tail(device):
    qkv = packed(1, 70, 1, 32, device, DTYPES[0])
    with torch.no_grad():
        qkv[:, :, 0], qkv[:, :, 1] = 45.0, -45.0
    check_against_float64(qkv, tolerance=ROUNDED_LOGITS)


@pytest.mark.parametrize("tokens", [38, 270])
def test_keys_with_logits_of_minus_infinity_get_no_weight(tokens, device):
    qkv = packed(1, tokens, 1, 32, device, DTYPES[0]).detach()
    qkv[:, :, 0].abs_()
    qkv[:, ::3, 1] = -float("inf")
    out = attention(qkv, impl="triton")
    without = torch.ones(tokens, dtype=torch.bool)
    without[::3] = False
    q, k, v = qkv.double()[:, :, :, 0].unbind(2)
    expected = (q @ k[:, without].mT * 32**-0.5).softmax(-1) @ v[:, without]
    close(out, expected, DTYPES[0])


def test_the_cpu_reference_of_the_op_matches_float64(monkeypatch):
    monkeypatch.setattr(module, "interpreted", lambda: False)
    qkv = packed(2, 37, 2, 32, torch.device("cpu"))
    check_against_float64(qkv)
    check_against_float64(*first_rows(qkv, 2))


BACKENDS = ["triton", "flash", "cudnn", "efficient", "math"] if GPU else ["flash", "math"]
"""Those of torch that the device has, and the kernel in a GPU's arithmetic; a CPU's flash is another than a GPU's."""


def errors_beside_float64(impl, tokens, rows, device, dtype):
    """Largest error of the output and of each gradient, as a share of the largest value."""
    qkv = packed(2, tokens, 2, 64, device, dtype)
    tensors = [qkv] if rows is None else first_rows(qkv, rows)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected_out = reference(*exact)
    out = attend(tensors, impl=impl)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    got = [out.detach(), *torch.autograd.grad(out, tensors, upstream)]
    gradients = torch.autograd.grad(expected_out, exact, upstream.double())
    pairs = zip(got, [expected_out.detach(), *gradients], strict=True)
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize("rows", [None, 2], ids=["all_rows", "two_rows"])
@pytest.mark.parametrize("tokens", [66, 198])
@pytest.mark.parametrize("impl", BACKENDS)
def test_gradients_of_every_backend_match_float64(impl, tokens, rows, device):
    """Of the whole sequence, and of the two query rows in the last block."""
    dtype = torch.bfloat16 if GPU else torch.float32
    chosen_unmeasured = impl in ("triton", torch_backend(dtype, device))  # "auto" first compares the others with these
    try:
        errors = errors_beside_float64(impl, tokens, rows, device, dtype)
    except RuntimeError as error:
        if chosen_unmeasured:
            raise
        pytest.skip(f"torch has no {impl} here: {' '.join(str(error).split())[:120]}")
    right = all(error <= TOLERANCES[dtype] for error in errors)
    if not (right or chosen_unmeasured):
        pytest.xfail(f"torch's {impl} is wrong here: {errors}")
    assert right, errors


def test_a_wrong_backend_is_found(monkeypatch):
    """NaN in a gradient, and a gradient that is off."""
    right = module.F.scaled_dot_product_attention
    for factor in (float("nan"), 1.1):

        def scaled(q, k, v, factor=factor):
            return right(q * factor, k, v)

        monkeypatch.setattr(module.F, "scaled_dot_product_attention", scaled)
        errors = errors_beside_float64("math", 66, 2, torch.device("cpu"), torch.float32)
        assert not all(error <= TOLERANCES[torch.float32] for error in errors)


@pytest.mark.skipif(GPU, reason="torch's CPU implementations")
@pytest.mark.parametrize("impl", ["auto", "sdpa", "flash", "math"])
def test_torch_implementations_agree_with_the_reference(impl):
    qkv = packed(2, 21, 2, 32, torch.device("cpu"))
    for tensors in ([qkv], first_rows(qkv, 3)):
        torch.testing.assert_close(attend(tensors, impl=impl), reference(*tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(GPU, reason="names of a CPU's operations")
@pytest.mark.parametrize("rows", [None, 2], ids=["all_rows", "two_rows"])
def test_torchs_gradients_are_joined_in_one_pass(rows):
    """Else its backends are timed beside the kernel with passes that a compiled step does not have."""
    from fastdeitlt.tools.profiling import Costs  # imports rich, which a GPU's image may lack

    qkv = packed(2, 20, 2, 32, torch.device("cpu"))
    tensors = [qkv] if rows is None else first_rows(qkv, rows)
    out = attend(tensors, impl="flash")
    upstream = torch.ones_like(out)
    with Costs() as costs:
        torch.autograd.grad(out, tensors, upstream)
    assert set(costs.bytes) == {"aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::stack"}
    assert costs.bytes["aten::stack"] == 2 * tensors[-1].nbytes


def test_ops_pass_opcheck(device):
    qkv = packed(1, 18, 1, 32, device, DTYPES[0])
    bias = torch.randn(96, device=device).requires_grad_()
    for arguments in ((qkv, None, None), (qkv, None, bias), (*first_rows(qkv, 2), bias)):
        torch.library.opcheck(torch.ops.fastdeitlt.attention.default, arguments)
        out, lse = torch.ops.fastdeitlt.attention(*(x.detach() if torch.is_tensor(x) else x for x in arguments))
        q, kv = (None if x is None else x.detach() for x in arguments[:2])
        backward = (q, kv, out, torch.randn_like(out), lse, arguments[2] is not None)
        torch.library.opcheck(torch.ops.fastdeitlt.attention_backward.default, backward)


def test_more_than_1024_tokens_use_torch_and_say_so_once(caplog):
    say_once.cache_clear()
    qkv = packed(1, 1030, 1, 32, torch.device("cpu"))
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        outs = [attention(qkv, impl="triton") for _ in range(2)]
    torch.testing.assert_close(outs[0], reference(qkv), rtol=1e-4, atol=1e-5)
    assert [record.message for record in caplog.records] == [
        "attention: the kernel supports up to 1024 tokens, got 1030; using torch (sdpa)"
    ]


@pytest.mark.parametrize(
    ("dtype", "tokens", "major", "expected", "reason"),
    [
        (torch.bfloat16, 577, 9, "cudnn", "measured on some GPU"),
        (torch.float16, 66, 9, "flash", "not measured on some GPU"),
        (torch.float16, 66, 7, "efficient", "not measured on some GPU"),
        (torch.float32, 577, 9, "efficient", "no kernel for this case"),
        (torch.bfloat16, 1300, 8, "flash", "no kernel for this case"),
    ],
)
def test_auto_is_the_measured_choice_or_one_backend_and_is_logged_once(
    dtype, tokens, major, expected, reason, caplog, monkeypatch
):
    say_once.cache_clear()
    row = SimpleNamespace(impl="cudnn", gpu="some GPU")
    monkeypatch.setattr(_measured, "gpu_name", lambda index: "some GPU")
    monkeypatch.setattr(_measured, "rows_of", lambda index: {("fastest", "attention", (577, 64)): row})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with caplog.at_level(logging.INFO, "fastdeitlt"):
        chosen = [pick_attention("auto", tokens, 64, dtype, torch.device("cuda", 0)) for _ in range(2)]
    assert chosen == [expected] * 2
    assert [record.message for record in caplog.records] == [f"attention at {tokens} 64: {expected}, {reason}"]


@pytest.fixture
def registry(monkeypatch):
    """torch's registry of FlashAttention, where version 3 is installed; records what is activated."""
    activated = []
    monkeypatch.setattr(_pick.importlib.util, "find_spec", lambda name: name == "flash_attn_interface" or None)
    for name, call in (
        ("current_flash_attention_impl", lambda: activated[-1] if activated else None),
        ("activate_flash_attention_impl", activated.append),
        ("restore_flash_attention_impl", lambda: activated.append(None)),
    ):
        monkeypatch.setattr(_pick.torch_attention, name, call, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return activated


ON_GPU = (198, 64, torch.bfloat16, torch.device("cuda", 0))


def test_another_flash_attention_is_activated_before_it_runs_and_restored_after(registry):
    for impl in ("fa3", "fa3", "triton", "flash", "flash"):
        assert pick_attention(impl, *ON_GPU) == impl
    assert registry == ["FA3", None]
    with pytest.raises(UserError, match="got impl 'fa4' without flash_attn"):
        pick_attention("fa4", *ON_GPU)


def test_a_flash_attention_that_does_not_start_is_one_line(registry, monkeypatch):
    def broken(impl):
        raise ImportError("no kernels for this GPU")

    monkeypatch.setattr(_pick.torch_attention, "activate_flash_attention_impl", broken)
    with pytest.raises(UserError, match=r"impl 'fa3', which cannot run here \(no kernels for this GPU\)"):
        pick_attention("fa3", *ON_GPU)


def test_a_measured_flash_attention_that_is_not_installed_is_not_chosen(registry, monkeypatch):
    row = SimpleNamespace(impl="fa4", gpu="some GPU")
    monkeypatch.setattr(_measured, "rows_of", lambda index: {("fastest", "attention", (198, 64)): row})
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert pick_attention("auto", *ON_GPU) == "flash"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x[:, :, :2], {}), r"qkv: got shape \(1, 18, 2, 1, 32\), expected \(any, any, 3, any, any\)"),
        (lambda x: (x.double(), {}), "qkv: got dtype float64, expected float32 or float16 or bfloat16"),
        (lambda x: (x.expand(2, -1, -1, -1, -1), {}), "expected contiguous"),
        (
            lambda x: (x, {"qkv_bias": torch.zeros(32, device=x.device)}),
            r"qkv_bias: got shape \(32,\), expected \(96,\)",
        ),
        (lambda x: (x, {"impl": "fast"}), "got impl 'fast', expected one of auto, triton"),
        (lambda x: (x[..., :24].contiguous(), {}), r"got head width 24, expected one of \(32, 64, 96, 128\)"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(change, message, device):
    qkv, options = change(packed(1, 18, 1, 32, device, DTYPES[0]).detach())
    with pytest.raises(UserError, match=message):
        attention(qkv, **{"impl": "triton"} | options)


def test_bad_keys_and_forced_cudnn_without_cuda_are_refused(device):
    q, kv = torch.zeros(2, 2, 1, 32, device=device), torch.zeros(2, 5, 2, 1, 32, device=device)
    with pytest.raises(UserError, match=r"kv: got shape \(1, 5, 2, 1, 32\), expected \(2, any, 2, 1, 32\)"):
        attention_first(q, kv[:1])
    with pytest.raises(UserError, match="got 2 query rows, expected 1 to 1"):
        attention_first(q, kv[:, :1].contiguous())
    with pytest.raises(UserError, match="got 17 query rows, expected all or at most 16"):
        attention_first(q.repeat(1, 9, 1, 1)[:, :17].contiguous(), kv.repeat(1, 9, 1, 1, 1), impl="triton")
    with pytest.raises(UserError, match="'cudnn': got a tensor on cpu, expected CUDA"):
        attention_first(q.cpu(), kv.cpu(), impl="cudnn")


@hypothesis.given(size=st.integers(1, 1024), block=st.sampled_from([32, 64, 128]), tail=st.sampled_from([0, 16]))
def test_tiles_cover_every_row_once(size, block, tail):
    loops = launch.loops(size, block, tail)
    starts = [start + i for start, stop, step, _ in loops for i in range(0, stop - start, step)]
    ends = [*starts[1:], size]
    assert starts[0] == 0 and all(0 < end - start <= block for start, end in zip(starts, ends, strict=True))
    assert all(masked == ((stop - start) % step > 0) for start, stop, step, masked in loops)
    for waste in (0.1, 0.3):
        chunks = launch.chunks(size, 7, waste)
        assert [start for start, _, _ in chunks] == [7 + sum(c[1] for c in chunks[:i]) for i in range(len(chunks))]
        assert sum(width for _, width, _ in chunks) >= size > sum(width for _, width, _ in chunks[:-1])
        assert [masked for *_, masked in chunks] == [start + width > size + 7 for start, width, _ in chunks]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_offsets_beyond_two_to_the_31_elements_are_right(device):
    batch = 2**31 // (198 * 3 * 12 * 64) + 2
    qkv = torch.randn(batch, 198, 3, 12, 64, device=device, dtype=torch.bfloat16).requires_grad_()
    out = attention(qkv, impl="triton")
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    last = qkv[-1:].detach().double().requires_grad_()
    expected = reference(last)
    close(out[-1:].detach(), expected.detach(), torch.bfloat16)
    close(gradient[-1:], torch.autograd.grad(expected, last, upstream[-1:].double())[0], torch.bfloat16)
