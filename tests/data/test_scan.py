"""Single image files: what is odd about them is noted, what cannot be trained on is a problem."""

import logging
import os

import numpy as np
import pytest
from image_files import encoded
from PIL import Image

from fastdeitlt.config import DataConfig
from fastdeitlt.data.check.scan import Scan, check_files, scan_files
from fastdeitlt.data.sets.types import LongTailSet, Sets
from fastdeitlt.errors import UserError

PIXELS = np.random.RandomState(0).randint(0, 256, (9, 13, 3)).astype(np.uint8)


def scan_file(folder, name: str, **options) -> Scan:
    (scan,) = scan_files(str(folder), [name], DataConfig(num_threads=1, **options))
    return scan


def rotated() -> bytes:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("data", "notes"),
    [
        (encoded(Image.fromarray(PIXELS).convert("L"), "PNG"), ["gray"]),
        (encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), ["CMYK"]),
        (encoded(Image.fromarray(PIXELS).convert("RGBA"), "PNG"), ["an alpha channel (dropped)"]),
        (encoded(Image.fromarray(PIXELS).convert("LA"), "PNG"), ["gray", "an alpha channel (dropped)"]),
        (encoded(Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11)), "PNG"), ["16 or 32 bits per channel"]),
        (rotated(), ["an EXIF orientation (ignored; data.exif=apply"]),
        (encoded(Image.fromarray(PIXELS).convert("P"), "PNG"), []),
        (encoded(Image.fromarray(PIXELS), "WEBP"), []),
    ],
    ids=["gray", "cmyk", "rgba", "gray-alpha", "16-bit", "exif", "palette", "webp"],
)
def test_odd_images_are_noted_but_no_error(tmp_path, data, notes):
    (tmp_path / "a.jpg").write_bytes(data)
    scan = scan_file(tmp_path, "a.jpg")
    assert scan.problem == ""
    assert len(scan.notes) == len(notes)
    assert all(got.startswith(note) for note, got in zip(notes, scan.notes, strict=True))


def test_huge_images_are_noted_and_bombs_refused(tmp_path):
    (tmp_path / "huge.png").write_bytes(encoded(Image.new("1", (9000, 6000)), "PNG"))
    (tmp_path / "bomb.png").write_bytes(encoded(Image.new("1", (20_000, 10_000)), "PNG"))
    assert "more than 50 megapixels" in scan_file(tmp_path, "huge.png").notes
    assert "exceeds limit" in scan_file(tmp_path, "bomb.png").problem


def test_results_come_in_the_order_of_the_names_and_alike_files_have_one_digest(tmp_path):
    names = [f"{i}.png" for i in range(700)]
    for i in range(0, 700, 7):
        (tmp_path / names[i]).write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    scans = list(scan_files(str(tmp_path), names, DataConfig(num_threads=3)))
    assert [scan.problem for scan in scans] == ["No such file or directory" if i % 7 else "" for i in range(700)]
    assert len({scan.digest for scan in scans if not scan.problem}) == 1


def test_a_look_at_all_files_finds_what_is_not_there_or_not_whole(tmp_path, caplog):
    jpeg, png = encoded(Image.fromarray(PIXELS), "JPEG"), encoded(Image.fromarray(PIXELS), "PNG")
    kinds = {
        "good.jpg": jpeg,
        "good.png": png,
        "followed.jpg": jpeg + b"tail" * 9,
        "good.webp": encoded(Image.fromarray(PIXELS), "WEBP"),
        "cut.jpg": jpeg[:-9],
        "cut.png": png[:-9],
        "text.jpg": b"<html>404</html>",
        "empty.png": b"",
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    names = [*kinds, "pipe.jpg", "folder.jpg", "gone.jpg"]
    images = LongTailSet(names, np.zeros(len(names), np.int64), [len(names)], str(tmp_path))
    good = images.take(np.arange(4))
    assert "of 8 files" in check_files(Sets(good, test=good), DataConfig())
    with pytest.raises(UserError, match=r"7 of 11 test images .*cut\.jpg: truncated JPEG; cut\.png: truncated PNG"):
        check_files(Sets(good, test=images), DataConfig())
    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        looked = check_files(Sets(good, images, images), DataConfig(on_error="skip"))
    assert looked.count("7 of 11") == 2
    assert [message.rpartition("; ")[2] for message in caplog.messages] == ["not scored"] * 2
    # images 0 to 3 are readable: three of class 0, one of class 1, none of class 2
    with pytest.raises(UserError, match=r"7 of 11 train images .* among them all of 'class 2'\. Repair"):
        mixed = LongTailSet(names, np.repeat([0, 1, 2], [3, 6, 2]), [3, 6, 2], str(tmp_path))
        check_files(Sets(mixed), DataConfig(on_error="skip"))
    with pytest.raises(UserError, match=r"7 of 7 test images .* none is left to score\. Repair"):
        check_files(Sets(good, test=images.take(np.arange(4, 11))), DataConfig(on_error="skip"))
    assert [bool(scan_file(tmp_path, name).problem) for name in names] == [index >= 4 for index in range(len(names))]
