"""The fused augmentation kernels against data.augment, which equals timm: exactly, in float32."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastdeitlt.kernels.augment import augment, reference

from fastdeitlt.config import AugmentConfig
from fastdeitlt.data.augment import transform as torch_augment
from fastdeitlt.data.augment.randaugment import OPS
from fastdeitlt.data.augment.transform import Draws
from fastdeitlt.data.mixup import MixDraw
from fastdeitlt.errors import UserError

CFG = AugmentConfig()
MIXES = {"unmixed": MixDraw(), "mixup": MixDraw(0.3), "cutmix": MixDraw(1 - 7 * 5 / 144, (2, 9, 0, 5))}
PAIRS = [
    ("auto_contrast", "equalize"), ("contrast", "auto_contrast"), ("equalize", "invert"), ("invert", "equalize"),
    ("rotate", "shear_y"), ("sharpness", "color"), ("color", "sharpness"), ("brightness", "solarize"),
    ("translate_x", "posterize"), ("solarize_add", "contrast"),
]  # fmt: skip


def decoded(sizes: list[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """A decoded set of smooth, noisy and flat images: its pixels, and where each image lies."""
    rng, images = np.random.default_rng(0), []
    for i, (height, width) in enumerate(sizes):
        ramp = np.add.outer(np.arange(height) * 5, np.arange(width) * 3)[..., None] + np.array([0, 40, 90])
        noisy = ramp + rng.normal(0, 20, (height, width, 3)) * (i % 3)
        images.append(noisy.clip(0, 255).astype(np.uint8) if i % 5 else np.full((height, width, 3), 7 * i, np.uint8))
    num_bytes = [image.size for image in images]
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in images])).to(device)
    return pixels, np.cumsum(num_bytes) - num_bytes, np.array(sizes)


def drawn(batch: int, size: int, cfg: AugmentConfig = CFG, seed: int = 1) -> Draws:
    return torch_augment.draw(np.arange(batch), np.zeros(batch, int), seed=seed, epoch=0, cfg=cfg, size=size)


def with_ops(draws: Draws, ops: list[tuple[str, ...]]) -> Draws:
    padded = [[OPS.index(name) for name in names] + [-1] * (2 - len(names)) for names in ops]
    return replace(draws, op_B2=np.array(padded, np.int8))


def assert_exact(*arguments) -> None:
    ours, expected = (f(*arguments, dtype=torch.float32) for f in (augment, reference))
    assert ours.shape == expected.shape
    different = (ours - expected).flatten(1).abs().amax(1).nonzero().flatten().tolist()
    assert not different


def test_every_operation_equals_the_reference(device: torch.device) -> None:
    draws = with_ops(drawn(15, 12), [(name,) for name in OPS])
    assert_exact(*decoded([(14, 11)] * 15, device), draws, MixDraw(), CFG, 12)


def test_operations_in_second_place_equal_the_reference(device: torch.device) -> None:
    draws = drawn(15, 12, seed=3)
    draws = replace(draws, op_B2=np.stack([np.full(15, -1), np.arange(15)], axis=1).astype(np.int8))
    assert_exact(*decoded([(11, 14)] * 15, device), draws, MixDraw(), CFG, 12)


def test_two_operations_go_one_after_the_other(device: torch.device) -> None:
    size = 24  # large enough for equalize to have a step of 2
    draws = with_ops(drawn(len(PAIRS), size, seed=2), PAIRS)
    assert_exact(*decoded([(20, 27)] * len(PAIRS), device), draws, MixDraw(), CFG, size)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_drawn_batches_equal_the_reference(mix: MixDraw, device: torch.device) -> None:
    sizes = [(8, 31), (40, 9), (12, 12), (25, 30), (5, 4), (33, 18)]
    assert_exact(*decoded(sizes, device), drawn(6, 12, seed=6), mix, CFG, 12)


@pytest.mark.parametrize("size", [9, 17])
def test_crops_of_any_shape_are_resized_as_pillow(size: int, device: torch.device) -> None:
    cfg = AugmentConfig(rand_ops=0, erase_prob=0, crop_scale=(0.5, 1.0), crop_ratio=(0.05, 20.0))
    sizes = [(70, 10), (10, 70), (45, 44), (3, 50), (1, 1), (64, 64), (13, 7)]
    assert_exact(*decoded(sizes, device), drawn(7, size, cfg, seed=4), MixDraw(), cfg, size)


def test_erased_noise_is_the_references(device: torch.device) -> None:
    cfg = AugmentConfig(rand_ops=0, erase_prob=1)
    draws = drawn(4, 13, cfg)
    assert (draws.erase_B4[:, 2] > 0).all()
    assert_exact(*decoded([(13, 13)] * 4, device), draws, MixDraw(0.4), cfg, 13)


def test_recipe_none_keeps_the_image(device: torch.device) -> None:
    cfg = AugmentConfig(recipe="none", mean=(0, 0, 0), std=(1, 1, 1))
    pixels, starts, sizes = decoded([(12, 12)] * 3, device)
    out = augment(pixels, starts, sizes, drawn(3, 12, cfg), MixDraw(), cfg, 12, dtype=torch.float32)
    assert torch.equal((out * 255).round().byte().permute(0, 2, 3, 1).flatten(), pixels)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_float32(dtype: torch.dtype, device: torch.device) -> None:
    arguments = (*decoded([(15, 12)] * 2, device), drawn(2, 8, seed=5), MixDraw(0.3), CFG, 8)
    assert torch.equal(augment(*arguments, dtype=dtype), reference(*arguments, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(10)}, r"pixels: got dtype float32, expected uint8"),
        ({"pixels": torch.zeros(10, dtype=torch.uint8)}, r"got an end at byte 108, expected at most 10"),
        ({"starts_B": np.array([0])}, r"got starts \(1,\) and sizes .* expected 3 of each"),
        ({"dtype": torch.float64}, r"got dtype torch.float64, expected one of torch.bfloat16"),
        ({"mix": MixDraw(0.5)}, r"got a batch of 3 images to mix, expected an even number"),
        ({"draws": drawn(3, 6, AugmentConfig(recipe="pad_crop"))}, r"padded crops .* Use data.augment.apply"),
    ],
)
def test_bad_input_is_refused_with_its_values(change: dict, message: str) -> None:
    pixels, starts, sizes = decoded([(3, 4)] * 3, torch.device("cpu"))
    arguments = {"pixels": pixels, "starts_B": starts, "sizes_B2": sizes, "draws": drawn(3, 6), "mix": MixDraw()}
    with pytest.raises(UserError, match=message):
        augment(**(arguments | {"cfg": CFG, "size": 6} | change))


VARIANTS = """
import collections
import json
import numpy as np
import torch
from fastdeitlt.kernels import augment as module
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from fastdeitlt.config import AugmentConfig
from fastdeitlt.data.augment import transform as augment
from fastdeitlt.data.mixup import MixDraw

backend, variants = make_backend(GPUTarget("cuda", 90, 32)), collections.defaultdict(set)


def record(kernel, grid, near, *arguments, **options):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialised, _ = bind(*arguments, **options)
    variants[kernel.__name__].add(str(specialised))


module._launch, module.check_launchable = record, lambda *_: None
cfg, pixels = AugmentConfig(), torch.zeros(16 * 300 + 1, dtype=torch.uint8)
for seed in range(20):
    draws = augment.draw(np.arange(16), np.zeros(16, int), seed=seed, epoch=0, cfg=cfg, size=12)
    places = np.arange(16) * 300, np.full((16, 2), 10)
    module.augment(pixels[seed % 2 :], *places, draws, MixDraw(), cfg, 12)
print(json.dumps({name: len(found) for name, found in variants.items()}))
"""


def test_a_kernel_is_compiled_once_whatever_is_drawn() -> None:
    """Once a pass or place of the operation; a variant more would be compiled in the data thread."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", VARIANTS], capture_output=True, text=True, env=environment)
    counts = {"coefficients_kernel": 1, "convolve_kernel": 2, "histogram_kernel": 1, "table_kernel": 2}
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == counts | {"operate_kernel": 1, "finish_kernel": 1}
