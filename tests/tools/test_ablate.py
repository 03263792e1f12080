"""The grid: what is trained, with which settings, in which order, what is trained again, and what the table says."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from small_model import read_csv
from tiny_run import embedded_lists

from fastdeitlt import cli, config
from fastdeitlt.data.sets.fingerprint import fingerprint
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.errors import NonFiniteError, UserError
from fastdeitlt.evaluation.metrics import score, score_heads
from fastdeitlt.reporting import report
from fastdeitlt.reporting.analysis import teacher as analysis_of_teacher
from fastdeitlt.tools import ablate, demo
from fastdeitlt.tools import ablation_table as table
from fastdeitlt.tools.ablation_table import holm, paired_t_test

COUNTS = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
SHORT = {
    "student": {
        "optim.lr": 1e-3,
        "train.epochs": 2,
        "loss.drw_epoch": 1,
        "student.depth": 1,
        "train.batch_size": 16,
    },
    "teacher": {
        "teacher_training.batch_size": 128,
        "teacher_training.epochs": 2,
        "teacher_training.drw_epoch": 1,
        "teacher_training.warmup_epochs": 1,
    },
}
GRID = {
    "name": "grid",
    "student": "quickstart",
    "teacher": "teacher/quickstart",
    "seeds": [0, 1],
    "settings": SHORT,
    "arms": {
        "base": {},
        "vit": {"teacher": "none", "student": {"loss.drw_epoch": -1}},
        "no-drw": {"student": {"loss.drw_epoch": -1}},
        "sgd": {"teacher": {"teacher_training.sam": "none"}},
    },
}


@pytest.fixture
def grid_file(tmp_path):
    """Writes a grid and gives its path."""

    def write(**changes):
        file = tmp_path / "grid.yaml"
        file.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
        return str(file)

    return write


def _scores(correct, images=20):
    """Logits of heads that are right on the first ``correct`` images of each class."""
    labels_N = torch.arange(10).repeat_interleave(images)
    right_N = torch.arange(images).repeat(10) < correct
    return torch.nn.functional.one_hot(torch.where(right_N, labels_N, (labels_N + 1) % 10), 10).float(), labels_N


def _results(folder, correct, teacher_correct=None):
    """A finished run's results with an accuracy of 5 x ``correct`` %."""
    folder.mkdir(parents=True, exist_ok=True)
    logits, labels = _scores(correct)
    teacher = (
        None
        if teacher_correct is None
        else score_heads({"TEACHER": _scores(teacher_correct)[0]}, labels, COUNTS).to_json()
    )
    test = score(logits, logits, labels, COUNTS).to_json()
    (folder / "results.json").write_text(json.dumps({"test": test, "teacher": teacher}))


@pytest.fixture
def trained(monkeypatch):
    """What would be trained, in place of training it; a student named in ``trained.diverging`` diverges."""

    class Calls(list):
        diverging = ()
        reported = ()

    calls = Calls()

    def train(cfg, resume="auto"):
        calls.append(cfg)
        if cfg.name in calls.diverging:
            raise NonFiniteError("loss is nan")
        folder = Path(cfg.runs_dir) / cfg.name
        _results(folder, 10 + cfg.train.seed, teacher_correct=8 if cfg.teacher.path else None)
        (folder / "config.yaml").write_text(config.dump(cfg))
        return folder

    def train_teacher(cfg):
        calls.append(cfg)
        folder = Path(cfg.runs_dir) / cfg.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config.dump(cfg))
        return folder / "checkpoints/best"

    monkeypatch.setattr(demo, "train_teacher", train_teacher)
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(ablate, "train", train)
    facts = {"mixed_resized": {"accuracy": 33.0}}
    monkeypatch.setattr(analysis_of_teacher, "diagnose_teacher", lambda path, cfg, n, **options: facts)
    monkeypatch.setattr(report, "write_report", lambda run: setattr(calls, "reported", (*calls.reported, run.name)))
    return calls


def test_all_arms_of_a_seed_come_before_the_next_seed_and_settings_win_in_order(grid_file):
    arms = GRID["arms"] | {"slow": {"student": {"optim.lr": 1e-4}}}
    runs = ablate.arm_runs(
        ablate.read_grid(grid_file(arms=arms)), ["optim.lr=3e-4", "runs_dir=r", "teacher_training.lr=0.2"]
    )
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for seed in (0, 1) for arm in arms]
    base, vit, _, sgd, slow = runs[:5]
    assert (base.student.optim.lr, slow.student.optim.lr) == (3e-4, 1e-4)  # override over recipe, arm over override
    assert base.student.train.epochs == 2  # settings over recipe
    assert base.student.data.dataset == "fashion_mnist_lt"  # recipe
    assert base.folder == Path("r/grid/base-seed0")
    assert runs[5].student.train.seed == 1
    assert vit.teacher is None and vit.student.teacher.path == ""
    assert base.teacher.teacher_training.lr == 0.2
    assert (base.teacher.teacher_training.sam, sgd.teacher.teacher_training.sam) == ("sam", "none")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": [1]}, "did you mean seeds"),
        ({"arms": {}}, "arms"),
        ({"seeds": []}, "seeds"),
        ({"student": "quickstrat"}, "did you mean quickstart"),
        ({"arms": {"base": {}, "x": {"student": {"loss.drw": 3}}}}, "arm x: unknown config name 'loss.drw'"),
        ({"arms": {"base": {}, "x": {"teacher": {"teacher_training.epochs": 0}}}}, "arm x, teacher: "),
        ({"arms": {"base": {}, "x": {"student": {"train.seed": 3}}}}, "train.seed is set by the grid"),
        ({"arms": {"base": {}, "x": {"student": {"teacher.path": "t"}}}}, "teacher.path is set by the grid"),
        ({"arms": {"base": {}, "x": {"student": {"optim.lr": 1e-3}}}}, "arm x: got the settings of arm base"),
        ({"arms": {"base": {}, "a b": {"student": {"optim.lr": 1}}}}, "name: got 'a b-seed0'"),
        ({"teacher": "", "settings": {}}, "teacher_training.sam: no effect, because grid grid has no teacher recipe"),
        ({"student": "teacher/quickstart"}, "a recipe of a teacher, expected a student's"),
        ({"teacher": "quickstart"}, "which sets nothing of teacher_training"),
        ({"settings": {"student": {"train": {"epochs": 2}}}}, "train: got a section, expected a dotted name"),
        ({"settings": {"student": {"teacher_training.lr": 1}}}, "teacher_training.lr: no effect on a student"),
        ({"settings": {"teacher": {"train.epochs": 2}}}, "arm base, teacher: train.epochs: no effect on a teacher"),
        ({"settings": {"teacher": {"data.root": "a"}}}, "teacher: data.root: a teacher has the student's"),
        ({"settings": {"teacher": "none"}}, "Remove the grid's teacher recipe"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_faulty_grid_is_one_line_and_code_2(grid_file, capsys, changes, words):
    assert cli.main(["ablate", grid_file(**changes)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "no-dwr"], "did you mean no-drw"),
        (["--seeds", "7"], "--seeds: got 7, expected some of (0, 1)"),
        (["--seeds", "0", "1", "2"], "--seeds: got 2, expected some of (0, 1)"),
        (["train.seed=4"], "train.seed is set by the grid"),
        (["data.root=/nowhere", "data.dataset=folder"], "/nowhere"),
        (["student.name=deit_tiny_distilled_patch5_32"], "patch5"),
        (["teacher_training.arch=resnet9"], "resnet9"),
        (["train.batch_size=4096"], "train.batch_size"),
        (["--table"], "no finished run"),
    ],
    ids=" ".join,
)
def test_what_would_fail_later_fails_before_the_first_run(grid_file, trained, tmp_path, capsys, arguments, words):
    settings = {"student": {"train.epochs": 2, "loss.drw_epoch": 1}, "teacher": SHORT["teacher"]}
    arguments = ["ablate", grid_file(settings=settings), f"runs_dir={tmp_path / 'runs'}", *arguments]
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err
    assert trained == []


def test_a_teacher_file_is_opened_before_the_first_run(grid_file, trained, tmp_path):
    (tmp_path / "t.pth").write_bytes(b"not a checkpoint")
    arms = {"base": {}, "taught": {"student": {"teacher.path": str(tmp_path / "t.pth")}}}
    with pytest.raises(UserError, match=r"arm taught: .*t\.pth"):
        ablate.ablate(grid_file(arms=arms, teacher="", settings={}), [f"runs_dir={tmp_path}"])
    assert trained == []


def test_settings_of_a_teacher_need_a_teacher(grid_file):
    plain = {"teacher": "", "arms": {"vit": {}, "slow": {"student": {"optim.lr": 1e-4}}}}
    grids = [ablate.read_grid(grid_file(**plain, settings={"teacher": own})) for own in ({}, {"data.root": "a"})]
    assert len(ablate.arm_runs(grids[0], ["optim.lr=3e-4"])) == 4
    for grid, settings in ((grids[0], ["teacher_training.lr=0.2"]), (grids[1], [])):
        with pytest.raises(UserError, match=r"(lr|root): no effect, because grid grid has no teacher recipe"):
            ablate.arm_runs(grid, settings)


def test_equal_teachers_are_shared_and_finished_runs_skipped(grid_file, trained, tmp_path):
    runs = [f"runs_dir={tmp_path / 'runs'}"]
    folder = ablate.ablate(grid_file(), runs, seeds=[0])
    assert [cfg.name for cfg in trained if cfg.teacher_training.epochs != 2] == [
        "base-seed0",
        "vit-seed0",
        "no-drw-seed0",
        "sgd-seed0",
    ]
    teachers = {cfg.name for cfg in trained if cfg.teacher_training.epochs == 2}
    assert len(teachers) == 2  # base and no-drw have one, sgd another, vit none
    (folder / "no-drw-seed0" / "results.json").unlink()
    trained.clear()
    ablate.ablate(grid_file(), runs, arms=["base", "no-drw"])
    students = [cfg.name for cfg in trained if cfg.teacher_training.epochs != 2]
    assert students == ["no-drw-seed0", "base-seed1", "no-drw-seed1"]
    # the reports of all finished runs, each beside all arms
    finished = [*(f"{arm}-seed0" for arm in GRID["arms"]), "base-seed1", "no-drw-seed1"]
    assert list(trained.reported[4:]) == finished
    trained.clear()
    ablate.ablate(grid_file(), runs, table_only=True)
    assert trained == [] and len(trained.reported) == 10


def test_what_training_left_out_is_looked_into_once_and_missed_plainly(grid_file, trained, tmp_path, caplog):
    only = {"overrides": [f"runs_dir={tmp_path}"], "seeds": [0], "arms": ["base"]}
    folder = ablate.ablate(grid_file(), **only)  # the training above analyses nothing
    file = folder / "base-seed0" / table.TEACHER_FILE
    assert json.loads(file.read_text()) == {"mixed_resized": {"accuracy": 33.0}}
    assert "OOD,training,1,33" in (folder / "results.csv").read_text()
    file.unlink()
    ablate.ablate(grid_file(), **only, table_only=True)
    assert "base-seed0: no analysis/teacher.json" in caplog.text
    assert "OOD" not in (folder / "results.csv").read_text()
    ablate.ablate(grid_file(), **only)
    assert file.is_file()


def test_a_diverged_run_is_told_at_the_end_and_stops_no_other(grid_file, trained, tmp_path, capsys):
    trained.diverging = ("vit-seed0",)
    assert cli.main(["ablate", grid_file(), f"runs_dir={tmp_path / 'runs'}"]) == 5
    assert "1 run diverged" in capsys.readouterr().err
    rows = read_csv(tmp_path / "runs/grid/results.csv")
    seeds = {row["arm"]: row["seeds"] for row in rows if row["head"] == "AVG"}
    assert seeds == {"base": "2", "vit": "1", "no-drw": "2", "sgd": "2"}


def test_arms_without_a_finished_run_are_named_under_the_table(grid_file, trained, tmp_path):
    folder = ablate.ablate(grid_file(), [f"runs_dir={tmp_path}"], seeds=[0], arms=["base", "vit"])
    text = (folder / "results.md").read_text()
    assert "| vit | 1 |" in text and "| sgd |" not in text
    assert "No finished run of `no-drw`, `sgd`." in text


@pytest.mark.parametrize(
    ("setting", "options", "words"),
    [
        ("optim.lr=0.002", [], "base-seed0: contains a run with other settings (optim.lr: 0.001 -> 0.002)"),
        ("optim.lr=0.002", ["--arms", "no-drw"], "optim.lr: 0.001 -> 0.002"),
        ("optim.lr=0.002", ["--table"], "optim.lr: 0.001 -> 0.002"),
        ("data.root=@", ["--arms", "base", "--dry-run"], "data.root: '' -> "),
        ("data.test_list=@/test.txt", ["--arms", "no-drw"], "data.test_list: '' -> "),
        ("teacher_training.lr=0.3", ["--arms", "no-drw"], "(teacher_training.lr: 0.07 -> 0.3)"),
    ],
)
def test_finished_runs_with_other_settings_or_data_are_not_compared(
    grid_file, trained, tmp_path, capsys, setting, options, words
):
    runs = f"runs_dir={tmp_path / 'runs'}"
    folder = ablate.ablate(grid_file(), [runs], seeds=[0], arms=["base"])
    trained.clear()
    before = (folder / "results.csv").read_bytes()
    assert cli.main(["ablate", grid_file(), runs, setting.replace("@", str(tmp_path)), *options]) == 2
    assert words in capsys.readouterr().err
    assert trained == [] and (folder / "results.csv").read_bytes() == before


def test_a_grid_continues_with_images_that_were_moved(grid_file, trained, tmp_path, capsys):
    for name, number in product("ab", range(9)):
        path = tmp_path / "here" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    settings = {"student": SHORT["student"] | {"data.dataset": "folder", "train.batch_size": 2}}
    grid = grid_file(
        teacher="", settings=settings, arms={"vit": {}, "fast": {"student": {"optim.lr": 1e-2}}}, seeds=[0]
    )

    def ablated(place, *options):
        root = tmp_path / place
        return cli.main(["ablate", grid, f"data.root={root}", f"runs_dir={tmp_path / 'runs'}", *options])

    assert ablated("here", "--arms", "vit") == 0
    best = tmp_path / "runs/grid/vit-seed0/checkpoints/best"
    best.mkdir(parents=True)
    images = open_sets(config.DataConfig(dataset="folder", root=str(tmp_path / "here"))).train
    (best / "manifest.json").write_text(json.dumps({"data_sha256": fingerprint(images)}))
    (tmp_path / "here").rename(tmp_path / "there")
    assert ablated("there", "--dry-run") == 0
    (tmp_path / "there/a").rename(tmp_path / "there/c")
    assert ablated("there") == 2 and "other settings (data.root" in capsys.readouterr().err


def test_a_finished_grid_needs_its_images_no_more(grid_file, trained, tmp_path, monkeypatch, capsys):
    arguments = ["ablate", grid_file(), f"runs_dir={tmp_path / 'runs'}", "--arms", "base", "vit"]
    assert cli.main(arguments) == 0
    step = tmp_path / "runs/grid/base-seed0/checkpoints/step-00000308"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text('{"step": 308}')
    trained.clear()
    monkeypatch.setattr(ablate, "open_training_sets", lambda cfg: pytest.fail("opened"))
    assert cli.main(arguments) == 0 and trained == []
    capsys.readouterr()
    assert cli.main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "0 steps left" in shown and shown.count("finished") == 4 and "308" in shown


def test_the_dry_run_lists_runs_with_steps_and_states_and_trains_nothing(grid_file, trained, tmp_path, capsys):
    runs = f"runs_dir={tmp_path / 'runs'}"
    ablate.ablate(grid_file(), [runs], seeds=[0], arms=["vit"])
    newest = tmp_path / "runs/grid/no-drw-seed0/checkpoints/step-00000154"
    newest.mkdir(parents=True)
    (newest / "manifest.json").write_text('{"step": 154}')
    trained.clear()
    capsys.readouterr()
    assert cli.main(["ablate", grid_file(), "--dry-run", "--seeds", "0", "--arms", "base", "vit", "no-drw", runs]) == 0
    # 154 whole batches of 16 of 2,478 images an epoch, two epochs; the teacher's batches are of 128
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "308" in lines["base-seed0"] and "new" in lines["base-seed0"]
    assert "finished" in lines["vit-seed0"]
    assert "interrupted at step 154" in lines["no-drw-seed0"]
    assert "40" in lines["teacher-quickstart of base-seed0"]
    assert not any("of no-drw-seed0" in name for name in lines)  # it has base's
    assert trained == []


def test_the_table_has_means_deviations_and_paired_differences(tmp_path):
    finished = []
    for arm, correct in {"base": (10, 11, 12), "better": (12, 12, 15), "alone": (9,)}.items():
        for seed, number in enumerate(correct):
            folder = tmp_path / f"{arm}-seed{seed}"
            _results(folder, number, teacher_correct=14)
            (folder / "analysis").mkdir()
            (folder / table.TEACHER_FILE).write_text(json.dumps({"mixed_resized": {"accuracy": 41.5}}))
            finished.append((arm, seed, folder))
    table.write(tmp_path, ["base", "better", "alone"], finished)
    rows = {
        row["arm"]: row
        for row in read_csv(tmp_path / "results.csv")
        if (row["head"], row["group"], row["split"]) == ("AVG", "tail", "official")
    }
    base, better = rows["base"], rows["better"]
    assert (float(base["mean"]), float(base["deviation"])) == (55, 5)
    assert float(better["difference"]) == pytest.approx(10)
    # differences 10, 5, 15: t = 10 / (5 / sqrt 3), two degrees of freedom
    assert float(better["p"]) == pytest.approx(0.0741799, rel=1e-5)
    # the table's other p with pairs: AVG all and head and CLS head and DIST tail, where every head has one accuracy
    assert float(better["p_holm"]) == pytest.approx(5 * float(better["p"]), rel=1e-5)
    assert rows["alone"]["deviation"] == "" and rows["alone"]["p"] == rows["alone"]["p_holm"] == ""
    text = (tmp_path / "results.md").read_text()
    assert "| base | 3 | 70.0 ± 0.0 | 41.5 ± 0.0 | 55.0 ± 5.0 |" in text
    assert "| better | 3 | +10.0 | 0.074 | 0.371 |" in text
    assert "| alone | 1 | -5.0 | - | - |" in text
    assert "corrected for the 5 comparisons of the table (Holm" in text
    svg = (tmp_path / "results.svg").read_text()
    assert "<svg" in svg and "better" in svg


@pytest.mark.parametrize(
    ("differences", "p"),
    [  # scipy.stats.ttest_1samp(differences, 0) of scipy 1.17
        ([0.5, -0.2], 0.7422378831816868),
        ([1.2, 0.7, 2.1], 0.08281966404388959),
        ([1.2, 0.7, 2.1, -0.3], 0.16179538047146924),
        ([3, 1, 4, 1, 5, 9, 2, 6], 0.005270757241602),
    ],
)
def test_the_paired_test_is_students(differences, p):
    assert paired_t_test(differences) == pytest.approx(p, rel=1e-9)
    assert paired_t_test([-d for d in differences]) == pytest.approx(p, rel=1e-9)


def test_the_paired_test_without_spread_or_pairs():
    for equal in ([], [1.0], [0, 0, 0], [2, 2, 2], [70.3 - 70.2, 60.2 - 60.1]):
        assert math.isnan(paired_t_test(equal))


def test_the_correction_is_holms():
    # by hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, then 1 x 0.04, which may not fall below 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([]) == []
    with_gap = holm([float("nan"), 0.02, 0.04])
    assert math.isnan(with_gap[0]) and with_gap[1:] == pytest.approx([0.04, 0.04])  # the gap is no comparison


def test_only_the_comparisons_of_the_table_are_corrected():
    values = {arm: {s: {m: float(n * s) for m in METRICS} for s in range(3)} for n, arm in enumerate("abc")}
    found = table.summarise(values)
    assert all(math.isnan(summary.corrected) for summary in found["a"].values())
    assert math.isnan(found["b"]["AVG", "mid", "official"].corrected)
    one = found["b"]["AVG", "all", "official"]
    assert one.corrected == pytest.approx(min(1, 2 * len(table.DIFFERENCES) * one.p))


METRICS = [*table.COLUMNS.values()]
SHIPPED = sorted(config.find("ablation/embedded").parent.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_grids_are_valid(path):
    grid = ablate.read_grid(f"ablation/{path.stem}")
    assert grid.name == f"ablation-{path.stem}"
    assert len(grid.seeds) >= 3
    assert len(ablate.arm_runs(grid)) == len(grid.seeds) * len(grid.arms)


def test_a_grid_cut_off_continues_and_ends_with_its_table(tmp_path, grid_file, monkeypatch):
    data = embedded_lists(tmp_path, train=19, val=25, test=25)
    arms = {name: GRID["arms"][name] for name in ("base", "vit")}
    student = SHORT["student"] | data | {"teacher.check": False}  # its teacher has learnt nothing in so few steps
    settings = {"student": student, "teacher": SHORT["teacher"]}
    path = grid_file(seeds=[0], settings=settings, arms=arms)
    overrides = [f"runs_dir={tmp_path / 'runs'}", "train.precision=fp32"]

    def interrupted(cfg, resume="auto"):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablate, "train", interrupted)
        assert cli.main(["ablate", path, *overrides]) == 130
    done = tmp_path / "runs/grid/base-seed0/results.json"
    before = done.stat().st_mtime_ns
    assert cli.main(["ablate", path, *overrides]) == 0
    assert done.stat().st_mtime_ns == before
    rows = read_csv(tmp_path / "runs/grid/results.csv")
    arms_and_heads = {(row["arm"], row["head"]) for row in rows}
    assert arms_and_heads == {*product(("base", "vit"), ("AVG", "CLS", "DIST")), ("base", "TEACHER")}
    assert [row["mean"] for row in rows if row["group"] == "OOD"] != []
    assert "Arms of the grid grid: AVG" in (done.parent / "report.html").read_text()
