"""README.md of an exported model: architecture, training data, scores, limits."""

from typing import Any

from fastdeitlt.errors import counted
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

Class names are in `config.json` as `label_names`; `class_map` has the output index of each label of the data set.

## Training data

{data}

## Results

{results}

## Probabilities

{calibration}

## Licence

Not stated. State the licence of these weights here before you publish them, in accordance with the licence of the
training images.

## Limitations

Behaviour on images of other sources, fairness across groups of people, and robustness were not measured.
"""


STUDENT = """A distilled Vision Transformer (`{student}`; in timm `{architecture}`{arguments}), trained
from scratch on long-tailed images with DeiT-LT (Rangwani et al., CVPR 2024, arXiv:2404.02900). It predicts with the
mean of two heads: CLS, trained on the labels, and DIST, trained on the decisions of a CNN teacher."""
TEACHER = """A convolutional network (`{architecture}`), trained from scratch on long-tailed images (loss {loss}), as a
teacher for DeiT-LT (Rangwani et al., CVPR 2024, arXiv:2404.02900)."""
EXIF = {
    "ignore": "The EXIF orientation of images was ignored in training.",
    "apply": "Apply the EXIF orientation first, as in training: `image = PIL.ImageOps.exif_transpose(image)`.",
}


def model_card(saved: Saved, architecture: str, model_args: dict[str, Any]) -> str:
    """Return the Markdown card of a timm export; missing facts are marked as unknown."""
    arguments = ", ".join(f"{name} {value}" for name, value in model_args.items())
    split = next((split for split in ("test", "val") if saved.results.get(split)), "")
    result = Result.from_json(saved.results[split]) if split else None
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
        results=_results(result, split),
        calibration=_calibration(saved, result, split),
    )


def _data(saved: Saved) -> str:
    counts = saved.info.get("class_counts")
    if not counts:
        return f"{counted(saved.num_classes, 'class')}; the number of images is not in the model folder."
    smallest = min(count for count in counts if count)
    return (
        f"{saved.info.get('dataset') or 'Unnamed'}: {counted(sum(counts), 'image')} of "
        f"{counted(len(counts), 'class')}, {max(counts):,} in the largest and {smallest:,} in the smallest (imbalance "
        f"{max(counts) / smallest:.0f})."
    )


def _results(result: Result | None, name: str) -> str:
    if result is None:
        return "Not available: the model was not tested, or the run has no results.json."
    lines = [f"Top-1 accuracy in per cent on {result.size(f'{name} images')}; two splits of the classes by size.", ""]
    lines += ["| split | head | all | head | mid | tail |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for split in result.num_classes:
        for head, scores in result.heads.items():
            numbers = " | ".join(cell(scores.top1[split][group]) for group in GROUPS)
            lines.append(f"| {result.split_name(split)} | {head} | {numbers} |")
    return "\n".join(lines)


def _calibration(saved: Saved, result: Result | None, name: str) -> str:
    """Return text on temperatures and the calibration error without and with them."""
    lines = ["The model returns uncalibrated logits."]
    if fitted := saved.calibration:
        shown = ", ".join(f"{head} {value:.3f}" for head, value in fitted.temperatures.items())
        lines.append(
            f"Divide them by their temperature before the softmax: {shown} (`temperatures` in `config.json`), fitted "
            f"on {fitted.num_fitted:,} validation images with equal class weights. They do not change the predicted "
            "class and are not part of the weights."
        )
    else:
        lines.append("No temperature was fitted on validation images.")
    if result is None:
        return " ".join(lines)
    errors = [f"uncalibrated {cell(result.heads[result.main].ece['threshold']['all'])} %"]
    if saved.results.get("posthoc"):
        after = PostHoc.from_json(saved.results["posthoc"]).result.heads["AVG, temperature"]
        errors.append(f"with a fitted temperature {cell(after.ece['threshold']['all'])} %")
    error = f"Expected calibration error of {result.main} on {name} images (15 bins): {', '.join(errors)}."
    return " ".join([*lines, error])
