"""The report: complete from what a run leaves behind, honest about what is missing, safe with any class name."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from fastdeitlt import config
from fastdeitlt.compare import compare
from fastdeitlt.errors import UserError
from fastdeitlt.metrics import score, score_single
from fastdeitlt.report import results_table, write_report

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
            records.append(
                {"kind": "eval", "step": step, "epoch": epoch, "weights": weights, "set": "val", "result": result}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cls, dist, labels = logits(3.2, 2.6, seed)
    results = {
        "test": score(cls, dist, labels, COUNTS, "fashion_mnist_lt").to_json(),
        "teacher": score_single(
            dist * 0.8 + torch.randn_like(dist) * 0.2, labels, COUNTS, "fashion_mnist_lt"
        ).to_json(),
        "published": {"all": 87.5, "head": 94.5, "mid": 84.1, "tail": 85.0},
        "selected": {"step": 60, "epoch": 11, "weights": "ema", "accuracy": 70.0, "on": "val"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "checkpoints" / "best").mkdir(parents=True)
    (folder / "checkpoints" / "best" / "manifest.json").write_text(json.dumps({"class_names": names}))
    return folder


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
        if self.stack and self.stack[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def read(path):
    return Reader(path.read_text(encoding="utf-8"))


def test_the_page_shows_every_section_and_the_numbers_of_results_json(tmp_path):
    folder = make_run(tmp_path / "quick")
    path = write_report(folder)
    html, page = path.read_text(encoding="utf-8"), read(path)
    for title in (
        "Result",
        "Learning",
        "Classes",
        "Calibration",
        "Speed",
        "Environment",
        "Configuration",
        "Run it again",
    ):
        assert f"<h2>{title}</h2>" in html
    assert path == folder / "report.html" and page.tags.count("svg") == 8
    top1 = json.loads((folder / "results.json").read_text())["test"]["heads"]["DIST"]["top1"]
    for table, split in zip(page.tables, ("threshold", "official"), strict=False):
        rows = {row[0]: row[1:] for row in table}
        assert list(rows) == ["", "AVG", "CLS", "DIST", "teacher", "chance", "published"]
        assert rows["DIST"] == [f"{top1[split][group]:.1f}" for group in ("all", "head", "mid", "tail")]
        assert rows["chance"] == ["10.0"] * 4 and rows["published"] == ["87.5", "94.5", "84.1", "85.0"]
    assert page.tables[0][0] == ["", "all (10)", "head (5)", "mid (3)", "tail (2)"]
    assert page.tables[1][0] == ["", "all (10)", "head (3)", "mid (4)", "tail (3)"]
    assert "abc123" in html and "loss.drw_epoch" in html and "averaged weights of epoch 12" in html


def test_the_page_asks_the_network_for_nothing_and_runs_nothing(tmp_path):
    page = read(write_report(make_run(tmp_path / "quick")))
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    html = (tmp_path / "quick" / "report.html").read_text()
    outside = {a for a in re.findall(r"https?://[^\"'\s<)]+", html) if not a.startswith("http://www.w3.org/")}
    assert outside == set() and "@import" not in html


def test_class_names_and_run_names_are_text_and_never_markup(tmp_path):
    folder = make_run(tmp_path / "<img src=x onerror=alert(1)>", names=[EVIL] * 10)
    html = write_report(folder).read_text(encoding="utf-8")
    page = Reader(html)  # fails on an event handler
    assert "script" not in page.tags and "img" not in page.tags
    assert "&lt;script&gt;" in html and any(EVIL in row for table in page.tables for row in table)


def test_a_crashed_run_without_results_still_gets_curves(tmp_path):
    folder = make_run(tmp_path / "crashed")
    (folder / "results.json").unlink()
    (folder / "env.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 61, "lo')  # cut short by the crash
    html = write_report(folder).read_text(encoding="utf-8")
    assert "No results yet" in html and "<h2>Learning</h2>" in html
    assert "<h2>Result</h2>" not in html and "<h2>Classes</h2>" not in html and "<h2>Environment</h2>" not in html


@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl", "results.json"])
def test_any_single_file_of_a_run_makes_a_page(tmp_path, kept):
    folder = make_run(tmp_path / "run")
    for name in {"config.yaml", "metrics.jsonl", "results.json", "env.json"} - {kept}:
        (folder / name).unlink()
    assert "<h2>" in write_report(folder).read_text(encoding="utf-8")


def test_a_group_without_test_images_shows_a_dash(tmp_path):
    folder = make_run(tmp_path / "run")
    cls, dist, labels = logits(3, 3)
    present = labels < 8
    result = score(cls[present], dist[present], labels[present], COUNTS, "fashion_mnist_lt")
    (folder / "results.json").write_text(json.dumps({"test": result.to_json()}))
    path = write_report(folder)
    rows = {row[0]: row[1:] for row in read(path).tables[0]}
    assert rows["AVG"][3] == "-" and not re.search(r"\bnan\b", path.read_text(encoding="utf-8"))


def test_thousands_of_classes_do_not_make_thousands_of_rows(tmp_path):
    num_classes = 1200
    counts = [max(2, int(1000 * 0.994**k)) for k in range(num_classes)]
    result = score(*logits(3, 3, num_classes=num_classes, num_images=2400), counts, "inat18")
    (tmp_path / "results.json").write_text(json.dumps({"test": result.to_json()}))
    page = read(write_report(tmp_path))
    assert max(len(table) for table in page.tables) == 201
    assert (tmp_path / "report.html").stat().st_size < 600_000


def test_the_terminal_table_has_teacher_chance_and_published(tmp_path):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(results_table(make_run(tmp_path / "run")))
    for row in ("AVG", "CLS", "DIST", "teacher", "chance", "published"):
        assert row in capture.get()
    assert "87.5" in capture.get()


def test_compare_sets_runs_side_by_side_and_names_what_differs(tmp_path):
    first = make_run(tmp_path / "a", seed=0)
    second = make_run(tmp_path / "b", seed=1, overrides=["loss.alpha=0.7"])
    unfinished = make_run(tmp_path / "c", seed=2)
    (unfinished / "results.json").unlink()
    path = compare([first, second, unfinished])
    page = read(path)
    assert path == tmp_path / "compare.html"
    average = next(table for table in page.tables if table[0] == ["", "all", "head", "mid", "tail"])
    assert [row[0] for row in average[1:]] == ["a", "b"]
    assert page.tables[-1][1:] == [["loss.alpha", "0.5", "0.7", "0.5"]]


def test_a_teacher_s_run_has_a_report_of_its_own(tmp_path):
    folder = make_run(tmp_path / "teacher", overrides=["teacher_training.drw_epoch=6"])
    _, dist, labels = logits(3, 3)
    result = score_single(dist, labels, COUNTS, "fashion_mnist_lt").to_json()
    facts = {"images_per_s": 300.0, "data_wait": 0.0, "lr": 0.1, "rho": 0.1}
    records = [{"kind": "step", "step": s, "epoch": s // 5, "loss": 2.0 - s / 50, **facts} for s in range(50)]
    records.append({"kind": "eval", "step": 50, "epoch": 9, "weights": "model", "set": "val", "result": result})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "results.json").write_text(json.dumps({"test": result, "selected": {"epoch": 9, "on": "val"}}))
    path = write_report(folder)
    html, page = path.read_text(encoding="utf-8"), read(path)
    assert "teacher resnet32 on fashion_mnist_lt" in html and "marks epoch 6" in html
    assert [row[0] for row in page.tables[0]] == ["", "TEACHER", "chance"]
    compare([folder, make_run(tmp_path / "student")])


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="expected at least 2"):
        compare([tmp_path])
    folder = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="expected different names"):
        compare([folder, folder])
    (folder / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: cannot be read as JSON"):
        write_report(folder)
    (folder / "results.json").write_text('{"test": {"heads": 3}}')
    with pytest.raises(UserError, match=r"result: heads"):
        write_report(folder)
    (folder / "results.json").unlink()
    (folder / "metrics.jsonl").write_text("oops\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1: not JSON"):
        write_report(folder)
