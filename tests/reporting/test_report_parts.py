"""The report's mistakes, baselines and next steps, and its wording."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from made_up_run import COUNTS, EVIL, NAMES, facts_of_images, logits, make_run, read
from small_model import read_csv

from fastdeitlt import arguments, config
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import score, score_heads
from fastdeitlt.reporting import figures
from fastdeitlt.reporting.heat_map import NAME_LENGTH, heat_map
from fastdeitlt.reporting.next_steps import next_section
from fastdeitlt.reporting.report import write_report
from fastdeitlt.run.run_files import read_run
from fastdeitlt.teachers.schedule import learning_rate, radius
from fastdeitlt.tools import ablation_table


def table_of(page, *header):
    return next(table for table in page.tables if table[0] == list(header))


def commands(folder):
    return dict(next_section(read_run(folder)).blocks[0].rows)


def matrix_of(labels, predicted, num_classes):
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)


def change(folder, file, **facts):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_the_heat_map_shows_every_cell_and_the_csv_file_the_same_for_every_head(tmp_path):
    folder = make_run(tmp_path / "run")
    html = write_report(folder).read_text(encoding="utf-8")
    cls, dist, labels = logits(3.2, 2.6)
    expected = {h: matrix_of(labels, z.argmax(1), 10) for h, z in (("AVG", (cls + dist) / 2), ("CLS", cls))}
    shown = re.findall(r"<title>([^<]*), predicted ([^<]*): (\d+) of (\d+) images</title>", html)
    assert len(shown) == int((expected["AVG"] > 0).sum()) and len(shown) > 15
    names = [name.replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;") for name in NAMES]
    names[-1] = names[-1].replace(" & ", " &amp; ")
    for label, predicted, number, total in shown:
        assert expected["AVG"][names.index(label), names.index(predicted)] == int(number) and total == "40"
    rows = read_csv(folder / "report-confusion.csv")
    for head in ("AVG", "CLS"):
        matrix_KK = torch.zeros(10, 10, dtype=torch.int64)
        for row in rows:
            matrix_KK[int(row["label"]), int(row["predicted_label"])] = int(row[head])
        assert torch.equal(matrix_KK, expected[head])
    assert {row["class"] for row in rows} == set(NAMES) and "DIST" in rows[0]


def test_the_csv_file_stands_beside_the_page_and_its_names_are_no_formulas(tmp_path):
    folder = make_run(tmp_path / "run", names=["=1+1", *NAMES[1:]])
    write_report(folder, tmp_path / "page.html")
    text = (tmp_path / "page-confusion.csv").read_text()
    assert ",'=1+1," in text and not (folder / "report-confusion.csv").exists()


def test_rows_of_the_heat_map_are_in_order_of_size_and_long_names_are_cut(tmp_path):
    svg = heat_map(np.array([[3, 1], [0, 2]]), ["a" * 40, EVIL])
    assert svg.count("<rect") == 1 + 3 and "a" * (NAME_LENGTH - 1) + "…" in svg and "<script" not in svg
    assert re.findall(r">(\d+)</text>", svg) == ["3", "1", "2"]
    heights = re.findall(r'predicted[^<]*</title><rect x="([\d.]+)" y="([\d.]+)"', svg)
    assert heights[0][1] == heights[1][1] < heights[2][1] and heights[0][0] < heights[1][0] == heights[2][0]
    folder = make_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())["test"]
    change(folder, "results.json", test=results | {"counts_K": COUNTS[::-1]})
    html = write_report(folder).read_text(encoding="utf-8")
    drawn = re.findall(r"text-anchor=\"end\"[^>]*><title>([^<]*)", html)
    assert drawn[1:] == NAMES[-2::-1]


def test_wide_characters_of_a_name_have_room_beside_the_heat_map():
    for name, shown in (("漢字" * 4, "漢字" * 4), ("漢字" * 20, "漢字" * 3 + "漢 …"), ("🐈" * 9, "🐈" * 7 + " …")):
        svg = heat_map(np.eye(2, dtype=np.int64), ["a", name])
        assert f"<title>{name}</title>{shown}</text>" in svg
        font = float(re.search(r'font-size="([\d.]+)"', svg)[1])
        right = float(re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end"', svg)[1])
        assert right > font * sum(1 if letter in " …" else 2 for letter in shown) / 2


def test_a_legend_of_long_names_has_rows_within_the_figure():
    for number, length, rows in ((4, 3, 1), (4, 12, 2), (6, 33, 6)):
        names = [f"{index}{'m' * (length - 1)}" for index in range(number)]
        svg = figures.bars(["all", "tail"], {name: [50, 60] for name in names}, dict.fromkeys(names, "#000000"))
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
        places = re.findall(r'<text[^>]* x="([-\d.]+)" y="([-\d.]+)"[^>]*>\dm+<', svg)
        assert len(places) == number and len({y for _, y in places}) == rows
        assert all(float(x) > 0 and float(x) + 5 * length < width and float(y) > 0 for x, y in places)


def test_legends_show_long_names_whole_and_names_with_a_leading_underscore():
    names = [f"{'m' * 80}{end}" for end in "ab"] + ["_c"]
    colours = dict.fromkeys(names, "#000000")
    bars = figures.bars(["all", "tail"], {name: [50, 60] for name in names}, colours)
    for svg in (bars, figures.curves({name: ([1, 2], [50, 60]) for name in names}, "loss", colours)):
        place = r'<text[^>]*(?: x="|translate\()([-\d.]+)(?:" y="| )([-\d.]+)[^>]*>'
        parts = re.findall(rf"{place}(m*[ab]|m+|_c)<", svg)
        assert "".join(text for _, _, text in parts) == "".join(names)
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
        assert all(float(x) > 0 and float(x) + 5 * len(text) < width and float(y) > 0 for x, y, text in parts)


@pytest.mark.parametrize(("num_classes", "drawn"), [(50, True), (51, False)])
def test_beyond_fifty_classes_the_worst_pairs_take_the_matrix_s_place(tmp_path, num_classes, drawn):
    folder = tmp_path / "run"
    (folder / "analysis").mkdir(parents=True)
    cls, dist, labels = logits(1.0, 1.0, num_classes=num_classes, num_images=40 * num_classes)
    counts = list(range(500, 500 - num_classes, -1))
    result = score(cls, dist, labels, counts)
    (folder / "results.json").write_text(json.dumps({"test": result.to_json()}))
    (folder / "analysis" / "images.json").write_text(json.dumps(facts_of_images(cls, dist, labels)))
    path = write_report(folder)
    assert ("Confusion matrix of AVG" in path.read_text()) == drawn
    rows = table_of(read(path), "class", "predicted", "test images", "training images")[1:]
    assert len(rows) == (10 if drawn else 20)
    matrix_KK = matrix_of(labels, ((cls + dist) / 2).argmax(1), num_classes).fill_diagonal_(0)
    assert [int(row[2].split()[0]) for row in rows] == matrix_KK.flatten().sort(descending=True).values[
        : len(rows)
    ].tolist()
    assert (folder / "report-confusion.csv").is_file()


def test_the_gallery_says_what_was_taken_for_what_and_how_surely(tmp_path):
    folder = make_run(tmp_path / "run")
    html = write_report(folder).read_text(encoding="utf-8")
    facts = json.loads((folder / "analysis" / "images.json").read_text())
    first = facts["mistakes"][0]
    name, answer = NAMES[first["label"]], NAMES[first["predicted"]]
    assert f"{name}, predicted {answer}: {100 * first['probability']:.1f} %. {first['path']}</figcaption>" in html
    assert html.count("images/deep/folder/") == 2 * 12  # also for who cannot see the pictures
    assert "temperature fitted on validation images" in html
    change(folder, "analysis/images.json", temperature=None, mistakes=[first | {"probability": 0.99999}])
    html = write_report(folder).read_text(encoding="utf-8")
    assert "over 99.9 %" in html and "(uncalibrated)" in html


def test_a_run_that_left_no_single_images_still_shows_its_confusions(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "analysis" / "images.json").unlink()
    path = write_report(folder)
    assert "Confusion matrix" not in path.read_text() and not (folder / "report-confusion.csv").exists()
    assert len(table_of(read(path), "class", "predicted", "test images", "training images")) == 11


def arms(folder, **accuracies):
    """A grid's table and the runs that it is of, as ``ablate`` leaves them."""
    finished = []
    for arm, seeds in accuracies.items():
        for seed, gain in enumerate(seeds):
            run = make_run(folder / f"{arm}-seed{seed}")
            result = score(*logits(gain, gain, seed), COUNTS, "fashion_mnist_lt")
            (run / "results.json").write_text(json.dumps({"test": result.to_json()}))
            finished.append((arm, seed, run))
    ablation_table.write(folder, list(accuracies), finished)
    return {f"{arm}-seed{seed}": run for arm, seed, run in finished}


def test_a_run_of_a_grid_stands_beside_the_grid_s_arms(tmp_path):
    runs = arms(tmp_path / "grid", base=[2.0, 2.2], vit=[3.0])
    page = read(write_report(runs["vit-seed0"]))
    table = table_of(page, "", "seeds", "all", "head", "mid", "tail")
    assert [row[:2] for row in table[1:]] == [["this run", "1"], ["base", "2"], ["vit (its arm)", "1"]]
    assert table[1][2:] == table[3][2:] and re.fullmatch(r"\d+\.\d ± \d+\.\d", table[2][2])
    means = {(r["arm"], r["group"]): r for r in read_csv(tmp_path / "grid" / "results.csv")
             if (r["head"], r["split"]) == ("AVG", "official")}  # fmt: skip
    assert table[2][5] == "{:.1f} ± {:.1f}".format(*(float(means["base", "tail"][c]) for c in ("mean", "deviation")))
    assert "Arms of the grid grid" in (runs["vit-seed0"] / "report.html").read_text()


def test_a_run_beside_a_table_of_something_else_has_no_arms(tmp_path):
    other = make_run(tmp_path / "grid" / "mine")
    arms(tmp_path / "grid", base=[2.0])
    assert "Arms of the grid" not in write_report(other).read_text()  # no run of the grid
    (tmp_path / "grid" / "results.csv").write_text("a,b\n1,2\n")
    assert "Arms of the grid" not in write_report(tmp_path / "grid" / "base-seed0").read_text()
    (tmp_path / "grid" / "results.csv").write_text(",".join(("arm", "head", "group", "split", "seeds", "mean",
        "deviation", "pairs", "difference", "p")) + "\nbase,AVG,all,official,one,1,,1,,\n")  # fmt: skip
    with pytest.raises(UserError, match=r"results\.csv: cannot be read .*ablate GRID --table"):
        write_report(tmp_path / "grid" / "base-seed0")


def test_next_steps_are_commands_that_the_program_accepts(tmp_path):
    folder = make_run(tmp_path / "a run", overrides=["teacher.path=somewhere"])
    for name in ("student", "teacher"):
        (folder / "analysis" / f"{name}.json").unlink()
    found = commands(folder)
    lines = [line for text in found.values() for line in text.split("\n")]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line)
        args = arguments.parse(words[1:])
        assert words[0] == "fastdeitlt"
        assert str(folder) in " ".join(words) and (args.verb != "eval" or args.model.name == "a run")
        settings = [word for word in words if "=" in word and "/" not in word]
        config.load("quickstart", settings)


@pytest.mark.parametrize(
    ("selected", "teacher_gain", "said"),
    [
        ({"epoch": 11, "on": "val"}, 0.0, "The last epoch was the best. Train twice as long"),
        ({"epoch": 9, "on": "val"}, 9.0, r"The teacher leads by \d+\.\d points. Train twice as long"),
        ({"epoch": 9, "on": "val"}, 0.0, None),
        ({"epoch": 9, "on": "test"}, 0.0, "The weights were selected on the test images"),
        ({"epoch": 11, "on": "last"}, 0.0, "The final weights were kept without selection"),
    ],
)
def test_what_the_results_call_for_comes_first(tmp_path, selected, teacher_gain, said):
    folder = make_run(tmp_path / "run")
    cls, dist, labels = logits(3.2, 2.6)
    onehot = torch.nn.functional.one_hot(labels, 10)
    teacher = score_heads(
        {"TEACHER": (cls + dist) / 2 + teacher_gain * onehot}, labels, COUNTS, "fashion_mnist_lt"
    ).to_json()
    change(folder, "results.json", selected=selected, teacher=teacher)
    first, command = next(iter(commands(folder).items()))
    if said is None:
        assert first == "List the prediction and probability of every image"
    else:
        assert re.match(said, first)
        expected = "evaluate.select_on=val" if "weights" in first else "train.epochs=24 loss.drw_epoch=18"
        assert expected in command and f"{folder}/config.yaml name=run-" in command


@pytest.mark.parametrize("recipe", ["cifar10_lt_r100", "cifar10_lt_r100_paco", "imagenet_lt"])
def test_a_teacher_trained_twice_as_long_has_the_schedule_of_before_at_half_the_pace(tmp_path, recipe):
    folder = make_run(tmp_path / "run")
    cfg = config.load(f"teacher/{recipe}")
    (folder / "config.yaml").write_text(config.dump(cfg))
    last = {"selected": {"epoch": cfg.teacher_training.epochs - 1, "on": "val"}}
    result = score_heads({"TEACHER": torch.eye(10)}, torch.arange(10), COUNTS)
    (folder / "results.json").write_text(json.dumps({"test": result.to_json()} | last))
    command = next(iter(commands(folder).values()))
    words = [word for word in shlex.split(command)[3:] if not word.startswith("name=")]
    old, new = cfg.teacher_training, config.load(f"teacher/{recipe}", words).teacher_training
    assert new.epochs == 2 * old.epochs and new.drw_epoch == (2 * old.drw_epoch if old.drw_epoch >= 0 else -1)
    for epoch in range(old.warmup_epochs, old.epochs):
        assert radius(2 * epoch, new) == radius(epoch, old)
        if old.schedule == "step":
            assert learning_rate(2 * epoch, new) == learning_rate(epoch, old)


def test_signs_of_failure_have_their_commands(tmp_path):
    folder = make_run(tmp_path / "run", overrides=["teacher.path=somewhere"])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["signs"] = [{"name": name, "seen": True, "text": ""} for name in ("tail expert", "overfitting")]
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    found = commands(folder)
    assert found["DIST does not lead CLS on the tail. Analyze the teacher's decisions"].startswith(
        f"fastdeitlt analyze teacher {folder}\n"
    )
    assert any("train.patience=3" in command for command in found.values())


def test_commands_of_a_moved_run_have_the_place_of_its_report(tmp_path, monkeypatch):
    make_run(tmp_path / "kept" / "moved", overrides=["name=run", "runs_dir=/old"])
    monkeypatch.chdir(tmp_path)
    found = commands("kept/moved")
    assert found["Score other images"].startswith("fastdeitlt eval kept/moved ")
    assert "kept/moved/config.yaml name=moved-seed1" in found["Measure the variance over seeds"]
    html = write_report("kept/moved").read_text()
    assert "train kept/moved/config.yaml name=moved-again" in html and "/old/" not in html


def test_an_unfinished_run_is_told_how_to_finish(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "results.json").unlink()
    assert commands(folder) == {"Finish the run": f"fastdeitlt train {folder}/config.yaml --resume {folder}"}


def test_a_run_that_ended_without_images_to_score_is_finished(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "results.json").write_text(json.dumps({"selected": {"on": "last"}, "published": {}}))
    assert "Finish the run" not in commands(folder) and "Use the model in another program" in commands(folder)
    assert "No test or validation images." in write_report(folder).read_text()


def test_behind_the_teacher_is_not_a_negative_lead(tmp_path):
    folder = make_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    html = write_report(folder).read_text()
    gain = results["test"]["heads"]["AVG"]["top1"]["threshold"]["all"]
    gain -= results["teacher"]["heads"]["TEACHER"]["top1"]["threshold"]["all"]
    assert f"<b>{abs(gain):.1f}</b><span>points {'above' if gain >= 0 else 'below'} the teacher" in html
    results["test"], results["teacher"] = results["teacher"], results["test"]
    for score_of in (results["test"], results["teacher"]):
        score_of["heads"] = {"AVG" if name == "TEACHER" else name: head for name, head in score_of["heads"].items()}
    change(folder, "results.json", **results)
    html = write_report(folder).read_text()
    assert f"<b>{abs(gain):.1f}</b><span>points {'below' if gain >= 0 else 'above'} the teacher" in html
    assert f"-{abs(gain):.1f}" not in html


def test_what_is_absent_is_said_in_words_and_splits_are_explained(tmp_path):
    folder = make_run(tmp_path / "run")
    env = {"gpu": None, "cpus": 2, "packages": {"torch": "2.14.1", "deepspeed": None}}
    (folder / "env.json").write_text(json.dumps(env))
    path = write_report(folder)
    rows = [row for table in read(path).tables for row in table]
    assert ["gpu", "none"] in rows and ["packages deepspeed", "not installed"] in rows and ["cpus", "2"] in rows
    for dataset, split, said in (
        ("cifar10_lt", "official split", "The official split is that of"),
        ("folder", "thirds by class size", "divides the classes, sorted by size, into thirds"),
    ):
        results = {"test": score(*logits(3, 3), COUNTS, dataset).to_json()}
        (folder / "results.json").write_text(json.dumps(results))
        html = write_report(folder).read_text()
        assert f"on the 3 tail classes ({split})" in html and said in html
        assert ("The official split" in html) == (split == "official split")
