"""The command line. Each verb imports what it needs, which keeps ``--help`` fast."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastdeitlt.arguments import parse, refuse_unused
from fastdeitlt.errors import MemoryFullError, UserError, counted, is_memory_full, printable, storage_failure
from fastdeitlt.run import process

if TYPE_CHECKING:
    from fastdeitlt.config import Config

Verb = Callable[[argparse.Namespace], int]
PRINTS = ("plan", "eval", "predict", "export", "bench", "analyze", "report", "data", "config", "doctor")
"""Verbs that print their result: failing to print is an error."""


def _set_up_logging() -> None:
    from fastdeitlt.run.folder import set_up_logging

    set_up_logging()


def _train(args: argparse.Namespace) -> int:
    from fastdeitlt import config

    cfg, teacher = config.load_student(args.config, args.overrides, args.with_teacher)
    _set_up_logging()
    if (code := _as_ranks(cfg, args)) is not None:
        return code
    if args.dry_run:
        from fastdeitlt.tools.dryrun import dry_run

        return dry_run(cfg, teacher, args.resume)
    if teacher:
        from fastdeitlt.tools.demo import train_both

        train_both(cfg, teacher, args.resume)
        return 0
    from fastdeitlt.train import train

    train(cfg, args.resume)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from fastdeitlt.tools.plan import main

    return main(args.root, hours=args.hours, weights=args.weights, out=args.out)


def _train_teacher(args: argparse.Namespace) -> int:
    from fastdeitlt import config

    cfg = config.load_teacher(args.config, args.overrides)
    _set_up_logging()
    if (code := _as_ranks(cfg, args)) is not None:
        return code
    if args.dry_run:
        from fastdeitlt.tools.dryrun import dry_run_teacher

        return dry_run_teacher(cfg, args.resume)
    from fastdeitlt.train_teacher import train_teacher

    train_teacher(cfg, args.resume)
    return 0


def _as_ranks(cfg: "Config", args: argparse.Namespace) -> int | None:
    """Launch several ranks and return their exit code; None: run in this process."""
    from fastdeitlt.run import launch

    for option in ("processes", "restarts"):
        if (number := getattr(args, option)) < 0:
            raise UserError(f"--{option}: got {number}, expected 0 or more")
    count = launch.processes(cfg, args.processes, os.environ)
    restarts = 0 if launch.is_launched(os.environ) else args.restarts
    return launch.launch(count, args.arguments, restarts) if count > 1 or restarts else None


def _ablate(args: argparse.Namespace) -> int:
    from fastdeitlt.tools.ablate import ablate

    _set_up_logging()
    settings = [word for word in args.arms if "=" in word]  # settings after --arms
    folder = ablate(
        args.grid,
        [*args.overrides, *settings],
        arms=[word for word in args.arms if word not in settings],
        seeds=args.seeds,
        dry_run=args.dry_run,
        table_only=args.table,
    )
    if folder:
        print(folder / "results.md")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from fastdeitlt.tools.demo import demo

    _set_up_logging()
    demo(args.seed, args.runs_dir)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from fastdeitlt.evaluation.evaluate import evaluate

    _set_up_logging()
    paths = {"json_path": args.json, "csv_path": args.csv, "predictions_path": args.predictions}
    evaluate(args.model, args.overrides, split=args.split, **paths)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from fastdeitlt.tools.predict import main

    options = {name: getattr(args, name) for name in ("top_k", "out", "strict", "raw", "head")}
    return main(args.model, args.inputs, **options)


def _export(args: argparse.Namespace) -> int:
    if args.format.startswith("official_"):
        from fastdeitlt.teachers.convert import export_official

        print(export_official(args.model, args.format, args.out))
        return 0
    from fastdeitlt.tools.export import export

    print(export(args.model, args.out, args.format))
    return 0


def _timed_settings(args: argparse.Namespace) -> list[str]:
    """Return the overrides of a measurement, with its teacher's architecture."""
    from fastdeitlt import config

    teacher = []
    if args.with_teacher:
        teacher = [f"teacher.arch={config.load_teacher(args.with_teacher).teacher_training.arch}"]
    return [*teacher, *args.overrides]


def _bench(args: argparse.Namespace) -> int:
    from fastdeitlt.tools.bench import bench

    _set_up_logging()
    options = {"ranks": args.ranks, "batches": args.batches, "json_path": args.json}
    bench(args.config, _timed_settings(args), quick=args.quick, synthetic=args.synthetic, **options)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from fastdeitlt.tools.tune import tune

    _set_up_logging()
    tune(args.config, args.overrides, out=args.out, with_step=not args.ops_only, again=args.again)
    return 0


def _profile(args: argparse.Namespace) -> int:
    from fastdeitlt.tools.profiling import profile

    _set_up_logging()
    profile(args.config, _timed_settings(args), args.out, num_steps=args.steps, synthetic=args.synthetic)
    return 0


def _analyze(args: argparse.Namespace) -> int:
    from fastdeitlt.reporting import analysis

    _set_up_logging()
    runs = [word for word in args.runs if "=" not in word]
    overrides = [word for word in (*args.runs, *args.overrides) if "=" in word]
    common = {"verb", "what", "runs", "overrides", "arguments"}
    options = {name: value for name, value in vars(args).items() if name not in common}
    analysis.main(args.what, runs, overrides, **options)
    return 0


def _report(args: argparse.Namespace) -> int:
    from fastdeitlt.reporting import report
    from fastdeitlt.store.files import expect_folder

    runs = [*args.runs, *args.compare]
    if not runs:
        raise UserError("report: no run folder, expected runs/<name>")
    expect_folder(args.out)
    several = args.compare or len(runs) > 1
    print(report.compare(runs, args.out) if several else report.write_report(runs[0], args.out))
    return 0


def _data(args: argparse.Namespace) -> int:
    from fastdeitlt import config

    if args.action == "cache":
        return _data_cache(args)
    if args.config is None:
        raise UserError(f"data {args.action}: no data set, expected a recipe such as quickstart, or a YAML file")
    if args.action == "prepare":
        from fastdeitlt.data.sets.cut import prepare

        if args.root is None:
            raise UserError("data prepare: no folder for the archive, expected --root FOLDER")
        print(prepare(args.config, args.root, download=args.download))
        return 0
    from fastdeitlt.data.check import doctor

    cfg = config.load(args.config, args.overrides)
    findings = doctor.check(cfg) if args.action == "check" else doctor.stats(cfg)
    findings.print(as_json=args.json)
    return findings.exit_code


def _data_cache(args: argparse.Namespace) -> int:
    from datetime import datetime

    from fastdeitlt.data.pixels import cache

    before = cache.cached_sets()
    if args.clear:
        in_use = cache.clear()
        freed = sum(cached.num_bytes for cached in before) - sum(cached.num_bytes for cached in in_use)
        removed = counted(len(before) - len(in_use), "decoded set")
        print(f"removed {removed}, {freed / 1e6:,.1f} MB; {len(in_use)} in use")
        return 0
    for cached in before:
        date = datetime.fromtimestamp(cached.modified).isoformat(" ", "minutes")
        what = (
            f"{counted(cached.num_images, 'image')} of {cached.root}"
            if cached.root
            else "incomplete, damaged or of another version"
        )
        print(f"{cached.num_bytes / 1e6:,.1f} MB  {date}  {cached.path.name}  {what}")
    print(f"{counted(len(before), 'decoded set')} in {cache.user_cache('decoded')}")
    return 0


def _config(args: argparse.Namespace) -> int:
    from fastdeitlt.tools import settings

    if args.action == "list":
        settings.list_recipes()
    else:
        settings.show([*([args.config] if args.config else []), *args.overrides], args.changed, args.yaml)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fastdeitlt.tools.doctor import doctor

    findings = doctor()
    findings.print(as_json=args.json)
    return findings.exit_code


VERBS: dict[str, Verb] = {
    "plan": _plan, "train": _train, "train-teacher": _train_teacher, "ablate": _ablate, "demo": _demo, "eval": _eval,
    "predict": _predict, "export": _export, "bench": _bench, "tune": _tune, "profile": _profile, "analyze": _analyze,
    "report": _report, "data": _data, "config": _config, "doctor": _doctor,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code.

    Exit codes: 0 success; 1 a bug (with its traceback) or a file error during a run; 2 invalid input; 4 no intact
    checkpoint, or none can be written; 5 non-finite loss; 6 out of memory; 7 another rank lost; 8 crash loop; 75
    stopped by SIGTERM or SIGUSR1 (rerun to resume); 130 Ctrl-C; 141 broken pipe. All but a bug print one line.

    Args:
        arguments: for use inside another program; None: the process's own, with signal handlers and streams set up.
    """
    if arguments is not None:
        return _run(parse(arguments))
    stdout = process.start()
    args = parse(sys.argv[1:])
    return process.end(_run(args), stdout if args.verb in PRINTS else None)


def _run(args: argparse.Namespace) -> int:
    """Run the verb, print an expected error in one line, and return the exit code."""
    try:
        refuse_unused(args)
        return VERBS[args.verb](args)
    except UserError as error:
        if not error.reported:
            _report_line(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        process.say_stopped(process.STOP.first or signal.SIGINT)
        return process.stop_code(process.STOP.first or signal.SIGINT)
    except Exception as error:
        if message := storage_failure(error):
            _report_line(f"error: {message}")
            return UserError.exit_code
        if is_memory_full(error):
            reason = " ".join(str(error).split())[:160]
            _report_line(f"error: out of memory ({reason}). Raise the limit or use smaller batches.")
            return MemoryFullError.exit_code
        if "FASTDEITLT_LAUNCHER" not in os.environ:
            raise
        traceback.print_exc()
        return 1


def _report_line(text: str) -> None:
    print(f"fastdeitlt: {printable(text)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
