"""Streaming: the crops Pillow would give, whatever the threads, groups and restarts; and nothing left behind."""

import errno
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from image_files import CPU, GOOD, assert_like_pillow, deliver, make_set, request
from nvidia.dali import backend
from PIL import Image
from timm.data import create_transform

from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels import decoder, files, reader
from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.errors import UserError


def test_training_crops_are_those_of_pillow(tmp_path):
    images = make_set(tmp_path)
    wanted = [request(range(11)), request([3, 3, 0], size=37, epoch=5, copies=[0, 1, 0]), request([10], size=64)]
    crops, _ = deliver(images, wanted)
    for got_BHWC, one in zip(crops, wanted, strict=True):
        assert_like_pillow(got_BHWC, images, one)


def test_evaluation_crops_are_those_of_timm(tmp_path):
    images = make_set(tmp_path)
    transform = create_transform(24, interpolation="bicubic", crop_pct=24 / 27, mean=(0, 0, 0), std=(1, 1, 1))
    crops, _ = deliver(images, [CropRequest(np.arange(11), 24, resize=27)])
    for sample, crop_HWC in enumerate(crops[0]):
        image = Image.open(tmp_path / images.paths[sample]).convert("RGB")
        expected_HWC = (transform(image) * 255).round().to(torch.uint8).permute(1, 2, 0)
        assert torch.equal(crop_HWC, expected_HWC), images.paths[sample]


def test_what_fails_after_decoding_is_no_images_fault(tmp_path, monkeypatch):
    """As memory of the device that is full: the images are not decoded one by one to find a damaged one."""
    decoded = []

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    decode = decoder.Decoder.__call__
    monkeypatch.setattr(decoder.Decoder, "__call__", lambda self, *args: decoded.append(1) or decode(self, *args))
    monkeypatch.setattr(reader, "cut", full)
    with pytest.raises(torch.OutOfMemoryError):
        deliver(make_set(tmp_path), [request(range(11))], on_error="skip")
    assert len(decoded) == 1


@pytest.mark.parametrize("failures", [2, 3])
def test_a_read_that_the_system_refuses_is_no_images_fault(tmp_path, monkeypatch, failures):
    """It is tried three times; then the command ends, though ``on_error=skip`` leaves unreadable images out."""
    images, left = make_set(tmp_path), [failures]
    expected, _ = deliver(images, [request(range(11))])

    def stale(path, mode):
        if path.endswith(images.paths[3]) and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return open(path, mode)

    monkeypatch.setattr(files, "open", stale, raising=False)
    monkeypatch.setattr(reader, "RETRY_S", 0.0)
    if failures == 3:
        with pytest.raises(UserError, match=r"cannot be read after 3 tries \(Stale file handle\)") as caught:
            deliver(images, [request(range(11))], on_error="skip")
        assert caught.value.__cause__.errno == errno.ESTALE
    else:
        assert torch.equal(deliver(images, [request(range(11))], on_error="skip")[0][0], expected[0])
    assert not left[0]


def test_a_missing_decoder_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="Install nvidia-dali"):
        deliver(make_set(tmp_path), [request([0])])
    with pytest.raises(UserError, match="Install nvidia-dali"):
        decoder.decoder_version()


def test_copies_in_one_group_are_read_once_and_differ_only_in_their_crop(tmp_path, monkeypatch):
    images = make_set(tmp_path)
    wanted = [request([0, 1, 2], copies=[c] * 3) for c in range(4)] + [request([3, 4])]
    apart, _ = deliver(images, wanted)
    read = []
    read_encoded = reader.read_encoded
    monkeypatch.setattr(
        reader, "read_encoded", lambda path, *rest, **how: read.append(path) or read_encoded(path, *rest, **how)
    )
    shared, _ = deliver(images, wanted, window=4)
    assert len(read) == 5
    assert len(shared) == len(apart)
    assert all(torch.equal(a, b) for a, b in zip(shared, apart, strict=True))


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
    deadline = time.monotonic() + 20
    while native_threads() > before and time.monotonic() < deadline:  # the system ends a thread after it was joined
        time.sleep(0.01)
    assert native_threads() <= before


def test_an_error_of_the_sampler_reaches_the_consumer(tmp_path):
    def requests():
        yield request([0])
        raise RuntimeError("sampler broke")

    with pytest.raises(RuntimeError, match="sampler broke"):
        deliver(make_set(tmp_path), requests())


UNPARSABLE = """
import sys, numpy as np, torch
from fastdeitlt.data.pixels.files import Encoded
from fastdeitlt.data.pixels.decoder import Decoder
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
        [sys.executable, "-c", UNPARSABLE, str(tmp_path / "good.jpg")], capture_output=True, text=True, timeout=250
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
    graph = decoder.decode_graph(2, torch.device(device))
    graph.start_py_workers()  # forms the graph, which checks argument names
    operators = [re.search(r"OpSpec for (\w+):.*?device: (\w+)", str(op.spec), re.S).groups() for op in graph._ops]
    assert ("decoders__ImageSlice", "cpu" if device == "cpu" else "mixed") in operators
    assert ("PeekImageShape", "cpu") in operators
    assert [name for name, where in operators if name not in registered[where]] == []


def test_another_thread_may_take_the_last_idle_graph(tmp_path):
    class TakenInBetween(list):
        def __len__(self):
            return 1

    (tmp_path / "good.jpg").write_bytes(GOOD)
    decode = decoder.Decoder(1, CPU)
    decode._idle = TakenInBetween()
    (pixels,) = decode.whole([files.read_encoded(str(tmp_path / "good.jpg"))])
    assert pixels.shape == (60, 80, 3)


def test_large_images_are_decoded_in_more_than_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "MAX_DECODE", 4)
    images = make_set(tmp_path)
    wanted = request(range(11))
    (crops,), _ = deliver(images, [wanted])
    assert_like_pillow(crops, images, wanted)
