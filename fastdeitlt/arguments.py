"""The verbs of the command line and their arguments."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdeitlt import __version__
from fastdeitlt.tools import examples

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

EXPORTS = ("timm", "onnx", "pt2", "official_ldam", "official_paco")
"""The last two are of teachers."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Arguments by name; settings may stand before, between and after options, where argparse takes one run of them."""
    parser = argparse.ArgumentParser(
        prog="fastdeitlt",
        description="Train Vision Transformers from scratch on long-tailed images (DeiT-LT).",
        epilog=examples.epilog(""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastdeitlt {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        _plan, _training, _ablate, _demo, _eval, _predict, _export, _bench, _tune, _profile, _analyze, _report, _data,
        _config, _doctor,
    ):  # fmt: skip
        add(verbs)
    arguments = list(arguments)
    args, rest = parser.parse_known_args(arguments)
    strangers = [word for word in rest if word.startswith("-") or "=" not in word]
    if strangers or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strangers or rest)}")
    if rest:
        args.overrides += rest
    args.arguments = arguments
    return args


def _verb(verbs: "Verbs", name: str, text: str) -> argparse.ArgumentParser:
    how = argparse.RawDescriptionHelpFormatter
    return verbs.add_parser(name, help=text, description=text, epilog=examples.epilog(name), formatter_class=how)


def _configured(verbs: "Verbs", name: str, text: str) -> argparse.ArgumentParser:
    added = _verb(verbs, name, text)
    added.add_argument("config", help="YAML file, or a shipped recipe such as quickstart or imagenet_lt")
    added.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that win over the file")
    return added


def _plan(verbs: "Verbs") -> None:
    added = _verb(
        verbs, "plan", "choose the recipes of teacher and student for your images, this machine and your time"
    )
    added.add_argument("root", help="folder of class folders, split folders or lists; or a list file")
    added.add_argument("--hours", type=float, help="for both trainings; default: by the size of the set")
    added.add_argument("--from", dest="weights", default="", metavar="WEIGHTS", help="weights the student starts from")
    added.add_argument(
        "--out", default="", metavar="NAME", help="NAME.yaml and NAME-teacher.yaml; default: the folder's"
    )


def _training(verbs: "Verbs") -> None:
    for name, text in (
        ("train", "train a student: data, teacher, DeiT-LT, evaluation, report"),
        ("train-teacher", "train the flat CNN teacher with SAM"),
    ):
        added = _configured(verbs, name, text)
        added.add_argument(
            "--resume", default="auto", metavar="auto|never|must|PATH", help="what to do with saved state"
        )
        if name == "train":
            added.add_argument(
                "--with-teacher",
                metavar="RECIPE",
                help="train this teacher first, such as teacher/quickstart, on the student's data, seed and device; "
                "teacher_training.field=value sets it",
            )
        added.add_argument("--dry-run", action="store_true", help="check everything, run one step on fake data")
        added.add_argument(
            "--processes", type=int, default=0, metavar="N", help="ranks here; default: one a visible GPU"
        )
        added.add_argument(
            "--restarts", type=int, default=0, metavar="N", help="start all ranks again after a crash, this often"
        )


def _ablate(verbs: "Verbs") -> None:
    added = _verb(verbs, "ablate", "train a grid of arms x seeds, continuing what is there, and compare the arms")
    added.add_argument("grid", help="grid file, or a shipped one such as ablation/embedded")
    added.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings of all arms")
    added.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="train these only")
    added.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="train these only")
    added.add_argument("--dry-run", action="store_true", help="check everything, list the runs and their steps")
    added.add_argument("--table", action="store_true", help="train nothing, write the table of what is finished")


def _demo(verbs: "Verbs") -> None:
    added = _verb(
        verbs, "demo", "train a teacher and a student on the embedded real images; about five minutes on a CPU"
    )
    added.add_argument("--seed", type=int, default=0, help="seed of both")
    added.add_argument("--runs-dir", default="runs", help="where run folders go")


def _eval(verbs: "Verbs") -> None:
    added = _verb(verbs, "eval", "score a model: AVG, CLS, DIST by head, mid, tail, calibration")
    added.add_argument("model", type=Path, help="run folder or model folder")
    added.add_argument(
        "overrides", nargs="*", metavar="data.field=value", help="other images than the model was trained on"
    )
    added.add_argument("--split", choices=("test", "val", "train"), default="test")
    added.add_argument("--json", type=Path, help="write all scores there")
    added.add_argument("--csv", type=Path, help="write a row a class there")
    added.add_argument(
        "--predictions", type=Path, metavar="FILE.csv", help="write a row an image there: each head's answer"
    )


def _predict(verbs: "Verbs") -> None:
    added = _verb(verbs, "predict", "classify images with a student or a teacher: top-k with the class names")
    added.add_argument("model", type=Path, help="run folder or model folder")
    added.add_argument("inputs", nargs="+", type=Path, help="image files or folders")
    added.add_argument("--top-k", type=int, default=5)
    added.add_argument("--out", type=Path, help="write .csv or .json there")
    added.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    added.add_argument("--head", default="AVG", choices=("AVG", "CLS", "DIST"), help="of a student: what predicts")
    added.add_argument("--raw", action="store_true", help="probabilities without the temperatures of validation images")


def _export(verbs: "Verbs") -> None:
    added = _verb(verbs, "export", "write a model for other programs: timm, ONNX, torch.export, the official code")
    added.add_argument("model", type=Path, help="run folder or model folder")
    added.add_argument("out", type=Path)
    added.add_argument("--format", choices=EXPORTS, default="timm")


def _bench(verbs: "Verbs") -> None:
    added = _configured(verbs, "bench", "images a second of a configuration here, part by part; MFU, memory, scaling")
    added.add_argument("--quick", action="store_true", help="few rounds, no scaling over ranks; no compiling on a CPU")
    added.add_argument("--synthetic", action="store_true", help="random images: needs no data set")
    added.add_argument("--with-teacher", metavar="RECIPE", help="time a fresh teacher of this recipe's architecture")
    added.add_argument("--ranks", type=int, nargs="*", metavar="N", help="numbers of processes to measure the step on")
    added.add_argument("--batches", type=int, nargs="*", metavar="B", help="micro-batch sizes to measure the step at")
    added.add_argument("--json", type=Path, help="write the results there")


def _tune(verbs: "Verbs") -> None:
    added = _configured(verbs, "tune", "measure what `auto` takes on this GPU at a configuration's shapes")
    added.add_argument("--out", type=Path, help="folder for the measurements; default: the user's cache")
    added.add_argument("--ops-only", action="store_true", help="let each op decide alone, not the training step")
    added.add_argument("--again", action="store_true", help="measure also the ops that have been measured here")


def _profile(verbs: "Verbs") -> None:
    added = _configured(verbs, "profile", "where a step's time goes: trace for Perfetto, table by kernel and stage")
    added.add_argument("--out", type=Path, default=Path("profile"), help="folder for trace and tables")
    added.add_argument("--steps", type=int, default=3, help="optimizer steps to record")
    added.add_argument("--with-teacher", metavar="RECIPE", help="time a fresh teacher of this recipe's architecture")
    added.add_argument("--synthetic", action="store_true", help="random images: needs no data set")


def _analyze(verbs: "Verbs") -> None:
    analyses = _verb(verbs, "analyze", "where a student looks, what a teacher teaches").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )

    def analysis(name: str, text: str) -> argparse.ArgumentParser:
        added = analyses.add_parser(name, help=text, description=text)
        added.add_argument(
            "runs", nargs="+", metavar="RUN", help="run folders; words with '=' are settings, section.field=value"
        )
        added.add_argument("--json", type=Path, help="write the numbers there too")
        added.set_defaults(overrides=[])
        return added

    added = analysis("student", "where CLS and DIST look, attention distance, feature rank, likeness of tokens")
    added.add_argument("--images", type=int, default=2048, metavar="N", help="test images to look at")

    added = analysis("teacher", "what a student will be taught on its own images, sharpness, feature rank")
    added.add_argument("--recipe", help="the student's recipe, where RUN is a teacher rather than a student's run")
    added.add_argument("--images", type=int, default=2048, metavar="N", help="training images to look at")


def _report(verbs: "Verbs") -> None:
    added = _verb(verbs, "report", "write the HTML report of a run, or compare several")
    added.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder; several are compared")
    added.add_argument("--compare", nargs="+", type=Path, default=[], metavar="RUN", help="set these side by side")
    added.add_argument("--out", type=Path, help="file to write; default: report.html in the run's folder")


def _data(verbs: "Verbs") -> None:
    data = _verb(verbs, "data", "prepare, check or describe a data set; list or clear the decoded sets of earlier runs")
    data.add_argument("action", choices=("prepare", "check", "stats", "cache"))
    data.add_argument("config", nargs="?", help="recipe or YAML file; for prepare: cifar10, cifar100 or fashion_mnist")
    data.add_argument("overrides", nargs="*", metavar="section.field=value")
    data.add_argument("--root", type=Path, help="prepare: folder for the archive")
    data.add_argument("--download", action="store_true", help="prepare: fetch the archive if it is not there")
    data.add_argument("--clear", action="store_true", help="cache: remove the decoded sets")
    data.add_argument("--json", action="store_true")


def _config(verbs: "Verbs") -> None:
    added = _verb(verbs, "config", "show settings with their meaning and origin; list the shipped recipes")
    added.add_argument("action", choices=("show", "list"))
    added.add_argument("config", nargs="?", help="recipe or YAML file; left out: the defaults")
    added.add_argument(
        "overrides", nargs="*", metavar="NAME", help="show these sections or settings alone; or section.field=value"
    )
    added.add_argument("--changed", action="store_true", help="only what differs from the defaults")
    added.add_argument("--yaml", action="store_true", help="as YAML")


def _doctor(verbs: "Verbs") -> None:
    added = _verb(verbs, "doctor", "what is installed, what is missing, how to get it")
    added.add_argument("--json", action="store_true")
