"""A small student saved as a model folder, and images to show it. Shared by the tests of what reads model folders."""

import csv
from contextlib import closing

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.evaluation.evaluate import collect_logits
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.store.checkpoint import save_model_folder
from fastdeitlt.store.manifest import Preprocess

NAME, SIZE = "deit_tiny_distilled_patch8_32", 32
CLASS_NAMES = ["<b>cat</b>", "dog, small", "[red]eel[/red]", "fish"]
MANIFEST = {
    "kind": "student",
    "class_names": CLASS_NAMES,
    "class_counts": [500, 60, 30, 4],
    "dataset": "folder",
    "preprocess": {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3], "img_size": SIZE, "crop_pct": 0.8},
}


def save_student(folder, *, depth=2, **changes):
    """Save a student with random weights far from zero, so that its decisions differ by image."""
    torch.manual_seed(1)
    student = create_student(NAME, len(CLASS_NAMES), depth=depth)
    for weight in (parameter for parameter in student.parameters() if parameter.ndim > 1):
        torch.nn.init.normal_(weight, std=0.15)
    model = {"name": NAME, "num_classes": len(CLASS_NAMES), "img_size": SIZE, "depth": depth}
    save_model_folder(folder, student.state_dict(), MANIFEST | {"model": model} | changes)
    return student.eval()


def save_images(folder, shapes=((40, 40), (57, 33), (32, 90), (200, 150), (33, 33))):
    """PNG and JPEG files of odd sizes in colour and gray; returns their paths in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for index, (height, width) in enumerate(shapes):
        low = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)
        image = image.convert("L") if index % 3 == 2 else image
        paths.append(folder / f"{index}.{'jpg' if index % 2 else 'png'}")
        image.save(paths[-1])
    return paths


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def listed(paths):
    """The images as a data set, of four classes."""
    return LongTailSet([p.name for p in paths], np.zeros(len(paths), np.int64), [5, 0, 0, 0], str(paths[0].parent))


def evaluated(model, paths, batch_size=4):
    """CLS and DIST logits of the images through the reader of training and evaluation."""
    images, cpu = listed(paths), torch.device("cpu")
    with closing(Stream(images, DataConfig(num_threads=1), cpu)) as source:
        preprocess = Preprocess(**MANIFEST["preprocess"])
        return collect_logits(model, source, images, preprocess, batch_size=batch_size, device=cpu)[:2]


def save_teacher(folder, arch="resnet8", *, loss="ldam", normed_head=True):
    """Save a teacher with random weights; LDAM's has a cosine head and logits that its softmax multiplies by 30."""
    torch.manual_seed(2)
    network = create_teacher(arch, len(CLASS_NAMES), normed_head=normed_head and loss == "ldam")
    for weight in (parameter for parameter in network.parameters() if parameter.ndim > 1):
        torch.nn.init.normal_(weight, std=0.2)
    model = {"arch": arch, "num_classes": len(CLASS_NAMES), "img_size": SIZE}
    facts = {"kind": "teacher", "model": model, "recipe": {"loss": loss, "ldam_scale": 30.0}}
    save_model_folder(folder, network.state_dict(), MANIFEST | facts)
    return network.eval()


def lively(network: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights that a wrong fold would not survive."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.2)
    return network.eval()
