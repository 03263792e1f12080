"""Training batches of the fused kernel are those of torch, whatever the source."""

import logging
from contextlib import closing

import numpy as np
import pytest
import torch
from fastdeitlt.kernels import _pick
from fastdeitlt.kernels import augment as module
from fastdeitlt.kernels.augment import augment
from image_files import decoded_set, make_set

from fastdeitlt.config import AugmentConfig, Config, DataConfig, TrainConfig
from fastdeitlt.core import batches as data_batches
from fastdeitlt.core.batches import Batch, train_batches
from fastdeitlt.data.augment import transform as torch_augment
from fastdeitlt.data.mixup import MixDraw
from fastdeitlt.data.pixels import resize
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.resident import stage
from fastdeitlt.data.pixels.source import Source, open_source
from fastdeitlt.data.sampler import MicroBatch
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError

SIZE = 12
MICRO_BATCHES = [
    MicroBatch(0, 0, 0, np.array([3, 0, 10, 3]), np.array([0, 0, 0, 1])),
    MicroBatch(0, 0, 1, np.array([0, 10, 7, 8]), np.array([1, 1, 0, 0])),
]


def config(impl: str, precision: str = "fp32") -> Config:
    return Config(augment=AugmentConfig(impl=impl), train=TrainConfig(precision=precision))


def batches(source: Source, images: LongTailSet, cfg: Config, mixing: bool = True) -> list[Batch]:
    return list(train_batches(MICRO_BATCHES, source, images, cfg, mixing=mixing, size=SIZE))


def open_one(kind: str, images: LongTailSet, device: torch.device) -> Source:
    pytest.importorskip("nvidia.dali", reason="DALI decodes the images")
    data = DataConfig(num_threads=2, residency="host" if kind == "host" else "device")
    return Stream(images, data, device, window=2) if kind == "stream" else open_source(images, data, device)


@pytest.fixture(autouse=True)
def exact_crops_and_own_cache(tmp_path_factory, monkeypatch) -> None:
    """Pillow's crops on the host too; ``data.resize`` says how far the fast ones are from them."""
    monkeypatch.setattr(resize, "_vectorised", lambda crop, size: resize._pillow(crop, (size, size)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(("kind", "mixing"), [("stream", True), ("host", True), ("device", False)])
def test_batches_are_equal_in_float32(kind: str, mixing: bool, tmp_path, device: torch.device) -> None:
    images = make_set(tmp_path)
    with closing(open_one(kind, images, device)) as source:
        ours, expected = (batches(source, images, config(impl), mixing) for impl in ("triton", "torch"))
    for got, wanted in zip(ours, expected, strict=True):
        assert torch.equal(got.images_BCHW, wanted.images_BCHW)
        assert torch.equal(got.labels_B, wanted.labels_B)
        assert (got.lam is None) == (wanted.lam is None) == (not mixing)
        assert not mixing or (got.lam == wanted.lam and torch.equal(got.partner_B, wanted.partner_B))


def test_a_bfloat16_step_gets_the_rounded_images(tmp_path, device: torch.device, native_bf16: bool) -> None:
    dtype = torch.bfloat16 if native_bf16 or device.type == "cuda" else torch.float32
    images = make_set(tmp_path)
    with closing(open_one("device", images, device)) as source:
        half, full = (batches(source, images, config(*how)) for how in (("triton", "bf16"), ("torch", "fp32")))
    assert all(torch.equal(a.images_BCHW, b.images_BCHW.to(dtype)) for a, b in zip(half, full, strict=True))
    assert {batch.images_BCHW.dtype for batch in half} == {dtype}


def test_staged_boxes_give_what_the_whole_images_give(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([(30, 17), (9, 40), (25, 25), (64, 50)])
    images = [torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    draws = torch_augment.draw(np.arange(4), np.zeros(4, int), seed=1, epoch=0, cfg=AugmentConfig(), size=SIZE)
    staged = stage(images, draws.boxes(sizes), device)
    together = torch.cat([image.flatten() for image in images]).to(device)
    starts = np.cumsum([0, *(image.numel() for image in images[:-1])])
    how = (draws, MixDraw(0.4), AugmentConfig(), SIZE)
    whole = augment(together, starts, sizes, *how)
    boxed = augment(staged.pixels.to(device), staged.starts_B, staged.sizes_B2, *how, boxes_B4=staged.boxes_B4)
    assert len(staged.pixels) < len(together)
    assert torch.equal(whole, boxed)


@pytest.fixture
def first_start(monkeypatch):
    """The first batch of a process, where "auto" is the kernel unless it is refused; counts calls by function.

    torch's operations stand in for the kernels, which the interpreter runs slowly.
    """
    calls = {"augment": 0, "reference": 0}

    def counted(name, function):
        def call(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(module, "_agrees", None)
    monkeypatch.setattr(_pick, "_refused", set())
    monkeypatch.setattr(data_batches, "use_kernel", lambda cfg, device: "augment" not in _pick._refused)
    _pick.say_once.cache_clear()
    torchs = module.reference
    for name in calls:
        monkeypatch.setattr(module, name, counted(name, torchs))
    return calls


def auto_batches(device: torch.device) -> list[Batch]:
    images = decoded_set(12, 20, 2)
    with closing(open_source(images, DataConfig(residency="device", num_threads=1), device)) as source:
        return batches(source, images, config("auto"))


def test_the_first_batch_alone_is_compared_with_torch(first_start, device, caplog) -> None:
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        ours = auto_batches(device)
        assert first_start == {"augment": 3 + len(MICRO_BATCHES), "reference": 3}
        auto_batches(device)
    assert first_start == {"augment": 3 + 2 * len(MICRO_BATCHES), "reference": 3}
    assert len(ours) == len(MICRO_BATCHES) and not caplog.records


def spoiled(crops: torch.Tensor) -> torch.Tensor:
    crops[2] = 0
    return crops


def failing(crops: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("PTXAS error")


def test_a_kernel_that_breaks_the_cuda_context_is_named_with_its_setting(first_start, device, monkeypatch) -> None:
    """The launch itself succeeds; torch's operations would fail too."""
    monkeypatch.setattr(module, "context_failure", lambda device: "CUDA error: an illegal memory access")
    with pytest.raises(UserError, match=r"^augment\.impl=auto: .*illegal memory access.* Set augment\.impl=torch"):
        auto_batches(device)
    assert first_start == {"augment": 1, "reference": 0}


@pytest.mark.parametrize(
    ("wrong", "said"), [(spoiled, "differs from torch"), (failing, r"failed on the first batch (PTXAS error)")]
)
def test_a_wrong_kernel_is_replaced_by_torch_with_one_warning(wrong, said, first_start, device, monkeypatch, caplog):
    """A resizing kernel that blanks one image of the batch, and one that does not compile."""
    right, resized = module._resize, []

    def resize_wrongly(*arguments):
        resized.append(1)
        return wrong(right(*arguments))

    monkeypatch.setattr(module, "augment", augment)
    monkeypatch.setattr(module, "_resize", resize_wrongly)
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        got = [auto_batches(device) for _ in range(2)]
    assert len(resized) == 1  # the second epoch leaves the kernels to themselves
    images = decoded_set(12, 20, 2)
    with closing(open_source(images, DataConfig(residency="device", num_threads=1), device)) as source:
        expected = batches(source, images, config("torch"))
    for epoch in got:
        for ours, torchs in zip(epoch, expected, strict=True):
            assert torch.equal(ours.images_BCHW, torchs.images_BCHW)
    (record,) = caplog.records
    assert said in record.message and "using torch operations; please report this" in record.message
