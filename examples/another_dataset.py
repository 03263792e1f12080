"""Write a small data set of another domain as class folders: ``python examples/another_dataset.py digits FOLDER``.

digits: handwritten digits that scikit-learn carries (pip install scikit-learn), cut to a long tail.
solar-cells: electroluminescence images of solar cells that elpv-dataset carries (pip install elpv-dataset), as
long-tailed as they were collected.
photo-patches: patches of the photos that scikit-image carries (pip install scikit-image), JPEG and PNG of many sizes.

FOLDER gets {train,val,test}/<class>/<number>.png or .jpg, which ``data.dataset=folder`` reads, always the same images.
"""

# N images in the set, K classes

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastdeitlt.data.sets.counts import cifar_lt_counts

Split = dict[str, list[int]]  # split -> images of each class [K]
SEED = 0


def digits() -> tuple[list[np.ndarray], np.ndarray, list[str], Split]:
    """Return handwritten digits: (images, labels_N, class names, counts).

    8 x 8 pixels; 110 to 5 training images per class, 20 val, 40 test.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = list((found.images * (255 / 16)).round().astype(np.uint8))
    counts = {"train": cifar_lt_counts(1100, 10, 1 / 22), "val": [20] * 10, "test": [40] * 10}
    return images, found.target, [str(name) for name in found.target_names], counts


def solar_cells() -> tuple[list[np.ndarray], np.ndarray, list[str], Split]:
    """Return solar cells: (images, labels_N, class names, counts).

    Kind of cell by rated defect, 8 classes; a tenth val, a quarter test.
    """
    from elpv_dataset.utils import load_dataset

    images, defect_N, kind_N = load_dataset()
    names = [f"{kind}-{percent}" for kind in ("mono", "poly") for percent in ("000", "033", "067", "100")]
    labels_N = 4 * (kind_N == "poly") + np.rint(3 * defect_N).astype(int)
    total_K = np.bincount(labels_N, minlength=len(names))
    counts = {"val": (total_K // 10).tolist(), "test": (total_K // 4).tolist()}
    counts["train"] = (total_K - counts["val"] - counts["test"]).tolist()
    return list(images), labels_N, names, counts


def photo_patches() -> tuple[list[np.ndarray], np.ndarray, list[str], Split]:
    """Return photo patches: (images, labels_N, class names, counts).

    Which of 8 photos; 200 to 5 training patches, 10 val, 20 test.

    Patches of 40 to 160 pixels are in separate cells of a grid, so that no two share a pixel.
    """
    from skimage import data

    names = ["astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket", "brick"]
    counts = {"train": cifar_lt_counts(1600, len(names), 1 / 40), "val": [10] * len(names), "test": [20] * len(names)}
    generator = np.random.RandomState(SEED)
    images, labels = [], []
    for label, name in enumerate(names):
        photo = Image.fromarray(getattr(data, name)()).convert("RGB")
        needed = sum(split[label] for split in counts.values())
        columns = int(np.ceil(np.sqrt(needed)))
        cell = np.array(photo.size) / columns
        for number in range(needed):
            left, top = np.array((number % columns, number // columns)) * cell
            width, height = cell * generator.uniform(0.7, 1, 2)
            side = generator.randint(40, 161)
            patch = photo.crop((int(left), int(top), int(left + width), int(top + height)))
            images.append(np.asarray(patch.resize((side, generator.randint(40, 161)), Image.Resampling.BICUBIC)))
            labels.append(label)
    return images, np.array(labels), names, counts


SETS: dict[str, Callable[[], tuple[list[np.ndarray], np.ndarray, list[str], Split]]] = {
    "digits": digits,
    "solar-cells": solar_cells,
    "photo-patches": photo_patches,
}


def choose(labels_N: np.ndarray, counts: Split) -> Iterator[tuple[str, int, int]]:
    """(split, class, image) of every image taken; no image is taken twice."""
    generator = np.random.RandomState(SEED)
    for label in range(len(counts["train"])):
        shuffled = generator.permutation(np.flatnonzero(labels_N == label)).tolist()
        for split in ("test", "val", "train"):
            for _ in range(counts[split][label]):
                yield split, label, shuffled.pop()


def main() -> None:
    """Write one set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder}: exists, expected a new folder")
    images, labels_N, names, counts = SETS[args.set]()
    for split, label, index in choose(labels_N, counts):
        suffix = "jpg" if args.set == "photo-patches" and index % 3 else "png"
        file = args.folder / split / names[label] / f"{index:05d}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(file)
    print(f"{args.folder}: " + ", ".join(f"{split} {sum(counts[split]):,}" for split in counts))


if __name__ == "__main__":
    main()
