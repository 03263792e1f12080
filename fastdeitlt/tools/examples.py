"""Examples in `--help`, by verb."""

EXAMPLES = {
    "": (
        "demo",
        "plan photos --hours 0.5",
        "train quickstart --with-teacher teacher/quickstart",
        "config list",
        "train --help",
    ),
    "train": (
        "train quickstart --with-teacher teacher/quickstart",
        "train imagenet_lt data.root=/images teacher.path=runs/my-teacher name=my-student",
        "train my.yaml --dry-run",
        "train my.yaml name=larger student.init=runs/my-student student.img_size=96 optim.layer_decay=0.75",
    ),
    "plan": ("plan photos --hours 0.5 --out mine", "plan lists/train.csv --from runs/my-student"),
    "train-teacher": ("train-teacher teacher/imagenet_lt data.root=/images name=my-teacher",),
    "ablate": ("ablate ablation/embedded --seeds 0 1", "ablate my_grid.yaml --dry-run"),
    "demo": ("demo --seed 1",),
    "eval": (
        "eval runs/my-student --predictions predictions.csv",
        "eval runs/my-student data.root=/new/images --split test --csv classes.csv",
    ),
    "predict": ("predict runs/my-student photo.jpg more/photos --out answers.csv",),
    "export": ("export runs/my-student exported --format timm", "export runs/my-student model.onnx --format onnx"),
    "bench": ("bench quickstart --quick", "bench imagenet_lt --synthetic train.batch_size=256"),
    "tune": ("tune imagenet_lt",),
    "profile": ("profile quickstart --steps 5 --out profile",),
    "report": ("report runs/my-student", "report --compare runs/a runs/b --out compare.html"),
    "data": ("data check my.yaml", "data prepare cifar10 --root data/cifar --download", "data cache --clear"),
    "config": (
        "config list",
        "config show imagenet_lt --changed",
        "config show imagenet_lt loss optim.lr",
        "config show quickstart train.epochs=100 --yaml",
    ),
    "doctor": ("doctor --json",),
}


def epilog(verb: str) -> str | None:
    """Return the help examples of a verb ("": the program), one per line."""
    lines = EXAMPLES.get(verb, ())
    return "\n".join(("examples:", *(f"  fastdeitlt {line}" for line in lines))) if lines else None
