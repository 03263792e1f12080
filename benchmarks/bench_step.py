"""Whole training step, from images on the device to new weights: ours lever by lever, timm's task, the official loop.

    python -m benchmarks.bench_step [--case NAME ...] [--rounds 12] [--only NAME ...] [--check] [--profile FILE]

One process, interleaved rounds, the same weights, images, precision and work; the losses of three steps are compared
before timing. A contestant that fails or differs is reported and not timed, and the exit code is 1. The rate is images
per second; the ratio is to the baseline. ``--profile`` appends a table of the longest operations of one step of each of
our contestants to a file.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from benchmarks import harness, peers
from benchmarks.peers import Workload
from fastdeitlt.core.measure.timer import synchronise
from fastdeitlt.models import create_student
from fastdeitlt.models.vit import flops_per_image

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KNOWN = peers.LEVERS | peers.ONE_OFF
SHOWN = 40
"""Operations in a profile's table."""
CASES = {
    "dry": Workload("deit_tiny_distilled_patch16_32", 32, 10, 4, "resnet8", "fp32", CPU),
    "ti8-32": Workload("deit_tiny_distilled_patch8_32", 32, 10, 64, "resnet8", "fp32", CPU),
    "ti8-32-bf16": Workload("deit_tiny_distilled_patch8_32", 32, 10, 64, "resnet8", "bf16", CPU),
    "ti4-32": Workload("deit_tiny_distilled_patch4_32", 32, 100, 32, "resnet32", "fp32", CPU),
    "ti4-32-bf16": Workload("deit_tiny_distilled_patch4_32", 32, 100, 32, "resnet32", "bf16", CPU),
    "ti8-64": Workload("deit_tiny_distilled_patch8_64", 64, 100, 32, "resnet8", "fp32", CPU),
    "ti8-64-bf16": Workload("deit_tiny_distilled_patch8_64", 64, 100, 32, "resnet8", "bf16", CPU),
    "s16-224": Workload("deit_small_distilled_patch16_224", 224, 1000, 256, "resnet50", "bf16", GPU),
    "b16-224": Workload("deit_base_distilled_patch16_224", 224, 1000, 256, "resnet50", "bf16", GPU),
    "b16-224-inat": Workload("deit_base_distilled_patch16_224", 224, 8142, 256, "resnet50", "bf16", GPU),
}


def contestants(work: Workload, only: list[str] | None = None) -> tuple[dict[str, peers.Step], dict[str, str]]:
    """Build the contestants that can run on the workload's device and installation.

    Returns:
        Steps; reasons of those that failed.
    """
    names = [name for name in KNOWN if name in (peers.LEVERS if only is None else only)]
    if work.device.type != "cuda":
        names = [name for name in names if name not in peers.GPU_ONLY]
    if not harness.installed("deepspeed"):
        print("deepspeed: not installed, not measured")
        names = [name for name in names if "DeepSpeed" not in name]
    steps: dict[str, peers.Step] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            steps[name] = KNOWN[name](work)
        except Exception as error:  # noqa: BLE001 - whatever one raises, the others are measured
            reasons[name] = peers.one_line(error)
    return steps, reasons


def profile(calls: dict[str, harness.Call], device: torch.device, file: Path) -> None:
    """Append a table of one step of each of our contestants to a file.

    Longest operations first.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with file.open("a", encoding="utf-8") as out:
        for name, call in calls.items():
            if not peers.is_ours(name):
                continue
            with torch.profiler.profile(activities=activities) as recorded:
                call()
                synchronise(device)
            longest = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
            table = recorded.key_averages().table(sort_by=longest, row_limit=SHOWN, max_name_column_width=90)
            out.write(f"== {name}\n{table}\n")
    print(f"profile appended to {file}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs="+", choices=sorted(CASES), help="default: the cases of this device, without dry"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(KNOWN), help="measure only these contestants and the baseline"
    )
    parser.add_argument("--baseline", choices=list(KNOWN), default=peers.BASELINE)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--check", action="store_true", help="compare losses, without timing or output")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="append a table of operations to this file")
    options = parser.parse_args(arguments)
    torch._dynamo.config.recompile_limit = harness.RECOMPILES
    device = GPU if torch.cuda.is_available() else CPU
    only = [*options.only, options.baseline] if options.only else None
    complete = True
    for name in options.case or [name for name, work in CASES.items() if work.device == device and name != "dry"]:
        work = CASES[name]
        steps, not_built = contestants(work, only)
        losses, not_equal = peers.check_equal(steps, work)
        for label, reason in (not_built | not_equal).items():
            print(f"{name} {label}: NOT TIMED, {reason}", flush=True)
            complete = False
        for label, values in losses.items():
            print(f"{name} {label}: losses " + ", ".join(f"{loss:.5f}" for loss in values))
        if options.check or not losses:
            continue
        calls = {label: functools.partial(steps[label], work.batch(0, label)) for label in losses}
        student = create_student(work.student, work.num_classes, work.img_size)
        case = harness.Case(
            name, calls, options.baseline if options.baseline in calls else next(iter(calls)),
            useful_flops=int(3 * flops_per_image(student) * work.batch_size),
            dtype=torch.bfloat16 if work.precision == "bf16" else torch.float32, eager=frozenset(calls),
            images=work.batch_size, facts=work.facts,
        )  # fmt: skip
        print(f"rows appended to {harness.run('step', case, device, options.rounds)}")
        if options.profile:
            profile(calls, device, options.profile)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
