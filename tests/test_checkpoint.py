"""Model folders are whole or absent, and what is read back is what was written."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastdeitlt import checkpoint
from fastdeitlt.checkpoint import Checkpoints, load_tensors, read_manifest, save_model_folder
from fastdeitlt.errors import UserError

STATE = {
    "w": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "n": torch.tensor(3),
}


def test_tensors_and_facts_come_back_bit_for_bit(tmp_path):
    save_model_folder(tmp_path / "m", STATE, {"kind": "student", "step": 7}, ema={"w": STATE["w"].t()})
    manifest = read_manifest(tmp_path / "m")
    assert (manifest["kind"], manifest["step"], manifest["format"]) == ("student", 7, "fastdeitlt")
    back = load_tensors(tmp_path / "m")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in STATE.items())
    assert torch.equal(load_tensors(tmp_path / "m", "ema")["w"], STATE["w"].t())


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove", "manifest", "foreign", "no-files", "deep"])
def test_a_damaged_folder_is_refused(tmp_path, harm):
    folder = save_model_folder(tmp_path / "m", STATE, {})
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    content = bytearray(weights.read_bytes())
    if harm == "flip":
        content[-3] ^= 4
        weights.write_bytes(content)
    elif harm == "truncate":
        weights.write_bytes(content[: len(content) // 2])
    elif harm == "empty":
        weights.write_bytes(b"")
    elif harm == "remove":
        weights.unlink()
    else:
        text = {"manifest": '{"format": ', "foreign": '{"format": "other"}', "no-files": '{"format": "fastdeitlt"}'}
        manifest.write_text(text.get(harm, "[" * 100_000))
    with pytest.raises(UserError) as caught:
        read_manifest(folder)
    assert str(folder) in str(caught.value)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    folder = save_model_folder(tmp_path / "m", STATE, {})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"sha256": "0", "bytes": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is missing"):
        read_manifest(folder)


@pytest.mark.parametrize("point", ["save_file", "_flush", "_replace_folder"])
def test_a_kill_while_saving_leaves_the_old_folder(tmp_path, point):
    """The process ends at a named point, as with kill -9; the folder of before still loads, and saving works again."""
    save_model_folder(tmp_path / "m", {"w": torch.zeros(2)}, {"step": 1})
    code = (
        "import os, sys, torch; from fastdeitlt import checkpoint as c;"
        f"c.{point} = lambda *a, **k: os._exit(9);"
        "c.save_model_folder(sys.argv[1], {'w': torch.ones(2)}, {'step': 2})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=False)
    assert done.returncode == 9
    assert read_manifest(tmp_path / "m")["step"] == 1
    assert torch.equal(load_tensors(tmp_path / "m")["w"], torch.zeros(2))
    save_model_folder(tmp_path / "m", {"w": torch.ones(2)}, {"step": 3})
    assert read_manifest(tmp_path / "m")["step"] == 3


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: _Disk)
    with pytest.raises(UserError, match=r"0 MiB free.*needed; free space"):
        save_model_folder(tmp_path / "m", STATE, {})
    assert not list(tmp_path.glob("**/*.safetensors"))


class _Disk:
    free = 10


def test_a_failed_write_keeps_the_old_folder_and_leaves_no_draft(tmp_path, monkeypatch):
    save_model_folder(tmp_path / "m", STATE, {"step": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*previous one is kept"):
        save_model_folder(tmp_path / "m", STATE, {"step": 2})
    assert read_manifest(tmp_path / "m")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_only_the_two_newest_checkpoints_are_kept_and_last_points_at_the_newest(tmp_path):
    found = Checkpoints(tmp_path)
    for step in (1, 2, 10):
        found.save(step, {"model": STATE}, {"best": None}, wait=True)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000010"]
    assert read_manifest(tmp_path / "last")["step"] == 10
    assert found.newest()[1]["step"] == 10


def test_optimizer_state_continues_exactly():
    def model():
        torch.manual_seed(0)
        return nn.Linear(4, 3)

    def advance(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, part = model(), model()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (whole, part)]
    advance(whole, optimizers[0], range(5))
    advance(part, optimizers[1], range(3))
    fresh = model()
    fresh.load_state_dict(part.state_dict())
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    checkpoint.load_optimizer(fresh, optimizer, checkpoint.optimizer_tensors(part, optimizers[1]))
    advance(fresh, optimizer, range(3, 5))
    assert torch.equal(fresh.weight, whole.weight)


def test_another_models_optimizer_state_is_refused():
    one, other = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(one.parameters())
    one(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = checkpoint.optimizer_tensors(one, optimizer)
    with pytest.raises(UserError, match="of other parameters"):
        checkpoint.load_optimizer(other, torch.optim.AdamW(other.parameters()), state)


class GroupAdam(torch.optim.Optimizer):
    """Counts steps in its groups, as apex's and DeepSpeed's FusedAdam do."""

    adam_w_mode = 1

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["exp_avg"] = state.get("exp_avg", 0) * 0.9 + parameter.grad * 0.1
                parameter.sub_(group["lr"] * state["exp_avg"] / (1 - 0.9 ** group["step"]))


def test_optimizers_that_count_in_groups_keep_their_bias_correction():
    def run(steps, tensors=None, weights=None):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.full_like(p, 0.1 * i) if weights is None else weights[i])
        optimizer = GroupAdam(model.parameters())
        if tensors:
            checkpoint.load_optimizer(model, optimizer, tensors)
        for _ in range(steps):
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()], checkpoint.optimizer_tensors(model, optimizer)

    whole, _ = run(5)
    half, tensors = run(2)
    rest, _ = run(3, tensors, half)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))
