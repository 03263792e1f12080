"""The spine: the reference's trajectory, exact resume, virtual ranks, one graph, no host sync."""

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, repeat

import golden
import numpy as np
import pytest
import torch
from no_sync import NoSync
from snapshots import Killed, train_until_killed
from tiny_run import SMALLEST, records, tensors, tiny_data
from torch._dynamo.testing import CompileCounter

from fastdeitlt import config
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.optim import Ema, learning_rate
from fastdeitlt.data.sampler import Plan
from fastdeitlt.data.sets import embedded
from fastdeitlt.data.sets.counts import drw_weights
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.errors import NonFiniteError, UserError
from fastdeitlt.evaluation.metrics import SELECT_BY
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.run import student_scorer as student
from fastdeitlt.run.selection import Selector
from fastdeitlt.store.checkpoint import load_tensors, read_manifest
from fastdeitlt.train import train
from fastdeitlt.train_teacher import train_teacher

CPU = torch.device("cpu")
TINY = SMALLEST | {
    "train.batch_size": 16, "train.log_every": 3, "train.save_every_steps": 5, "mixup.off_in_drw": True
}  # fmt: skip


class Fixed(torch.nn.Module):
    """A teacher whose logits are set from outside."""

    class_map = None
    logits_BK = torch.zeros(0)

    def forward(self, images_BCHW):
        return self.logits_BK


def _engine(student, teacher, counts, cfg, micro_batches=1):
    return PlainEngine(JointForward(student, teacher, counts, cfg, CPU), cfg, micro_batches)


def test_twelve_steps_follow_the_official_loop():
    official = golden.load("trajectory")
    schedule, arch, seed = official["schedule"], official["arch"], official["seed"]
    cfg = config.build(
        {
            "train.epochs": schedule["epochs"],
            "train.batch_size": 2,
            "train.accumulate": official["accumulate"],
            "train.precision": "fp32",
            "train.compile": False,
            "loss.drw_epoch": official["drw_from_epoch"],
            "optim.lr": schedule["base_lr"],
            "optim.lr_scale": "none",
            "optim.warmup_epochs": schedule["warmup_epochs"],
        }
    )
    student = create_student("deit_base_distilled_patch16_224", arch["classes"], drop_path=0.0, depth=arch["depth"])
    golden.fill(student, seed)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    teacher = Fixed()
    engine = _engine(student.train(), teacher, official["counts"], cfg, official["accumulate"])
    weights_K = drw_weights(official["counts"], official["beta"])
    plan = Plan(8, 2, official["accumulate"], 1, 1)
    assert plan.micro_steps == schedule["iterations_per_epoch"]
    expected = iter(official["trajectory"])
    for epoch in range(3):
        reweight = epoch >= cfg.loss.drw_epoch
        for step in plan.steps(epoch):
            for _ in step.micro_batches:
                row = next(expected)
                random = np.random.default_rng([seed, 1000 + row["iteration"]])
                images = torch.from_numpy(random.standard_normal((2, 3, 224, 224)).astype(np.float32))
                labels = torch.from_numpy(random.integers(0, arch["classes"], 2))
                lam = float(random.uniform(0.1, 0.9))
                teacher.logits_BK = torch.from_numpy(random.standard_normal((2, arch["classes"])).astype(np.float32))
                mixed = images * lam + images.flip(0) * (1 - lam)
                batch = Batch(mixed, labels, labels.flip(0), torch.tensor(lam))
                losses = engine.forward(batch, weights_K if reweight else torch.ones(arch["classes"]), None)
                engine.backward(losses.loss)
                got = (losses.loss.item(), losses.cls_loss.item(), losses.dist_loss.item())
                assert got == pytest.approx((row["loss"], row["cls"], row["dist"]), abs=1e-4), row["iteration"]
            rate = learning_rate(step.clock, cfg)
            assert rate == pytest.approx(row["lr"], abs=1e-9)
            engine.step(rate)
    for name, parameter in student.named_parameters():
        assert parameter.norm().item() == pytest.approx(official["final_param_norms"][name], rel=1e-3)
        moved = (parameter.detach() - start[name]).norm().item()
        assert moved == pytest.approx(official["update_norms"][name], rel=1e-3), name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of 3 epochs of 8 steps on 130 of the embedded images."""
    return TINY | tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run that nothing interrupted."""
    return train(config.build(tiny | {"name": "whole", "runs_dir": str(tmp_path_factory.mktemp("runs"))}))


def test_a_run_folder_has_all_its_parts(whole):
    expected = {"config.yaml", "env.json", "metrics.jsonl", "summary.csv", "results.json", "report.html", "tensorboard"}
    assert expected <= {p.name for p in whole.iterdir()}
    manifest = read_manifest(whole / "checkpoints" / "best")
    assert manifest["kind"] == "student"
    assert manifest["dataset"] == embedded.unpack().name  # lists of one's own are called by their folder
    results = json.loads((whole / "results.json").read_text())
    assert set(results["test"]["heads"]) == {"AVG", "CLS", "DIST"}
    assert not list((whole / "checkpoints").glob("*tmp*"))


@pytest.fixture
def no_report(monkeypatch):
    """It is half of so small a run's time."""
    monkeypatch.setattr("fastdeitlt.train.report.write_report", lambda folder: folder)


@pytest.mark.parametrize(("select_by", "epoch"), [("balanced", 0), ("micro", 1)])
def test_the_best_weights_are_chosen_by_class_or_by_image(tiny, tmp_path, monkeypatch, select_by, epoch):
    """On a long-tailed validation set the first evaluation knows the tail classes, the second the head class."""
    head = np.zeros(12, dtype=np.int64)
    monkeypatch.setattr(student, "gather_logits", lambda *_, **__: _logits_of(next(decisions), labels))
    labels = torch.from_numpy(np.concatenate([head, np.arange(1, 4)]))
    knows_tail, knows_head = torch.where(labels == 0, 9, labels), torch.zeros_like(labels)
    cfg = config.build(
        tiny
        | {"evaluate.every": 1, "evaluate.weights": "model", "evaluate.select_by": select_by, "teacher.path": ""}
        | {"train.epochs": 2, "loss.drw_epoch": -1, "runs_dir": str(tmp_path)}
    )
    sets = open_sets(cfg.data)
    val = replace(sets.val, labels=labels.numpy(), paths=sets.val.paths[:15])
    monkeypatch.setattr("fastdeitlt.core.assemble.open_training_sets", lambda data: replace(sets, val=val, test=None))
    decisions = chain.from_iterable([[knows_tail, knows_head], repeat(knows_head)])
    monkeypatch.setattr(student.signs, "tail_images", lambda *_: val.take(np.arange(0)))
    monkeypatch.setattr(student.WithCosine, "cosine_N", lambda *_: torch.zeros(15))
    run = train(cfg)
    selected = json.loads((run / "results.json").read_text())["selected"]
    assert (selected["epoch"], selected["by"], selected["on"]) == (epoch, select_by, "val")
    assert f"by {SELECT_BY[select_by]}" in (run / "report.html").read_text()


def _logits_of(decided_N, labels_N):
    logits_NK = torch.nn.functional.one_hot(decided_N, 10).float()
    return logits_NK, logits_NK, labels_N


@pytest.mark.parametrize("stop_after", [2, 13, 23], ids=lambda n: f"step{n}")
def test_a_killed_run_continues_bit_for_bit(whole, tiny, tmp_path, stop_after, no_report):
    cfg = config.build(tiny | {"name": "killed", "runs_dir": str(tmp_path)})
    train_until_killed(cfg, stop_after)
    killed = train(cfg, "must")
    assert records(killed) == records(whole)
    torch.testing.assert_close(tensors(killed), tensors(whole), atol=0, rtol=0)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tiny, tmp_path, monkeypatch, whole):
    cfg = config.build(tiny | {"name": "damaged", "runs_dir": str(tmp_path), "train.save_every_steps": 4})
    monkeypatch.setattr("fastdeitlt.train.report.write_report", lambda folder: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train(cfg)
    monkeypatch.undo()
    folder = tmp_path / "damaged"
    (folder / "results.json").unlink()
    newest = max((folder / "checkpoints").glob("step-*"))
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    torch.testing.assert_close(tensors(train(cfg)), tensors(whole), atol=0, rtol=0)
    assert list((folder / "checkpoints").glob("*.damaged-*"))


def test_one_rank_plays_two_and_takes_the_same_steps(tiny):
    """Two virtual ranks of 64 on one rank give the gradient that averaging two real ranks' gradients gives."""
    cfg = config.build(tiny | {"train.batch_size": 4, "train.virtual_ranks": 2})
    torch.manual_seed(0)
    student = create_student("deit_tiny_distilled_patch16_32", 10, depth=1, drop_path=0.0)
    batches = [Batch(torch.randn(4, 3, 32, 32), torch.arange(4), None, None) for _ in range(2)]
    teacher = Teacher(create_teacher("resnet8", 10, "fastdeitlt"), 10)
    weights_K = drw_weights(range(10, 110, 10), 0.999)

    def gradients(engine, batches):
        for batch in batches:
            engine.backward(engine.forward(batch, weights_K, None).loss)
        found = [p.grad.clone() for p in engine.parameters]
        student.zero_grad()
        return found

    both = gradients(_engine(student, teacher, [1] * 10, cfg, 2), batches)
    each = [gradients(_engine(student, teacher, [1] * 10, cfg, 1), [batch]) for batch in batches]
    for together, one, two in zip(both, *each, strict=True):
        torch.testing.assert_close(together, (one + two) / 2)


def _one_step(cfg, watch=nullcontext()):  # noqa: B008
    torch.manual_seed(0)
    student = create_student("deit_tiny_distilled_patch16_32", 10, depth=2, drop_path=0.2).train()
    engine = _engine(student, Teacher(create_teacher("resnet8", 10, "fastdeitlt"), 10, img_size=28), [5] * 10, cfg)
    labels = torch.arange(8)
    batch = Batch(torch.randn(8, 3, 32, 32), labels, labels.flip(0), torch.tensor(0.3))
    weights_K = torch.ones(10)
    ema = Ema(student, cfg.optim.ema_decay, engine.optimizer)
    with watch:
        losses = engine.forward(batch, weights_K, None)
        engine.backward(losses.loss)
        engine.step(1e-3)
        ema.update()
    return losses, student


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_student_teacher_and_loss_compile_to_one_graph(monkeypatch, precision, native_bf16):
    graphs, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, options=None, **kw: real(module, backend=graphs, **kw))
    compiled, _ = _one_step(config.build({"train.precision": precision, "train.batch_size": 8}))
    eager, _ = _one_step(config.build({"train.precision": precision, "train.batch_size": 8, "train.compile": False}))
    assert graphs.frame_count == 1
    assert compiled.loss.item() == pytest.approx(eager.loss.item(), abs=1e-5 if precision == "fp32" else 3e-2)


@pytest.mark.parametrize("backend", ["torch", "fastdeitlt"])
def test_the_step_never_waits_for_the_device(backend, native_bf16):
    cfg = config.build(
        {"train.compile": False, "train.batch_size": 8, "optim.backend": backend, "optim.clip_norm": 1.0}
    )
    _one_step(cfg, NoSync())


def test_the_sync_test_can_fail():
    with pytest.raises(AssertionError, match="host sync"), NoSync():
        torch.ones(2).sum().item()


def test_our_optimizer_takes_the_steps_of_torchs(tiny, whole, tmp_path, no_report):
    """Weights and moving average, through the whole spine with its flat buffers, checkpoints and evaluation."""
    run = train(config.build(tiny | {"name": "flat", "runs_dir": str(tmp_path), "optim.backend": "fastdeitlt"}))
    expected = tensors(whole)
    for name, value in tensors(run).items():
        if "qkv.bias" not in name:  # the keys' bias has no gradient but rounding, which AdamW scales up
            torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-3)
    losses = [[line["loss"] for line in records(r) if line["kind"] == "step"] for r in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_loss_that_is_not_finite_stops_with_code_5_and_leaves_a_sound_checkpoint(tiny, tmp_path, monkeypatch):
    cfg = config.build(tiny | {"name": "nan", "runs_dir": str(tmp_path), "train.save_every_steps": 4})
    real, count = PlainEngine.backward, [0]

    def poison(self, loss):
        count[0] += 1
        real(self, loss * float("nan") if count[0] == 7 else loss)

    monkeypatch.setattr(PlainEngine, "backward", poison)
    with pytest.raises(NonFiniteError, match=r"steps 7 to 8.*optim\.clip_norm=1") as caught:
        train(cfg)
    assert caught.value.exit_code == 5
    last = load_tensors(tmp_path / "nan" / "checkpoints" / "last")
    assert all(value.isfinite().all() for value in last.values() if value.is_floating_point())


def test_bfloat16_is_computed_where_there_are_instructions_for_it(tiny, whole, tmp_path, native_bf16, no_report):
    """Elsewhere the whole run, evaluation included, is that of float32, bit for bit."""
    half = {"name": "half", "runs_dir": str(tmp_path), "train.precision": "bf16"}
    run = train(config.build(tiny | half))
    steps, expected = ([r["loss"] for r in records(r) if r["kind"] == "step"] for r in (run, whole))
    assert steps == pytest.approx(expected, abs=0.2)  # rounding turns some decisions of an untrained teacher
    assert (records(run) == records(whole)) == (not native_bf16)
    saved = tensors(whole)
    assert all(value.dtype == saved[name].dtype for name, value in tensors(run).items())


def test_without_a_teacher_both_heads_learn_the_labels(tiny, tmp_path):
    alone = tiny | {
        "teacher.path": "",
        "name": "alone",
        "runs_dir": str(tmp_path),
        "train.epochs": 1,
        "loss.drw_epoch": 0,
    }
    run = train(config.build(alone))
    assert json.loads((run / "results.json").read_text())["teacher"] is None


def test_runs_of_one_process_do_not_use_up_the_compilers_limit(tiny, tmp_path, monkeypatch, no_report):
    """As the runs of a grid: one graph may have so many variants, and whole graphs fail beyond."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, options, **how: compile(module, backend="eager", **how))
    short = tiny | {"runs_dir": str(tmp_path), "train.epochs": 1, "loss.drw_epoch": -1, "train.compile": True}
    with torch._dynamo.config.patch(recompile_limit=1):
        for depth in (1, 2):
            train(config.build(short | {"name": f"depth-{depth}", "student.depth": depth}))
    torch.compiler.reset()


@pytest.mark.parametrize(("select_on", "kept"), [("val", {"test"}), ("test", {"val"}), ("last", {"val", "test"})])
def test_a_list_that_does_not_shape_the_weights_may_be_corrected(tiny, select_on, kept):
    cfg = config.build(tiny | {"evaluate.select_on": select_on})
    sets, model = open_sets(cfg.data), create_student("deit_tiny_distilled_patch16_32", 10, depth=1)

    def selector(sets):
        return Selector(cfg, None, sets, student.StudentScorer(cfg, sets, model, None, None, CPU))

    saved = selector(sets).fingerprint
    for split, images in sets:
        changed = selector(replace(sets, **{split: images.take(np.arange(1, len(images)))}))
        with nullcontext() if split in kept else pytest.raises(UserError, match=f"labels of the {split} set changed"):
            changed.check_fingerprint(saved, "run")


@pytest.mark.parametrize("spine", [train, train_teacher])
def test_files_of_every_split_are_looked_at_before_the_first_step(tiny, tmp_path, spine):
    """A test set that is not there was found after all training."""
    root = embedded.unpack()
    lines = [f"gone/{line}" for line in (root / "test.txt").read_text().splitlines()]
    (tmp_path / "test.txt").write_text("\n".join(lines[:30]))
    cfg = {"data.test_list": str(tmp_path / "test.txt"), "runs_dir": str(tmp_path), "name": spine.__name__}
    with pytest.raises(UserError, match=r"30 of 30 test images in .* unreadable .*No such file") as caught:
        spine(config.build(tiny | cfg))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / spine.__name__ / "metrics.jsonl").exists()
