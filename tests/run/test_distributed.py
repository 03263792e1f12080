"""The spine on two ranks and two nodes: the one-rank run's results, resume on as many or fewer, one end for all."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import free_port, spawn
from snapshots import train_until_killed
from tiny_run import records, tensors, tiny_run

from fastdeitlt import cli, config, distributed
from fastdeitlt.arguments import parse
from fastdeitlt.data.pixels.workers import num_threads
from fastdeitlt.errors import NonFiniteError, RankLostError, StorageError, UserError
from fastdeitlt.run import launch
from fastdeitlt.train import train

KILLED_AT = 5


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    flat = config.flatten(tiny_run(tmp_path_factory.mktemp("spine")))
    return config.build(flat | {"evaluate.analyze_images": 8})


def _named(cfg, name):
    return cfg.model_copy(update={"name": name})


def _launch(cfg, *jobs, nodes=1):
    """torchrun this file on two ranks; a job is a run's name, or ``name!`` for one that rank 1 does not survive.

    Two nodes are two launchers with a rank each, which know each other by their addresses alone.
    """
    path = Path(cfg.runs_dir) / "config.yaml"
    path.write_text(config.dump(cfg))
    meeting = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    launchers = []
    for node in range(nodes):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node_rank", str(node)]
        command += ["--nproc_per_node", str(2 // nodes), "--rdzv_backend", "c10d", "--rdzv_id", "test"]
        command += ["--rdzv_endpoint", meeting, "--rdzv_conf", f"is_host={int(node == 0)}"]
        command += ["--local_addr", f"127.0.0.{node + 1}", __file__, str(path), *jobs]
        launchers.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    said = [launcher.communicate()[0] for launcher in launchers]
    return max(launcher.returncode for launcher in launchers), "\n".join(said)


def _main(path, *jobs):
    """What one rank of a launch does."""
    torch.set_num_threads(1)
    cfg = config.load(path)
    for job in jobs:
        if job.endswith("!"):
            _die_at(KILLED_AT, Path(cfg.runs_dir) / "died")
        train(_named(cfg, job.rstrip("!")))


def _die_at(number, note):
    from fastdeitlt.core.engine.sharded import DeepSpeedEngine

    real, count = DeepSpeedEngine.step, [0]

    def step(self, rate):
        count[0] += 1
        if count[0] == number and distributed.rank() == 1:
            note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, rate)

    DeepSpeedEngine.step = step


@pytest.fixture(scope="module")
def runs(cfg):
    """Folders by name: `one` (one rank), `two` (two ranks), and three that were stopped in the middle and continued."""
    folder = Path(cfg.runs_dir)
    train(_named(cfg, "one"))
    train_until_killed(_named(cfg, "one_then_two"), KILLED_AT)
    code, said = _launch(cfg, "two", "killed!", nodes=2)
    ended = time.time()
    assert code != 0, said
    shutil.copytree(folder / "killed", folder / "two_then_one", symlinks=True)
    train(_named(cfg, "two_then_one"), "must")
    code, resumed = _launch(cfg, "killed", "one_then_two")
    assert code == 0, resumed
    found = {p.name: p for p in folder.iterdir() if (p / "results.json").is_file()}
    return found | {"seconds_to_end": ended - float((folder / "died").read_text())}


def _accuracies(record):
    return {k: v for k, v in record.items() if k.startswith(("avg_", "cls_", "dist_"))}


@pytest.mark.parametrize("name", ["two", "one_then_two", "two_then_one"])
def test_two_ranks_train_the_run_of_one_rank_that_plays_both(runs, name):
    expected, got = records(runs["one"]), records(runs[name])
    assert [(r["kind"], r["step"]) for r in got] == [(r["kind"], r["step"]) for r in expected]
    for ours, theirs in zip(got, expected, strict=True):
        if ours["kind"] == "step":
            assert {**ours, "kind": 0} == pytest.approx({**theirs, "kind": 0}, abs=1e-6, rel=1e-6)
        else:
            assert _accuracies(ours) == _accuracies(theirs)
    torch.testing.assert_close(tensors(runs[name]), tensors(runs["one"]), atol=1e-6, rtol=0)
    results = [json.loads((runs[n] / "results.json").read_text()) for n in ("one", name)]
    assert results[0]["test"]["support_K"] == results[1]["test"]["support_K"]
    assert sum(results[1]["test"]["support_K"]) == 77


def test_a_run_killed_on_two_ranks_continues_bit_for_bit(runs):
    assert records(runs["killed"]) == records(runs["two"])
    torch.testing.assert_close(tensors(runs["killed"]), tensors(runs["two"]), atol=0, rtol=0)


def test_the_death_of_one_rank_ends_the_launch_within_seconds(runs):
    assert runs["seconds_to_end"] < 60


def test_another_number_of_ranks_without_virtual_ranks_is_refused(runs, cfg):
    left_out = cfg.model_copy(update={"train": cfg.train.model_copy(update={"virtual_ranks": 0})})
    with pytest.raises(UserError, match=r"train\.virtual_ranks: 2 -> 1"):
        train(_named(left_out, "two"))


SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NODELIST": "gpu[007-010,12],login1",
}


def test_a_task_of_srun_finds_its_place():
    env = dict(SRUN)
    distributed.adopt_slurm(env)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [env[name] for name in names] == ["9", "16", "1", "gpu007", "24567"]


@pytest.mark.parametrize(("visible", "local_rank"), [("0", "0"), ("GPU-5f", "0"), ("0,1,2,3", "1"), ("", "1")])
def test_a_task_that_was_given_one_gpu_takes_it(visible, local_rank):
    env = SRUN | {"CUDA_VISIBLE_DEVICES": visible}
    distributed.adopt_slurm(env)
    assert env["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(("nodes", "first"), [("a1", "a1"), ("b-2,c", "b-2"), ("x[3]y,z", "x3y"), ("r[08-11]", "r08")])
def test_the_first_host_of_slurms_list_is_the_meeting_point(nodes, first):
    env = SRUN | {"SLURM_STEP_NODELIST": nodes}
    distributed.adopt_slurm(env)
    assert env["MASTER_ADDR"] == first


@pytest.mark.parametrize("already", [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}], ids=["torchrun", "one task"])
def test_slurm_is_left_alone_when_it_did_not_start_the_ranks(already):
    env = SRUN | already
    before = dict(env)
    distributed.adopt_slurm(env)
    assert env == before


REQUEUE = Path(__file__).parents[2] / "docs" / "slurm.sbatch"


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (75, True), (7, True), (143, True), (138, True), (2, False), (5, False)]
)
def test_the_slurm_script_requeues_what_can_go_on(tmp_path, code, requeued):
    """srun and scontrol are stand-ins: the script's own decisions are what is tested."""
    for name, line in (("srun", f'echo "$@"; exit {code}'), ("scontrol", f"echo $@ > {tmp_path}/requeued")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "6"}
    done = subprocess.run(["bash", str(REQUEUE), "imagenet_lt"], env=env, capture_output=True, text=True, check=False)
    asked = (tmp_path / "requeued").read_text().split() if (tmp_path / "requeued").exists() else None
    assert asked == (["requeue", "42"] if requeued else None), done.stderr
    assert done.returncode == (0 if requeued else code)
    assert "--cpus-per-task=6 " in done.stdout  # srun does not inherit it from sbatch
    assert "fastdeitlt train imagenet_lt" in done.stdout


@pytest.mark.parametrize(
    ("gpus", "virtual_ranks", "asked", "env", "count"),
    [
        (8, 0, 0, {}, 8),
        (8, 4, 0, {}, 4),
        (8, 6, 0, {}, 6),
        (3, 4, 0, {}, 2),
        (0, 0, 0, {}, 1),
        (8, 0, 2, {}, 2),
        (8, 0, 0, {"RANK": "0"}, 1),
        (8, 0, 0, {"SLURM_STEP_NUM_TASKS": "8"}, 1),
        (8, 0, 2, {"FASTDEITLT_LAUNCHER": "1", "RANK": "0"}, 1),
    ],
)
def test_train_starts_a_process_a_visible_gpu(monkeypatch, gpus, virtual_ranks, asked, env, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cfg = config.build({"train.virtual_ranks": virtual_ranks})
    assert launch.processes(cfg, asked, env) == count


def test_gpus_that_torch_cannot_use_start_one_process_and_a_warning(monkeypatch, tmp_path, caplog):
    """As with a driver too old for torch: NVML still counts them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(distributed, "DRIVER", tmp_path)
    distributed._warn_unused_gpu.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # not wanted
    assert launch.processes(config.build({}), 0, {}) == 1 and not caplog.text
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.processes(config.build({}), 0, {}) == 1
    assert "cannot use" in caplog.text
    with pytest.raises(UserError, match="torch has no usable GPU"):
        launch.processes(config.build({"train.device": "cuda"}), 0, {})


def _place(monkeypatch, **env):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: got 'abc'"),
        ({"WORLD_SIZE": "9" * 6000}, "WORLD_SIZE: got '9999"),
        ({"WORLD_SIZE": "2"}, "RANK: not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "expected a rank below the world size",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "70000"}, "a port from 1 to 65535"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS: got 'two'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID: not set"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(monkeypatch, env, words):
    monkeypatch.setattr(distributed, "_end_with_launcher", lambda: None)
    monkeypatch.setattr(distributed.collective, "is_initialized", lambda: False)  # other tests may have a group
    _place(monkeypatch, **env)
    with pytest.raises(UserError, match=words):
        distributed.start("cpu")


def test_a_port_of_another_program_is_told_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        _place(monkeypatch, WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(UserError, match=f"rank 0 cannot listen on 127.0.0.1:{port} .*Set a free port"):
            distributed._meet()


def test_the_meeting_point_on_loopback_cannot_be_reached_from_outside(monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    _place(monkeypatch, WORLD_SIZE="1", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    monkeypatch.setenv(distributed.LISTENER, str(listener.detach()))
    store, *place = distributed._meet()
    store.set("key", "value")
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    listening = [fields[1] for fields in lines if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")]
    assert place == [0, 1] and listening == [f"0100007F:{port:04X}"]  # 127.0.0.1 in the machine's byte order


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device_of("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"torch sees 2 GPUs\. Start at most 2 ranks on this machine"):
        distributed.device_of("auto")


def test_a_rank_is_told_with_how_many_it_shares_the_machine(monkeypatch, tmp_path):
    """Its threads are the machine's cores divided by these."""
    said = f"open('{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['LOCAL_WORLD_SIZE'])"
    monkeypatch.setattr(launch, "PROGRAM", [sys.executable, "-c", f"import os; {said}"])
    assert launch.launch(2, []) == 0
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["2", "2"]


@pytest.mark.parametrize("place", [0, 1])
def test_an_error_of_all_ranks_is_reported_by_rank_0(monkeypatch, place):
    """Without the store, which ends with rank 0."""
    monkeypatch.setattr(distributed, "_already_reported", pytest.fail)
    monkeypatch.setattr(distributed, "start", lambda *_: (place, 2))
    monkeypatch.setattr(distributed, "rank", lambda: place)
    monkeypatch.setattr(distributed, "get_world", lambda: 2)

    def broadcast(answer, **_):  # what rank 0 raised reaches rank 1
        answer[1] = answer[1] or UserError("bad input")

    monkeypatch.setattr(distributed.collective, "broadcast_object_list", broadcast)

    def refuse():
        raise UserError("bad input")

    def diverge():
        raise NonFiniteError("steps 1 to 9: non-finite loss; checkpoint 8 is intact")

    for work in (lambda: distributed.on_main(refuse), diverge):
        with pytest.raises(UserError) as found, distributed.group("cpu"):
            work()
        assert found.value.reported is (place == 1)


def test_ranks_report_an_error_once_and_rank_0_waits_for_the_others(monkeypatch):
    store, late = torch.distributed.HashStore(), []
    monkeypatch.setattr(distributed, "_store", store)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "get_world", lambda: 2)
    key = f"reported/{hashlib.sha256(b'a').hexdigest()}"
    monkeypatch.setattr(distributed.time, "sleep", lambda _: late.append(store.add(key, 1)))
    assert not distributed._already_reported("a") and late == [2]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert [distributed._already_reported(message) for message in ("a", "b", "b")] == [True, False, True]


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_of_a_machine_share_its_cores(monkeypatch, name):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    for known in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(known, raising=False)
    assert num_threads() == 16
    monkeypatch.setenv(name, "8")
    assert num_threads() == 2 and num_threads(5) == 5
    monkeypatch.setenv(name, "0")
    assert num_threads() == 16
    monkeypatch.setenv(name, "eight")
    with pytest.raises(UserError, match=f"{name}: got 'eight' in the environment, expected an integer from 0"):
        num_threads()


def test_a_crash_is_started_again_and_bad_input_is_not(monkeypatch, tmp_path):
    code = f"import sys, pathlib; n = pathlib.Path('{tmp_path}/starts'); n.touch(); had = n.read_text(); "
    code += "n.write_text(had + 'x'); sys.exit(CODE if len(had) < 1 else 0)"
    for number, ends, starts in ((StorageError.exit_code, 0, 2), (UserError.exit_code, 2, 1)):
        (tmp_path / "starts").unlink(missing_ok=True)
        monkeypatch.setattr(launch, "PROGRAM", [sys.executable, "-c", code.replace("CODE", str(number))])
        assert launch.launch(1, [], restarts=2) == ends
        assert len((tmp_path / "starts").read_text()) == starts


@pytest.mark.parametrize(
    ("env", "launched"), [({}, (1, 2)), ({"FASTDEITLT_LAUNCHER": "1"}, None), ({"RANK": "0"}, None)]
)
def test_one_process_is_started_again_too(monkeypatch, env, launched):
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.setattr(launch, "launch", lambda count, arguments, restarts: (count, restarts))
    arguments = ["train", "quickstart", "train.device=cpu", "--restarts", "2"]
    assert cli._as_ranks(config.load("quickstart", ["train.device=cpu"]), parse(arguments)) == launched


def test_two_launchers_at_once_and_undivided_virtual_ranks_are_refused():
    with pytest.raises(UserError, match="another launcher"):
        launch.processes(config.build({}), 2, {"RANK": "0"})
    with pytest.raises(UserError, match=r"--processes: got 2, expected a divisor of train\.virtual_ranks=1"):
        launch.processes(config.build({"train.virtual_ranks": 1}), 2, {})


def test_alone_there_is_nothing_to_exchange():
    rows = torch.arange(6.0).view(3, 2)
    assert distributed.gather_interleaved(rows, 3, torch.device("cpu")) is rows
    assert distributed.on_main(lambda: "done") == "done"


def _wait_for_main(rank, folder):
    distributed.start("cpu", timeout_s=1)
    found = distributed.on_main(lambda: time.sleep(2.5) or "saved")
    Path(folder, str(rank)).write_text(found)
    distributed.stop()


def test_ranks_wait_for_what_rank_0_does_alone(tmp_path):
    """Longer than the time-out of a collective: a slow disk is no lost rank."""
    spawn(_wait_for_main, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["saved", "saved"]


def _lose_main(rank, folder):
    if rank == 0:
        distributed.start("cpu", timeout_s=1, main_timeout_s=2)
        with pytest.raises(RuntimeError):  # when the other one has left
            distributed.on_main(lambda: time.sleep(12))
    else:
        with pytest.raises(RankLostError, match="lost contact with rank 0"), distributed.group("cpu", 1, 2):
            distributed.on_main(lambda: None)
        Path(folder, "noticed").touch()
    os._exit(0)  # nobody is left to leave the group with


def test_a_rank_0_that_hangs_in_what_it_does_alone_is_noticed(tmp_path):
    spawn(_lose_main, str(tmp_path))
    assert (tmp_path / "noticed").exists()


if __name__ == "__main__":
    _main(*sys.argv[1:])
