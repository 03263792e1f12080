"""The verbs of the command line and their arguments."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdeitlt import __version__
from fastdeitlt.errors import UserError
from fastdeitlt.tools import examples

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

EXPORTS = ("timm", "onnx", "pt2", "official_ldam", "official_paco")
"""Export formats; the last two are for teachers."""
USED_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "data": {
        "config": ("prepare", "check", "stats"),
        "overrides": ("check", "stats"),
        "root": ("prepare",),
        "download": ("prepare",),
        "clear": ("cache",),
        "json": ("check", "stats"),
    },
    "config": dict.fromkeys(("config", "overrides", "changed", "yaml"), ("show",)),
}
"""Verb -> argument -> the actions that use it."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Unlike argparse, accept settings before, between and after options.
    """
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
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        args.overrides += rest
    args.arguments = arguments
    return args


def refuse_unused(args: argparse.Namespace) -> None:
    """Raise UserError for an argument that the action does not use."""
    for name, actions in USED_BY.get(args.verb, {}).items():
        value = getattr(args, name)
        if value and args.action not in actions:
            word = value if name == "config" else value[0] if name == "overrides" else f"--{name}"
            expected = " or ".join(f"'{args.verb} {action}'" for action in actions)
            raise UserError(f"{word}: no effect on '{args.verb} {args.action}', expected with {expected}. Remove it.")


def _verb(verbs: "Verbs", name: str, text: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    return verbs.add_parser(name, help=text, description=text, epilog=examples.epilog(name), formatter_class=formatter)


def _configured(verbs: "Verbs", name: str, text: str) -> argparse.ArgumentParser:
    added = _verb(verbs, name, text)
    added.add_argument("config", help="YAML file, or a shipped recipe such as quickstart or imagenet_lt")
    added.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that override the file")
    return added


def _plan(verbs: "Verbs") -> None:
    added = _verb(
        verbs, "plan", "write teacher and student recipes that fit your images, this machine and a time limit"
    )
    added.add_argument("root", help="folder of class folders, split folders or list files; or a list file")
    added.add_argument("--hours", type=float, help="time for both trainings; default: by the size of the data set")
    added.add_argument("--from", dest="weights", default="", metavar="WEIGHTS", help="initial weights of the student")
    added.add_argument(
        "--out", default="", metavar="NAME", help="write NAME.yaml and NAME-teacher.yaml; default: the folder's name"
    )


def _training(verbs: "Verbs") -> None:
    for name, text in (
        ("train", "train a DeiT-LT student, evaluate it and write the report"),
        ("train-teacher", "train the flat CNN teacher with SAM"),
    ):
        added = _configured(verbs, name, text)
        added.add_argument(
            "--resume",
            default="auto",
            metavar="auto|never|must|PATH",
            help="resume if a checkpoint exists (default), never, or fail without one; or resume the run at PATH",
        )
        if name == "train":
            added.add_argument(
                "--with-teacher",
                metavar="RECIPE",
                help="first train a teacher by this recipe (such as teacher/quickstart) with the student's data, seed, "
                "device and precision; override it by teacher_training.field=value",
            )
        added.add_argument("--dry-run", action="store_true", help="check everything and run one step on random data")
        added.add_argument(
            "--processes", type=int, default=0, metavar="N", help="ranks on this machine; default: one per visible GPU"
        )
        added.add_argument(
            "--restarts", type=int, default=0, metavar="N", help="restart all ranks after a crash, at most N times"
        )


def _ablate(verbs: "Verbs") -> None:
    added = _verb(verbs, "ablate", "train a grid of arms x seeds, resuming unfinished runs, and compare the arms")
    added.add_argument("grid", help="grid file, or a shipped grid such as ablation/embedded")
    added.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings of all arms")
    added.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="train these arms only")
    added.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="train these seeds only")
    added.add_argument("--dry-run", action="store_true", help="check everything; list the runs and their steps")
    added.add_argument("--table", action="store_true", help="only write the table of the finished runs")


def _demo(verbs: "Verbs") -> None:
    added = _verb(
        verbs, "demo", "train a teacher and a student on the embedded real images; about five minutes on two CPU cores"
    )
    added.add_argument("--seed", type=int, default=0, help="seed of teacher and student")
    added.add_argument("--runs-dir", default="runs", help="folder of the run folders")


def _eval(verbs: "Verbs") -> None:
    added = _verb(verbs, "eval", "score a model: AVG, CLS and DIST by head, mid and tail classes; calibration")
    added.add_argument("model", type=Path, help="run folder or model folder")
    added.add_argument(
        "overrides", nargs="*", metavar="data.field=value", help="use other images than those of training"
    )
    added.add_argument("--split", choices=("test", "val", "train"), default="test", help="default: test")
    added.add_argument("--json", type=Path, help="write all scores to this file")
    added.add_argument("--csv", type=Path, help="write one row per class to this file")
    added.add_argument(
        "--predictions", type=Path, metavar="FILE.csv", help="write one row per image: the predictions of each head"
    )


def _predict(verbs: "Verbs") -> None:
    added = _verb(verbs, "predict", "classify images with a student or a teacher: top k with class names")
    added.add_argument("model", type=Path, help="run folder or model folder")
    added.add_argument("inputs", nargs="+", type=Path, help="image files or folders")
    added.add_argument("--top-k", type=int, default=5, help="classes per image; default: 5")
    added.add_argument("--out", type=Path, help="write the predictions to this .csv or .json file")
    added.add_argument("--strict", action="store_true", help="stop at the first unreadable image")
    added.add_argument("--head", default="AVG", choices=("AVG", "CLS", "DIST"), help="logits of a student to use")
    added.add_argument("--raw", action="store_true", help="do not calibrate the probabilities")


def _export(verbs: "Verbs") -> None:
    added = _verb(verbs, "export", "convert a model to timm, ONNX, torch.export or the format of the official code")
    added.add_argument("model", type=Path, help="run folder or model folder")
    added.add_argument("out", type=Path, help="file or folder to write")
    added.add_argument(
        "--format", choices=EXPORTS, default="timm", help="default: timm; the official ones are for teachers"
    )


def _bench(verbs: "Verbs") -> None:
    added = _configured(verbs, "bench", "measure throughput here, part by part, and MFU, memory and scaling")
    added.add_argument("--quick", action="store_true", help="fewer rounds, no scaling over ranks, no compiling on CPU")
    added.add_argument("--synthetic", action="store_true", help="use random images, without a data set")
    added.add_argument("--with-teacher", metavar="RECIPE", help="use an untrained teacher of this recipe")
    added.add_argument("--ranks", type=int, nargs="*", metavar="N", help="numbers of ranks to measure the step with")
    added.add_argument("--batches", type=int, nargs="*", metavar="B", help="micro-batch sizes to measure the step with")
    added.add_argument("--json", type=Path, help="write the results to this file")


def _tune(verbs: "Verbs") -> None:
    added = _configured(verbs, "tune", "measure on this GPU which implementation `auto` selects for each operation")
    added.add_argument("--out", type=Path, help="folder of the measurements; default: the user cache")
    added.add_argument("--ops-only", action="store_true", help="measure single operations, not the training step")
    added.add_argument("--again", action="store_true", help="repeat measurements that exist")


def _profile(verbs: "Verbs") -> None:
    added = _configured(verbs, "profile", "profile training steps: trace for Perfetto, tables by kernel and stage")
    added.add_argument("--out", type=Path, default=Path("profile"), help="folder of trace and tables")
    added.add_argument("--steps", type=int, default=3, help="optimizer steps to record")
    added.add_argument("--with-teacher", metavar="RECIPE", help="use an untrained teacher of this recipe")
    added.add_argument("--synthetic", action="store_true", help="use random images, without a data set")


def _analyze(verbs: "Verbs") -> None:
    analyses = _verb(verbs, "analyze", "analyze a student's attention or a teacher's decisions").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )

    def analysis(name: str, text: str) -> argparse.ArgumentParser:
        added = analyses.add_parser(name, help=text, description=text)
        added.add_argument(
            "runs", nargs="+", metavar="RUN", help="run folders, and settings such as section.field=value"
        )
        added.add_argument("--json", type=Path, help="also write the figures to this file")
        added.set_defaults(overrides=[])
        return added

    added = analysis("student", "attention maps of CLS and DIST, attention distance, feature rank, token similarity")
    added.add_argument("--images", type=int, default=2048, metavar="N", help="number of test images; default: 2048")

    added = analysis("teacher", "decisions on the student's training images, sharpness, feature rank")
    added.add_argument("--recipe", help="student recipe; needed if RUN is a teacher's run")
    added.add_argument("--images", type=int, default=2048, metavar="N", help="number of training images; default: 2048")


def _report(verbs: "Verbs") -> None:
    added = _verb(verbs, "report", "write the HTML report of a run, or a comparison of several runs")
    added.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder; several are compared")
    added.add_argument("--compare", nargs="+", type=Path, default=[], metavar="RUN", help="runs to compare")
    added.add_argument(
        "--out",
        type=Path,
        help="file to write; default: report.html in the run folder, or compare.html beside the first run",
    )


def _data(verbs: "Verbs") -> None:
    data = _verb(
        verbs, "data", "prepare or check a data set, compute its statistics, or list the cache of decoded images"
    )
    data.add_argument("action", choices=("prepare", "check", "stats", "cache"))
    data.add_argument("config", nargs="?", help="recipe or YAML file; for prepare: cifar10, cifar100 or fashion_mnist")
    data.add_argument("overrides", nargs="*", metavar="section.field=value")
    data.add_argument("--root", type=Path, help="prepare: folder of the archive")
    data.add_argument("--download", action="store_true", help="prepare: download the archive if it is missing")
    data.add_argument("--clear", action="store_true", help="cache: delete the cached sets that are not in use")
    data.add_argument("--json", action="store_true", help="check, stats: print JSON")


def _config(verbs: "Verbs") -> None:
    added = _verb(verbs, "config", "show settings with their meaning and origin, or list the shipped recipes")
    added.add_argument("action", choices=("show", "list"))
    added.add_argument("config", nargs="?", help="recipe or YAML file; default: the default settings")
    added.add_argument(
        "overrides",
        nargs="*",
        metavar="NAME",
        help="sections or settings to show; or section.field=value",
    )
    added.add_argument("--changed", action="store_true", help="show only settings that differ from the defaults")
    added.add_argument("--yaml", action="store_true", help="print YAML")


def _doctor(verbs: "Verbs") -> None:
    added = _verb(verbs, "doctor", "check the installation: what is missing and how to install it")
    added.add_argument("--json", action="store_true", help="print JSON")
