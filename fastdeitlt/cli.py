"""The command line: verbs only. Each verb imports what it needs, so ``--help`` stays instant."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastdeitlt.errors import UserError

Verb = Callable[[argparse.Namespace], int]


def _train(args: argparse.Namespace) -> int:
    from fastdeitlt import config, run

    cfg = config.load(args.config, args.overrides)
    run.set_up_logging()
    if args.dry_run:
        from fastdeitlt.dryrun import dry_run

        return dry_run(cfg)
    if args.with_teacher:
        from fastdeitlt.demo import train_both

        train_both(cfg, config.load(args.with_teacher), args.resume)
        return 0
    from fastdeitlt.train import train

    train(cfg, args.resume)
    return 0


def _train_teacher(args: argparse.Namespace) -> int:
    from fastdeitlt import config, run
    from fastdeitlt.teachers.train import train_teacher

    cfg = config.load(args.config, args.overrides)
    run.set_up_logging()
    train_teacher(cfg, args.resume)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from fastdeitlt import run
    from fastdeitlt.demo import demo

    run.set_up_logging()
    demo(args.seed, args.runs_dir)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from fastdeitlt import run
    from fastdeitlt.evaluate import evaluate

    run.set_up_logging()
    evaluate(args.model, args.overrides, split=args.split, json_path=args.json)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from fastdeitlt.predict import main

    return main(args.model, args.inputs, top_k=args.top_k, out=args.out, strict=args.strict)


def _export(args: argparse.Namespace) -> int:
    from fastdeitlt.export import export

    print(export(args.model, args.out, args.format))
    return 0


def _report(args: argparse.Namespace) -> int:
    from fastdeitlt import report

    page = report.compare(args.runs, args.out) if len(args.runs) > 1 else report.write_report(args.runs[0])
    print(page)
    return 0


def _data(args: argparse.Namespace) -> int:
    from fastdeitlt import config

    if args.action == "prepare":
        from fastdeitlt.data.cifar import prepare

        print(prepare(args.config, args.root, download=args.download))
        return 0
    from fastdeitlt.data import doctor

    cfg = config.load(args.config, args.overrides)
    findings = doctor.check(cfg) if args.action == "check" else doctor.stats(cfg)
    findings.print(as_json=args.json)
    return findings.exit_code


def _config(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from fastdeitlt import config

    cfg = config.load(args.config, args.overrides)
    if args.yaml:
        print(config.dump(cfg), end="")
        return 0
    table = Table("name", "value", "from", "meaning")
    for name, value in config.flatten(cfg).items():
        table.add_row(name, str(value), cfg.origins[name], config.describe(name))
    Console().print(table)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fastdeitlt.doctor import doctor

    findings = doctor()
    findings.print(as_json=args.json)
    return findings.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdeitlt", description="Train Vision Transformers from scratch on long-tailed images (DeiT-LT)."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Verb, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    def configured(name: str, run: Verb, text: str) -> argparse.ArgumentParser:
        added = verb(name, run, text)
        added.add_argument("config", help="YAML file, or a shipped recipe such as quickstart or imagenet_lt")
        added.add_argument(
            "overrides", nargs="*", metavar="section.field=value", help="settings that win over the file"
        )
        return added

    for name, run, text in (
        ("train", _train, "train a student: data, teacher, DeiT-LT, evaluation, report"),
        ("train-teacher", _train_teacher, "train the flat CNN teacher with SAM"),
    ):
        added = configured(name, run, text)
        added.add_argument(
            "--resume", default="auto", metavar="auto|never|must|PATH", help="what to do with saved state"
        )
        if run is _train:
            added.add_argument(
                "--with-teacher", metavar="RECIPE", help="train this teacher first, such as teacher/quickstart"
            )
            added.add_argument("--dry-run", action="store_true", help="check everything, run one step on fake data")

    added = verb(
        "demo", _demo, "train a teacher and a student on the embedded real images; about five minutes on a CPU"
    )
    added.add_argument("--seed", type=int, default=0, help="seed of both")
    added.add_argument("--runs-dir", default="runs", help="where run folders go")

    added = verb("eval", _eval, "score a model: AVG, CLS, DIST by head, mid, tail, calibration")
    added.add_argument("model", type=Path, help="run folder or model folder")
    added.add_argument(
        "overrides", nargs="*", metavar="data.field=value", help="other images than the model was trained on"
    )
    added.add_argument("--split", choices=("test", "val", "train"), default="test")
    added.add_argument("--json", type=Path, help="write the scores there")

    added = verb("predict", _predict, "classify images: top-k with the class names")
    added.add_argument("model", type=Path, help="run folder or model folder")
    added.add_argument("inputs", nargs="+", type=Path, help="image files or folders")
    added.add_argument("--top-k", type=int, default=5)
    added.add_argument("--out", type=Path, help="write .csv or .json there")
    added.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")

    added = verb("export", _export, "write a model for other programs: timm folder, ONNX, torch.export")
    added.add_argument("model", type=Path, help="run folder or model folder")
    added.add_argument("out", type=Path)
    added.add_argument("--format", choices=("timm", "onnx", "pt2"), default="timm")

    added = verb("report", _report, "write the HTML report of a run, or compare several")
    added.add_argument("runs", nargs="+", type=Path)
    added.add_argument("--out", type=Path, help="where to write a comparison")

    data = verb("data", _data, "prepare, check or describe a data set")
    data.add_argument("action", choices=("prepare", "check", "stats"))
    data.add_argument("config", help="recipe or YAML file; for prepare: cifar10 or cifar100")
    data.add_argument("overrides", nargs="*", metavar="section.field=value")
    data.add_argument("--root", type=Path, help="prepare: folder for the archive")
    data.add_argument("--download", action="store_true", help="prepare: fetch the archive if it is not there")
    data.add_argument("--json", action="store_true")

    added = verb("config", _config, "show the resolved configuration, and where each value came from")
    added.add_argument("action", choices=("show",))
    added.add_argument("config")
    added.add_argument("overrides", nargs="*", metavar="section.field=value")
    added.add_argument("--yaml", action="store_true", help="as YAML")

    added = verb("doctor", _doctor, "what is installed, what is missing, how to get it")
    added.add_argument("--json", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Exit code 0; 2 for bad input, in one line; 5 for a loss that is not finite; 130 for Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except UserError as error:
        print(f"fastdeitlt: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastdeitlt: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
