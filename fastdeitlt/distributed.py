"""torch.distributed: start-up, collectives, rank and world size.

A launcher starts one process per GPU, on one machine or several:

    torchrun --nproc_per_node 8 -m fastdeitlt.cli train imagenet_lt
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m fastdeitlt.cli train ...
    deepspeed --no_local_rank --module fastdeitlt.cli train imagenet_lt
    srun --ntasks-per-node 8 python -m fastdeitlt.cli train imagenet_lt

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under srun they are derived from
SLURM's variables. The runs folder must be shared by all machines.
"""

# N rows in all, B rows of a rank

import atexit
import ctypes
import faulthandler
import functools
import hashlib
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as collective

from fastdeitlt.errors import NonFiniteError, RankLostError, StoppedError, UserError, counted

log = logging.getLogger("fastdeitlt")
T = TypeVar("T")
PR_SET_PDEATHSIG = 1
MEETING_S = 300
"""Rendezvous timeout in seconds: on a busy machine or in a queue, ranks start minutes apart."""
ROLL_CALL_S = 3.0
"""Seconds that failed ranks wait for each other's reports."""
LISTENER = "FASTDEITLT_LISTENER"
"""Environment variable: file descriptor of the launcher's listening socket, for rank 0."""
DRIVER = Path("/dev/nvidiactl")
"""Exists if NVIDIA's driver is loaded."""

_store: collective.Store | None = None
_timeout: timedelta | None = None
_patient: Any = None
"""Process group of all ranks for ``on_main``, with a longer timeout."""


def start(device_type: str, timeout_s: int = 600, main_timeout_s: int = 3600) -> tuple[int, int]:
    """Join the launcher's group; return (rank, world), (0, 1) without a launcher.

    Args:
        device_type: train.device.
        timeout_s: timeout of collectives in seconds.
        main_timeout_s: timeout of ``on_main``, longer because of slow disks. A dead rank 0 is detected at once.
    """
    if collective.is_initialized():
        return rank(), get_world()
    if "FASTDEITLT_LAUNCHER" in os.environ or _launcher_int("WORLD_SIZE", 1) > 1:
        _end_with_launcher()
    if _launcher_int("WORLD_SIZE", 1) > 1:
        global _store, _timeout, _patient
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # kill -USR2 prints the stacks of a hanging rank
        device = device_of(device_type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        timeout = _timeout = timedelta(seconds=timeout_s)
        _store, place, world = _meet()
        _store.set_timeout(timeout)
        store = collective.PrefixStore("group", _store)
        collective.init_process_group(_backend(device), store=store, rank=place, world_size=world, timeout=timeout)
        _patient = collective.new_group(backend="gloo", timeout=timedelta(seconds=max(timeout_s, main_timeout_s)))
        atexit.register(stop)
    return rank(), get_world()


def _meet() -> tuple[collective.Store, int, int]:
    """Return the store, rank and world; a loopback address is bound to loopback only.

    Raises:
        UserError: an incomplete environment, or an address in use.
        RankLostError: not all ranks join in time.
    """
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"{missing[0]}: not set, expected with WORLD_SIZE in the environment. Use a launcher, or unset WORLD_SIZE."
        )
    place, world = _launcher_int("RANK", 0), _launcher_int("WORLD_SIZE", 1)
    host, port = os.environ["MASTER_ADDR"], _launcher_int("MASTER_PORT", 0)
    if place >= world or not 0 < port < 2**16:
        raise UserError(
            f"RANK={place} WORLD_SIZE={world} MASTER_PORT={port}: expected a rank below the world size and a port from "
            "1 to 65535. Use a launcher, or unset all three."
        )
    patience = timedelta(seconds=MEETING_S)
    try:
        is_loopback = host in ("localhost", "::1") or host.startswith("127.")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not is_loopback:
            return next(collective.rendezvous("env://", timeout=patience))
        listener = None
        if place == 0:  # torch's own socket listens on every interface
            descriptor = os.environ.pop(LISTENER, None)
            listener = int(descriptor) if descriptor else socket.create_server((host, port)).detach()
        store = collective.TCPStore(host, port, world, place == 0, patience, master_listen_fd=listener)
        return store, place, world
    except (collective.DistError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        if isinstance(error, OSError) or "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT: rank 0 cannot listen on {host}:{port} ({reason}). Set a free port of this machine."
            ) from error
        raise RankLostError(
            f"rank {place} of {world}: not all ranks joined at {host}:{port} within {MEETING_S} s ({reason}). Check "
            "that every rank was started and that the address is reachable."
        ) from error


def _end_with_launcher() -> None:
    """Make Linux kill this rank when its launcher dies, so that no rank is orphaned."""
    launcher = os.environ.get("FASTDEITLT_LAUNCHER")
    if launcher and os.getppid() != int(launcher):
        raise RankLostError("the launcher of this rank exited before the rank started. Start the command again.")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def group(device_type: str, timeout_s: int = 600, main_timeout_s: int = 3600) -> Iterator[tuple[int, int]]:
    """Join the process group for a run, as ``start``; log the error that ends a rank.

    The group outlives the run, because engines keep it. It is destroyed at exit, but not after an error, because that
    would wait for ranks that may be blocked in a collective.

    Raises:
        RankLostError: another rank died or timed out; the message has its number.
    """
    ranks = start(device_type, timeout_s, main_timeout_s)
    try:
        yield ranks
    except BaseException as error:
        if ranks[1] == 1:
            raise
        atexit.unregister(stop)
        if isinstance(error, KeyboardInterrupt):
            raise
        if isinstance(error, UserError):
            if isinstance(error, StoppedError | NonFiniteError):
                error.reported = ranks[0] > 0  # all ranks raise it; rank 0 reports it
            elif error.reported is None:
                error.reported = _already_reported(str(error))
            raise
        of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
        if not of_gloo and not isinstance(error, collective.DistError):
            log.error("rank %d of %d stopped: %s: %s", *ranks, type(error).__name__, error)
            raise
        reason = " ".join(str(error).split())[:160]
        raise RankLostError(
            f"rank {ranks[0]} of {ranks[1]}: lost contact with {_absent()} ({reason}). See the log of that rank, and "
            "rerun the same command (--resume FOLDER instead of never) to resume from the last checkpoint."
        ) from error


def _already_reported(message: str) -> bool:
    """Return whether another rank reported the same message.

    Rank 0, which hosts the store, waits for the other ranks' reports before it ends.
    """
    try:
        assert _store is not None
        _store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        key = f"reported/{hashlib.sha256(message.encode()).hexdigest()}"
        number, deadline = _store.add(key, 1), time.monotonic() + ROLL_CALL_S
        while rank() == 0 and _store.add(key, 0) < get_world() and time.monotonic() < deadline:
            time.sleep(0.05)
        return number > 1
    except (RuntimeError, collective.DistError):
        return False


def _absent() -> str:
    """Return a description of the ranks that do not report."""
    try:
        assert _store is not None
        _store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        _store.set(f"failed/{rank()}", "")
        time.sleep(ROLL_CALL_S)
        missing = [str(r) for r in range(get_world()) if not _store.check([f"failed/{r}"])]
    except (RuntimeError, collective.DistError):
        return "rank 0, which hosts the store"
    return f"rank {', '.join(missing)}" if missing else "the network (all ranks are running)"


def all_ranks(backend: str | None = None) -> Any:
    """Create another group of all ranks with the run's timeout, not torch's."""
    return collective.new_group(backend=backend, timeout=_timeout)


class Agreement:
    """Maximum of a number over ranks, one call late, on the host.

    Each call collects the all-reduce started by the previous one, which had a step's time to finish.
    """

    def __init__(self) -> None:
        self._group = all_ranks("gloo") if get_world() > 1 else None
        self._value = torch.tensor(0)
        self._pending: Any = None

    def highest(self, number: int, at_once: bool = False) -> int:
        """Return the maximum of the previous call; with ``at_once`` also of this call."""
        if self._group is None:
            return number
        previous = self._collect()
        self._value = torch.tensor(number)
        self._pending = collective.all_reduce(self._value, collective.ReduceOp.MAX, group=self._group, async_op=True)
        return max(previous, self._collect()) if at_once else previous

    def _collect(self) -> int:
        if self._pending is None:
            return 0
        self._pending.wait()
        self._pending = None
        return int(self._value)


def start_alone(device: torch.device) -> None:
    """Create a one-process group, which some engines need, unless one exists."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not collective.is_initialized():
        collective.init_process_group(_backend(device), store=collective.HashStore(), rank=0, world_size=1)
        atexit.register(stop)


def adopt_slurm(env: Any) -> None:
    """Set torchrun's variables from SLURM's, for tasks started by srun alone.

    Args:
        env: os.environ, or another mapping of strings.

    Raises:
        UserError: a SLURM variable is missing or not a number.
    """
    if "RANK" in env or tasks_of_slurm(env) == 1:
        return
    missing = [name for name in ("PROCID", "LOCALID", "STEP_NODELIST", "JOB_ID") if f"SLURM_{name}" not in env]
    if missing:
        raise UserError(f"SLURM_{missing[0]}: not set, expected with SLURM_STEP_NUM_TASKS. Start the ranks with srun.")
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # a task with its own GPU (--gpus-per-task=1) has index 0, whatever its local rank
    env["LOCAL_RANK"] = "0" if visible[0] and len(visible) == 1 else env["SLURM_LOCALID"]
    env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
    env.setdefault("MASTER_PORT", str(20000 + _number(env, "SLURM_JOB_ID", 0) % 10000))


def tasks_of_slurm(env: Any) -> int:
    """Return the number of tasks that srun started; 1 without srun."""
    return _number(env, "SLURM_STEP_NUM_TASKS", 1)


def _first_host(nodes: str) -> str:
    """Return the first host of SLURM's list: "gpu[007-010,12]" gives "gpu007"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _launcher_int(name: str, default: int) -> int:
    """Read an integer set by the launcher, or return the default."""
    adopt_slurm(os.environ)
    return _number(os.environ, name, default)


def _number(env: Any, name: str, default: int) -> int:
    text = env.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name}: got {text[:40]!r} in the environment, expected an integer from 0. Unset it.")
    return int(text)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def rank() -> int:
    """Return this process's rank; 0 when alone."""
    return collective.get_rank() if collective.is_initialized() else _launcher_int("RANK", 0)


def local_rank() -> int:
    """Return this process's rank on its machine; 0 when alone."""
    return _launcher_int("LOCAL_RANK", 0)


def local_world() -> int:
    """Return the ranks on this machine as its launcher states them, else 1.

    srun does not state them: it gives each task its own cores.
    """
    return max(1, _number(os.environ, "LOCAL_WORLD_SIZE", _number(os.environ, "LOCAL_SIZE", 1)))  # deepspeed's


def get_world() -> int:
    """Return the number of processes; 1 when alone."""
    return collective.get_world_size() if collective.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks in place, on the device, without a host sync."""
    if get_world() > 1:
        collective.all_reduce(tensor)
    return tensor


def gather_interleaved(rows_B: Tensor, total: int, device: torch.device) -> Tensor:
    """Gather rows of ``arange(rank, total, world)`` to every rank's CPU, in order.

    Args:
        rows_B: this rank's rows [B, ...], on the CPU; the ranks' numbers of rows may differ by one.
        total: rows of all ranks, N.
        device: device of the group's communication.

    Returns:
        [N, ...].
    """
    world = get_world()
    if world == 1:
        return rows_B
    parts = _gather_padded(rows_B.to(device), -(-total // world))
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].cpu()


def sum_together(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over ranks in place, in one all-reduce, without a host sync."""
    if get_world() == 1 or not tensors:
        return
    flat = sum_over_ranks(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])


def average_together(tensors: Sequence[Tensor]) -> None:
    """Average each tensor over ranks in place: one all-reduce, no host sync."""
    if get_world() > 1 and tensors:
        sum_together(tensors)
        torch._foreach_div_(list(tensors), get_world())


def gather_split(rows_B: Tensor, total: int) -> Tensor:
    """Gather rows split by ``numpy.array_split`` to every rank's device, in order.

    Args:
        rows_B: this rank's rows [B, ...].
        total: rows of all ranks, N.

    Returns:
        [N, ...].
    """
    world = get_world()
    if world == 1:
        return rows_B
    sizes = [total // world + (r < total % world) for r in range(world)]
    parts = _gather_padded(rows_B, sizes[0])
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _gather_padded(rows_B: Tensor, longest: int) -> list[Tensor]:
    """Gather each rank's rows, zero-padded to ``longest`` rows."""
    padded = rows_B.new_zeros(longest, *rows_B.shape[1:])
    padded[: len(rows_B)] = rows_B
    parts = [torch.empty_like(padded) for _ in range(get_world())]
    collective.all_gather(parts, padded)
    return parts


def on_main(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 within train.main_timeout_s; return its result on all.

    Raises:
        UserError: raised by ``work``, on every rank; rank 0 reports it.
    """
    if get_world() == 1:
        return work()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = error
    collective.broadcast_object_list(answer, src=0, group=_patient)
    if answer[1] is not None:
        answer[1].reported = rank() > 0
        raise answer[1]
    return answer[0]


def device_of(kind: str) -> torch.device:
    """Return the device of this rank for `auto`, `cpu` or `cuda`.

    Raises:
        UserError: `cuda` without a usable GPU, or more ranks on this machine than GPUs.
    """
    usable = kind != "cpu" and torch.cuda.is_available()
    if kind == "cuda" and not usable:
        raise UserError("train.device: got cuda, but torch has no usable GPU. Run 'fastdeitlt doctor', or use cpu.")
    if not usable:
        if kind == "auto" and DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            _warn_unused_gpu()
        return torch.device("cpu")
    index, count = local_rank(), torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"train.device: got cuda for local rank {index}, but torch sees {counted(count, 'GPU')}. Start at most "
            f"{counted(count, 'rank')} on this machine."
        )
    return torch.device("cuda", index)


@functools.cache
def _warn_unused_gpu() -> None:
    log.warning("train.device=auto: torch cannot use this machine's NVIDIA GPU, using the CPU; run 'fastdeitlt doctor'")


def stop() -> None:
    """Destroy the process group, if there is one."""
    if collective.is_initialized():
        collective.destroy_process_group()
