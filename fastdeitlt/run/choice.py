"""Choice of a run's folder, and comparison of its settings with the saved ones."""

import os
from collections.abc import Collection
from pathlib import Path

from fastdeitlt import config, distributed
from fastdeitlt.config import Config
from fastdeitlt.errors import UserError
from fastdeitlt.run.process import LAUNCH

MAY_CHANGE = (
    "runs_dir",
    "published",
    "track",
    "data.root",
    "data.train_list",
    "data.val_list",
    "data.test_list",
    "data.on_error",
    "data.residency",
    "data.num_threads",
    "data.jpeg_engine_share",
    "augment.impl",
    "student.attention",
    "student.add_layernorm",
    "student.bias_gelu",
    "teacher.fuse_epilogues",
    "teacher.cudnn_benchmark",
    "loss.impl",
    "optim.backend",
    "train.device",
    "train.compile",
    "train.autotune",
    "train.cuda_graphs",
    "train.measure_kernels",
    "train.ranks_per_forward",
    "train.engine",
    "train.zero_stage",
    "train.offload",
    "train.timeout_s",
    "train.main_timeout_s",
    "train.keep",
    "train.log_every",
    "train.save_every_epochs",
    "train.save_every_steps",
    "train.nonfinite_skips",
    "evaluate.batch_size",
    "evaluate.analyze_images",
)
"""Settings that may change when a run resumes: places, implementations, and what the run does after a fault.

Names and labels of training and selection images are compared with the checkpoint's.
"""


def with_ranks(cfg: Config) -> Config:
    """Set ``train.virtual_ranks``: a resume on other ranks is equal or refused."""
    ranks = cfg.train.virtual_ranks or distributed.get_world()
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"virtual_ranks": ranks})})


def choose_folder(cfg: Config, resume: str) -> Path:
    """Return the run folder for a resume mode (see ``Run``).

    Raises:
        UserError: the mode needs a run, and the folder has none.
    """
    folder = Path(cfg.runs_dir) / cfg.name
    if resume not in ("auto", "never", "must"):
        folder = Path(resume)
    elif resume == "never":
        folder = _unused(folder)
    if resume not in ("auto", "never") and not (folder / "config.yaml").is_file():
        raise UserError(f"resume: no run in {folder}. Use --resume auto to start one.")
    return folder


def mark_of_launch(folder: Path) -> Path:
    """Return the file that marks the new folder of this launch, for its restarts."""
    return folder / f".launch-{os.environ.get(LAUNCH, '')}"


def _unused(folder: Path) -> Path:
    """Return the first path that is free, or the folder of this launch."""
    number = 2
    candidate = folder
    while candidate.exists() and not mark_of_launch(candidate).exists():
        candidate = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return candidate


def begun(folder: Path) -> Config | None:
    """Return the settings of the run in a folder.

    None without records and selected weights: a branch, or a refused start.
    """
    saved, signs = folder / "config.yaml", (folder / "metrics.jsonl", folder / "checkpoints" / "best")
    return config.load(str(saved)) if saved.exists() and any(sign.exists() for sign in signs) else None


def changes(saved: Config, now: Config, free: Collection[str]) -> dict[str, str]:
    """Return "setting: old -> new" of each changed setting, except ``free``.

    A teacher in ``runs_dir`` moves with it; its weights are compared when the run resumes.
    """
    old_teacher, new_teacher = (cfg.teacher.path.removeprefix(f"{Path(cfg.runs_dir)}/") for cfg in (saved, now))
    free = (*free, "teacher.path") if old_teacher == new_teacher else free
    before, after = config.flatten(saved), config.flatten(now)
    changed = [name for name in before if before[name] != after[name] and name not in free]
    return {name: f"{name}: {before[name]!r} -> {after[name]!r}" for name in changed}


def refuse_other_run(folder: Path, cfg: Config, free: Collection[str] = ()) -> None:
    """Raise UserError if the folder has a begun run with other settings."""
    if before := begun(folder):
        refuse_changes(before, with_ranks(cfg), folder, free)


def refuse_changes(
    saved: Config,
    now: Config,
    folder: Path,
    free: Collection[str] = (),
    remedy: str = "Use --resume never for a new folder, or the saved settings.",
    fixed: Collection[str] = (),
) -> None:
    """Raise UserError for changed settings not in ``free`` or MAY_CHANGE - ``fixed``."""
    changed = changes(saved, now, {*MAY_CHANGE, "name", *free} - {*fixed})
    if changed:
        listed = ", ".join([*changed.values()][:4])
        if "train.epochs" in changed:
            remedy += f" To train longer, start a new run from its weights: name=NEW student.init={folder}."
        raise UserError(f"run folder {folder}: contains a run with other settings ({listed}). {remedy}")
