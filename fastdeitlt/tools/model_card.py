"""README.md of an exported model: architecture, training data, scores, limits."""

from typing import Any

from fastdeitlt.evaluation.metrics import GROUPS, Result, cell
from fastdeitlt.evaluation.posthoc import PostHoc
from fastdeitlt.models.saved import Saved

CARD = """---
library_name: timm
tags: [image-classification, timm, long-tail]
---
# {name}

{what}

```python
import timm

model = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

{exif}

Class names are `label_names` in `config.json`. `class_map` there is the output of each label of the data set.

## Training data

{data}

## Results

{results}

## Probabilities

{calibration}

## Licence

Not stated. The licence of these weights is for whoever publishes them to state here, in keeping with the licence of the
training images, which this program does not know.

## Not known

Behaviour on other images than those of the data set, fairness across groups of people, and robustness were not
measured.
"""


STUDENT = """A distilled Vision Transformer (`{student}`; in timm `{architecture}`{arguments}), trained
from scratch on long-tailed images with DeiT-LT (Rangwani et al., CVPR 2024, arXiv:2404.02900). It predicts with the
mean of two heads: CLS, trained on the labels, and DIST, trained on the decisions of a CNN teacher."""
TEACHER = """A convolutional network (`{architecture}`), trained from scratch on long-tailed images (loss {loss}), as a
teacher for DeiT-LT (Rangwani et al., CVPR 2024, arXiv:2404.02900)."""
EXIF = {
    "ignore": "Images were used as they are stored: their EXIF orientation was ignored in training.",
    "apply": "Turn images upright first, as in training: `image = PIL.ImageOps.exif_transpose(image)`.",
}


def model_card(saved: Saved, architecture: str, model_args: dict[str, Any]) -> str:
    """Return the Markdown card of a timm export; missing facts are marked as unknown."""
    arguments = ", ".join(f"{name} {value}" for name, value in model_args.items())
    return CARD.format(
        name=f"DeiT-LT on {saved.info.get('dataset') or 'an unnamed data set'}",
        what=(TEACHER if saved.kind == "teacher" else STUDENT).format(
            student=saved.info["model"].get("name"),
            architecture=architecture,
            arguments=f" with {arguments}" if arguments else "",
            loss=(saved.info.get("recipe") or {}).get("loss", "not stated"),
        ),
        exif=EXIF[saved.preprocess.exif],
        data=_data(saved),
        results=_results(saved.results),
        calibration=_calibration(saved),
    )


def _data(saved: Saved) -> str:
    counts = saved.info.get("class_counts")
    if not counts:
        return f"{saved.num_classes} classes; the model folder does not say how many images."
    smallest = min(count for count in counts if count)
    return (
        f"{saved.info.get('dataset') or 'Unnamed'}: {sum(counts):,} images of {len(counts):,} classes, "
        f"{max(counts):,} in the largest and {smallest:,} in the smallest (imbalance {max(counts) / smallest:.0f})."
    )


def _results(results: dict[str, Any]) -> str:
    name = next((name for name in ("test", "val") if results.get(name)), None)
    if name is None:
        return "Not known: the model was not tested, or the run's results.json is not beside it."
    result = Result.from_json(results[name])
    lines = [
        f"Top-1 accuracy in per cent on {result.size(f'{name} images')}; classes by size, two conventions.",
        "",
    ]
    lines += ["| split | head | all | head | mid | tail |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for split in result.num_classes:
        for head, scores in result.heads.items():
            numbers = " | ".join(cell(scores.top1[split][group]) for group in GROUPS)
            lines.append(f"| {result.split_name(split)} | {head} | {numbers} |")
    return "\n".join(lines)


def _calibration(saved: Saved) -> str:
    """Return text on temperatures and the calibration error without and with them."""
    lines = ["The model gives logits as trained."]
    if fitted := saved.calibration:
        shown = ", ".join(f"{head} {value:.3f}" for head, value in fitted.temperatures.items())
        lines.append(
            f"Divide them by their temperature before the softmax: {shown} (`temperatures` in `config.json`), fitted "
            f"on {fitted.num_fitted:,} validation images with every class counting the same. They leave the order of "
            "the classes as it is, and are not part of the weights."
        )
    else:
        lines.append("No temperature comes with them: none was fitted on validation images.")
    name = next((name for name in ("test", "val") if saved.results.get(name)), None)
    if name is None:
        return " ".join(lines)
    result = Result.from_json(saved.results[name])
    errors = [f"as trained {cell(result.heads[result.main].ece['threshold']['all'])} %"]
    if saved.results.get("posthoc"):
        after = PostHoc.from_json(saved.results["posthoc"]).result.heads["AVG, temperature"]
        errors.append(f"with a fitted temperature {cell(after.ece['threshold']['all'])} %")
    return " ".join([*lines, f"Expected calibration error of AVG on {name} images (15 bins): {', '.join(errors)}."])
