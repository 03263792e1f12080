"""Teachers end to end on a tiny set of coloured squares: training, resuming, folders, conversion, diagnosis."""

import json
import logging
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_files import class_folders
from PIL import Image
from ranks import SGD, flat_step, problem, spawn, train_teachers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastdeitlt import config
from fastdeitlt.cli import main
from fastdeitlt.config import Config, MixupConfig, TeacherTrainingConfig
from fastdeitlt.core import assemble
from fastdeitlt.core.joint import JointForward
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sets.fingerprint import fingerprint
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.data.sets.types import class_counts
from fastdeitlt.errors import NonFiniteError, UserError
from fastdeitlt.evaluation.evaluate import evaluate, evaluate_saved
from fastdeitlt.models import create_student
from fastdeitlt.models.saved import open_released_teacher, open_saved
from fastdeitlt.models.teacher import Paco, Teacher, create_teacher, load_teacher, open_teacher
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.reporting.analysis import sections
from fastdeitlt.run.student_scorer import StudentScorer
from fastdeitlt.store.checkpoint import load_tensors, read_manifest, save_model_folder
from fastdeitlt.teachers import SAM, flatness
from fastdeitlt.teachers.check import check_decisions
from fastdeitlt.teachers.convert import export_official, import_official
from fastdeitlt.teachers.diagnose import diagnose_teacher
from fastdeitlt.teachers.flatness import feature_rank, sharpness, top_eigenvalue
from fastdeitlt.teachers.opening import ORDER_FILE, settled_teacher, teacher_of
from fastdeitlt.teachers.paco import PacoObjective
from fastdeitlt.teachers.sam import frozen_batch_stats
from fastdeitlt.teachers.schedule import learning_rate, radius
from fastdeitlt.teachers.step import LogitObjective, Step, build_objective, build_optimizer
from fastdeitlt.teachers.views import Part, StepBatch
from fastdeitlt.train import train
from fastdeitlt.train_teacher import train_teacher

COLOURS = [(220, 40, 40), (40, 220, 40), (40, 40, 220)]
COUNTS = {"train": (14, 8, 5), "val": (4, 4, 4), "test": (5, 5, 5)}
PACO = ["loss=paco", "normed_head=false", "batch_size=8", "paco_queue=16", "paco_dim=4", "drw_epoch=-1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy squares, each class of its own colour."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for split, counts in COUNTS.items():
        lines = []
        for label, count in enumerate(counts):
            for i in range(count):
                pixels = np.array(COLOURS[label]) + rng.normal(0, 30, (16, 16, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{split}{label}-{i}.png")
                lines.append(f"{split}{label}-{i}.png {label}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def recipe(data: Path, runs: Path, *changes: str) -> Config:
    lists = [f"data.{split}_list={split}.txt" for split in COUNTS]
    base = [
        "arch=resnet8", "img_size=16", "loss=ldam", "normed_head=true", "schedule=cosine", "warmup_epochs=1",
        "epochs=4", "drw_epoch=3", "batch_size=9", "lr=0.05",
    ]  # fmt: skip

    def named(change: str) -> str:
        return change if "." in change.partition("=")[0] or change.startswith("name=") else f"teacher_training.{change}"

    ours = [named(change) for change in (*base, *changes)]
    others = ["train.compile=false", "train.precision=fp32", "train.device=cpu", "evaluate.crop_pct=1.0"]
    augment = ["augment.recipe=pad_crop", "augment.pad=2"]
    return config.load(
        "teacher/quickstart",
        [f"runs_dir={runs}", "name=t", "data.dataset=list", f"data.root={data}", *lists, *others, *augment, *ours],
    )


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    cfg = recipe(data, tmp_path_factory.mktemp("runs"), "epochs=8", "drw_epoch=6", "evaluate.every=2")
    return cfg, train_teacher(cfg)


def test_a_sam_teacher_learns_and_its_folder_says_how_well(trained: tuple[Config, Path]) -> None:
    cfg, folder = trained
    manifest = read_manifest(folder)
    assert set(manifest["accuracy"]) == {"train", "val", "test"}
    assert manifest["accuracy"]["test"] > 80
    assert manifest["balanced_accuracy"]["train"] == pytest.approx(class_mean(cfg, folder))
    assert manifest["class_counts"] == [14, 8, 5]
    assert manifest["model"]["arch"] == "resnet8"
    assert manifest["preprocess"]["mean"] == list(cfg.augment.mean)
    records = [json.loads(line) for line in (folder.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "eval"} == {record["kind"] for record in records}
    results = json.loads((folder.parents[1] / "results.json").read_text())
    assert results["selected"]["on"] == "val"
    left = json.loads((folder.parents[1] / "analysis" / "images.json").read_text())
    right = sum(number for label, predicted, number in left["confusion"] if label == predicted)
    assert left["heads"] == ["TEACHER"] and right == sum(results["test"]["heads"]["TEACHER"]["correct_K"])
    assert train_teacher(cfg) == folder  # finished: nothing is trained again
    assert main(["train-teacher", str(folder.parents[1] / "config.yaml"), "name=t"]) == 0


def class_mean(cfg: Config, folder: Path) -> float:
    """Mean accuracy of the classes on training images, in %, as the run's results have it."""
    scores = json.loads((folder.parents[1] / "results.json").read_text())["train"]["heads"]["TEACHER"]["correct_K"]
    return 100 * float(np.mean(np.array(scores) / open_sets(cfg.data).train.counts))


def test_the_folder_gives_the_accuracy_it_claims(trained: tuple[Config, Path]) -> None:
    cfg, folder = trained
    images = open_sets(cfg.data).test
    pixels = np.stack([np.asarray(Image.open(Path(images.root) / path)) for path in images.paths])
    normalised = (torch.tensor(pixels).float() / 255 - torch.tensor(cfg.augment.mean)) / torch.tensor(cfg.augment.std)
    logits = load_teacher(folder, "", 3)(normalised.permute(0, 3, 1, 2))
    hits = logits.argmax(1) == torch.from_numpy(images.labels)
    assert 100 * hits.float().mean().item() == pytest.approx(read_manifest(folder)["accuracy"]["test"], abs=1e-4)
    # cosines alone are nearly uniform: the softmax is of LDAM's scaled ones
    nll = torch.nn.functional.cross_entropy(30 * logits, torch.from_numpy(images.labels)).item()
    trained_result = json.loads((folder.parents[1] / "results.json").read_text())["test"]
    assert trained_result["heads"]["TEACHER"]["nll"]["threshold"]["all"] == pytest.approx(nll, abs=1e-3)
    evaluated = evaluate(folder, ["train.device=cpu"])
    assert evaluated.heads["TEACHER"].nll["threshold"]["all"] == pytest.approx(nll, abs=1e-3)


@pytest.mark.parametrize("changes", [["sam_schedule=linear", "clip_norm=1.0"], PACO], ids=["ldam", "paco"])
@pytest.mark.parametrize("stop", [3, 7])
def test_a_stopped_run_continues_exactly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], stop: int
) -> None:
    whole = train_teacher(recipe(data, tmp_path / "whole", *changes))
    cfg = recipe(data, tmp_path / "parts", *changes, "train.save_every_steps=2")
    plain_step, calls = Step.__call__, []

    def failing_step(*arguments: object) -> torch.Tensor:
        calls.append(None)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return plain_step(*arguments)

    monkeypatch.setattr(Step, "__call__", failing_step)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(cfg)
    monkeypatch.setattr(Step, "__call__", plain_step)
    parts = train_teacher(cfg)
    expected, got = load_tensors(whole.parent / "last"), load_tensors(parts.parent / "last")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert read_manifest(whole)["accuracy"] == read_manifest(parts)["accuracy"]


@pytest.mark.parametrize("loss", ["ce", "focal", "vs", "balanced_softmax", "logit_adjustment", "paco"])
@pytest.mark.parametrize("sam", ["none", "asam"])
def test_every_loss_trains_with_and_without_sam(data: Path, tmp_path: Path, loss: str, sam: str) -> None:
    extra = PACO if loss == "paco" else ["normed_head=false", "drw_epoch=1"]
    cfg = recipe(data, tmp_path, *extra, f"loss={loss}", f"sam={sam}", "epochs=2")
    state = load_tensors(train_teacher(cfg))
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"Lower teacher_training\.lr"):
        train_teacher(recipe(data, tmp_path, "loss=ce", "normed_head=false", "lr=1e30", "warmup_epochs=0"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["drw_epoch=4"],
            r"^teacher_training\.drw_epoch: got 4, expected less than epochs=4, or -1 for no re-weighting",
        ),
        (["sam_schedule=step"], r"^teacher_training\.sam_rho_steps: got \[\], expected"),
        (["sam_rho_steps=[[2,-0.5]]"], r"^teacher_training\.sam_rho_steps: got \[2, -0\.5\], expected a first epoch"),
        (["lr_steps=[[-1,0.1]]"], r"^teacher_training\.lr_steps: got \[-1, 0\.1\], expected a first epoch"),
        (["loss=paco", "normed_head=false"], r"^teacher_training\.paco_queue: got 1024, expected a multiple of "),
        (["loss=ce"], r"^teacher_training\.normed_head: got true with loss=ce, expected false"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_work(
    data: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        recipe(data, tmp_path, *changes)


def test_a_batch_larger_than_the_set_is_refused_for_paco(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 32, expected at most 27, the images of the set"):
        train_teacher(recipe(data, tmp_path, *PACO, "batch_size=32", "paco_queue=64"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": "paco", "drw_epoch": 3},
            r"^teacher_training\.drw_epoch: got 3 with loss=paco, which has no class weights, expected -1$",
        ),
        (
            {"epochs": 170},
            r"^teacher_training\.lr_steps: got first epoch 180, expected less than teacher_training\.epochs=170\. Use "
            r"earlier steps, or teacher_training\.schedule=cosine\.$",
        ),
        (
            {"sam_schedule": "step", "sam_rho_steps": [(0, 0.05), (200, 0.1)]},
            r"^teacher_training\.sam_rho_steps: got first epoch 200, expected less than teacher_training\.epochs=200",
        ),
    ],
)
def test_a_milestone_without_effect_is_refused_before_the_first_step(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cfg = TeacherTrainingConfig(arch="resnet8", **changes)
        build_optimizer(build_objective(cfg, [9, 3, 1], torch.device("cpu")).network, cfg)


def test_images_of_a_size_that_the_network_does_not_accept_are_refused_before_the_first_step() -> None:
    cfg = TeacherTrainingConfig(arch="vit_tiny_patch16_224", img_size=32)
    with pytest.raises(UserError, match=r"^teacher_training\.img_size: got 32, .*\(Input height \(32\) doesn't match"):
        build_objective(cfg, [9, 3, 1], torch.device("cpu"))


def test_steps_of_another_schedule_may_be_after_the_end() -> None:
    unused = {"schedule": "cosine", "sam": "none", "sam_schedule": "step", "sam_rho_steps": [(60, 0.5)]}
    build_optimizer(torch.nn.Linear(2, 2), TeacherTrainingConfig(epochs=60, **unused))


def test_schedules_are_the_references() -> None:
    ldam = config.load("teacher/cifar10_lt_r100").teacher_training
    rates = [learning_rate(epoch, ldam) for epoch in (0, 4, 5, 159, 160, 179, 180)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 0.1, 1e-3, 1e-3, 1e-5])
    large = config.load("teacher/imagenet_lt").teacher_training
    assert [radius(epoch, large) for epoch in (0, 4, 5, 59, 60, 89)] == [0.05, 0.05, 0.1, 0.1, 0.5, 0.5]
    assert learning_rate(45, large) == pytest.approx(0.1)
    linear = TeacherTrainingConfig(sam_schedule="linear", sam_rho=0.8, epochs=4)
    assert [radius(epoch, linear) for epoch in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("loss", ["ldam", "paco"])
def test_both_passes_of_sam_compile_to_one_whole_graph_each(loss: str) -> None:
    sizes = {"paco_queue": 16, "paco_dim": 4, "batch_size": 8}
    cfg = TeacherTrainingConfig(arch="resnet8", loss=loss, normed_head=loss == "ldam", **sizes)
    objective = build_objective(cfg, [9, 3, 1], torch.device("cpu"))
    graphs = CompileCounter()
    compiled = torch.compile(objective, backend=graphs, fullgraph=True, dynamic=False)
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(3, (8,))
    shared = objective.prepare([images, images])
    for frozen in (False, True, False, True):
        with frozen_batch_stats(objective.network, frozen):
            compiled(images, labels, torch.ones(3), *shared).backward()
    assert graphs.frame_count == 2


def test_bfloat16_is_only_used_where_there_are_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU before Ampere emulates it, as torch says unless it is asked for more."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for has_it, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        gpu = SimpleNamespace(major=8 if has_it else 7)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, gpu=gpu: gpu)
        for device in ("cpu", "cuda"):
            assert autocast_dtype("bf16", torch.device(device)) is dtype
            assert autocast_dtype("fp32", torch.device(device)) is None


@pytest.mark.parametrize("loss", ["ldam", "focal"])
@pytest.mark.parametrize("sam", ["none", "sam", "asam"])
def test_micro_batches_give_the_step_of_the_whole_batch(loss: str, sam: str) -> None:
    for whole, cut in zip(flat_step(loss, sam, 1), flat_step(loss, sam, 3), strict=True):
        torch.testing.assert_close(cut, whole)


def test_an_update_that_is_not_finite_shows_in_its_own_steps_loss() -> None:
    """Else its weights could be saved before the next step's loss shows it."""
    losses = iter([1.0, torch.nan])

    def of_passes(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return logits.sum() * next(losses)

    def of_gradient(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return (logits - logits.detach()).sqrt().sum()  # the slope of a root is infinite at 0

    batch = StepBatch([Part([torch.ones(2, 3, 2, 2)], torch.tensor([0, 1]))], torch.tensor([0, 1]))
    for sam, clip_norm, loss in (("sam", 0, of_passes), ("none", 1, of_gradient)):
        settings = {"teacher_training.sam": sam, "teacher_training.clip_norm": clip_norm, "train.compile": False}
        cfg = config.build(settings | {"train.precision": "fp32"})
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        optimizer = build_optimizer(network, cfg.teacher_training)
        step = Step(LogitObjective(network, loss), optimizer, cfg, torch.device("cpu"))
        assert not step(batch, torch.ones(3), 0).isfinite()
        assert not all(p.isfinite().all() for p in network.parameters())


def test_ranks_take_the_step_of_the_whole_batch_and_train_one_teacher(data: Path, tmp_path: Path) -> None:
    cfgs = [
        recipe(data, tmp_path / "runs", "epochs=6", "drw_epoch=5", "name=two", "batch_size=8", "accumulate=2"),
        recipe(data, tmp_path / "runs", *PACO, "epochs=2", "name=paco"),
    ]
    spawn(train_teachers, str(tmp_path), cfgs)
    model, x, y = problem()
    sam = SAM(model.parameters(), torch.optim.SGD, 0.5, **SGD)
    for _ in range(2):
        sam.step(lambda: F.cross_entropy(model(x), y).backward())
    alone = {"sam": [p.detach() for p in model.parameters()], "flat": flat_step("ldam", "sam", 1)}
    for kind, whole in alone.items():
        first, second = (torch.load(tmp_path / f"{kind}-{rank}", weights_only=True) for rank in (0, 1))
        for scope, after in first.items():
            assert all(torch.equal(a, b) for a, b in zip(after, second[scope], strict=True)), (kind, scope)
            if scope == "rank":
                assert not torch.allclose(after[1], whole[1])
            else:
                torch.testing.assert_close(after, whole)
    for index in (0, 1):
        first, second = (torch.load(tmp_path / f"run{index}-{rank}", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
    results = json.loads((tmp_path / "runs" / "two" / "results.json").read_text())
    assert results["test"]["heads"]["TEACHER"]["top1"]["official"]["all"] > 60
    assert train_teacher(cfgs[0]) == tmp_path / "runs" / "two" / "checkpoints" / "best"  # one rank takes it over


def test_more_parts_than_images_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 9, expected at least 2 images for each of 1 rank x 5 micro-batches"):
        train_teacher(recipe(data, tmp_path, "accumulate=5"))


@pytest.mark.parametrize("changes", [["batch_size=13"], ["batch_size=12", "accumulate=2"], PACO], ids=str)
def test_a_network_that_ends_in_one_pixel_trains_whatever_the_last_batch(
    data: Path, tmp_path: Path, changes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its batch norm has as many values as images: 27 = 13 + 13 + 1 = 12 + 12 + 2 + 1."""
    caplog.set_level(logging.INFO, "fastdeitlt")
    cfg = recipe(data, tmp_path, *changes, "arch=resnet18", "sam=none", "epochs=1", "drw_epoch=-1", "warmup_epochs=0")
    train_teacher(cfg)
    words = (
        "skips 3 of 27 images"
        if changes is PACO
        else f"the last batch of an epoch has {15 - ('=13' in changes[0])} images"
    )
    assert words in caplog.text


def test_paco_moves_its_key_encoder_and_queue_once_a_step() -> None:
    torch.manual_seed(0)
    cfg = TeacherTrainingConfig(loss="paco", paco_queue=8, paco_momentum=0.9, batch_size=4)
    paco = Paco("resnet8", 3, dim=4, queue_size=8).train()
    objective = PacoObjective(paco, torch.tensor([5, 3, 1]), cfg)
    with torch.no_grad():
        paco.linear.weight += 1.0
    before = paco.linear_k.weight.clone()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    for step in range(3):
        objective.begin()
        (keys,) = objective.prepare([images, images])
        objective(images, labels, None, keys).backward()
        objective.finish(labels, [(keys,)])
        place = slice(4 * (step % 2), 4 * (step % 2) + 4)
        assert torch.equal(paco.queue[place], keys)
        assert paco.queue_l[place].tolist() == labels.tolist()
    assert paco.queue_ptr.item() == 4
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(paco.linear_k.weight, before + (1 - 0.9**3))
    assert all(p.grad is None for p in paco.encoder_k.parameters())
    assert all(p.grad is not None for p in (*paco.encoder_q.parameters(), *paco.linear.parameters()))


@pytest.mark.parametrize("style", ["official_ldam", "official_paco"])
def test_folders_and_released_checkpoints_convert_both_ways(data: Path, tmp_path: Path, style: str) -> None:
    changes = [*PACO, "epochs=1"] if style == "official_paco" else ["epochs=1", "drw_epoch=0"]
    folder = train_teacher(recipe(data, tmp_path, *changes))
    released = export_official(folder, style, tmp_path / "out" / "released.pth.tar")
    content = torch.load(released, weights_only=True)["state_dict"]
    expected = create_teacher("resnet8", 3, style).state_dict()
    assert {key.removeprefix("module.") for key in content} == set(expected)
    assert all(key.startswith("module.") for key in content)
    facts = {"arch": "resnet8", "num_classes": 3, "img_size": 16, "mean": (0.3,) * 3, "std": (0.3,) * 3}
    back = import_official(released, tmp_path / "back", **facts)
    images = torch.randn(2, 3, 16, 16)
    logits = [load_teacher(path, "resnet8", 3)(images) for path in (folder, released, back)]
    for size, crop in ((16, 1.0), (32, 1.0), (224, 0.875)):  # of the evaluation in the codes that released them
        folder = import_official(released, tmp_path / f"of-{size}", **facts | {"img_size": size})
        loaded = open_released_teacher(released, "resnet8", 3, size)
        assert open_saved(folder).preprocess.crop_pct == loaded.preprocess.crop_pct == crop
        assert open_saved(folder).preprocess.mean == (0.3,) * 3 and open_saved(folder).preprocess.img_size == size
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    for wrong, message in (
        ({"mean": (0.3,)}, r"mean\.1: Field required, expected three numbers"),
        ({"std": (0.0,) * 3}, r"std\.0: Input should be greater than 0"),
        ({"img_size": 0}, "img_size: got 0, expected at least 1"),
        ({"class_map": [0, 0, 1]}, "class map: got 3 classes, 2 of them distinct"),
    ):
        with pytest.raises(UserError, match=message):
            import_official(released, tmp_path / "wrong", **facts | wrong)
    import_official(released, back, **facts)  # replaces a model folder
    with pytest.raises(UserError, match="exists and is not a model folder"):
        import_official(released, tmp_path, **facts)
    assert released.is_file() and not (tmp_path / "wrong").exists()


def test_a_plain_cnn_can_be_wrapped_for_pacos_loader_but_a_cosine_head_cannot(
    trained: tuple[Config, Path], data: Path, tmp_path: Path
) -> None:
    plain = train_teacher(recipe(data, tmp_path, "loss=ce", "normed_head=false", "epochs=1", "drw_epoch=-1"))
    released = tmp_path / "wrapped.pth"
    assert main(["export", str(plain), str(released), "--format", "official_paco"]) == 0
    with pytest.raises(UserError, match="exists, expected a new name"):
        export_official(plain, "official_paco", released)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(
        load_teacher(released, "resnet8", 3, "official_paco")(images), load_teacher(plain, "", 3)(images)
    )
    with pytest.raises(UserError, match="cosine head"):
        export_official(trained[1], "official_paco", tmp_path / "no.pth")
    with pytest.raises(UserError, match="expected one of official_ldam, official_paco"):
        export_official(plain, "timm", tmp_path / "no.pth")


def student(cfg: Config, folder: Path) -> Config:
    changes = {
        "student": cfg.student.model_copy(update={"img_size": 32}),
        "teacher": cfg.teacher.model_copy(update={"path": str(folder), "img_size": 16}),
        "augment": cfg.augment.model_copy(update={"recipe": "deit"}),
        "mixup": MixupConfig(),
        "train": cfg.train.model_copy(update={"batch_size": 6}),
    }
    return cfg.model_copy(update=changes)


def test_a_diagnosis_shows_that_harder_images_confuse_the_teacher(trained: tuple[Config, Path]) -> None:
    cfg, folder = trained
    facts = diagnose_teacher(folder, student(cfg, folder))
    assert facts["images"] == 27
    assert facts["clean"]["accuracy"] == pytest.approx(read_manifest(folder)["accuracy"]["train"])
    logged = json.loads((folder.parents[1] / "results.json").read_text())["train"]["heads"]["TEACHER"]["top1"]
    assert facts["clean"]["agreement"] == {shot: logged["official"][shot] for shot in ("head", "mid", "tail")}
    assert facts["clean"]["accuracy"] > facts["mixed_resized"]["accuracy"]
    assert facts["clean"]["entropy"] < facts["mixed"]["entropy"]
    assert facts["mixed"]["either"] >= facts["mixed"]["accuracy"]
    assert set(facts["augmented"]["agreement"]) == {"head", "mid", "tail"}
    assert facts["hard_targets"]["labels"] == [14, 8, 5]
    assert sum(facts["hard_targets"]["targets"]) == 26  # mixing pairs images
    gaps = list(facts["sharpness"]["gap"].values())
    assert gaps == sorted(gaps)
    assert 1 <= facts["feature_rank"]["sample"] <= facts["feature_rank"]["width"] == 64
    json.dumps(facts)


def test_the_clean_images_of_a_released_teacher_are_prepared_as_the_run_does(
    trained: tuple[Config, Path], tmp_path: Path
) -> None:
    cfg, folder = trained
    released = export_official(folder, "official_ldam", tmp_path / "released.pth")
    of_student = student(cfg, released)
    of_student = of_student.model_copy(update={"teacher": of_student.teacher.model_copy(update={"arch": "resnet8"})})
    assert cfg.augment.mean != of_student.teacher.mean  # which only normalise=teacher uses
    clean = [diagnose_teacher(path, of_student, flatness=False)["clean"] for path in (folder, released)]
    assert clean[0] == clean[1]


def test_analyze_prints_writes_and_reports_a_teacher(
    trained: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, folder = trained
    monkeypatch.setenv("COLUMNS", "200")
    run, recipe_file, numbers = folder.parents[1], tmp_path / "student.yaml", tmp_path / "numbers.json"
    recipe_file.write_text(config.dump(student(cfg, folder)))
    command = ["analyze", "teacher", str(run), "--images", "20", "--json", str(numbers)]
    assert main(command) == 2
    assert "add the student's recipe, such as --recipe" in capsys.readouterr().err
    assert main([*command, "mixup.prob=0", "--recipe", str(recipe_file)]) == 0
    shown = capsys.readouterr().out
    for text in ("resized", "target, %", "largest Hessian eigenvalue", "feature rank, by sample"):
        assert text in shown
    facts = json.loads(numbers.read_text())[str(run)]
    assert facts["images"] == 20
    assert facts["mixed"] == facts["augmented"]  # the override turned mixing off
    assert json.loads((run / "analysis" / "teacher.json").read_text()) == facts
    (reported,) = [s for s in sections(run) if s.title == "Teacher"]
    assert reported.blocks[0].svg.startswith("<svg")


def small_student(cfg: Config, folder: Path, runs: Path, **teacher: object) -> Config:
    """A student's run of a few steps on the squares, by the teacher in ``folder``."""
    flat = config.flatten(student(cfg, folder)) | {
        "runs_dir": str(runs), "name": "s", "student.name": "deit_tiny_distilled_patch8_16", "student.img_size": 16,
        "student.depth": 1, "train.epochs": 1, "loss.drw_epoch": -1, "augment.repeats": 1,
        "evaluate.analyze_images": 0,
    }  # fmt: skip
    return config.build(flat | {f"teacher.{name}": value for name, value in teacher.items()})


def in_another_order(folder: Path, to: Path) -> Path:
    """The teacher's weights in a folder that names another order of its classes."""
    manifest = {k: v for k, v in read_manifest(folder).items() if k not in ("files", "sha256")}
    return save_model_folder(to, load_tensors(folder), manifest | {"class_map": [1, 2, 0]})


def test_a_wrong_class_order_stops_the_run_before_its_first_step(trained: tuple[Config, Path], tmp_path: Path) -> None:
    cfg, folder = trained
    wrong = in_another_order(folder, tmp_path / "wrong")
    with pytest.raises(
        UserError, match=r"on 27 clean training images, expected .* as stated in its folder; 100.*another order"
    ):
        train(small_student(cfg, wrong, tmp_path / "runs"))
    assert not (tmp_path / "runs" / "s" / "metrics.jsonl").exists()
    assert (train(small_student(cfg, wrong, tmp_path / "off", check=False)) / "results.json").is_file()
    assert (train(small_student(cfg, folder, tmp_path / "right")) / "results.json").is_file()


def test_a_released_teacher_must_be_right_more_often_than_chance(
    trained: tuple[Config, Path], data: Path, tmp_path: Path
) -> None:
    cfg, folder = trained
    released = export_official(folder, "official_ldam", tmp_path / "released.pth")
    cfg = small_student(cfg, released, tmp_path, arch="resnet8")
    images = open_sets(cfg.data).train
    source = open_source(images, cfg.data, torch.device("cpu"))
    teacher = open_teacher(cfg.teacher, cfg.augment.mean, cfg.augment.std, 16, 3)
    assert check_decisions(teacher, images, source, cfg, 16) > 80
    teacher.class_map = torch.tensor([1, 2, 0])
    with pytest.raises(UserError, match=r"expected at least 57\.7 %; 100\.0 % .* another order"):
        check_decisions(teacher, images, source, cfg, 16)
    source.close()


def test_the_top_eigenvalue_of_a_quadratic_in_two_shares() -> None:
    weight = nn.Parameter(torch.ones(3))

    def share(*curvature: float) -> Tensor:
        return 0.5 * (torch.tensor(curvature) * weight**2).sum()

    shares = [partial(share, 1.0, -10.0, 4.0), partial(share, 0.0, 3.0, 0.0)]
    assert top_eigenvalue(shares, [weight], 50, tolerance=0.0) == pytest.approx(-7.0, rel=1e-4)


def test_sharpness_in_chunks_is_that_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images, labels = create_teacher("resnet8", 3), torch.randn(5, 3, 8, 8), torch.arange(5) % 3
    network(images * 3 + 1)  # statistics of batch norm that are not those of these images
    whole = sharpness(network.train(), images, labels, scale=2.0)
    sizes = []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(flatness, "CHUNK_PIXELS", 3 * 8 * 8 + 1)
    chunked = sharpness(network.train(), images, labels, scale=2.0)
    assert set(sizes) == {3, 2}  # no graph of more images
    assert chunked["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert chunked["gap"] == pytest.approx(whole["gap"], rel=1e-4)
    assert chunked["top_eigenvalue"] == pytest.approx(whole["top_eigenvalue"], rel=1e-5)


def test_sharpness_leaves_the_network_as_it_was() -> None:
    network = create_teacher("resnet8", 3).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    facts = sharpness(network, images, labels)
    assert facts["loss"] == pytest.approx(F.cross_entropy(network.eval()(images), labels).item(), rel=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_feature_rank_counts_directions() -> None:
    torch.manual_seed(0)
    features = torch.randn(40, 3) @ torch.randn(3, 10)
    features += 5  # a shared offset is one more direction unless features are centred
    assert feature_rank(features, "feature", 0.999999) == 3
    assert feature_rank(torch.ones(5, 1) * torch.randn(4), "sample") == 1


def test_another_orientation_rule_than_the_teachers_is_a_warning(
    trained: tuple[Config, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pixels are the student's, and where no image states an orientation the rules are the same."""
    cfg, folder = trained
    images = open_sets(cfg.data).train
    for rule, warnings in (("ignore", 0), ("apply", 1)):
        of_student = config.build(config.flatten(small_student(cfg, folder, tmp_path)) | {"data.exif": rule})
        teacher_of(of_student, images, 16, torch.device("cpu"))
        assert [r.getMessage()[:21] for r in caplog.records if r.levelno > 20] == ["data.exif: got apply,"] * warnings


def test_images_added_since_the_teacher_was_trained_are_a_warning(
    trained: tuple[Config, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The student's hold-out then takes others, and some may have been the teacher's training images."""
    class_folders(tmp_path / "photos", dict.fromkeys("abc", 10))
    cfg, cpu = config.build({"data.dataset": "folder", "data.root": str(tmp_path / "photos")}), torch.device("cpu")
    facts = {"data_sha256": fingerprint(open_sets(cfg.data).train), "dataset": "photos", "class_names": list("abc")}
    manifest = {name: fact for name, fact in read_manifest(trained[1]).items() if name != "files"} | facts
    folder = save_model_folder(tmp_path / "t", load_tensors(trained[1]), manifest)
    cfg = config.build(config.flatten(cfg) | {"teacher.path": str(folder)})
    for warnings in (0, 1):
        images = open_sets(cfg.data).train
        with closing(open_source(images, cfg.data, cpu)) as source:
            assert settled_teacher(cfg, images, source, 16, cpu)
        assert caplog.text.count(f"teacher {folder}: trained on other images than today's training split") == warnings
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "a" / "10.png")


def test_a_students_run_scores_its_teacher_with_the_teachers_preprocessing(
    trained: tuple[Config, Path], tmp_path: Path
) -> None:
    cfg, folder = trained
    other = {"evaluate.crop_pct": 0.5, "augment.mean": [0.9, 0.1, 0.5], "augment.std": [0.1, 0.2, 0.3]}
    of_student = config.build(config.flatten(small_student(cfg, folder, tmp_path)) | other)
    sets, cpu = open_sets(cfg.data), torch.device("cpu")
    teacher, student = teacher_of(of_student, sets.train, 32, cpu), create_student("deit_tiny_distilled_patch16_32", 3)
    scorer = StudentScorer(of_student, sets, student, teacher, None, cpu)
    scored = scorer._score_teacher(sets.train, teacher)
    scorer.close()
    expected = evaluate_saved(open_saved(folder), cfg, "train").result
    nll, expected_nll = (result.heads["TEACHER"].nll["official"] for result in (scored, expected))
    assert nll == pytest.approx(expected_nll, rel=1e-4)


def test_classes_of_the_students_data_are_matched_by_name(trained: tuple[Config, Path], tmp_path: Path) -> None:
    cfg, folder = trained
    manifest = {k: v for k, v in read_manifest(folder).items() if k not in ("files", "sha256")}
    named = save_model_folder(tmp_path / "t", load_tensors(folder), manifest | {"class_names": ["red", "lime", "blue"]})
    images = open_sets(cfg.data).train
    names, labels = ["blue", "red", "lime"], (images.labels + 1) % 3
    images = replace(images, labels=labels, counts=class_counts(labels, 3), class_names=names)
    cfg, cpu = small_student(cfg, named, tmp_path), torch.device("cpu")
    teacher = teacher_of(cfg, images, 16, cpu)
    assert [names[label] for label in teacher.class_map] == ["red", "lime", "blue"]
    source = open_source(images, cfg.data, cpu)
    assert check_decisions(teacher, images, source, cfg, 16) > 80
    source.close()
    with pytest.raises(UserError, match="classes differ by name, got 'pink', not in teacher"):
        teacher_of(cfg, replace(images, class_names=["blue", "pink", "lime"]), 16, cpu)


def test_training_and_analysis_take_the_settled_order_of_classes_of_equal_size(
    trained: tuple[Config, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released teacher numbers two classes of eight images each other than a stable sort does."""
    cfg, folder = trained
    state = load_tensors(folder)
    torch.save(state | {"linear.weight": state["linear.weight"][:, [1, 0, 2]]}, tmp_path / "released.pth")
    lines = (data / "train.txt").read_text().splitlines()
    (tmp_path / "tied.txt").write_text("\n".join(lines[:8] + lines[14:]))
    seen = []

    class Joint(JointForward):
        def __init__(self, student: nn.Module, teacher: Teacher, *others: object) -> None:
            seen.append(teacher.class_map.tolist())
            super().__init__(student, teacher, *others)

    monkeypatch.setattr(assemble, "JointForward", Joint)
    flat = config.flatten(small_student(cfg, tmp_path / "released.pth", tmp_path, arch="resnet8", map_classes=True))
    cfg = config.build(flat | {"data.train_list": str(tmp_path / "tied.txt"), "evaluate.analyze_images": 21})
    run = train(cfg)
    assert seen == [[1, 0, 2]]
    assert json.loads((run / ORDER_FILE).read_text())["class_map"] == [1, 0, 2]
    assert json.loads((run / "analysis" / "teacher.json").read_text())["augmented"]["accuracy"] > 50
