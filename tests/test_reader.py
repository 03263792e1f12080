"""Streaming: the crops Pillow would give, every kind of image file, and files that are broken."""

import io
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import backend
from PIL import Image
from timm.data import create_transform

from fastdeitlt.config import AugmentConfig, DataConfig
from fastdeitlt.data import augment, files, reader
from fastdeitlt.data.augment import CropRequest
from fastdeitlt.data.longtail import LongTailSet
from fastdeitlt.errors import UserError

CPU = torch.device("cpu")
CLASSES = 3
SIZES = [(61, 43), (40, 90), (33, 33), (120, 31), (50, 64), (29, 77), (64, 64), (97, 52), (45, 38), (36, 100), (70, 51)]


def picture(height, width, seed=0):
    """Waves and noise: every pixel differs, no two images are alike."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 5 + seed), np.cos(x / 7 - seed), np.sin(x / 3 + y / 2)], -1)
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    return Image.fromarray((127 + 100 * waves + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_set(folder, contents=()):
    """Eleven JPEGs of odd sizes in three classes (labels 0, 1, 2, 0, ...), some with other contents by index."""
    paths = [f"{i:02d}.jpg" for i in range(len(SIZES))]
    for i, (height, width) in enumerate(SIZES):
        data = dict(contents).get(i, encoded(picture(height, width, i), quality=92))
        if data is not None:
            (folder / paths[i]).write_bytes(data)
    labels = np.arange(len(SIZES)) % CLASSES
    return LongTailSet(paths, labels, np.bincount(labels).tolist(), str(folder))


def request(samples, size=24, epoch=0, copies=None):
    sample_B = np.asarray(samples)
    copy_B = np.zeros_like(sample_B) if copies is None else np.asarray(copies)
    draws = augment.draw(sample_B, copy_B, seed=7, epoch=epoch, cfg=AugmentConfig(), size=size)
    return CropRequest(sample_B, size, draws)


def deliver(images, requests, share=1, **options):
    """All crops, and the stream, closed."""
    stream = reader.Stream(images, DataConfig(num_threads=2, **options), CPU, share)
    try:
        return list(stream.crops(requests)), stream
    finally:
        stream.close()


def pillow_crops(images, wanted):
    crops = []
    for b, sample in enumerate(wanted.sample_B):
        image = Image.open(Path(images.root) / images.paths[sample]).convert("RGB")
        top, left, height, width = wanted.draws[b : b + 1].boxes(np.array([image.size[::-1]]))[0].tolist()
        box = image.crop((left, top, left + width, top + height))
        crops.append(np.asarray(box.resize((wanted.size, wanted.size), Image.Resampling.BICUBIC)))
    return np.stack(crops)


def test_training_crops_are_those_of_pillow(tmp_path):
    images = make_set(tmp_path)
    wanted = [request(range(11)), request([3, 3, 0], size=37, epoch=5, copies=[0, 1, 0]), request([10], size=64)]
    crops, _ = deliver(images, wanted)
    for got_BHWC, one in zip(crops, wanted, strict=True):
        assert got_BHWC.dtype == torch.uint8
        assert np.array_equal(got_BHWC.numpy(), pillow_crops(images, one))


def test_evaluation_crops_are_those_of_timm(tmp_path):
    images = make_set(tmp_path)
    transform = create_transform(24, interpolation="bicubic", crop_pct=24 / 27, mean=(0, 0, 0), std=(1, 1, 1))
    crops, _ = deliver(images, [CropRequest(np.arange(11), 24, resize=27)])
    for sample, crop_HWC in enumerate(crops[0]):
        image = Image.open(tmp_path / images.paths[sample]).convert("RGB")
        expected_HWC = (transform(image) * 255).round().to(torch.uint8).permute(1, 2, 0)
        assert torch.equal(crop_HWC, expected_HWC), images.paths[sample]


def test_a_smaller_last_batch_is_exact(tmp_path):
    images = make_set(tmp_path)
    parts = [CropRequest(np.arange(11)[start : start + 4], 24, resize=27) for start in (0, 4, 8)]
    crops, _ = deliver(images, parts)
    assert [len(part) for part in crops] == [4, 4, 3]
    whole, _ = deliver(images, [CropRequest(np.arange(11), 24, resize=27)])
    assert torch.equal(torch.cat(crops), whole[0])


def test_resuming_in_mid_epoch_gives_the_same_batches(tmp_path):
    images = make_set(tmp_path)
    generator = np.random.default_rng(0)
    wanted = [request(generator.integers(0, 11, 6), epoch=e) for e in range(8)]
    whole, _ = deliver(images, wanted)
    resumed = reader.Stream(images, DataConfig(num_threads=1), CPU)
    for got, expected in zip(resumed.crops(wanted[5:]), whole[5:], strict=True):
        assert torch.equal(got, expected)
    resumed.close()


def test_copies_in_one_group_are_read_once_and_differ_only_in_their_crop(tmp_path, monkeypatch):
    images = make_set(tmp_path)
    wanted = [request([0, 1, 2], copies=[c] * 3) for c in range(4)] + [request([3, 4])]
    apart, _ = deliver(images, wanted)
    read = []
    read_encoded = reader.read_encoded
    monkeypatch.setattr(reader, "read_encoded", lambda path, *rest: read.append(path) or read_encoded(path, *rest))
    shared, _ = deliver(images, wanted, share=4)
    assert len(read) == 5
    assert len(shared) == len(apart)
    assert all(torch.equal(a, b) for a, b in zip(shared, apart, strict=True))


EXIF_ROTATED = Image.Exif()
EXIF_ROTATED[0x0112] = 6
KINDS = {
    "cmyk jpeg": encoded(picture(50, 60).convert("CMYK")),
    "gray jpeg": encoded(picture(50, 60).convert("L")),
    "progressive jpeg": encoded(picture(50, 60), progressive=True),
    "4:4:4 jpeg": encoded(picture(50, 61), subsampling=0),
    "exif-rotated jpeg": encoded(picture(50, 60), exif=EXIF_ROTATED),
    "jpeg with a tail": encoded(picture(50, 60)) + b"\0trailing\xff\xda" * 20,
    "1x1 jpeg": encoded(picture(1, 1)),
    "alpha png": encoded(picture(50, 60).convert("RGBA"), "PNG"),
    "gray alpha png": encoded(picture(50, 60).convert("LA"), "PNG"),
    "palette png": encoded(picture(50, 60).convert("P"), "PNG", transparency=3),
    "1-bit png": encoded(picture(50, 60).convert("1"), "PNG"),
    "3x700 png": encoded(picture(3, 700), "PNG"),
    "webp": encoded(picture(50, 60), "WEBP"),
    "bmp": encoded(picture(50, 60), "BMP"),
    "tiff": encoded(picture(50, 60), "TIFF", compression="tiff_lzw"),
    "jpeg2000": encoded(picture(50, 60), "JPEG2000"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_the_rgb_of_pillow(tmp_path, kind):
    images = make_set(tmp_path, {1: KINDS[kind]})
    wanted = request([0, 1, 2])
    (crops_BHWC,), _ = deliver(images, [wanted])
    assert np.array_equal(crops_BHWC.numpy(), pillow_crops(images, wanted))


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    images = make_set(tmp_path, {0: encoded(Image.fromarray(values), "PNG")})
    (crops_BHWC,), _ = deliver(images, [CropRequest(np.array([0]), 40, resize=40)])
    assert np.abs(crops_BHWC[0].numpy().astype(float) - (values / 257)[..., None]).max() <= 1


GOOD = encoded(picture(60, 80), quality=90)
BMP = encoded(picture(40, 40), "BMP")
GOOD_PNG = encoded(picture(60, 80), "PNG")
BAD = {
    "text": (b"this is no image\n" * 40, "not an image"),
    "html": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "gif": (encoded(picture(20, 20).convert("P"), "GIF"), "not an image"),
    "zeros": (bytes(5000), "not an image"),
    "empty": (b"", "empty"),
    "missing": (None, "No such file"),
    "header cut": (GOOD[:100], "truncated"),
    "half a jpeg": (GOOD[: len(GOOD) // 2], "truncated"),
    "jpeg without its end": (GOOD[:-2], "truncated"),
    "half a png": (GOOD_PNG[: len(GOOD_PNG) // 2], "truncated"),
    "damaged png": (GOOD_PNG[:3000] + b"\xff" * 200 + GOOD_PNG[3200:], ""),
    "bmp cut": (BMP[:3000], "truncated"),
    "bomb": (BMP[:18] + (30_000).to_bytes(4, "little") * 2 + BMP[26:], "900000000 pixels"),
    "large": (BMP[:18] + (10_000).to_bytes(4, "little") * 2 + BMP[26:], "10000 x 10000 pixels"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_file_stops_training_with_its_name_and_the_reason(tmp_path, kind):
    data, reason = BAD[kind]
    images = make_set(tmp_path, {4: data})
    threads = threading.active_count()
    with pytest.raises(UserError) as error:
        deliver(images, [request([0, 1, 4]), request([5])])
    message = str(error.value)
    assert str(tmp_path / "04.jpg") in message
    assert re.search(reason, message, re.IGNORECASE)
    assert "on_error=skip" in message
    assert "\n" not in message
    assert threading.active_count() == threads


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_skip_puts_the_next_readable_image_of_the_class(tmp_path, kind, caplog):
    data, _ = BAD[kind]
    images = make_set(tmp_path, {4: data, 7: b"also bad"})
    wanted = [request([4, 0, 7, 4], epoch=e) for e in range(3)]
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        crops, stream = deliver(images, wanted, on_error="skip")
    (tmp_path / "clean").mkdir()
    clean = make_set(tmp_path / "clean")  # 4 and 7 are of the class of 1, 4, 7, 10
    as_10 = [CropRequest(np.array([10, 0, 10, 10]), 24, one.draws) for one in wanted]
    expected, _ = deliver(clean, as_10)
    assert all(torch.equal(a, b) for a, b in zip(crops, expected, strict=True))
    assert sorted(stream.skipped) == ["04.jpg", "07.jpg"]
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2, "once for each file"
    assert any("04.jpg" in line for line in logged)


def test_skip_does_not_depend_on_what_was_read_before(tmp_path):
    images = make_set(tmp_path, {4: BAD["half a png"][0], 0: b""})
    wanted = [request(range(11), epoch=e) for e in range(4)]
    whole, _ = deliver(images, wanted, on_error="skip")
    resumed, _ = deliver(images, wanted[2:], on_error="skip")
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], resumed, strict=True))


def test_skip_stops_when_a_class_has_no_readable_image(tmp_path):
    images = make_set(tmp_path, {i: b"" for i in (1, 4, 7, 10)})
    with pytest.raises(UserError, match="class 1"):
        deliver(images, [request(range(11))], on_error="skip")


def test_a_stream_goes_on_after_an_image_that_does_not_decode(tmp_path):
    images = make_set(tmp_path, {4: BAD["half a png"][0]})
    stream = reader.Stream(images, DataConfig(num_threads=2), CPU)
    with pytest.raises(UserError, match=r"04\.jpg"):
        list(stream.crops([request([3, 4])]))
    (crops,) = stream.crops([request([3, 5])])
    assert np.array_equal(crops.numpy(), pillow_crops(images, request([3, 5])))
    stream.close()


def test_a_fifo_does_not_hang_the_reader(tmp_path):
    images = make_set(tmp_path, {4: None})
    os.mkfifo(tmp_path / "04.jpg")
    with pytest.raises(UserError, match="not a file"):
        deliver(images, [request([4])])


def native_threads():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("how", ["all", "half", "error", "unused"])
def test_close_leaves_no_thread(tmp_path, how):
    images = make_set(tmp_path, {10: b"bad"})
    before, python_before = native_threads(), threading.active_count()
    stream = reader.Stream(images, DataConfig(num_threads=2), CPU)
    batches = stream.crops([request([i, i + 1]) for i in range(10 if how == "error" else 9)])
    if how == "error":
        with pytest.raises(UserError):
            list(batches)
    elif how != "unused":
        for _ in range(2 if how == "half" else 9):
            next(batches)
    stream.close()
    stream.close()
    batches.close()
    assert threading.active_count() == python_before
    assert native_threads() <= before


def test_an_error_of_the_sampler_reaches_the_consumer(tmp_path):
    def requests():
        yield request([0])
        raise RuntimeError("sampler broke")

    with pytest.raises(RuntimeError, match="sampler broke"):
        deliver(make_set(tmp_path), requests())


UNPARSEABLE = """
import sys, numpy as np, torch
from fastdeitlt.data.files import Encoded
from fastdeitlt.data.reader import Decoder
good = np.fromfile(sys.argv[1], np.uint8)
decoder = Decoder(2, torch.device("cpu"))
region = np.tile(np.array([[0, 0, 20, 20]], np.int32), (32, 1))
for position in (0, 1, 2, 5):
    files = [Encoded(i, good, 60, 80) for i in range(32)]
    files[position] = Encoded(position, np.frombuffer(b"plain text named .jpg" * 9, np.uint8), 60, 80)
    try:
        decoder(files, region)
    except RuntimeError:
        print("caught", position)
"""


def test_dali_does_not_end_the_process_on_a_file_it_cannot_parse(tmp_path):
    """DALI 2.4 without the peek at the header: segmentation fault when such a file is early in the batch."""
    (tmp_path / "good.jpg").write_bytes(GOOD)
    done = subprocess.run(
        [sys.executable, "-c", UNPARSEABLE, str(tmp_path / "good.jpg")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split() == ["caught", "0", "caught", "1", "caught", "2", "caught", "5"]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_every_operator_of_the_graph_exists_for_its_device(device):
    """The graph for a GPU cannot be built without one, but its operators can be looked up in DALI's registry."""
    registered = {
        "cpu": backend.RegisteredCPUOps(),
        "gpu": backend.RegisteredGPUOps(),
        "mixed": backend.RegisteredMixedOps(),
    }
    graph = reader.decode_graph(2, torch.device(device))
    graph.start_py_workers()  # forms the graph, which checks argument names
    operators = [re.search(r"OpSpec for (\w+):.*?device: (\w+)", str(op.spec), re.S).groups() for op in graph._ops]
    assert ("decoders__ImageSlice", "cpu" if device == "cpu" else "mixed") in operators
    assert ("PeekImageShape", "cpu") in operators
    assert [name for name, where in operators if name not in registered[where]] == []


def test_large_images_are_decoded_in_more_than_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_DECODE", 4)
    images = make_set(tmp_path)
    wanted = request(range(11))
    (crops,), _ = deliver(images, [wanted])
    assert np.array_equal(crops.numpy(), pillow_crops(images, wanted))


def test_sizes_come_from_headers(tmp_path):
    images = make_set(tmp_path, {4: b""})
    stream = reader.Stream(images, DataConfig(num_threads=2, on_error="skip"), CPU)
    expected = np.array(SIZES)
    expected[4] = 0
    assert np.array_equal(stream.sizes(), expected)
    stream.close()


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((375, 500), 256, (256, 341)), ((500, 375), 256, (341, 256)), ((200, 300), 256, (200, 300)), ((9, 9), 0, (9, 9))],
)
def test_a_longer_short_side_is_shrunk_and_the_ratio_kept(size, short_side, expected):
    assert files.shrunk(np.array([size]), short_side).tolist() == [list(expected)]
