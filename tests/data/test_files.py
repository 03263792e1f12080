"""Every kind of image file becomes RGB; broken ones stop with their name, or are replaced, but never hang or crash."""

import logging
import os
import re
import threading

import numpy as np
import pytest
import torch
from image_files import CPU, GOOD, SIZES, assert_like_pillow, deliver, encoded, make_set, picture, request
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from fastdeitlt.config import DataConfig
from fastdeitlt.data.check.scan import scan_files
from fastdeitlt.data.pixels import files, reader
from fastdeitlt.data.pixels.decoder import Decoder
from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.errors import UserError

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
THUMBNAIL = b"Exif\0\0" + encoded(picture(8, 8))
"""Metadata in which a JPEG ends."""
ODD = 1
EXIF_ROTATED = Image.Exif()
EXIF_ROTATED[0x0112] = 6


def tiff(values_HWC, photometric=1, planar=1, alpha=None):
    """An uncompressed TIFF with tags that Pillow does not write."""
    height, width, channels = values_HWC.shape
    stored = (values_HWC.transpose(2, 0, 1) if planar == 2 else values_HWC).tobytes()
    parts = channels if planar == 2 else 1
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype.update({273: 4, 279: 4})
    tags[256], tags[257], tags[258] = width, height, (8 * values_HWC.itemsize,) * channels
    tags[259], tags[262], tags[277], tags[278], tags[284] = 1, photometric, channels, height, planar
    tags[273] = tuple(part * len(stored) // parts for part in range(parts))  # from the end of the tags
    tags[279] = (len(stored) // parts,) * parts
    if alpha is not None:
        tags[338] = (alpha,)
    return b"II*\0" + (8).to_bytes(4, "little") + tags.tobytes(8) + stored


def premultiplied(values_HWC, alpha_HW):
    """RGB multiplied by an alpha channel, which follows."""
    return np.dstack([(values_HWC * (alpha_HW[..., None] / 255)).astype(np.uint8), alpha_HW])


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
    "gray alpha tiff": encoded(picture(50, 60).convert("LA"), "TIFF"),
    "gray alpha lzw tiff": encoded(picture(50, 60).convert("LA"), "TIFF", compression="tiff_lzw"),
    "palette alpha tiff": encoded(picture(50, 60).convert("P").convert("PA"), "TIFF"),
    "gray tiff with an unspecified second sample": tiff(np.dstack([picture(50, 60).convert("L")] * 2), alpha=0),
    "tiff": encoded(picture(50, 60), "TIFF", compression="tiff_lzw"),
    "1-bit tiff": encoded(picture(50, 60).convert("1"), "TIFF"),
    "tiff premultiplied by alpha": tiff(
        premultiplied(np.asarray(picture(50, 60)), np.asarray(picture(50, 60, 7).convert("L"))), 2, alpha=1
    ),
    "webp with metadata after pixels of odd length": encoded(picture(50, 60, ODD), "WEBP", lossless=True, exif=b"Exif"),
    "png with a profile of another colour space": encoded(picture(50, 60).convert("L"), "PNG", icc_profile=PROFILE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_the_rgb_of_pillow(tmp_path, kind):
    images = make_set(tmp_path, {1: KINDS[kind]})
    wanted = request([0, 1, 2])
    (crops_BHWC,), _ = deliver(images, [wanted])
    assert_like_pillow(crops_BHWC, images, wanted)


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    images = make_set(tmp_path, {0: encoded(Image.fromarray(values), "PNG")})
    (crops_BHWC,), _ = deliver(images, [CropRequest(np.array([0]), 40, resize=40)])
    assert np.abs(crops_BHWC[0].numpy().astype(float) - (values / 257)[..., None]).max() <= 1


def pnm(values, maximum, is_text=False):
    """A PGM or PPM, binary or text with a comment, of a maximum that Pillow does not write."""
    kind = (2 if is_text else 5) + (values.ndim == 3)
    header = b"P%d\n%d %d\n# a comment\n%d\n" % (kind, values.shape[1], values.shape[0], maximum)
    if is_text:
        return header + b"# 7\n" + "\n".join(map(str, values.ravel().tolist())).encode() + b"\n"
    return header + values.astype("u1" if maximum < 256 else ">u2").tobytes()


@pytest.mark.parametrize(
    ("maximum", "is_text"),
    [(1, False), (15, False), (100, False), (254, False), (256, False), (4095, False), (65534, False), (4095, True)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pnm_is_scaled_by_its_maximum(tmp_path, maximum, is_text, channels):
    values = np.random.default_rng(0).integers(0, maximum + 1, (31, 40, channels))
    values[0, 0] = maximum
    (tmp_path / "a").write_bytes(pnm(values[..., 0] if channels == 1 else values, maximum, is_text))
    pixels = Decoder(1, CPU).whole([files.read_encoded(str(tmp_path / "a"))])[0].numpy()
    assert np.abs(pixels - values / maximum * 255).max() <= 0.5
    with Image.open(tmp_path / "a") as image:
        if image.mode != "I":  # which Pillow scales to 16 bits
            assert np.array_equal(pixels, image.convert("RGB"))
    (scan,) = scan_files(str(tmp_path), ["a"], DataConfig(num_threads=1))
    assert scan.problem == scan.doubt == ""


BMP = encoded(picture(40, 40), "BMP")
TIFF = encoded(picture(60, 80), "TIFF")
WIDE = np.asarray(picture(40, 40)).astype(np.uint16) * 257
PAIR = encoded(picture(60, 80), "MPO", save_all=True, append_images=[picture(20, 20)], exif=THUMBNAIL)
GOOD_PNG = encoded(picture(60, 80), "PNG")
BAD = {
    "text": (b"this is no image\n" * 40, "not an image"),
    "html": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "gif": (encoded(picture(20, 20).convert("P"), "GIF"), "GIF image, expected JPEG, PNG"),
    "jpeg2000": (encoded(picture(20, 20), "JPEG2000"), "JPEG2000 image, expected"),
    "zeros": (bytes(5000), "not an image"),
    "empty": (b"", "empty"),
    "missing": (None, "No such file"),
    "header cut": (GOOD[:100], "truncated"),
    "half a jpeg": (GOOD[: len(GOOD) // 2], "truncated"),
    "jpeg without its end": (GOOD[:-2], "truncated"),
    "half a png": (GOOD_PNG[: len(GOOD_PNG) // 2], "truncated"),
    "damaged png": (GOOD_PNG[:3000] + b"\xff" * 200 + GOOD_PNG[3200:], ""),
    "bmp cut": (BMP[:3000], "truncated"),
    "tiff cut near its end": (TIFF[:-500], "truncated"),
    "12-bit ppm cut": (pnm(WIDE // 16, 4095)[:-1], "truncated PPM"),
    "12-bit text ppm cut": (pnm(WIDE // 16, 4095, is_text=True)[:-900], "truncated PPM"),
    "32-bit tiff": (encoded(Image.new("I", (40, 40)), "TIFF"), "TIFF with 32 bits per channel, expected 8 or 16"),
    "lab tiff": (encoded(Image.new("LAB", (40, 40), (150, 20, 40)), "TIFF"), "Lab TIFF, expected RGB"),
    "planar 16-bit tiff": (tiff(WIDE, 2, planar=2), "planar TIFF with 16 bits per channel, expected interleaved"),
    "planar alpha tiff": (
        tiff(np.asarray(picture(40, 40).convert("RGBA")), 2, planar=2, alpha=2),
        "planar TIFF with an alpha channel",
    ),
    "16-bit white-is-zero tiff": (tiff(WIDE[..., :1], 0), "TIFF with 16 bits in which 0 is white, expected 0 as black"),
    "premultiplied gray tiff": (tiff(np.asarray(picture(40, 40))[..., :2], 1, alpha=1), "premultiplied by alpha"),
    "first of two pictures cut": (PAIR[:2500], "truncated"),
    "bomb": (BMP[:18] + (30_000).to_bytes(4, "little") * 2 + BMP[26:], "900000000 pixels"),
    "large": (BMP[:18] + (10_000).to_bytes(4, "little") * 2 + BMP[26:], "10000 x 10000 pixels"),
}


def turned(orientation, kind, mode, **options):
    """An image file that states an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(40, 61).convert(mode), kind, exif=exif, **options)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {}),
        ("MPO", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
    ],
)
def test_orientations_are_pillows_whole_and_by_region(tmp_path, kind, mode, options, orientation, exif):
    """Of TIFF always turned, else only if told so; the header's size is that of what comes out."""
    (tmp_path / "a").write_bytes(turned(orientation, kind, mode, **options))
    with Image.open(tmp_path / "a") as image:
        expected = np.asarray((ImageOps.exif_transpose(image) if exif == "apply" else image).convert("RGB"))
    file = files.read_encoded(str(tmp_path / "a"), exif=exif)
    header = files.read_encoded(str(tmp_path / "a"), exif=exif, header_only=True)
    assert (file.height, file.width) == (header.height, header.width) == expected.shape[:2]
    boxes = np.array([[0, 0, *expected.shape[:2]], [3, 5, 20, 17]], np.int32)
    whole, part = Decoder(1, CPU)([file, file], boxes)
    assert np.array_equal(whole, expected)
    assert np.array_equal(part, expected[3:23, 5:22])
    in_memory = files.from_pillow(Image.open(tmp_path / "a"), exif=exif)
    assert np.array_equal(Decoder(1, CPU).whole([in_memory])[0], expected)


def test_a_png_states_its_orientation_also_after_its_pixels(tmp_path):
    data = turned(6, "PNG", "RGB")
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    (tmp_path / "a").write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    header = files.read_encoded(str(tmp_path / "a"), exif="apply", header_only=True)
    assert (header.height, header.width, header.orientation) == (61, 40, 6)


def test_what_a_decoder_warns_of_is_not_told_for_each_reading(tmp_path, capfd):
    make_set(tmp_path, {1: KINDS["png with a profile of another colour space"]})
    list(scan_files(str(tmp_path), ["01.jpg"], DataConfig(num_threads=1)))
    assert capfd.readouterr().err == ""


def test_damage_that_training_reads_is_a_doubt_of_the_check(tmp_path):
    """Of a byte of 255 in the scan of a JPEG Pillow reports damage, while the decoder goes on."""
    place = GOOD.index(b"\xff\xda") + 200
    images = make_set(tmp_path, {4: GOOD[:place] + b"\xff" + GOOD[place + 1 :]})
    deliver(images, [request([4])])
    (scan,) = scan_files(str(tmp_path), ["04.jpg"], DataConfig(num_threads=1))
    assert scan.problem == "" and scan.doubt.startswith("damaged, but accepted by the training decoder")


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
def test_what_stops_training_is_found_by_the_check(tmp_path, kind):
    images = make_set(tmp_path, {4: BAD[kind][0]})
    problems = [scan.problem for scan in scan_files(str(tmp_path), images.paths, DataConfig(num_threads=1))]
    assert [bool(problem) for problem in problems] == [index == 4 for index in range(len(SIZES))]


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_takes_passes_the_check(tmp_path, kind):
    make_set(tmp_path, {1: KINDS[kind]})
    (scan,) = scan_files(str(tmp_path), ["01.jpg"], DataConfig(num_threads=1))
    assert scan.problem == scan.doubt == ""


@pytest.mark.parametrize("contents", [None, encoded(picture(60, 80), "PNG")[:4000]], ids=["gone", "overwritten"])
def test_a_file_that_changes_after_the_start_is_named(tmp_path, contents):
    images = make_set(tmp_path)
    stream = reader.Stream(images, DataConfig(num_threads=2), CPU)
    batches = stream.crops([request([i, i + 1]) for i in range(9)])
    next(batches)
    (tmp_path / "09.jpg").unlink()
    if contents:
        (tmp_path / "09.jpg").write_bytes(contents)
    with pytest.raises(UserError, match=r"09\.jpg"):
        list(batches)
    stream.close()


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
    assert stream.unreadable == {4, 7}
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
    images = make_set(tmp_path, dict.fromkeys((1, 4, 7, 10), b""))
    with pytest.raises(UserError, match="unreadable, as are all images of its class"):
        deliver(images, [request(range(11))], on_error="skip")


def test_a_stream_goes_on_after_an_image_that_does_not_decode(tmp_path):
    images = make_set(tmp_path, {4: BAD["half a png"][0]})
    stream = reader.Stream(images, DataConfig(num_threads=2), CPU)
    with pytest.raises(UserError, match=r"04\.jpg"):
        list(stream.crops([request([3, 4])]))
    ((_, crops),) = stream.crops([request([3, 5])])
    assert_like_pillow(crops, images, request([3, 5]))
    stream.close()


def test_gray_and_alpha_of_a_tiff_are_as_pillow_reads_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gray = Image.fromarray(np.arange(0, 240).reshape(12, 20).astype(np.uint8))
    (tmp_path / "a").write_bytes(encoded(Image.merge("LA", [gray, gray.rotate(180)]), "TIFF", exif=exif))
    for rule in ("ignore", "apply"):
        file = files.read_encoded(str(tmp_path / "a"), 3, exif=rule)
        header = files.read_encoded(str(tmp_path / "a"), exif=rule, header_only=True)
        assert (file.sample, file.height, file.width) == (3, header.height, header.width) == (3, 20, 12)
        expected = np.asarray(gray.transpose(Image.Transpose.ROTATE_270).convert("RGB"))
        assert np.array_equal(Decoder(1, CPU).whole([file])[0], expected)


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind.endswith(" tiff")])
def test_a_tiff_that_would_be_misread_is_refused_before_it_is_decoded(tmp_path, kind):
    data, reason = BAD[kind]
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(files.UnreadableError, match=reason):
        files.glance(str(tmp_path / "a"))
    with pytest.raises(files.UnreadableError, match=reason):
        files.from_pillow(Image.open(tmp_path / "a"))


def test_a_fifo_does_not_hang_the_reader(tmp_path):
    images = make_set(tmp_path, {4: None})
    os.mkfifo(tmp_path / "04.jpg")
    with pytest.raises(UserError, match="not a file"):
        deliver(images, [request([4])])


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
