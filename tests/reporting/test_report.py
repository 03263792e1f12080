"""The report: complete from what a run leaves behind, honest about what is missing, safe with any class name."""

import json
import re
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
from made_up_run import COUNTS, EVIL, NAMES, Reader, logits, make_run, read, teacher_facts

from fastdeitlt import cli, config
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import score, score_heads
from fastdeitlt.evaluation.posthoc import METHODS
from fastdeitlt.reporting import figures
from fastdeitlt.reporting.compare import compare
from fastdeitlt.reporting.published import TABLES, published_for, published_table
from fastdeitlt.reporting.report import write_report


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The page of a run."""
    return write_report(make_run(tmp_path_factory.mktemp("shown") / "run"))


def test_the_page_shows_every_section_and_the_numbers_of_results_json(tmp_path):
    folder = make_run(tmp_path / "quick", overrides=["data.dataset=cifar10_lt"])
    path = write_report(folder)
    html, page = path.read_text(encoding="utf-8"), read(path)
    for title in (
        "Result",
        "Signs of failure",
        "Learning",
        "Classes",
        "Mistakes",
        "Calibration",
        "Fitted on validation images",
        "Other class frequencies",
        "Attention and features",
        "Teacher",
        "Speed",
        "Environment",
        "Configuration",
        "Reproduce this run",
        "Next steps",
    ):
        assert f"<h2>{title}</h2>" in html
    assert path == folder / "report.html" and page.tags.count("svg") == 17
    top1 = json.loads((folder / "results.json").read_text())["test"]["heads"]["DIST"]["top1"]
    for table, split in zip(page.tables, ("threshold", "official"), strict=False):
        rows = {row[0]: row[1:] for row in table}
        assert list(rows) == ["", "AVG", "CLS", "DIST", "teacher", "chance", "published"]
        assert rows["DIST"] == [f"{top1[split][group]:.1f}" for group in ("all", "head", "mid", "tail")]
        assert rows["chance"] == ["10.0"] * 4
        assert rows["published"] == ["87.5", *(["94.5", "84.1", "85.0"] if split == "official" else ["-"] * 3)]
    assert page.tables[0][0] == ["", "all (10)", "head (5)", "mid (3)", "tail (2)"]
    assert page.tables[1][0] == ["", "all (10)", "head (3)", "mid (4)", "tail (3)"]
    assert "abc123" in html and "loss.drw_epoch" in html and "averaged weights of epoch 12" in html


def test_the_page_asks_the_network_for_nothing_and_runs_nothing(shown):
    page, html = read(shown), shown.read_text()
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("img") == 15
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    outside = {a for a in re.findall(r"https?://[^\"'\s<)]+", html) if not a.startswith("http://www.w3.org/")}
    assert outside == set() and "@import" not in html and '"viewport" content="width=device-width' in html
    assert all(place.startswith("#") for place in re.findall(r"url\(['\"]?([^)]*)", html))


def test_class_names_and_run_names_are_text_and_never_markup(tmp_path):
    folder = make_run(tmp_path / "<img src=x onerror=alert(1)>", names=[EVIL] * 10)
    html = write_report(folder).read_text(encoding="utf-8")
    page = Reader(html)  # fails on an event handler
    assert "script" not in page.tags and page.tags.count("img") == 15
    assert "&lt;script&gt;" in html and any(EVIL in row for table in page.tables for row in table)


def test_control_characters_in_names_are_escaped_in_the_page(tmp_path):
    html = write_report(make_run(tmp_path / "run", names=["\x1b]0;t\x07cat\u202e"] * 10)).read_text(encoding="utf-8")
    assert all(character.isprintable() or character == "\n" for character in html)
    assert r"\x1b]0;t\x07cat\u202e" in html


def test_a_crashed_run_without_results_still_gets_curves(tmp_path):
    folder = make_run(tmp_path / "crashed")
    (folder / "results.json").unlink()
    (folder / "env.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 61, "lo')  # cut short by the crash
    html = write_report(folder).read_text(encoding="utf-8")
    assert "No test results yet" in html and "<h2>Learning</h2>" in html
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("counts", [[40, 0, 9, 0], [0, 0, 0, 0], [*range(1, 50), 0]])
def test_classes_without_training_images_are_drawn_without_a_warning(counts):
    labels_N = torch.arange(4 * len(counts)) % len(counts)
    logits_NK = torch.randn(len(labels_N), len(counts), generator=torch.Generator().manual_seed(0))
    svg = figures.class_accuracy(score(logits_NK, logits_NK, labels_N, counts))
    assert svg.startswith("<svg") and "nan" not in svg.lower()


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


def test_scores_on_validation_images_are_named_and_not_set_beside_those_on_test_images(tmp_path):
    folders = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    results = json.loads((folders[1] / "results.json").read_text())
    (folders[1] / "results.json").write_text(json.dumps({"val": results["test"]}))
    html, page = (path := compare(folders)).read_text(), read(path)
    tables = [table for table in page.tables if table[0] == ["", "all", "head", "mid", "tail"]]
    runs = [[row[0] for row in table[1:]] for table in tables]
    assert len(runs) == 12 and runs[:6] == [["a", "c"]] * 6 and runs[6:] == [["b"]] * 6
    assert "AVG, threshold split, test images" in html and "AVG, thirds by class size, validation images" in html
    for folder, name in ((folders[0], "test"), (folders[1], "validation")):
        table = next(table for table in read(write_report(folder)).tables if table[0][:2] == ["class", "training"])
        assert table[0][2] == name


def test_a_teacher_s_run_has_a_report_of_its_own(tmp_path):
    folder = make_run(tmp_path / "teacher", overrides=["teacher_training.drw_epoch=6"])
    _, dist, labels = logits(3, 3)
    result = score_heads({"TEACHER": dist}, labels, COUNTS, "fashion_mnist_lt").to_json()
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


def test_the_published_table_of_the_data_set_has_the_run_in_front_under_both_splits(tmp_path):
    folder = make_run(tmp_path / "run", overrides=["data.dataset=cifar10_lt"])
    table = next(table for table in read(write_report(folder)).tables if table[0][-1] == "split")
    assert [row[-1] for row in table[1:3]] == ["threshold", "official"] and table[1][0] == "this run"
    assert ["ViT-B", "62.6", "-", "-", "-", "-"] in table
    assert table[-1] == ["DeiT-LT-B (PaCo+SAM)", "87.5", "94.5", "84.1", "85.0", "official"]
    other = config.load("quickstart", ["data.dataset=cifar10_lt", "data.imbalance_factor=0.1"])
    assert published_table(other.data) is None


@pytest.mark.parametrize(
    ("recipe", "changes", "threshold", "official"),
    [
        ("cifar100_lt_r50", [], {"all": 60.5}, {"all": 60.5, "head": 74.8, "mid": 60.3, "tail": 43.1}),
        ("cifar100_lt_r100", [], {"all": 55.6}, {"all": 55.6}),  # split unknown
        ("cifar10_lt_r100", ["data.imbalance_factor=0.02"], {}, {}),
        ("cifar10_lt_r100", ["data.imbalance_kind=step"], {}, {}),
        ("cifar10_lt_r100", ["data.dataset=cifar100_lt"], {}, {}),
        ("imagenet_lt", [], {"all": 59.1, "head": 66.6, "mid": 58.3, "tail": 40.0}, {"all": 59.1}),
        ("imagenet_lt", ["data.dataset=folder", "data.root=images"], {}, {}),
        ("inat18", [], *[{"all": 75.1, "head": 70.3, "mid": 75.2, "tail": 76.2}] * 2),
        ("teacher/imagenet_lt", [], {"all": 53.1}, {"all": 53.1}),  # neither split gives 53.1
        ("teacher/cifar10_lt_r50", [], {"all": 84.8}, {"all": 84.8}),
        ("teacher/cifar10_lt_r50", ["data.imbalance_factor=0.01"], {}, {}),  # there a student has 84.8
        ("quickstart", ["published={all: 90, tail: 80}"], *[{"all": 90, "tail": 80}] * 2),  # the user's own
    ],
)
def test_published_figures_stand_beside_their_own_data_set_and_split(recipe, changes, threshold, official):
    cfg = config.load(recipe, changes)
    is_teacher = recipe.startswith("teacher/")
    run = SimpleNamespace(cfg=cfg, published=cfg.published, is_teacher=is_teacher)
    assert published_for(run, "threshold") == threshold and published_for(run, "official") == official


def test_the_published_figures_of_each_recipe_are_a_row_of_the_table_of_its_data():
    for cfg in (config.load(name) for name in config.recipes() if not name.startswith("ablation/")):
        _, rows = published_table(cfg.data) or ("", ())
        assert not cfg.published or cfg.published in [row.by_group for row in rows]


def test_a_published_row_s_split_is_the_one_that_gives_back_its_overall_accuracy():
    sizes = {10: {"official": (3, 4, 3)}, 100: {"official": (36, 35, 29)}}
    sizes |= {1000: {"official": (390, 445, 165), "threshold": (385, 479, 136)}, 8142: {"both": (842, 3701, 3599)}}
    checked = 0
    for name, rows in TABLES.items():
        classes = {"CIFAR-10-": 10, "CIFAR-100": 100, "ImageNet-": 1000, "iNaturali": 8142}[name[:9]]
        for row in rows:
            if not row.split:
                continue
            away = {
                split: abs(np.average([row.head, row.mid, row.tail], weights=weights) - row.overall)
                for split, weights in sizes[classes].items()
            }
            assert min(away, key=away.get) == row.split and away[row.split] < 0.3
            checked += 1
    assert checked == 22


def test_what_validation_can_fit_and_shifted_classes_are_shown_as_results_json_has_them(shown):
    page, fitted = read(shown), json.loads(shown.with_name("results.json").read_text())["posthoc"]
    table = next(table for table in page.tables if [row[0] for row in table[3:]] == list(METHODS))
    top1 = fitted["result"]["heads"]["fusion"]["top1"]["official"]
    assert table[list(METHODS).index("fusion") + 3][1:5] == [f"{top1[g]:.1f}" for g in ("all", "head", "mid", "tail")]
    assert [row[0] for row in page.tables if row[0][0] == "method"] == [["method", "values"]]
    shifted = next(table for table in page.tables if table[0][0] == "test classes")
    assert shifted[0][1:] == ["AVG", "CLS", "DIST", "AVG, known prior"] and len(shifted) == 12


def test_signs_of_failure_say_how_often_and_what(shown):
    table = next(table for table in read(shown).tables if table[0][0] == "sign")
    assert table[1][:3] == ["tail expert", "no", "1 of 2, last after epoch 10"] and EVIL in table[1][3]
    assert table[2] == ["head", "no", "0 of 2", "AVG keeps the head accuracy: 90.0 %"]


def test_a_page_without_analyses_names_the_commands_that_make_them(tmp_path):
    folder = make_run(tmp_path / "run", overrides=["teacher.path=somewhere"])
    html = write_report(folder).read_text(encoding="utf-8")
    assert "Teacher teacher-quickstart-1efd5b1b on 2,048 training images" in html and "fastdeitlt analyze" not in html
    assert "sharpness: increase" in html
    kept = {key: value for key, value in teacher_facts(NAMES).items() if key != "sharpness"}  # what train leaves
    (folder / "analysis" / "teacher.json").write_text(json.dumps(kept))
    html = write_report(folder).read_text(encoding="utf-8")
    assert f"fastdeitlt analyze teacher {folder}" in html and "feature rank, by sample" in html
    assert "Add the teacher&#39;s sharpness to this page" in html
    assert "sharpness: " not in html and "Hessian" not in html
    (folder / "analysis" / "teacher.json").unlink()
    html = write_report(folder).read_text(encoding="utf-8")
    assert f"fastdeitlt analyze teacher {folder}" in html and "analyze student" not in html
    (folder / "analysis" / "student.json").unlink()
    html = write_report(folder).read_text(encoding="utf-8")
    assert f"fastdeitlt analyze student {folder}" in html and "Attention and features" not in html


@pytest.mark.skipif(browser.find() is None, reason="no Chromium (make test installs one as root with apt-get)")
def test_in_a_browser_nothing_overflows_breaks_or_fails_at_phone_and_desktop_width(tmp_path):
    runs = [make_run(tmp_path / ("long-name-" * 8), seed=0), make_run(tmp_path / "b", overrides=["loss.alpha=0.7"])]
    bad = tmp_path / "bad.html"
    bad.write_text("<div style='width: 2000px'>wide</div><img src='absent.png'><script>oops()</script>")
    find = """({document}) => {
        const all = selector => [...document.querySelectorAll(selector)], page = document.documentElement
        all("details").forEach(fold => fold.open = true)
        const teacher = all("section").find(section => section.querySelector("h2").textContent == "Teacher")
        return {
            overflow: Math.max(page.scrollWidth - page.clientWidth, 0),
            broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
            small: all("figure svg").filter(svg => svg.getBoundingClientRect().width <= 280).length,
            scrolling: [...teacher?.querySelectorAll(".scroll") ?? []].filter(t => t.scrollWidth > t.clientWidth)
                .map(table => table.textContent.trim()),
        }
    }"""
    pages = [(page, width) for page in (write_report(runs[0]), compare(runs)) for width in (390, 1280)]
    found, errors = browser.look([*pages, (bad, 390)], find, tmp_path)
    assert found[:-1] == [{"overflow": 0, "broken": 0, "small": 0, "scrolling": []}] * 4
    assert found[-1]["overflow"] > 0 and found[-1]["broken"] == 1  # the checks can fail
    assert len(errors) == 1 and "oops is not defined" in errors[0]


def test_a_page_goes_where_it_is_asked_to(tmp_path, capsys):
    folder, out = make_run(tmp_path / "run"), tmp_path / "page.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    assert out.is_file() and not (folder / "report.html").exists()
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "absent" / "page.html")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_by_their_places(tmp_path):
    folders = [make_run(tmp_path / place / "run") for place in ("a", "b")]
    assert "2 runs: a/run, b/run." in compare(folders).read_text()
    assert "2 runs: run, other." in compare([folders[0], make_run(tmp_path / "other")]).read_text()


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="expected at least 2"):
        compare([tmp_path])
    folder = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="got one run twice"):
        compare([folder, tmp_path / "." / "run"])
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
