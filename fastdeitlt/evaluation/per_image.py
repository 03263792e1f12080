"""Results of single images: confusions, the most confident mistakes, and CSV with one row per image."""

# N images in the set, K classes, C channels, H height, W width

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastdeitlt.data.pixels.request import centre_crops
from fastdeitlt.data.pixels.source import Source
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import csv_name
from fastdeitlt.evaluation.metrics import CHUNK, LEFT_OUT, readable
from fastdeitlt.store.manifest import Preprocess

NUM_MISTAKES = 12
PICTURE_SIDE = 160
"""Largest side of a picture in pixels; larger crops are scaled down."""
LOSSLESS_SIDE = 64
"""Largest side of a PNG in pixels; larger pictures are JPEGs."""


def decisions(logits_NK: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return each image's likeliest class, int64 [N], and its probability, float64.

    Args:
        logits_NK: logits of one head.
        temperature: divisor of the logits.
    """
    parts = []
    for chunk_NK in logits_NK.split(max(1, CHUNK // logits_NK.shape[1])):
        scaled_NK = chunk_NK.double() / temperature
        largest_N, predicted_N = scaled_NK.max(dim=1)
        parts.append((predicted_N, (largest_N - scaled_NK.logsumexp(dim=1)).exp()))
    predicted_N, probability_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return predicted_N, probability_N


def confusion(heads: Mapping[str, Tensor], labels_N: Tensor) -> list[list[int]]:
    """Count the images of each class by each head's predicted class.

    Returns:
        (label, predicted class, images for each head) of every pair with images for some head, in order.
    """
    *parts, labels_N = readable(*heads.values(), labels_N)
    num_classes = parts[0].shape[1]
    counts: dict[int, list[int]] = {}
    for column, logits_NK in enumerate(parts):
        pairs, numbers = (labels_N * num_classes + logits_NK.argmax(dim=1)).unique(return_counts=True)
        for pair, number in zip(pairs.tolist(), numbers.tolist(), strict=True):
            counts.setdefault(pair, [0] * len(parts))[column] = number
    return [[*divmod(pair, num_classes), *numbers] for pair, numbers in sorted(counts.items())]


def image_facts(
    heads: Mapping[str, Tensor],
    labels_N: Tensor,
    images: LongTailSet,
    source: Source,
    preprocess: Preprocess,
    temperatures: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Collect the facts of single images for analysis/images.json.

    Args:
        heads: logits_NK by name; the first head predicts.
        labels_N: LEFT_OUT for an image that could not be read.
        images: the set.
        source: pixels of the set.
        preprocess: preprocessing of the scored crops.
        temperatures: temperatures of the heads, fitted on validation images.
    """
    main, logits_NK = next(iter(heads.items()))
    temperature = (temperatures or {}).get(main)
    predicted_N, probability_N = decisions(logits_NK, temperature or 1.0)
    is_wrong_N = (predicted_N != labels_N) & (labels_N != LEFT_OUT)
    order_N = torch.where(is_wrong_N, probability_N, -1.0).argsort(descending=True, stable=True)
    worst = order_N[: min(NUM_MISTAKES, int(is_wrong_N.sum()))]
    pictures = []
    if len(worst):
        ((_, crops_BHWC),) = source.crops(
            centre_crops(worst.numpy(), len(worst), preprocess.img_size, preprocess.resize)
        )
        pictures = [picture(Image.fromarray(crop_HWC)) for crop_HWC in crops_BHWC.cpu().numpy()]
    return {
        "heads": list(heads),
        "confusion": confusion(heads, labels_N),
        "temperature": temperature,
        "mistakes": [
            {
                "path": images.paths[index],
                "label": int(labels_N[index]),
                "predicted": int(predicted_N[index]),
                "probability": float(probability_N[index]),
                "picture": shown,
            }
            for index, shown in zip(worst.tolist(), pictures, strict=True)
        ],
    }


def picture(image: Image.Image) -> str:
    """Return a small picture as a data URI: PNG if tiny, else JPEG."""
    if max(image.size) <= LOSSLESS_SIDE:
        return data_uri(image, "PNG", optimize=True)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "JPEG", quality=85)


def data_uri(image: Image.Image, kind: str, **how: Any) -> str:
    """Return an image as a data URI; ``how`` are options of Pillow's ``save``."""
    data = io.BytesIO()
    image.save(data, format=kind, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def to_csv(
    heads: Mapping[str, Tensor],
    labels_N: Tensor,
    images: LongTailSet,
    class_names: Sequence[str],
    temperatures: Mapping[str, float] | None = None,
) -> str:
    """Return CSV with one row per image.

    Columns: path, label, each head's prediction and probability; ``error`` if unreadable.

    Args:
        heads: logits_NK by name.
        labels_N: LEFT_OUT for an image that could not be read.
        images: the set.
        class_names: name of each label [K].
        temperatures: divisors of the heads' logits; 1 for the others.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    answers = [f"{head.lower()}_{what}" for head in heads for what in ("label", "class", "probability")]
    writer.writerow(["path", "label", "class", *answers, "error"])
    names = [csv_name(name) for name in class_names]
    found = [decisions(logits_NK, (temperatures or {}).get(head, 1.0)) for head, logits_NK in heads.items()]
    columns = [(predicted_N.tolist(), probability_N.tolist()) for predicted_N, probability_N in found]
    for index, (path, label) in enumerate(zip(images.paths, images.labels.tolist(), strict=True)):
        cells: list[object] = [csv_name(path), label, names[label]]
        if labels_N[index] == LEFT_OUT:
            writer.writerow([*cells, *[""] * len(answers), "unreadable"])
            continue
        for predicted, probability in columns:
            cells += [predicted[index], names[predicted[index]], f"{probability[index]:.6f}"]
        writer.writerow([*cells, ""])
    return text.getvalue()
