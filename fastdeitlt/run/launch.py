"""`train` alone on a machine with several GPUs: one process each, and an end of all of them with the first that fails.

torchrun, deepspeed and srun do the same (distributed.py); this one needs no command of its own, and its exit code is
the code of what went wrong rather than 1.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import torch

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.errors import RankLostError, UserError
from fastdeitlt.run.process import SIGNALS, STOP, stop_code

log = logging.getLogger("fastdeitlt")
PROGRAM = [sys.executable, "-P", "-m", "fastdeitlt.cli"]
"""What a rank is started as."""
LOOPBACK = "127.0.0.1"
GRACE_S = 5.0
"""What the other ranks have to end by themselves once one has failed."""
RESTARTABLE = (1, RankLostError.exit_code)
"""Exit codes after which ``restarts`` tries again: a crash, a lost rank."""


def is_launched(env: Mapping[str, str]) -> bool:
    """Return whether a launcher, this one or another, has started this process as a rank."""
    return "FASTDEITLT_LAUNCHER" in env or "RANK" in env or distributed.tasks_of_slurm(env) > 1


def processes(cfg: Config, asked: int, env: Mapping[str, str]) -> int:
    """How many processes `train` starts here: those asked for, else one a visible GPU; 1 inside another launcher.

    Args:
        cfg: the run.
        asked: --processes; 0 = not given.
        env: os.environ.

    Raises:
        UserError: some were asked for, and another launcher has started this process; no GPU where one is asked for.
    """
    if is_launched(env):
        if asked and "FASTDEITLT_LAUNCHER" not in env:
            raise UserError("--processes: another launcher has started this process; let one of the two do it")
        return 1
    if asked:
        return asked
    if cfg.train.engine == "plain" or distributed.device_of(cfg.train.device).type == "cpu":
        return 1
    gpus, ranks = torch.cuda.device_count(), cfg.train.virtual_ranks
    count = next((n for n in range(gpus, 0, -1) if not ranks or ranks % n == 0), 1)
    if count < gpus:
        log.info("using %d of %d GPUs: train.virtual_ranks=%d is a multiple of that", count, gpus, ranks)
    return count


def launch(count: int, arguments: Sequence[str], restarts: int = 0) -> int:
    """Run ``fastdeitlt ARGUMENTS`` as ``count`` ranks on this machine.

    Args:
        count: ranks.
        arguments: of the command line.
        restarts: how often to start all ranks again after a crash or a lost rank.

    Returns:
        0, or the exit code of the rank that failed first; 7 for one that was killed.
    """
    ranks = _Ranks(count, arguments)
    with STOP.received_by(ranks.forward):
        STOP.cleanup = lambda number: ranks.kill()
        try:
            for left in range(restarts, -1, -1):
                code = ranks.run()
                if code not in RESTARTABLE or not left or ranks.asked_to_stop:
                    break
                log.warning("starting all ranks again (%d more restarts)", left - 1)
        finally:
            STOP.cleanup = None
            ranks.kill()
    return code


class _Ranks:
    def __init__(self, count: int, arguments: Sequence[str]) -> None:
        self.count, self.arguments = count, arguments
        self.asked_to_stop = 0
        self.alive: list[subprocess.Popen[bytes]] = []

    def forward(self, number: int) -> None:
        """Signals to the launcher are for the ranks, which save and end; the launcher waits for them."""
        self.asked_to_stop = self.asked_to_stop or number
        for rank in self.alive:
            if rank.poll() is None:
                rank.send_signal(number)

    def run(self) -> int:
        """Start all, wait until they end, and say which failed first."""
        shared = {"WORLD_SIZE": str(self.count), "LOCAL_WORLD_SIZE": str(self.count)}
        if self.count > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // self.count)
            shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        shared |= {"FASTDEITLT_LAUNCHER": str(os.getpid()), "MASTER_ADDR": LOOPBACK}
        shared |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
        command = [*PROGRAM, *self.arguments]
        with socket.create_server((LOOPBACK, 0)) as meeting:  # held from here on, so no other program gets its port
            shared |= {"MASTER_PORT": str(meeting.getsockname()[1]), distributed.LISTENER: str(meeting.fileno())}
            for rank in range(self.count):
                env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                held = [meeting.fileno()] if rank == 0 else []
                self.alive.append(subprocess.Popen(command, env=env, pass_fds=held))
        if self.asked_to_stop:  # while some had not been started
            self.forward(self.asked_to_stop)
        while not (failed := self._failed()) and any(rank.poll() is None for rank in self.alive):
            time.sleep(0.05)
        deadline = time.monotonic() + GRACE_S
        while failed and time.monotonic() < deadline and any(rank.poll() is None for rank in self.alive):
            time.sleep(0.05)
        self.kill()
        # a rank that lost another reports that it did: what the other one reports is the cause
        ours = (-signal.SIGKILL, -signal.SIGUSR2)
        failed |= {r: c for r, c in self._failed().items() if r not in failed and c not in ours}
        self.alive = []
        if not failed:
            return 0
        rank, code = next(
            ((r, c) for r, c in failed.items() if c != RankLostError.exit_code), next(iter(failed.items()))
        )
        if code < 0:
            if self.asked_to_stop and -code in SIGNALS:  # before its first line
                return stop_code(self.asked_to_stop)
            log.error("rank %d of %d died of %s", rank, self.count, signal.Signals(-code).name)
            return RankLostError.exit_code
        return code

    def _failed(self) -> dict[int, int]:
        return {rank: process.returncode for rank, process in enumerate(self.alive) if process.poll()}

    def kill(self) -> None:
        """End the ranks that are left; a Python one first shows where it hangs (SIGUSR2)."""
        left = [rank for rank in self.alive if rank.poll() is None]
        for rank in left:
            rank.send_signal(signal.SIGUSR2)
        if left:
            time.sleep(0.2)
        for rank in left:
            rank.kill()
            rank.wait()
