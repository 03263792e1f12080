"""Ranks and what they say to each other: the only importer of torch.distributed.

A launcher starts one process a GPU and tells each its place; any of these does, on one machine or several:

    torchrun --nproc_per_node 8 -m fastdeitlt.cli train imagenet_lt
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m fastdeitlt.cli train ...
    deepspeed --no_local_rank --module fastdeitlt.cli train imagenet_lt
    srun --ntasks-per-node 8 python -m fastdeitlt.cli train imagenet_lt

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under srun they are made from
SLURM's own variables. The folder of runs must be one that every machine sees.
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

from fastdeitlt.errors import RankLostError, StoppedError, UserError

log = logging.getLogger("fastdeitlt")
T = TypeVar("T")
PR_SET_PDEATHSIG = 1
MEETING_S = 300
"""Ranks of a busy machine or a queue start minutes apart."""
ROLL_CALL_S = 3.0
"""How long ranks that failed wait for each other to say so, before they name those that did not."""
LISTENER = "FASTDEITLT_LISTENER"
"""Environment variable: the descriptor of a socket that our launcher listens with for rank 0."""
DRIVER = Path("/dev/nvidiactl")
"""There where NVIDIA's driver is."""

_store: collective.Store | None = None
_timeout: timedelta | None = None
_patient: Any = None
"""The group of all ranks for ``on_main``."""


def start(device_type: str, timeout_s: int = 600, main_timeout_s: int = 3600) -> tuple[int, int]:
    """(rank, world). Joins the group that a launcher set up; a process started without one is (0, 1), without a group.

    Args:
        device_type: train.device.
        timeout_s: seconds after which a rank that waits for another gives up.
        main_timeout_s: the same in ``on_main``: a slow disk is no lost rank. A dead rank 0 is noticed at once.
    """
    if collective.is_initialized():
        return rank(), get_world()
    if "FASTDEITLT_LAUNCHER" in os.environ or _told("WORLD_SIZE", 1) > 1:
        _end_with_launcher()
    if _told("WORLD_SIZE", 1) > 1:
        global _store, _timeout, _patient
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # kill -USR2: where a rank hangs
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
    """The meeting point of the ranks with this one's number and theirs; on a loopback address it listens there alone.

    Raises:
        UserError: the launcher has not told all, or the address is another program's.
        RankLostError: some do not come.
    """
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"{missing[0]}: not set in the environment, but WORLD_SIZE is; use a launcher, or unset it")
    place, world = _told("RANK", 0), _told("WORLD_SIZE", 1)
    host, port = os.environ["MASTER_ADDR"], _told("MASTER_PORT", 0)
    if place >= world or not 0 < port < 2**16:
        raise UserError(
            f"RANK={place} WORLD_SIZE={world} MASTER_PORT={port}: expected a rank below the world size and a port from "
            "1 to 65535; use a launcher, or unset them"
        )
    patience = timedelta(seconds=MEETING_S)
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not _is_loopback(host):
            return next(collective.rendezvous("env://", timeout=patience))
        listener = None
        if place == 0:  # torch's own socket listens on every interface
            given = os.environ.pop(LISTENER, None)
            listener = int(given) if given else socket.create_server((host, port)).detach()
        store = collective.TCPStore(host, port, world, place == 0, patience, master_listen_fd=listener)
        return store, place, world
    except (collective.DistError, OSError) as error:
        said = " ".join(str(error).split())[:160]
        if isinstance(error, OSError) or "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT: rank 0 cannot listen at {host}:{port} ({said}); choose a free port of this machine"
            ) from error
        raise RankLostError(
            f"the ranks did not find each other in {MEETING_S} s at {host}:{port} ({said}); is each of them started, "
            "and the address reachable?"
        ) from error


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _end_with_launcher() -> None:
    """Ask Linux to kill this rank when its launcher dies, however it dies, so that no rank is left behind."""
    launcher = os.environ.get("FASTDEITLT_LAUNCHER")
    if launcher and os.getppid() != int(launcher):
        raise RankLostError("the launcher of this rank has ended before it began")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def group(device_type: str, timeout_s: int = 600, main_timeout_s: int = 3600) -> Iterator[tuple[int, int]]:
    """``start`` for the time of a run. What ends one rank is logged with its number; the launcher ends the others.

    The group outlives the run, because engines keep it; the process leaves it at its exit, but not after an error:
    the others may be waiting in it, and leaving would wait for them.

    Raises:
        RankLostError: another rank died, or did not answer in time (``start``); names it.
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
            # all ranks stop together: the first says it, whoever is quicker; it holds the store, so it cannot be asked
            said_by_another = ranks[0] > 0 if isinstance(error, StoppedError) else _already_said(str(error))
            error.told = said_by_another  # type: ignore[attr-defined]
            raise
        if not _lost_contact(error):
            log.error("rank %d of %d stops: %s: %s", *ranks, type(error).__name__, error)
            raise
        said = " ".join(str(error).split())[:160]
        raise RankLostError(
            f"rank {ranks[0]} of {ranks[1]}: lost contact with {_absent()} ({said}); its own message says why; the "
            "same command continues from the last checkpoint"
        ) from error


def _already_said(message: str) -> bool:
    """Whether another rank has ended with the same message, so that one of them shows it."""
    try:
        assert _store is not None
        _store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        return _store.add(f"said/{hashlib.sha256(message.encode()).hexdigest()}", 1) > 1
    except (RuntimeError, collective.DistError):
        return False


def _lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because of another rank."""
    return isinstance(error, collective.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _absent() -> str:
    """The ranks that do not answer a roll call."""
    try:
        assert _store is not None
        _store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        _store.set(f"failed/{rank()}", "")
        time.sleep(ROLL_CALL_S)
        missing = [str(r) for r in range(get_world()) if not _store.check([f"failed/{r}"])]
    except (RuntimeError, collective.DistError):
        return "rank 0, which holds the meeting point"
    return f"rank {', '.join(missing)}" if missing else "the network: every rank is there"


def all_ranks(backend: str | None = None) -> Any:
    """Another group of all ranks, with the run's time-out: torch gives a new group half an hour."""
    return collective.new_group(backend=backend, timeout=_timeout)


class Agreement:
    """The highest of a number that each rank names, one call late, through host memory.

    Each call collects what the previous one started, which has had a step's time to finish.
    """

    def __init__(self) -> None:
        self._group = all_ranks("gloo") if get_world() > 1 else None
        self._said = torch.tensor(0)
        self._pending: Any = None

    def highest(self, number: int, at_once: bool = False) -> int:
        """The ranks' highest ``number`` of the call before; of this one too when alone, or where it waits for them."""
        if self._group is None:
            return number
        found = self._collect()
        self._said = torch.tensor(number)
        self._pending = collective.all_reduce(self._said, collective.ReduceOp.MAX, group=self._group, async_op=True)
        return max(found, self._collect()) if at_once else found

    def _collect(self) -> int:
        if self._pending is None:
            return 0
        self._pending.wait()
        self._pending = None
        return int(self._said)


def start_alone(device: torch.device) -> None:
    """A group of this process alone, for engines that need one, unless there is a group already."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not collective.is_initialized():
        collective.init_process_group(_backend(device), store=collective.HashStore(), rank=0, world_size=1)
        atexit.register(stop)


def adopt_slurm(env: Any) -> None:
    """Name this task's place as torchrun would, when srun started it among several and no launcher has.

    Args:
        env: os.environ, or another mapping of strings.

    Raises:
        UserError: a number of SLURM's is none.
    """
    if "RANK" in env or tasks_of_slurm(env) == 1:
        return
    missing = [name for name in ("PROCID", "LOCALID", "STEP_NODELIST", "JOB_ID") if f"SLURM_{name}" not in env]
    if missing:
        raise UserError(f"SLURM_{missing[0]}: is not set, but SLURM_STEP_NUM_TASKS is; start the ranks by srun")
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # a task with one GPU of its own (--gpus-per-task=1) sees it as the first, whatever its place
    env["LOCAL_RANK"] = "0" if visible[0] and len(visible) == 1 else env["SLURM_LOCALID"]
    env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
    env.setdefault("MASTER_PORT", str(20000 + _number(env, "SLURM_JOB_ID", 0) % 10000))


def tasks_of_slurm(env: Any) -> int:
    """Number of tasks that srun started, this one among them; 1 without srun."""
    return _number(env, "SLURM_STEP_NUM_TASKS", 1)


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: ``gpu[007-010,12],login1`` gives ``gpu007``."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _told(name: str, alone: int) -> int:
    """Read an integer that the launcher set, or return the default."""
    adopt_slurm(os.environ)
    return _number(os.environ, name, alone)


def _number(env: Any, name: str, alone: int) -> int:
    text = env.get(name, str(alone))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name}: got {text[:40]!r} in the environment, expected a whole number; unset it")
    return int(text)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def rank() -> int:
    """This process's rank; 0 when alone."""
    return collective.get_rank() if collective.is_initialized() else _told("RANK", 0)


def local_rank() -> int:
    """This process's rank on its machine; 0 when alone."""
    return _told("LOCAL_RANK", 0)


def get_world() -> int:
    """Number of processes; 1 when alone."""
    return collective.get_world_size() if collective.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In-place sum over ranks, on the device, without a host sync; nothing when alone."""
    if get_world() > 1:
        collective.all_reduce(tensor)
    return tensor


def gather_interleaved(rows_B: Tensor, total: int, device: torch.device) -> Tensor:
    """All rows in order, on the CPU of every rank, where each rank has those of ``arange(rank, total, world)``.

    Args:
        rows_B: this rank's rows [B, ...], on the CPU; the ranks' numbers of rows may differ by one.
        total: rows of all ranks, N.
        device: where the group communicates.

    Returns:
        [N, ...].
    """
    world = get_world()
    if world == 1:
        return rows_B
    parts = _gather_padded(rows_B.to(device), -(-total // world))
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].cpu()


def sum_together(tensors: Sequence[Tensor]) -> None:
    """In-place sum of each tensor over ranks, in one exchange, without a host sync; nothing when alone."""
    if get_world() == 1 or not tensors:
        return
    flat = sum_over_ranks(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])


def average_together(tensors: Sequence[Tensor]) -> None:
    """In-place mean of each tensor over ranks, in one exchange, without a host sync; nothing when alone."""
    if get_world() > 1 and tensors:
        sum_together(tensors)
        torch._foreach_div_(list(tensors), get_world())


def gather_split(rows_B: Tensor, total: int) -> Tensor:
    """All rows in order, on the device of every rank, where the ranks have what ``numpy.array_split`` would give them.

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
    """Each rank's rows, with zeros up to ``longest`` of them."""
    padded = rows_B.new_zeros(longest, *rows_B.shape[1:])
    padded[: len(rows_B)] = rows_B
    parts = [torch.empty_like(padded) for _ in range(get_world())]
    collective.all_gather(parts, padded)
    return parts


def on_main(work: Callable[[], T]) -> T:
    """Rank 0 does ``work``; every rank waits for it, up to ``train.main_timeout_s``, and gets its result.

    Raises:
        UserError: the one that ``work`` raised, on every rank.
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
        raise answer[1]
    return answer[0]


def device_of(kind: str) -> torch.device:
    """The device of this rank for `auto`, `cpu` or `cuda`.

    Raises:
        UserError: `cuda` where torch has no GPU, or more ranks on this machine than GPUs.
    """
    usable = kind != "cpu" and torch.cuda.is_available()
    if kind == "cuda" and not usable:
        raise UserError("device cuda: torch finds no GPU that it can use; 'fastdeitlt doctor' says why, or use cpu")
    if not usable:
        if kind == "auto" and DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            _say_unused()
        return torch.device("cpu")
    index, count = local_rank(), torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"device cuda: this is rank {index} of this machine, counted from 0, and {count} of its GPUs can be seen; "
            f"start at most {count} ranks here"
        )
    return torch.device("cuda", index)


@functools.cache
def _say_unused() -> None:
    log.warning("this machine has an NVIDIA GPU that torch cannot use, so the CPU computes; see 'fastdeitlt doctor'")


def stop() -> None:
    """Leave the group."""
    if collective.is_initialized():
        collective.destroy_process_group()
