"""`tune`: every op's launches are searched at a small shape, wrong and failing settings lose, the step decides."""

import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from fastdeitlt.kernels import _attention_launch, _launch, _measured, _search, adamw_ema
from fastdeitlt.kernels._attention_launch import Problem, one_program
from fastdeitlt.kernels._launch import LaunchConfig
from fastdeitlt.kernels._measured import setting
from fastdeitlt.kernels._pick import pick_attention

from fastdeitlt import config
from fastdeitlt.core.flat_adamw import ALIGNMENT
from fastdeitlt.core.measure import first_start
from fastdeitlt.core.measure import parts as tune_parts
from fastdeitlt.core.measure.timer import Timing
from fastdeitlt.errors import UserError
from fastdeitlt.tools import tune
from fastdeitlt.tools.setup import set_up

pytestmark = pytest.mark.usefixtures("some_gpu")
GPU = torch.cuda.is_available()
SMALL = [
    "student.name=deit_tiny_distilled_patch16_32", "student.img_size=32", "student.depth=1", "teacher.arch=resnet8",
    "train.batch_size=2", "train.accumulate=1", "train.compile=false", "train.precision=bf16", "augment.impl=triton",
    "train.measure_kernels=false",
]  # fmt: skip
DEFAULT, FAST, SLOW, WRONG, BROKEN = (LaunchConfig({"BLOCK": block}) for block in (10, 5, 20, 1, 0))


@pytest.fixture
def timed(monkeypatch):
    """``timed(times)`` reads times instead of measuring, see ``clock``."""

    def plant(times):
        for module in (first_start, tune):
            monkeypatch.setattr(module, "measure", clock(times))

    return plant


@pytest.fixture(scope="module")
def shapes(setup):
    return tune.shapes_of(setup)


@pytest.fixture(scope="module")
def setup():
    """A step in bfloat16, whatever the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        yield set_up(config.load("quickstart", SMALL), torch.device("cuda" if GPU else "cpu"), synthetic=True)


def clock(times):
    """A timer that reads times by name instead of measuring, or by what the call returns."""

    def measure(calls, device, rounds, eager=frozenset()):
        found = {name: times[name] if name in times else float(call()[0]) for name, call in calls.items()}
        return {name: Timing(median, median, median, False) for name, median in found.items()}

    return measure


def planted(settings, op="op"):
    """A launch that takes BLOCK microseconds, computes something else with 1, and fails with 0."""

    def call():
        block = setting(op, ("k",), torch.device("cpu"), DEFAULT).blocks["BLOCK"]
        if block == 0 and not _launch._compiler:
            raise RuntimeError("out of shared memory")
        return torch.tensor([float(block)])

    def result():
        return torch.ones(3) + (call() == 1)

    return tune_parts.Pass(call, settings, result)


def test_the_fastest_setting_wins_and_wrong_and_failing_ones_are_left_out(shapes, timed):
    timed({})
    row = tune.search(shapes, "op", ("k",), planted([DEFAULT, BROKEN, SLOW, WRONG, FAST]))
    assert row.config == FAST
    assert row.us == {"best": 5e3, "default": 10e3} and row.gpu == "some GPU"


def test_the_default_stays_where_nothing_is_faster(shapes, timed):
    timed({})
    assert tune.search(shapes, "op", ("k",), planted([DEFAULT, SLOW])).config == DEFAULT
    assert tune.search(shapes, "op", ("k",), planted([DEFAULT, BROKEN, WRONG])).config == DEFAULT


def test_a_setting_that_breaks_the_cuda_context_is_named(shapes, timed, monkeypatch):
    timed({})
    monkeypatch.setattr(tune, "context_failure", lambda device: "CUDA error: an illegal memory access")
    with pytest.raises(UserError, match=r"^tune: op \('k',\): LaunchConfig.*'BLOCK': 0.*illegal memory access"):
        tune.search(shapes, "op", ("k",), planted([DEFAULT, BROKEN, FAST]))


def test_what_was_found_is_kept_when_a_later_part_fails(shapes, tmp_path, monkeypatch, timed):
    def parts(shapes):
        yield tune_parts.Part("op", ("k",), {("k",): planted([DEFAULT, SLOW, FAST])})
        raise torch.OutOfMemoryError("the next part does not fit")

    timed({})
    monkeypatch.setattr(tune, "parts", parts)
    with pytest.raises(torch.OutOfMemoryError):
        tune.tune_ops(shapes, tmp_path / "rows.jsonl", {})
    (row,) = _measured.read(tmp_path / "rows.jsonl")
    assert row.config == FAST
    assert setting("op", ("k",), torch.device("cpu"), DEFAULT) == FAST  # the rest of the op is measured with it


def test_an_interrupted_search_goes_on_where_it_was(shapes, tmp_path, monkeypatch, timed):
    counted = []
    path, op, key = tmp_path / "rows.jsonl", "bias_gelu", ("k",)
    whole = {"torch": lambda: [2.0], "triton": lambda: [counted.append(1) or 1.0]}
    timed({})
    monkeypatch.setattr(tune, "parts", lambda _: [tune_parts.Part(op, key, {key: planted([DEFAULT, FAST], op)}, whole)])

    def current():
        return _measured.by_key(row for row in _measured.read(path) if _measured.is_current(row, "some GPU"))

    first, calls = tune.tune_ops(shapes, path, current()), len(counted)
    assert first[1][op].impl == "triton"
    known = current()
    assert known["fastest", op, key].impl == "torch"  # as long as the step has not said yes
    monkeypatch.setattr(tune, "search", lambda *_: pytest.fail("searched twice"))
    assert tune.tune_ops(shapes, path, known) == first and len(counted) == calls
    for other in ({"triton": "3.0.0"}, {"torch": "2.0.0"}, {"gpu": "another"}):
        _measured.write(path, [first[1][op].model_copy(update=other)])
        assert [kind for kind, _, _ in current()] == ["setting"] + ["fastest"] * ("gpu" in other)
        _measured.write(path, [first[1][op]])
    _measured.write(path, [first[1][op].model_copy(update={"command": _measured.FIRST_START})])
    assert tune.tune_ops(shapes, path, current()) == first and len(counted) > calls


@pytest.mark.parametrize(
    ("got", "agree"), [(1.0, True), (1.01, True), (1.1, False), (float("nan"), False), (float("inf"), False)]
)
def test_results_agree_up_to_rounding(got, agree):
    expected = [torch.tensor([1.0, 0.0]), torch.zeros(0)]
    assert first_start.same((torch.tensor([got, 0.0]), torch.zeros(0), None), expected) is agree


def test_every_launch_of_the_step_is_searched_and_its_settings_agree(shapes, monkeypatch, timed):
    monkeypatch.setattr(tune_parts, "SOURCE", (20, 24))
    timed(dict.fromkeys(("best", "default"), 1.0))
    if not GPU:  # the weights in few programs: the interpreter runs one after the other
        monkeypatch.setattr(adamw_ema, "DEFAULT", LaunchConfig({"BLOCK": 1 << 17}))
    seen = {}
    for part in tune_parts.parts(shapes):
        for key, found in part.passes.items():
            last = found.settings[:1] if part.op == "adamw_ema" and not GPU else found.settings[-1:]
            assert sum(setting != found.settings[0] for setting in found.settings) > 5
            few = found._replace(settings=[found.settings[0], *last], call=lambda: [1.0])
            seen.setdefault(part.op, []).append(tune.search(shapes, part.op, key, few).key[0])
        for call in part.whole.values():
            assert call() is not None
    both = ["forward", "backward"]
    assert seen == {
        "attention": both * 2,
        "add_layernorm": both, "bias_gelu": both, "joint_loss": both, "adamw_ema": ["step"],
        "augment": ["convolve", "histogram", "operate", "finish"],
    }  # fmt: skip


def test_attention_is_searched_only_where_the_step_is_in_bfloat16(native_bf16):
    """The kernel has no float32 on a GPU."""
    setup = set_up(config.load("quickstart", SMALL), torch.device("cpu"), synthetic=True)
    ops = ["attention"] * 2 * native_bf16 + ["add_layernorm", "bias_gelu", "joint_loss", "adamw_ema", "augment"]
    assert [part.op for part in tune_parts.parts(tune.shapes_of(setup))] == ops


def test_attentions_keys_are_searched_within_a_backward_that_launches_their_kernel(monkeypatch, timed):
    device = torch.device("cuda" if GPU else "cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    setup = set_up(config.load("quickstart", [*SMALL, "student.img_size=128"]), device, synthetic=True)
    timed(dict.fromkeys(("attention", "best", "default"), 1.0))
    launched = []
    monkeypatch.setattr(_attention_launch, "launch", lambda *_, **options: launched.append(options))
    shapes = tune.shapes_of(setup)
    part = next(tune_parts.parts(shapes))
    key = Problem(66, 66, 3, 64, packed=True).key("backward_keys")
    launched.clear()
    last = part.passes[key].settings[-1]
    monkeypatch.setattr(tune, "same", lambda *_: True)
    row = tune.search(
        shapes, "attention", key, part.passes[key]._replace(settings=[part.passes[key].settings[0], last])
    )
    assert row.key == key
    assert last.options in [{name: options.get(name) for name in last.options} for options in launched]


@pytest.mark.parametrize(
    ("tokens", "keys"), [(6, False), (18, False), (64, False), (66, True), (198, True), (578, True)]
)
def test_attentions_keys_are_searched_where_a_backward_may_launch_their_kernel(tokens, keys):
    problem = Problem(tokens, tokens, 3, 64, packed=True)
    settings = _search.attention(problem, torch.device("cpu"))
    assert (problem.key("backward_keys") in settings) is keys
    assert any(not one_program(problem, setting) for setting in settings[problem.key("backward")]) is keys
    assert list(settings)[-1] == problem.key("backward")  # which then has the best keys


def test_the_optimizer_is_timed_on_buffers_as_aligned_as_its_own(shapes, monkeypatch):
    buffers = []
    monkeypatch.setattr(adamw_ema, "adamw_ema", lambda *given, **_: buffers.extend(given))
    (part,) = tune_parts.parts(shapes, ["adamw_ema"])
    part.passes[adamw_ema.KEY].call()
    assert len(buffers) == 4 and all(len(buffer) % ALIGNMENT == 0 for buffer in buffers)


@pytest.mark.parametrize("default", [LaunchConfig({"BLOCK": 512}), LaunchConfig({"BLOCK": 1024}, 8)])
def test_no_setting_gives_a_thread_more_than_twice_the_defaults_elements(default):
    settings = _search.elementwise({("k",): default})["k",]
    of_a_warp = [setting.blocks["BLOCK"] // setting.num_warps for setting in settings]
    assert settings[0] == default and len(settings) > 5
    assert min(of_a_warp) >= 32 and max(of_a_warp) == 2 * of_a_warp[0]


def test_a_kernel_stays_where_the_step_is_faster_with_it(setup, shapes, monkeypatch, timed):
    built = []

    def step(setup, choice):
        built.append(dict(choice))
        helps = {"attention": ("triton", 3), "bias_gelu": ("triton", -1), "adamw_ema": ("fastdeitlt", 2)}
        return lambda: [10.0 - sum(saved for op, (impl, saved) in helps.items() if choice[op] == impl)]

    monkeypatch.setattr(tune, "_step", step)
    timed({})
    won = {
        op: first_start.new_row(shapes, op, ("k",), "fastest", {"torch": 2.0, impl: 1.0}, impl=impl)
        for op, impl in (
            ("attention", "triton"),
            ("bias_gelu", "triton"),
            ("add_layernorm", "torch"),
            ("adamw_ema", "fastdeitlt"),
        )
    }
    rows = {row.op: row for row in tune.choose_by_step(setup, shapes, won)}
    taken = {op: row.impl for op, row in rows.items()}
    assert taken == {"attention": "triton", "bias_gelu": "torch", "add_layernorm": "torch", "adamw_ema": "fastdeitlt"}
    assert rows["attention"].step_ms == {"without": 10, "with": 7} and rows["bias_gelu"].step_ms["with"] == 8
    assert built[-1] == {**built[0], "attention": "triton", "adamw_ema": "fastdeitlt"}


def test_the_step_takes_the_implementations_it_is_given(setup, shapes):
    torchs = {op: shapes.torchs(op) for op in tune_parts.SETTINGS}
    step = tune._step(setup, torchs | {"attention": "triton", "adamw_ema": "fastdeitlt"})
    assert torch.isfinite(step())


def test_what_is_written_is_what_auto_takes(shapes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    row = first_start.new_row(shapes, "attention", (6, 64), "fastest", {"triton": 1.0, "sdpa": 2.0}, impl="triton")
    _measured.write(_measured.file_of("some GPU"), [row])
    assert pick_attention("auto", 6, 64, torch.bfloat16, torch.device("cuda", 0)) == "triton"


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_tune():
    with pytest.raises(UserError, match="tune: no GPU"):
        tune.tune("quickstart")


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Driver())
from fastdeitlt.kernels import bias_gelu
from fastdeitlt.kernels._launch import LaunchConfig, compiling
from fastdeitlt.kernels._measured import trying

u, bias = torch.zeros(8, 256, dtype=torch.bfloat16), torch.zeros(256)
good, bad = LaunchConfig({"ROWS": 4, "BLOCK": 128}), LaunchConfig({"ROWS": 3, "BLOCK": 128})
with compiling(2) as pending:
    for setting in (good, bad):
        with trying("bias_gelu", ("forward", 256), setting):
            bias_gelu._launch_forward(u, bias)
print([type(compilation.exception()).__name__ for compilation in pending])
cache = bias_gelu.bias_gelu_fwd_kernel.device_caches[0][0]
print([(kernel.metadata.num_warps, "cubin" in kernel.asm) for kernel in cache.values()])
"""


def test_settings_that_wait_to_be_compiled_keep_no_memory(monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(_launch, "_compile", lambda *_: go.wait())
    with _launch.compiling(1) as pending:
        outputs = [torch.zeros(8) for _ in range(3)]
        kept = [weakref.ref(output) for output in outputs]
        while outputs:
            _launch.launch(None, (1,), outputs[-1], outputs.pop())
        assert len(pending) == 3 and [output() for output in kept] == [None] * 3
        go.set()


def test_settings_are_compiled_without_being_run(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["['NoneType', 'CompilationError']", "[(4, True)]"], done.stderr[-2000:]
