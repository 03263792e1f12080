"""Model of a run on 1 to 512 GPUs: epoch, communication, checkpoint and failures from a measured step time.

    python -m benchmarks.simulate --step-ms MS --batch B [--images N] [--parameters P] [--gpus 1 2 4 ... 512] ...
    python -m benchmarks.simulate --check [--ranks 1 2 4]

No speed is built in: the step of one GPU (from ``fastdeitlt bench CONFIG``) and every link are inputs. The model is in
docs/scaling.md. ``--check`` measures one and two gloo processes on this machine, predicts the step of more, and
measures it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
FP32, MOMENTS = 4, 2


@dataclass(frozen=True)
class Cluster:
    """Properties of the machines.

    Args:
        gpus_per_node: GPUs on the fast link.
        intra_gb_s, inter_gb_s: GB/s that one GPU sends within a node, and to other nodes (its part of the network).
        latency_us: latency of one message.
        disk_gb_s: GB/s of the file system for one writer.
        mtbf_hours: mean time between failures of one GPU with its part of the machine.
        restart_s: from a failure to the first step of the restarted run.
    """

    gpus_per_node: int = 8
    intra_gb_s: float = 0.0
    inter_gb_s: float = 0.0
    latency_us: float = 0.0
    disk_gb_s: float = 0.0
    mtbf_hours: float = 0.0
    restart_s: float = 0.0


@dataclass(frozen=True)
class Job:
    """Properties of the training.

    Args:
        images: number of training images; an epoch of repeated augmentation has as many.
        parameters: number of the student's parameters.
        step_ms: forward, backward and optimizer of one micro-batch on one GPU, without communication.
        batch: images in a micro-batch.
        accumulate: micro-batches between exchanges of gradients.
        zero: ZeRO stage.
        overlap: share of the communication that overlaps with the backward pass.
        ema: whether a moving average is kept.
    """

    images: int
    parameters: int
    step_ms: float
    batch: int
    accumulate: int = 1
    zero: int = 1
    overlap: float = 0.0
    ema: bool = True


@dataclass(frozen=True)
class Prediction:
    """Prediction in seconds, except ``images_per_s``, and the ratios ``efficiency`` and ``lost``."""

    gpus: int
    exchange: float
    step: float
    epoch: float
    images_per_s: float
    efficiency: float
    checkpoint: float
    checkpoint_every: float
    lost: float


def messages(zero: int, accumulate: int) -> int:
    """Return a rank's messages per optimizer step.

    Of the gradients' size, each times (N - 1) / N.

    A reduce-scatter of gradients and an all-gather of weights; stage 2 reduces after every micro-batch, stage 3 also
    gathers for every forward and again for every backward pass.
    """
    return {0: 2, 1: 2, 2: accumulate + 1, 3: 3 * accumulate}[zero]


def exchange_s(job: Job, cluster: Cluster, gpus: int) -> float:
    """Return the seconds of a ring over all GPUs at its slowest link.

    Volume / bandwidth + messages x latency.
    """
    if gpus == 1:
        return 0.0
    link = cluster.intra_gb_s if gpus <= cluster.gpus_per_node else min(cluster.intra_gb_s, cluster.inter_gb_s)
    sent = messages(job.zero, job.accumulate) * (gpus - 1)
    return sent / gpus * FP32 * job.parameters / (link * 1e9) + sent * cluster.latency_us * 1e-6


def checkpoint_s(job: Job, cluster: Cluster) -> float:
    """Return the seconds to write a checkpoint by one process.

    Weights, two moments and the average in float32.
    """
    return FP32 * job.parameters * (1 + MOMENTS + job.ema) / (cluster.disk_gb_s * 1e9) if cluster.disk_gb_s else 0.0


def predict(job: Job, cluster: Cluster, gpus: int) -> Prediction:
    """Predict a run on a number of GPUs by the model of docs/scaling.md."""
    compute, exchange = job.step_ms / 1e3 * job.accumulate, exchange_s(job, cluster, gpus)
    step = compute + exchange * (1 - job.overlap)
    per_step = job.batch * job.accumulate * gpus
    save, lost, every = checkpoint_s(job, cluster), 0.0, 0.0
    if cluster.mtbf_hours:
        between = cluster.mtbf_hours * 3600 / gpus
        every = math.sqrt(2 * save * between)  # Young's optimum
        lost = (save / every if every else 0.0) + (every / 2 + cluster.restart_s) / between
    epoch = math.ceil(job.images / per_step) * step / max(1 - lost, 1e-9)
    return Prediction(gpus, exchange, step, epoch, per_step / step, compute / step, save, every, lost)


def show(job: Job, cluster: Cluster, gpus: Sequence[int]) -> None:
    """Print the table of predictions."""
    print(f"{job}\n{cluster}")
    heads = ("GPUs", "images/step", "exchange ms", "step ms", "images/s", "efficiency", "epoch s", "checkpoint s",
             "every s", "lost")  # fmt: skip
    print("  ".join(heads))
    for number in gpus:
        p = predict(job, cluster, number)
        cells = (f"{number}", f"{job.batch * job.accumulate * number:,}",
                 f"{1e3 * p.exchange:.3f}", f"{1e3 * p.step:.2f}",
                 f"{p.images_per_s:,.0f}", f"{p.efficiency:.1%}", f"{p.epoch:,.1f}", f"{p.checkpoint:.2f}",
                 f"{p.checkpoint_every:,.0f}", f"{p.lost:.2%}")  # fmt: skip
        print("  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True)))


def rank(calls: int) -> None:
    """Time exchanges and steps in one process of the check.

    A tiny and a whole exchange, a step alone and a step with exchange.
    """
    from torch import distributed as collective

    from benchmarks.bench_step import CASES
    from fastdeitlt.models import create_student

    torch.set_num_threads(1)
    collective.init_process_group("gloo")
    work = CASES["ti8-32"]
    student = create_student(work.student, work.num_classes, work.img_size, drop_path=0.0).train()
    batch = work.batch(collective.get_rank())
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    flat, tiny = torch.zeros(sum(p.numel() for p in student.parameters())), torch.zeros(1)

    def step(exchange: bool) -> None:
        heads = student(batch.images_BCHW)
        sum(torch.nn.functional.cross_entropy(head, batch.labels_B) for head in heads).backward()
        if exchange:
            collective.all_reduce(flat)
        optimizer.step()
        optimizer.zero_grad()

    timed = {
        "latency": lambda: collective.all_reduce(tiny),
        "exchange": lambda: collective.all_reduce(flat),
        "compute": lambda: step(False),
        "step": lambda: step(True),
    }
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(calls + 2):
        for name, call in timed.items():
            collective.barrier()
            start = time.perf_counter()
            call()
            if i >= 2:
                samples[name].append(time.perf_counter() - start)
    if collective.get_rank() == 0:
        found = {name: median(values) for name, values in samples.items()}
        print(json.dumps(found | {"parameters": flat.numel(), "batch": work.batch_size}))
    collective.destroy_process_group()


def check(ranks: Sequence[int], calls: int) -> list[dict[str, float]]:
    """Measure 1, 2, ... processes and predict each.

    From the compute of one and the link of two.
    """
    cores, measured = len(os.sched_getaffinity(0)), {}
    for number in ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", "-m"]
        command += ["benchmarks.simulate", "--rank", str(calls)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        measured[number] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    one, two = measured[1], measured[2]
    # two ranks: 2 x (1 / 2) of the gradients sent by each, and 2 messages
    latency = two["latency"] / 2
    link = FP32 * one["parameters"] / max(two["exchange"] - two["latency"], 1e-9) / 1e9
    rows = []
    for number in ranks:
        crowd = max(1.0, number / cores)  # ranks that share a core share its time, and the link's
        job = Job(0, int(one["parameters"]), 1e3 * one["compute"] * crowd, int(one["batch"]), zero=0)
        cluster = Cluster(max(ranks), intra_gb_s=link / crowd, latency_us=1e6 * latency * crowd)
        predicted, times = predict(job, cluster, number), measured[number]
        rows.append({"ranks": number, "exchange_ms": 1e3 * times["exchange"], "step_ms": 1e3 * times["step"],
                     "predicted_exchange_ms": 1e3 * predicted.exchange, "predicted_step_ms": 1e3 * predicted.step,
                     "link_gb_s": link, "latency_us": 1e6 * latency, "cores": cores})  # fmt: skip
        row, off = rows[-1], times["step"] / predicted.step - 1
        print(f"{number} ranks on {cores} cores: exchange {row['exchange_ms']:.2f} ms, predicted "
              f"{row['predicted_exchange_ms']:.2f}; step {row['step_ms']:.1f} ms, predicted "
              f"{row['predicted_step_ms']:.1f} ({off:+.0%})")  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, help="measured time of one micro-batch on one GPU; required")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--images", type=int, default=115_846, help="ImageNet-LT; iNaturalist-2021 has 2686843")
    parser.add_argument("--parameters", type=int, default=87_338_192, help="DeiT-B with both heads of 1,000 classes")
    parser.add_argument("--zero", type=int, default=1, choices=range(4))
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--gpus", type=int, nargs="+", default=[2**i for i in range(10)])
    parser.add_argument("--gpus-per-node", type=int, default=8)
    for name in ("intra-gb-s", "inter-gb-s", "latency-us", "disk-gb-s", "mtbf-hours", "restart-s"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--check", action="store_true", help="compare the model with gloo processes on this machine")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--calls", type=int, default=15)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    if o.rank:
        rank(o.rank)
        return 0
    if o.check:
        if o.ranks[:2] != [1, 2]:
            parser.error(f"--ranks: got {o.ranks}, expected 1 2 ..., which are inputs of the model")
        check(o.ranks, o.calls)
        return 0
    if not o.step_ms:
        parser.error(
            "--step-ms: missing, expected the measured time of one micro-batch on one GPU (fastdeitlt bench CONFIG)"
        )
    if max(o.gpus) > 1 and not o.intra_gb_s:
        parser.error("--intra-gb-s: missing, expected the GB/s that one GPU sends within a node")
    if max(o.gpus) > o.gpus_per_node and not o.inter_gb_s:
        parser.error("--inter-gb-s: missing, expected the GB/s that one GPU sends to other nodes; or use fewer --gpus")
    job = Job(o.images, o.parameters, o.step_ms, o.batch, o.accumulate, o.zero, o.overlap)
    link = (o.gpus_per_node, o.intra_gb_s, o.inter_gb_s, o.latency_us, o.disk_gb_s, o.mtbf_hours, o.restart_s)
    show(job, Cluster(*link), o.gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
