"""The decoded set: equal to streaming, kept on disk soundly, put where it fits."""

import errno
import logging
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from filelock import FileLock
from image_files import CPU, SIZES, decoded_set, deliver, encoded, make_set, picture, request
from PIL import Image

from fastdeitlt import cli, distributed
from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels import cache, reader, source
from fastdeitlt.data.pixels.files import read_encoded
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.data.pixels.resident import Resident
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.errors import UserError

HOST = DataConfig(residency="host", num_threads=2)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "fastdeitlt" / "decoded"


@pytest.fixture
def decodings(monkeypatch):
    """Counts how often a set is decoded."""
    calls = []
    decoded = Stream.decoded

    def counted(self, *rest):
        calls.append(1)
        yield from decoded(self, *rest)

    monkeypatch.setattr(Stream, "decoded", counted)
    return calls


def hold(images, requests, cfg=HOST):
    source = open_source(images, cfg, CPU)
    try:
        return [crops for _, crops in source.crops(requests)], source
    finally:
        source.close()


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def requests_of_every_kind():
    return [
        request(range(11)),
        request([5, 5, 2], size=40, copies=[0, 1, 2]),
        CropRequest(np.arange(11), 24, resize=27),
        request([10], size=64),
    ]


def test_resident_and_streamed_batches_are_equal(tmp_path):
    images = make_set(tmp_path)
    wanted = requests_of_every_kind()
    assert same(hold(images, wanted)[0], deliver(images, wanted)[0])


def test_the_cache_is_used_again_and_gives_the_same_batches(tmp_path, decodings):
    images = make_set(tmp_path)
    first, _ = hold(images, requests_of_every_kind())
    second, _ = hold(images, requests_of_every_kind())
    assert same(first, second)
    assert len(decodings) == 1


def test_a_long_decoding_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "SAY_EVERY", 0.0)
    with caplog.at_level(logging.INFO, "fastdeitlt"):
        hold(make_set(tmp_path), requests_of_every_kind())
    said = [message for message in caplog.messages if message.startswith("decoded ")]
    assert said[0].startswith("decoded 0 of 11 images, ") and said[-1].startswith("decoded 10 of 11 images, ")


@pytest.mark.parametrize("change", ["content", "time", "permissions", "stored size", "order", "root"])
def test_a_changed_set_is_decoded_anew(tmp_path, decodings, change):
    images, cfg = make_set(tmp_path), HOST
    hold(images, [request([0])])
    if change == "content":
        (tmp_path / images.paths[3]).write_bytes(encoded(picture(44, 55, 99)))
    elif change == "time":
        os.utime(tmp_path / images.paths[3], ns=(1, 1))
    elif change == "permissions":  # an image that could not be read may be readable now
        (tmp_path / images.paths[3]).chmod(0o400)
    elif change == "stored size":
        cfg = HOST.model_copy(update={"stored_short_side": 30})
    elif change == "order":
        images = images.take(np.arange(11)[::-1])
    else:
        (tmp_path / "copy").mkdir()
        images = make_set(tmp_path / "copy")
    got, _ = hold(images, [CropRequest(np.array([3]), 24, resize=24)], cfg)
    assert len(decodings) == 2
    if change != "stored size":
        assert same(got, deliver(images, [CropRequest(np.array([3]), 24, resize=24)])[0])


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped pixel": lambda folder: flip_byte(folder / "pixels.npy", 5000),
    "cut pixels": lambda folder: os.truncate(folder / "pixels.npy", 9000),
    "no pixels": lambda folder: (folder / "pixels.npy").unlink(),
    "no index": lambda folder: (folder / "index.npz").unlink(),
    "a flipped index": lambda folder: flip_byte(folder / "index.npz", 400),
    "a cut index": lambda folder: os.truncate(folder / "index.npz", 300),
    "another file as index": lambda folder: (folder / "index.npz").write_bytes(b"hello"),
    "a pickle as index": lambda folder: np.savez(folder / "index.npz", sizes_N2=np.array([{}, None], dtype=object)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_noticed_and_replaced(tmp_path, cache_folder, decodings, caplog, damage):
    images = make_set(tmp_path)
    expected, _ = hold(images, [request(range(11))])
    (folder,) = (path for path in cache_folder.iterdir() if path.is_dir())
    DAMAGE[damage](folder)
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        again, _ = hold(images, [request(range(11))])
    assert same(expected, again)
    assert len(decodings) == 2
    assert [record.getMessage().count("damaged") for record in caplog.records] == [1]
    hold(images, [])
    assert len(decodings) == 2, "the new cache is sound"


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fault", ["full at once", "full later", "not writable"])
def test_without_a_cache_the_run_goes_on_with_one_message(tmp_path, cache_folder, monkeypatch, caplog, fault):
    images = make_set(tmp_path)
    if fault == "full at once":
        monkeypatch.setattr(os, "posix_fallocate", full_disk)
    elif fault == "full later":
        monkeypatch.setattr(np, "savez", full_disk)
    else:
        cache_folder.parent.mkdir()
        cache_folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        got, _ = hold(images, requests_of_every_kind())
    assert same(got, deliver(images, requests_of_every_kind())[0])
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(cache_folder) in message
    assert "memory" in message
    if cache_folder.is_dir():
        assert [path.name for path in cache_folder.glob("*") if not path.name.endswith(".lock")] == []


def test_ranks_without_a_cache_stream_instead_of_keeping_a_copy_each(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    monkeypatch.setattr(distributed, "get_world", lambda: 2)
    images = make_set(tmp_path)
    for settings, kind in (({}, Stream), ({"residency": "host"}, Resident), ({"stored_short_side": 40}, Resident)):
        opened = open_source(images, DataConfig(num_threads=1, **settings), CPU)
        next(opened.crops([request([0])]))
        opened.close()
        assert type(opened) is kind
        assert ("streaming" in caplog.messages[-1]) == (kind is Stream)


def test_what_a_killed_run_left_is_removed(tmp_path, cache_folder):
    images = make_set(tmp_path)
    hold(images, [])
    (folder,) = (path for path in cache_folder.iterdir() if path.is_dir())
    left = cache_folder / f"{folder.name}.abc.tmp"
    folder.rename(left)
    hold(images, [])
    assert folder.is_dir()
    assert not left.exists()


def test_ranks_that_start_at_once_decode_once(tmp_path, decodings):
    """Threads stand for ranks: the lock is on an open file, so it holds between them as between processes."""
    images = make_set(tmp_path)
    start = threading.Barrier(3)

    def rank():
        start.wait(timeout=30)
        return hold(images, [request(range(11))])[0]

    with ThreadPoolExecutor(3) as ranks:
        got = [future.result(timeout=60) for future in [ranks.submit(rank) for _ in range(3)]]
    assert len(decodings) == 1
    assert same(got[0], got[1])
    assert same(got[1], got[2])


def test_ranks_do_not_wait_for_each_other_to_check_a_cache(tmp_path, cache_folder, decodings):
    """Of a large set that takes a rank seconds, and a machine has eight."""
    images = make_set(tmp_path)
    hold(images, [])
    (lock,) = cache_folder.glob("*.lock")
    with ThreadPoolExecutor(1) as another, FileLock(lock):
        another.submit(hold, images, []).result(timeout=20)
    assert len(decodings) == 1


def test_an_unreadable_image_stops_with_its_name(tmp_path, cache_folder):
    images = make_set(tmp_path, {4: encoded(picture(60, 80), "PNG")[:4000]})
    threads = threading.active_count()
    with pytest.raises(UserError, match=r"04\.jpg"):
        open_source(images, HOST, CPU)
    assert threading.active_count() == threads
    assert [path.name for path in cache_folder.glob("*") if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("bad", [{4: b""}, {4: encoded(picture(60, 80), "PNG")[:4000], 7: b"text"}, {10: None, 0: b""}])
def test_skip_gives_what_streaming_gives_also_from_the_cache(tmp_path, bad):
    images = make_set(tmp_path, bad)
    skip = HOST.model_copy(update={"on_error": "skip"})
    streamed, stream = deliver(images, requests_of_every_kind(), on_error="skip")
    for _ in range(2):
        held, source = hold(images, requests_of_every_kind(), skip)
        assert same(held, streamed)
        assert source.unreadable == stream.unreadable == set(bad)


def test_raise_does_not_take_what_another_run_skipped(tmp_path):
    images = make_set(tmp_path, {4: encoded(picture(60, 80), "PNG")[:4000]})
    hold(images, [], HOST.model_copy(update={"on_error": "skip"}))
    with pytest.raises(UserError, match=r"04\.jpg.*1 of 11 images"):
        open_source(images, HOST, CPU)


def test_a_smaller_stored_size_is_that_of_pillow(tmp_path):
    images = make_set(tmp_path)
    cfg = HOST.model_copy(update={"stored_short_side": 40})
    source = open_source(images, cfg, CPU)
    for sample, (height, width) in enumerate(SIZES):
        ((_, crop),) = source.crops([CropRequest(np.array([sample]), 24, resize=24)])
        image = Image.open(tmp_path / images.paths[sample]).convert("RGB")
        if min(height, width) > 40:
            shape = int(width * 40 / min(height, width)), int(height * 40 / min(height, width))
            image = image.resize(shape, Image.Resampling.BICUBIC)
        width, height = (int(24 * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - 24) / 2), round((height - 24) / 2)
        assert np.array_equal(crop[0].numpy(), np.asarray(image.crop((left, top, left + 24, top + 24)))), sample
    source.close()


def test_images_that_are_scored_are_not_stored_smaller(tmp_path):
    images, cfg = make_set(tmp_path), HOST.model_copy(update={"stored_short_side": 30})
    crops = []
    for residency in ("host", "stream"):
        source = open_source(images, cfg.model_copy(update={"residency": residency}), CPU, scored=True)
        crops.append(next(source.crops([CropRequest(np.arange(len(SIZES)), 24, resize=40)]))[1])
        source.close()
    assert torch.equal(*crops)


def test_a_set_that_comes_decoded_is_held_as_it_is(cache_folder):
    images = decoded_set()
    (crops,), _ = hold(images, [CropRequest(np.array([3, 19, 3]), 28, resize=28)])
    assert np.array_equal(crops.numpy(), images.images_NHWC[[3, 19, 3]])
    assert not cache_folder.exists()
    with pytest.raises(UserError, match="which is decoded"):
        open_source(images, DataConfig(dataset="cifar10_lt", residency="stream"), CPU)


@pytest.mark.parametrize(
    ("residency", "free", "kind", "said"),
    [
        ("auto", 10**9, Resident, "auto.*host"),
        ("auto", 200_000, Stream, "auto.*stream"),
        ("host", 10**9, Resident, "11 images need 0.1 MB decoded at full size"),
        ("device", 10**9, Resident, "1.0 GB free on host"),
        ("stream", 0, Stream, ""),
    ],
)
def test_the_set_goes_where_it_fits(tmp_path, monkeypatch, caplog, residency, free, kind, said):
    monkeypatch.setattr(source, "available_memory", lambda: free)
    images = make_set(tmp_path)
    with caplog.at_level(logging.INFO, "fastdeitlt"):
        opened = open_source(images, DataConfig(residency=residency, num_threads=2), CPU, tell=True)
    assert type(opened) is kind
    assert re.search(said, " ".join(caplog.messages))
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastdeitlt"):
        open_source(images, DataConfig(residency=residency, num_threads=2), CPU).close()
    assert caplog.messages == []
    assert same(
        [crops for _, crops in opened.crops(requests_of_every_kind())], deliver(images, requests_of_every_kind())[0]
    )
    opened.close()


def test_a_set_that_does_not_fit_is_refused_before_it_is_decoded(tmp_path, monkeypatch, decodings):
    monkeypatch.setattr(source, "available_memory", lambda: 100_000)
    with pytest.raises(UserError, match=r"data\.residency=host: 11 images need 0\.1 MB .* 0\.1 MB free on host\. Set"):
        open_source(make_set(tmp_path), HOST, CPU)
    assert decodings == []


def test_a_set_stored_smaller_is_never_streamed_at_full_size(tmp_path, monkeypatch):
    """Else the pixels of a batch would depend on the memory that is free at each start, and on each rank."""
    images, smaller = make_set(tmp_path), {"stored_short_side": 40, "num_threads": 2}
    monkeypatch.setattr(source, "AUTO_SHARE", 1e-3)
    monkeypatch.setattr(source, "available_memory", lambda: 200_000)
    opened = open_source(images, DataConfig(**smaller), CPU)
    opened.close()
    assert type(opened) is Resident
    monkeypatch.setattr(source, "available_memory", lambda: 1_000)
    with pytest.raises(UserError, match=r"residency=auto: 11 images need .* decoded at short side 40"):
        open_source(images, DataConfig(**smaller), CPU)
    with pytest.raises(UserError, match=r"stored_short_side: got 40 with data\.residency=stream"):
        open_source(images, DataConfig(residency="stream", **smaller), CPU)


def test_a_set_far_too_large_for_memory_is_streamed_after_a_few_headers(tmp_path, monkeypatch, caplog):
    read = []
    monkeypatch.setattr(reader, "read_encoded", lambda *a, **k: (read.append(a[1]), read_encoded(*a, **k))[1])
    monkeypatch.setattr(source, "SAMPLE", 3)
    images = make_set(tmp_path)
    for free, kind, headers in ((20_000, Stream, 3), (120_000, Stream, 14), (10**9, Resident, 25)):
        monkeypatch.setattr(source, "available_memory", lambda free=free: free)
        read.clear()
        with caplog.at_level(logging.INFO, "fastdeitlt"):
            opened = open_source(images, DataConfig(num_threads=1), CPU, tell=True)
        opened.close()
        assert (type(opened), len(read)) == (kind, headers)
        assert ("need about" in caplog.messages[-1]) == (headers == 3)


def test_close_leaves_no_thread():
    before = threading.active_count()
    source = open_source(decoded_set(), HOST, CPU)
    batches = source.crops([request([i]) for i in range(9)])
    next(batches)
    source.close()
    source.close()
    batches.close()
    assert threading.active_count() == before


def test_an_image_that_changes_while_it_is_decoded_is_noticed(tmp_path, monkeypatch):
    images = make_set(tmp_path)
    read_sizes = Stream.sizes

    def then_change(stream):
        sizes = read_sizes(stream)
        (tmp_path / images.paths[3]).write_bytes(encoded(picture(44, 55, 99)))
        return sizes

    monkeypatch.setattr(Stream, "sizes", then_change)
    with pytest.raises(UserError, match=r"03\.jpg.*changed"):
        open_source(images, HOST, CPU)


def test_a_stand_in_is_of_the_class_that_the_image_has_now(tmp_path, decodings):
    """An unreadable image that was relabelled after the set was decoded."""
    images = make_set(tmp_path, {4: b""})  # of class 1, whose next image is 7
    skip = HOST.model_copy(update={"on_error": "skip"})
    hold(images, [], skip)
    relabelled = replace(images, labels=np.where(np.arange(11) == 4, 2, images.labels))  # the next of class 2 is 5
    wanted = [CropRequest(np.array([sample]), 24, resize=24) for sample in (4, 5)]
    stood_in, own = hold(relabelled, wanted, skip)[0]
    assert torch.equal(stood_in, own) and len(decodings) == 1


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_images_that_state_an_orientation_are_held_as_they_are_streamed(tmp_path, exif):
    files = {}
    for index, (kind, orientation) in enumerate(product(("JPEG", "TIFF"), (3, 5, 6, 8))):
        stated = Image.Exif()
        stated[0x0112] = orientation
        files[index] = encoded(picture(30 + index, 61, index), kind, exif=stated)
    images = make_set(tmp_path, files)
    held, _ = hold(images, requests_of_every_kind(), HOST.model_copy(update={"exif": exif}))
    assert same(held, deliver(images, requests_of_every_kind(), exif=exif)[0])
    if exif == "apply":  # whose cache is another
        assert not same(held, hold(images, requests_of_every_kind())[0])


def test_decoded_sets_are_listed_and_cleared_but_for_those_being_decoded(tmp_path, cache_folder, decodings, capsys):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    sets = [make_set(folder) for folder in folders]
    for images in sets:
        hold(images, [request([0])])
    (cache_folder / "draft.x.tmp").mkdir()
    assert cli.main(["data", "cache"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"{len(sets[0]):,} images of {tmp_path}") == 2 and "incomplete" in shown
    assert f"3 decoded sets in {cache_folder}" in shown
    busy = next(cached.path for cached in cache.cached_sets() if cached.root.endswith("b"))
    with FileLock(busy.with_suffix(".lock")):
        assert cli.main(["data", "cache", "--clear"]) == 0
    assert "removed 2 decoded sets" in capsys.readouterr().out
    assert [path for path in cache_folder.iterdir() if path.is_dir()] == [busy]
    for images in sets:
        hold(images, [request([0])])
    assert len(decodings) == 3  # the cleared one again


def test_other_data_verbs_need_a_data_set(capsys):
    assert cli.main(["data", "check"]) == 2
    assert "data check: no data set" in capsys.readouterr().err
