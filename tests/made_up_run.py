"""A run folder as ``train`` leaves it, with made-up numbers, for the tests of reports."""

import functools
import json
from html.parser import HTMLParser

import numpy as np
import torch

from fastdeitlt import config
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.evaluation.metrics import heads_of, score, score_heads
from fastdeitlt.evaluation.per_image import data_uri, image_facts
from fastdeitlt.evaluation.posthoc import post_hoc
from fastdeitlt.reporting.analysis import overlay
from fastdeitlt.reporting.analysis import write as write_analysis
from fastdeitlt.store.manifest import preprocess_of

COUNTS = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
EVIL = '<script>alert("x")</script> & $\\frac{'
NAMES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", EVIL]
EPOCHS, STEPS_PER_EPOCH = 12, 5


def logits(cls_gain, dist_gain, seed=0, num_classes=10, num_images=400):
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(num_images) % num_classes
    onehot = torch.nn.functional.one_hot(labels_N, num_classes)
    tail_first_K = torch.linspace(1, 0, num_classes)
    cls = torch.randn(num_images, num_classes, generator=generator) + cls_gain * onehot * (0.4 + tail_first_K)
    dist = torch.randn(num_images, num_classes, generator=generator) + dist_gain * onehot * (1.2 - 0.5 * tail_first_K)
    return cls, dist, labels_N


def make_run(folder, *, names=NAMES, seed=0, overrides=()):
    """A run folder as ``train`` leaves it, with made-up numbers."""
    folder.mkdir(parents=True)
    cfg = config.load("quickstart", [f"train.epochs={EPOCHS}", "loss.drw_epoch=9", "mixup.off_in_drw=true", *overrides])
    (folder / "config.yaml").write_text(config.dump(cfg))
    (folder / "env.json").write_text(
        json.dumps({"python": "3.11", "gpu": None, "cpus": 2, "packages": {"torch": "2.14.1"}, "commit": "abc123"})
    )
    for file, text in _numbers(seed).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    write_analysis("student", analysis_facts(names), folder)
    (folder / "analysis" / "teacher.json").write_text(json.dumps(teacher_facts(names)))
    (folder / "checkpoints" / "best").mkdir(parents=True)
    (folder / "checkpoints" / "best" / "manifest.json").write_text(json.dumps({"class_names": names}))
    return folder


@functools.cache
def _numbers(seed):
    """Files of a run, by name."""
    records = []
    for step in range(1, EPOCHS * STEPS_PER_EPOCH + 1):
        progress = step / (EPOCHS * STEPS_PER_EPOCH)
        loss = 2.3 - 1.2 * progress
        facts = {"loss": loss, "cls_loss": loss - 0.2, "dist_loss": loss + 0.2, "lr": 5e-4 * (1 - progress) + 1e-5}
        speed = {"images_per_s": 300 + step % 7, "data_wait": 0.02, "grad_norm": 1.5, "eta_s": 1.0}
        records.append({"kind": "step", "step": step, "epoch": (step - 1) // STEPS_PER_EPOCH, **facts, **speed})
    for epoch in range(1, EPOCHS, 2):
        for weights in ("model", "ema"):
            result = score(*logits(0.25 * epoch, 0.2 * epoch, seed), COUNTS, "fashion_mnist_lt").to_json()
            step = (epoch + 1) * STEPS_PER_EPOCH
            facts = {"epoch": epoch, "weights": weights, "set": "val", "result": result, "tail_seen": result}
            cosines = {f"cosine_{group}": 0.95 - epoch / 40 for group in ("all", "head", "mid", "tail")}
            records.append({"kind": "eval", "step": step, **facts, **cosines})
        if epoch >= 9:
            signs = [
                {"name": "tail expert", "seen": epoch == 9, "text": f"DIST and CLS {EVIL}"},
                {"name": "head", "seen": False, "text": "AVG keeps the head accuracy: 90.0 %"},
            ]
            records.append({"kind": "signs", "step": step, "epoch": epoch, "weights": "ema", "signs": signs})
    cls, dist, labels = logits(3.2, 2.6, seed)
    noise = torch.randn(dist.shape, generator=torch.Generator().manual_seed(seed))
    results = {
        "test": score(cls, dist, labels, COUNTS, "fashion_mnist_lt").to_json(),
        "teacher": score_heads({"TEACHER": dist * 0.8 + noise * 0.2}, labels, COUNTS, "fashion_mnist_lt").to_json(),
        "posthoc": post_hoc(logits(3.2, 2.6, seed + 1), (cls, dist, labels), COUNTS, "fashion_mnist_lt").to_json(),
        "published": {"all": 87.5, "head": 94.5, "mid": 84.1, "tail": 85.0},
        "selected": {"step": 60, "epoch": 11, "weights": "ema", "accuracy": 70.0, "on": "val"},
    }
    return {
        "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in records),
        "results.json": json.dumps(results),
        "analysis/images.json": json.dumps(facts_of_images(cls, dist, labels)),
    }


def facts_of_images(cls, dist, labels, paths="images/deep/folder/{}.png"):
    """What the test leaves of single images, which are made up."""
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    names = [paths.format(index) for index in range(len(labels))]
    images = LongTailSet(names, labels.numpy(), [1] * cls.shape[1], images_NHWC=pixels_NHWC)
    source = open_source(images, config.DataConfig(), torch.device("cpu"))
    preprocess = preprocess_of(config.Config(evaluate={"crop_pct": 1.0}), 32)
    return image_facts(heads_of(cls, dist), labels, images, source, preprocess, {"AVG": 1.5})


def teacher_facts(names):
    """What ``diagnose_teacher`` leaves, made up."""
    condition = {
        "accuracy": 67.1, "either": 71.2, "entropy": 0.29, "agreement": {"head": 71.2, "mid": 50.3, "tail": None}
    }  # fmt: skip
    counts = [max(count // 2, 1) for count in range(len(names), 0, -1)]
    return {
        "path": "runs/teacher-quickstart-1efd5b1b/checkpoints/best",
        "images": 2048,
        "class_names": ["Papilio polyxenes asterius", *names[1:-1], "Zygoballus rufipes"],
        "groups": {"head": [0, 1, 2], "mid": [3, 4, 5, 6], "tail": [7, 8, 9]},
        **dict.fromkeys(("clean", "augmented", "mixed", "mixed_resized"), condition),
        "hard_targets": {"labels": counts, "targets": counts[::-1]},
        "sharpness": {"loss": 0.35, "gap": {"0.01": 0.03, "0.5": 9.36}, "top_eigenvalue": 95.9},
        "feature_rank": {"sample": 26, "feature": 27, "width": 64},
    }


def analysis_facts(names):
    """What ``analyze student`` finds, made up."""
    picture = data_uri(overlay.strip(np.zeros((8, 8, 3), np.uint8), [np.eye(4, dtype=np.float32)] * 4), "PNG")
    groups = {"head": names[0], "mid": names[5], "tail": names[9]}
    return {
        "set": "test", "images": 400, "distance": [[10.0, 12.0, 15.0], [9.0, 14.0, 16.0]], "uniform_distance": 16.1,
        "rank": {token: {"sample": [5, 9], "feature": [6, 8]} for token in ("CLS", "DIST")},
        "cosine": [0.9, 0.4], "patch_similarity": [0.2, 0.6],
        "maps": {g: {"images": 100, "likeness": 0.9, "spread_cls": 0.8, "spread_dist": 0.7} for g in ("all", *groups)},
        "gallery": [
            {"group": group, "class": name, "training_images": 7, "picture": picture,
             "predicted": {"AVG": name, "CLS": names[0], "DIST": name}}
            for group, name in groups.items()
        ],
    }  # fmt: skip


class Reader(HTMLParser):
    """Collects tags, addresses and the cells of every table; refuses unclosed tags."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.stack, self.addresses, self.tables = [], [], [], []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for name, v in attributes if name in ("src", "href", "xlink:href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name.endswith(("href", "src"))]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.stack):
            self.tables[-1][-1][-1] += data


def read(path):
    return Reader(path.read_text(encoding="utf-8"))
