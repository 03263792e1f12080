"""All GPU measurements in one command within a time limit, the most important in the first minutes.

    python -m benchmarks.gpu [STAGE ...] [--minutes M] [--out DIR] [--wheels DIR] [--again] [--dry] [--list]

The first stages are planned for nine minutes on an H200 and need only torch, Triton, timm, pydantic, PyYAML and
safetensors:

- facts: versions, the rates of a copy and a product;
- prepare: the kernels' tests, while a process for each contestant fills the compilers' caches;
- step: ours beside timm's and the official loop, and a table of its operations;
- ops: each kernel beside its peers, torch's attention beside float64;
- arrays: training from images in memory.

The later ones need more time: tune-ops, tune, parts, train (from JPEG files), tune-inat18, steps. With ``--minutes``
each stage is killed at its part of the limit, and those after the limit are skipped.

The checkout need not be installed. ``--wheels`` is a folder of wheels that are not installed; a stage whose packages
are missing is skipped and does not count as failed. The folder DIR contains after each stage: rows.jsonl, kernels.jsonl
(the measurements that `auto` uses), profile.txt, log.txt and stages.json; table.txt at the end.
``--again`` is the second command: it reruns what failed, then measures the step with one kernel off at a time.
``--dry`` runs everything at its smallest on a machine without a GPU. Exits with 1 if a stage failed, or, if the stage
budget is named, a goal is missed.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import portable
from benchmarks.budget import budget, measured
from benchmarks.portable import ROOT

MEASURED = ROOT / "kernels" / "measured"
MINUTES = 9.0
"""Planned minutes of the first stages."""
RESERVE_S = 5.0
"""Seconds of ``--minutes`` reserved for the table."""
IN_BUDGET = ("official loop", "+ kernels", "as shipped (auto)", "as shipped, DeepSpeed")
"""Contestants of ``bench_step`` for the budget, and "+ kernels" to compare with `auto`."""
COMPILED = ("timm, compiled", "+ kernels", "as shipped (auto)")
"""Contestants to compile before they are timed."""
FILL_CACHES = ("check", "compile")
"""First words of the commands that only fill the compilers' caches."""
IN_STEP = {"attention", "add_layernorm", "bias_gelu", "joint_loss", "adamw_ema"}
"""Ops of "+ kernels"."""
ONE_OFF = (
    "as shipped, fused teacher",
    *(f"kernels, {op} by torch" for op in ("attention", "add_layernorm", "bias_gelu", "joint_loss")),
    "as shipped, fp8",
)
"""Contestants of ``--again``."""
ONE_BATCH = ("train.batch_size=256", "train.accumulate=1", "train.virtual_ranks=1")
"""Settings for a step of one batch of 256 images."""
ABSENT, NO_TIME = "is not installed", "skipped, no time"
Command = list[str]


@dataclass(frozen=True)
class Stage:
    """Commands that run in parallel.

    Args:
        commands: name -> arguments of Python.
        until: minute, of ``MINUTES``, at which the stage must end; 0 = a later stage, without its own limit.
        needs: distributions that it requires, besides ``BASE``.
        again: whether it only runs with ``--again``.
        crowded: whether its processes share the GPU, so that the kernels they time for `auto` are discarded.
    """

    commands: Mapping[str, Command]
    until: float = 0.0
    needs: tuple[str, ...] = ()
    again: bool = False
    crowded: bool = False


@dataclass
class Place:
    """Folders, environment and results of a run.

    Args:
        out: folder of the results.
        scratch: temporary folder.
        environment: environment of the workers.
        wheels: folder of wheels.
        results: command -> its outcome and last line.
    """

    out: Path
    scratch: Path
    environment: Mapping[str, str]
    wheels: Path | None = None
    results: dict[str, str] = field(default_factory=dict)


WHOLE_TRAINER = ("matplotlib", "tensorboard", "jinja2", "filelock")
"""Packages of the trainer's log and report; without them the tests that train are skipped."""
BASE = ("torch", "triton", "timm", "pydantic", "pyyaml", "safetensors")


def stages(dry: bool, out: Path) -> dict[str, Stage]:
    """Return name -> stage, most important first."""
    tune = ["-m", "fastdeitlt.cli", "tune"]
    config = ["quickstart", "student.depth=1", "train.batch_size=4"] if dry else ["imagenet_lt", *ONE_BATCH]
    parts = ["-m", "fastdeitlt.cli", "bench", *config, "name=gpu-budget", "--synthetic", "--json"]
    parts += [str(out / "parts.json"), *(["--quick", "--batches"] if dry else [])]
    step = ["-m", "benchmarks.bench_step", "--case", "dry" if dry else "b16-224"]
    only = ["--only", "+ last-block shortcut", "--baseline", "official loop"] if dry else ["--only", *IN_BUDGET]
    rounds = ["--rounds", "1" if dry else "6"]
    ops = ["-m", "benchmarks.gpu_ops", "ops", *(["--small", "--rounds", "1"] if dry else [])]
    images = ["--images", "8", "--rounds", "1"] if dry else ["--images", "4096", "--rounds", "3", "--workers", "12"]
    arrays = ["-m", "benchmarks.bench_train", "--arrays", *images, *(["--small"] if dry else [])]
    every = ["--case", "dry", "--check", *only] if dry else []
    train = ["-m", "benchmarks.bench_train", *(["--help"] if dry else [*images, "--images", "8192"])]
    facts = ["-m", "benchmarks.gpu_ops", "facts"]
    prepare = {"tests": _tests(dry, out), "compile": [*ops, "--check"]}
    checked = {"check": only} if dry else {f"check {n}": ["--only", n, "--baseline", n] for n in COMPILED}
    prepare |= {name: [*step, *contestants, "--check"] for name, contestants in checked.items()}
    stages = {
        "facts": Stage({"facts": facts}, 0.75),
        "prepare": Stage(prepare, 3.5, ("pytest", "hypothesis"), crowded=True),
        "step": Stage({"step": [*step, *only, *rounds, "--profile", str(out / "profile.txt")]}, 6.0),
        "ops": Stage({"ops": ops}, 7.75),
        "arrays": Stage({"arrays": arrays}, MINUTES),
        "tune-ops": Stage({"tune-ops": [*tune, *_tuned(dry, "imagenet_lt"), *(() if dry else ("--ops-only",))]}),
        "tune": Stage({"tune": [*tune, *_tuned(dry, "imagenet_lt")]}),
        "parts": Stage({"parts": parts}, needs=("rich", "tensorboard", "nvidia-ml-py")),
        "train": Stage({"train": train}, needs=("nvidia-dali-cuda130",)),
        "tune-inat18": Stage({"tune-inat18": [*tune, *_tuned(dry, "inat18")]}),
        "steps": Stage({"steps": ["-m", "benchmarks.bench_step", *every]}),
    }
    for name in ONE_OFF:
        less = only if dry else ["--only", name, "--baseline", "+ kernels"]
        stages[name] = Stage({name: [*step, *less, *rounds]}, again=True)
    return stages


def _tuned(dry: bool, recipe: str) -> Command:
    return ["--help"] if dry else [recipe, *ONE_BATCH, "--out", str(MEASURED)]


def _tests(dry: bool, out: Path) -> Command:
    """Return the command of the kernels' tests that depend on this GPU."""
    modules = {name for name in ("xdist", "pytest_timeout", *WHOLE_TRAINER) if importlib.util.find_spec(name)}
    command = ["-m", "pytest", "tests/kernels", "--ignore=tests/kernels/test_aot.py", "-o", "pythonpath=tests"]
    command += ["--collect-only"] if dry else [f"--junitxml={out / 'tests.xml'}", "--continue-on-collection-errors"]
    if not modules.issuperset(WHOLE_TRAINER):
        command += ["--ignore=tests/kernels/test_training.py"]
    if "xdist" in modules and not dry:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "-vv"]  # -vv names each failed test at once
    if "pytest_timeout" not in modules:  # else pytest rejects its option in pyproject.toml
        command += ["-o", "addopts=-q --import-mode=importlib -p no:cacheprovider"]
    return command


def red_ops(junit: Path, outcome: str, log: str = "") -> list[str]:
    """Return the ops whose tests failed in pytest's XML report.

    Without a report they are those that the ``log`` names if the ``outcome`` is that the tests were not due or out of
    time, else all.
    """
    if not junit.exists():
        modules = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
        failed = set(re.findall(r"\b(?:FAILED|ERROR) tests/kernels/(test_\w+)\.py", log))
        is_untested = outcome.startswith(("FAILED", "skipped"))
        return [path.stem.removeprefix("test_") for path in modules if is_untested or path.stem in failed]
    cases = xml.etree.ElementTree.parse(junit).getroot().iter("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    names = [f"{case.get('classname')} {case.get('name')}" for case in failed]  # no class: the module did not import
    found = [re.search(r"\btest_(\w+)", name) for name in names]
    return sorted({name[1] for name in found if name})


def without_red(stage: Stage, red: Sequence[str]) -> Stage:
    """Return a stage without the ops whose tests failed.

    If one is of the step, with the shipped step in place of the one with all kernels.
    """
    commands = dict(stage.commands)
    if "ops" in commands and red:
        commands["ops"] = [*commands["ops"], "--red", *red]
    if IN_STEP.intersection(red):  # a kernel may break the CUDA context of all contestants
        commands = {
            name: ["as shipped (auto)" if word == "+ kernels" else word for word in command]
            for name, command in commands.items()
        }
    return replace(stage, commands=commands)


def run(stage: Stage, place: Place, deadline: float) -> None:
    """Run a stage's commands until the monotonic ``deadline``; record outcomes."""
    absent = portable.missing((*BASE, *stage.needs), place.wheels)
    if absent or deadline <= time.monotonic():
        outcome = f"skipped, {', '.join(absent)} {ABSENT}" if absent else NO_TIME
        place.results.update(dict.fromkeys(stage.commands, outcome))
        return
    environment = dict(place.environment)
    if stage.crowded:
        environment["XDG_CACHE_HOME"] = str(place.scratch / "cache")
    started: dict[str, subprocess.Popen[bytes]] = {}
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        for name, command in stage.commands.items():
            log = stack.enter_context((place.scratch / name).open("wb"))
            started[name] = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            ended = {name: _wait(process, deadline) for name, process in started.items()}
        finally:
            for process in started.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its workers too
                    process.wait()
    for name, outcome in ended.items():
        lines = (place.scratch / name).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if re.search(r"\w", line)), "")
        place.results[name] = f"{outcome} by {time.monotonic() - start:.0f} s: {last[:120]}"
        with (place.out / "log.txt").open("a", encoding="utf-8") as log:
            command = " ".join(stage.commands[name])
            log.write("\n".join([f"== {name}: python {command}", *lines, f"== {name}: {outcome}", ""]))
        if outcome == "FAILED":
            print("\n".join(lines[-15:]), flush=True)


def chosen_stages(
    all_stages: Mapping[str, Stage], named: Sequence[str], results: Mapping[str, str], again: bool
) -> list[Stage]:
    """Return the stages to run: the named ones, or all.

    With ``again`` unfinished commands, the tests last of them, then ``ONE_OFF``.
    """
    if named:
        return [stage for name, stage in all_stages.items() if name in named]
    if not again:
        return [stage for stage in all_stages.values() if not stage.again]
    bad = {name for name, result in results.items() if not result.startswith("done") and ABSENT not in result}
    stages_again = []
    for stage in all_stages.values():
        was_due = stage.until or not any(results.get(name) == NO_TIME for name in stage.commands)  # not a later stage
        rerun = [n for n in stage.commands if was_due and n in bad and n.partition(" ")[0] not in FILL_CACHES]
        due = stage.commands if stage.again else rerun
        if due:
            stages_again.append(replace(stage, commands={name: stage.commands[name] for name in due}))
    return sorted(stages_again, key=lambda stage: (stage.again, "tests" in stage.commands))


def _wait(process: subprocess.Popen[bytes], deadline: float) -> str:
    try:
        code = process.wait(None if deadline == float("inf") else max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return "stopped, no time"
    return "done" if code == 0 else "FAILED"


def save(place: Place) -> None:
    """Write the commands' outcomes and the kernel measurements beside the rows."""
    (place.out / "stages.json").write_text(json.dumps(place.results, indent=1), encoding="utf-8")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdeitlt" / "kernels"
    texts = [
        file.read_text(encoding="utf-8") for folder in (MEASURED, cache) for file in sorted(folder.glob("*.jsonl"))
    ]
    (place.out / "kernels.jsonl").write_text("".join(texts), encoding="utf-8")


def table(place: Place, gpu: str | None) -> Iterator[str]:
    """Yield the lines of the table: each command's outcome, the steps, wrong results."""
    yield from (f"{name:28} {result}" for name, result in place.results.items())
    rows = measured(place.out, gpu)
    for (op, case, candidate), row in rows.items():
        if op == "step":
            yield f"{case} {candidate:32} {row['median_ms']:9.2f} ms {row['images_per_s']:8.0f} img/s"
        elif op == "backends" and not row["error"] <= 2e-2:
            yield f"WRONG: attention {case} {candidate}, error {row['error']:.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit; default: none")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use without installing them")
    parser.add_argument(
        "--again", action="store_true", help="rerun what failed in --out, then with one kernel off at a time"
    )
    parser.add_argument("--dry", action="store_true", help="run every stage at its smallest size, also without a GPU")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    start = time.monotonic()
    deadline = start + 60 * options.minutes - RESERVE_S
    all_stages = stages(options.dry, out)
    if unknown := set(options.stages) - {*all_stages, "budget"}:
        parser.error(f"got stage {', '.join(sorted(unknown))}, expected {', '.join(all_stages)} or budget")
    if options.list:
        listed = [(name, command) for stage in all_stages.values() for name, command in stage.commands.items()]
        print("\n".join(f"{name}: python {' '.join(command)}" for name, command in listed))
        return 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu is None and not options.dry:
        parser.error("no visible GPU; use --dry for what runs without one, and pytest tests/kernels for the kernels")
    out.mkdir(parents=True, exist_ok=True)
    before = out / "stages.json"
    results = json.loads(before.read_text(encoding="utf-8")) if before.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = portable.environment(Path(folder), options.wheels)
        except ValueError as error:
            parser.error(str(error))
        environment |= {"BENCHMARK_ROWS": str(out / "rows.jsonl"), "PYTHONUNBUFFERED": "1"}
        if options.dry:
            environment |= {"OMP_NUM_THREADS": "1"}  # tiny shapes, in which threads mostly wait
        place = Place(out, Path(folder), environment, options.wheels, dict(results))
        chosen = chosen_stages(all_stages, options.stages, results, options.again)
        shares = not (options.stages or options.again or options.dry)
        for stage in chosen:
            until = start + 60 * options.minutes * (stage.until or MINUTES) / MINUTES if shares else deadline
            if "tests" in stage.commands:
                (out / "tests.xml").unlink(missing_ok=True)
            log = out / "log.txt"
            said = log.read_text(encoding="utf-8").rpartition("== tests: python")[2] if log.exists() else ""
            red = red_ops(out / "tests.xml", place.results.get("tests", ""), said)
            run(without_red(stage, red), place, min(until, deadline))
            save(place)
    lines = list(table(place, gpu))
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        met = budget(measured(out, gpu)) or "budget" not in options.stages
    (out / "table.txt").write_text("\n".join([*lines, "", text.getvalue()]), encoding="utf-8")
    print((out / "table.txt").read_text(encoding="utf-8"), flush=True)
    ran = [place.results[name] for stage in chosen for name in stage.commands]
    return 1 if not met or any(result.startswith("FAILED") for result in ran) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are killed too
    sys.exit(main())
