"""Built-in launcher of `train`: one process per GPU, all stopped if one fails.

torchrun, deepspeed and srun are alternatives (distributed.py); this launcher is automatic, and its exit code is that of
the failed rank, not 1.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from uuid import uuid4

import torch

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.errors import RankLostError, UserError, counted
from fastdeitlt.machine import usable_cores
from fastdeitlt.run.process import LAUNCH, SIGNALS, STOP, THREADS, stop_code

log = logging.getLogger("fastdeitlt")
PROGRAM = [sys.executable, "-P", "-m", "fastdeitlt.cli"]
"""Command of a rank."""
LOOPBACK = "127.0.0.1"
GRACE_S = 5.0
"""Seconds that the other ranks have to exit once one has failed."""
RESTARTABLE = (1, RankLostError.exit_code)
"""Exit codes after which ``restarts`` apply: a crash, a lost rank."""


def is_launched(env: Mapping[str, str]) -> bool:
    """Return whether any launcher started this process as a rank."""
    return "FASTDEITLT_LAUNCHER" in env or "RANK" in env or distributed.tasks_of_slurm(env) > 1


def processes(cfg: Config, requested: int, env: Mapping[str, str]) -> int:
    """Return the processes to start: ``requested``, else one per visible GPU.

    1 within a launcher, on a CPU and with ``train.engine=plain``; at most the largest divisor of
    ``train.virtual_ranks``.

    Args:
        cfg: the run.
        requested: --processes; 0 = not given.
        env: os.environ.

    Raises:
        UserError: --processes within another launcher, or no divisor of train.virtual_ranks; or train.device=cuda
            without a GPU.
    """
    if is_launched(env):
        if requested and "FASTDEITLT_LAUNCHER" not in env:
            raise UserError("--processes: got a value under another launcher, expected none. Use one of the two.")
        return 1
    ranks = cfg.train.virtual_ranks
    if requested:
        if ranks % requested:  # before a teacher is trained
            raise UserError(f"--processes: got {requested}, expected a divisor of train.virtual_ranks={ranks}")
        return requested
    if cfg.train.engine == "plain" or distributed.device_of(cfg.train.device).type == "cpu":
        return 1
    gpus = torch.cuda.device_count()
    count = next((n for n in range(gpus, 0, -1) if not ranks or ranks % n == 0), 1)
    if count < gpus:
        log.info("using %d of %d GPUs, which divides train.virtual_ranks=%d", count, gpus, ranks)
    return count


def launch(count: int, arguments: Sequence[str], restarts: int = 0) -> int:
    """Run ``fastdeitlt ARGUMENTS`` as ``count`` ranks on this machine.

    Args:
        count: ranks.
        arguments: command-line arguments.
        restarts: number of restarts of all ranks after a crash or a lost rank.

    Returns:
        0, or the exit code of the rank that failed first; 7 for one that was killed.
    """
    ranks = _Ranks(count, arguments)
    with STOP.received_by(ranks.forward):
        STOP.cleanup = lambda number: ranks.kill()
        try:
            for left in range(restarts, -1, -1):
                code = ranks.run()
                if code not in RESTARTABLE or not left or ranks.stop_signal:
                    break
                log.warning("restarting all ranks (%s left)", counted(left - 1, "restart"))
        finally:
            STOP.cleanup = None
            ranks.kill()
    return code


class _Ranks:
    def __init__(self, count: int, arguments: Sequence[str]) -> None:
        self.count, self.arguments, self.id = count, arguments, uuid4().hex
        self.stop_signal = 0
        self.alive: list[subprocess.Popen[bytes]] = []

    def forward(self, number: int) -> None:
        """Forward a signal to the ranks, which save and exit while the launcher waits."""
        self.stop_signal = self.stop_signal or number
        for rank in self.alive:
            if rank.poll() is None:
                rank.send_signal(number)

    def run(self) -> int:
        """Run all ranks to their end; return the exit code of the first failure."""
        shared = {"WORLD_SIZE": str(self.count), "LOCAL_WORLD_SIZE": str(self.count)}
        if self.count > 1:
            threads = max(1, usable_cores() // self.count)
            shared["OMP_NUM_THREADS"] = THREADS or str(threads)
        shared |= {"FASTDEITLT_LAUNCHER": str(os.getpid()), "MASTER_ADDR": LOOPBACK, LAUNCH: self.id}
        shared |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
        command = [*PROGRAM, *self.arguments]
        with socket.create_server(
            (LOOPBACK, 0)
        ) as meeting:  # bound from here on, so that no other program gets the port
            shared |= {"MASTER_PORT": str(meeting.getsockname()[1]), distributed.LISTENER: str(meeting.fileno())}
            for rank in range(self.count):
                env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                descriptors = [meeting.fileno()] if rank == 0 else []
                self.alive.append(subprocess.Popen(command, env=env, pass_fds=descriptors))
        if self.stop_signal:  # a signal arrived during the start
            self.forward(self.stop_signal)
        while not (failed := self._failed()) and any(rank.poll() is None for rank in self.alive):
            time.sleep(0.05)
        deadline = time.monotonic() + GRACE_S
        while failed and time.monotonic() < deadline and any(rank.poll() is None for rank in self.alive):
            time.sleep(0.05)
        self.kill()
        # a rank that lost another one only reports the loss: the cause is the other's exit code
        ours = (-signal.SIGKILL, -signal.SIGUSR2)
        failed |= {r: c for r, c in self._failed().items() if r not in failed and c not in ours}
        self.alive = []
        if not failed:
            return 0
        rank, code = next(
            ((r, c) for r, c in failed.items() if c != RankLostError.exit_code), next(iter(failed.items()))
        )
        if code < 0:
            if self.stop_signal and -code in SIGNALS:  # before the rank installed its handlers
                return stop_code(self.stop_signal)
            log.error("rank %d of %d killed by %s", rank, self.count, signal.Signals(-code).name)
            return RankLostError.exit_code
        return code

    def _failed(self) -> dict[int, int]:
        return {rank: process.returncode for rank, process in enumerate(self.alive) if process.poll()}

    def kill(self) -> None:
        """Kill the remaining ranks, after SIGUSR2, which prints their stacks."""
        left = [rank for rank in self.alive if rank.poll() is None]
        for rank in left:
            rank.send_signal(signal.SIGUSR2)
        if left:
            time.sleep(0.2)
        for rank in left:
            rank.kill()
            rank.wait()
