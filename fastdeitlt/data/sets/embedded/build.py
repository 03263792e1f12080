"""Build the embedded long-tailed set from Fashion-MNIST's original files.

Usage: ``python -m fastdeitlt.data.sets.embedded.build FOLDER``. FOLDER has the original train-images-idx3-ubyte.gz,
train-labels-idx1-ubyte.gz and their t10k counterparts. The choice of images is deterministic. Prints the archive's
sha256 for ``fastdeitlt.data.sets.embedded.SHA256``.

N images, H height, W width.
"""

import argparse
import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST

from fastdeitlt.data.sets import embedded
from fastdeitlt.data.sets.counts import cifar_lt_counts
from fastdeitlt.data.sets.cut import parse_idx

CLASS_NAMES = FashionMNIST.classes
TRAIN_COUNTS = cifar_lt_counts(10_000, len(CLASS_NAMES), 0.01)
VAL_COUNT, TEST_COUNT = 50, 100
SEED = 0
_OLDEST_DATE = (1980, 1, 1, 0, 0, 0)


def read_idx(file: Path) -> np.ndarray:
    """Return the uint8 array in a gzipped IDX file."""
    return parse_idx(gzip.decompress(file.read_bytes()))


def choose(images_NHW: np.ndarray, labels_N: np.ndarray, counts: list[list[int]], seen: set[bytes]) -> list[list[int]]:
    """Choose ``counts[part][class]`` distinct images for each part; return indices."""
    generator = np.random.RandomState(SEED)
    parts: list[list[int]] = [[] for _ in counts]
    for label in range(len(CLASS_NAMES)):
        shuffled = iter(generator.permutation(np.flatnonzero(labels_N == label)).tolist())
        for part, wanted in zip(parts, counts, strict=True):
            for _ in range(wanted[label]):
                index = next(i for i in shuffled if images_NHW[i].tobytes() not in seen)
                seen.add(images_NHW[index].tobytes())
                part.append(index)
    return parts


def png(image_HW: np.ndarray) -> bytes:
    """Encode a gray image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def build(folder: Path, archive: Path) -> str:
    """Write the archive from the original files in ``folder`` and return its sha256."""
    originals = {
        name: (read_idx(folder / f"{name}-images-idx3-ubyte.gz"), read_idx(folder / f"{name}-labels-idx1-ubyte.gz"))
        for name in ("train", "t10k")
    }
    classes = len(CLASS_NAMES)
    seen: set[bytes] = set()
    train, val = choose(*originals["train"], [TRAIN_COUNTS, [VAL_COUNT] * classes], seen)
    (test,) = choose(*originals["t10k"], [[TEST_COUNT] * classes], seen)
    files = {"classes.txt": "".join(f"{name}\n" for name in CLASS_NAMES).encode()}
    for split, chosen, source in (("train", train, "train"), ("val", val, "train"), ("test", test, "t10k")):
        images_NHW, labels_N = originals[source]
        names = [f"{split}/{labels_N[i]}/{i:05d}.png" for i in chosen]
        rows = zip(names, labels_N[chosen], strict=True)
        files[f"{split}.txt"] = "".join(f"{name} {label}\n" for name, label in rows).encode()
        files |= {name: png(images_NHW[i]) for name, i in zip(names, chosen, strict=True)}
    with zipfile.ZipFile(archive, "w") as out:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _OLDEST_DATE)
            entry.create_system = 3  # the same bytes on every system
            out.writestr(entry, data)
    return hashlib.sha256(archive.read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the original idx files")
    parser.add_argument("--out", type=Path, default=embedded.ARCHIVE, help="the archive to write")
    arguments = parser.parse_args()
    print(build(arguments.folder, arguments.out))
