"""`analyze student`: attention maps and distance, feature rank of a student."""

# B images, C channels, H height, W width, K classes, N images in all, P patches, L blocks

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastdeitlt import config, distributed
from fastdeitlt.data.pixels.request import centre_crops
from fastdeitlt.data.pixels.source import Source, open_source
from fastdeitlt.data.sets.counts import class_order, shot_groups
from fastdeitlt.data.sets.opening import open_splits
from fastdeitlt.data.sets.types import SPLITS, LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import cell
from fastdeitlt.evaluation.per_image import data_uri
from fastdeitlt.models.saved import Saved, open_saved, run_of
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.reporting import figures, page
from fastdeitlt.reporting.analysis import attention, overlay
from fastdeitlt.reporting.analysis.features import CENTRINGS, watch_tokens
from fastdeitlt.reporting.page import Block, Section

SPLIT = "official"
PER_GROUP = 4
"""Pictures per group (head, mid, tail)."""
WEIGHT_BYTES = 2**29
"""Memory for the attention weights of a batch."""


def diagnose(path: str, overrides: Sequence[str], *, images: int) -> dict[str, Any]:
    """Analyse a student on its test images.

    Raises:
        UserError: not a student, no images, or another data set than the student's.
    """
    saved, run = open_saved(path), run_of(Path(path))
    if not isinstance(saved.model, DistilledViT):
        raise UserError(f"model {path}: got a {saved.kind}, expected a student. Use 'analyze teacher' for teachers.")
    if images < 1:
        raise UserError(f"--images: got {images}, expected at least 1")
    cfg = config.load_evaluation(str(run / "config.yaml") if run else "quickstart", list(overrides))
    device = distributed.device_of(cfg.train.device)
    splits = open_splits(cfg.data, () if saved.class_counts else ("train",), SPLITS, saved.classes)
    name, chosen = list(splits.items())[-1]  # test, else validation, else training images
    counts, dataset = saved.class_counts or splits["train"].counts, saved.info.get("dataset", cfg.data.dataset)
    saved.model.to(device)
    data = cfg.data.model_copy(update={"exif": saved.preprocess.exif})
    with closing(open_source(chosen, data, device, scored=True)) as source:
        return {"set": name} | look(saved, source, chosen, counts, dataset, images)


def after_training(run_dir: Path, num_images: int) -> dict[str, Any]:
    """Analyse the student of a run at the end of training."""
    return diagnose(str(run_dir), (), images=num_images)


def look(
    saved: Saved, source: Source, images: LongTailSet, counts: Sequence[int], dataset: str, num_images: int
) -> dict[str, Any]:
    """Measure attention and features of a student on images, in float32.

    Args:
        saved: the student.
        source: pixel source of ``images``.
        counts: training images of each class, for head, mid and tail (official split).
        num_images: most images, evenly spaced in the list.

    Returns:
        ``distance`` mean attention distance in pixels [L][heads] and ``uniform_distance``, that of uniform attention;
        ``rank`` token -> centring -> [L]; ``cosine`` of CLS and DIST [L]; ``patch_similarity`` [L]; ``maps`` group ->
        likeness (cosine) and spread of the rollouts of CLS and DIST; ``gallery`` pictures of the first image of some
        classes of each group: image, rollout of CLS and DIST, last block of CLS and DIST.
    """
    student = saved.model
    assert isinstance(student, DistilledViT)
    student.eval()
    sample_N = np.linspace(0, len(images) - 1, min(num_images, len(images))).astype(np.int64)
    distances, maps = [], []
    with watch_tokens(student) as tokens:
        for _, weights, _ in _batches(saved, source, sample_N):
            distances.append(torch.stack([attention.mean_distance(w, student.patch).mean(0) * len(w) for w in weights]))
            maps.append(attention.rollout(weights).cpu())
    side = student.img_size // student.patch
    return {
        "images": len(sample_N),
        "patch": student.patch,
        "side": side,
        "distance": (torch.stack(distances).sum(0) / len(sample_N)).tolist(),
        "uniform_distance": float(attention.patch_distances(side, student.patch).mean()),
        "rank": tokens.ranks(),
        "width": student.width,
        "cosine": tokens.cosines(),
        "patch_similarity": tokens.patch_similarities(),
        "maps": _compare_maps(torch.cat(maps), torch.as_tensor(images.labels[sample_N]), counts, dataset),
        "gallery": _gallery(saved, source, images, counts, dataset),
    }


def _batches(saved: Saved, source: Source, sample_N: np.ndarray) -> Any:
    """Yield crops_BHWC (CPU), attention weights by block, and both heads' logits."""
    student = saved.model
    assert isinstance(student, DistilledViT)
    tokens = student.pos_embed.shape[1]
    heads = student.get_submodule("blocks.0.attn").heads
    batch = int(np.clip(WEIGHT_BYTES // (4 * len(student.blocks) * heads * tokens**2), 1, 64))  # type: ignore[operator]
    requests = centre_crops(sample_N, batch, saved.preprocess.img_size, saved.preprocess.resize)
    with attention.attention_weights(student) as weights, torch.inference_mode():
        for _, crops_BHWC in source.crops(requests):
            x_BND = student.forward_features(saved.normalise(crops_BHWC))
            yield crops_BHWC.cpu(), weights, (student.head(x_BND[:, 0]), student.head_dist(x_BND[:, 1]))


def _compare_maps(
    maps_N2P: Tensor, labels_N: Tensor, counts: Sequence[int], dataset: str
) -> dict[str, dict[str, float]]:
    by_group = {}
    groups = {"all": torch.arange(len(counts))} | shot_groups(counts, SPLIT, dataset)
    likeness_N, spread_N2 = cosine_similarity(maps_N2P[:, 0], maps_N2P[:, 1], dim=1), attention.spread(maps_N2P)
    for group, ids in groups.items():
        inside_N = torch.isin(labels_N, ids)
        if inside_N.any():
            spread_2 = spread_N2[inside_N].mean(0).tolist()
            by_group[group] = {
                "images": int(inside_N.sum()),
                "likeness": float(likeness_N[inside_N].mean()),
                "spread_cls": spread_2[0],
                "spread_dist": spread_2[1],
            }
    return by_group


def _gallery(
    saved: Saved, source: Source, images: LongTailSet, counts: Sequence[int], dataset: str
) -> list[dict[str, Any]]:
    """Return pictures of the first image of classes of each group, evenly by size."""
    first: dict[int, int] = {}
    for index, label in enumerate(images.labels.tolist()):
        first.setdefault(label, index)
    chosen: list[tuple[str, int]] = []
    for group, ids in shot_groups(counts, SPLIT, dataset).items():
        members = [k for k in class_order(counts).tolist() if k in first and k in set(ids.tolist())]
        places = np.linspace(0, len(members) - 1, min(PER_GROUP, len(members))).astype(int)
        chosen += [(group, members[place]) for place in places]
    names = saved.label_names
    items: list[dict[str, Any]] = []
    for crops_BHWC, weights, (cls_BK, dist_BK) in _batches(saved, source, np.array([first[k] for _, k in chosen])):
        side = round((weights[0].shape[-1] - 2) ** 0.5)
        maps = torch.cat([attention.rollout(weights), attention.last_maps(weights)], dim=1).unflatten(-1, (side, side))
        predicted = {
            head: saved.by_label(logits_BK).argmax(1).tolist()
            for head, logits_BK in (("AVG", (cls_BK + dist_BK) / 2), ("CLS", cls_BK), ("DIST", dist_BK))
        }
        for b, (crop_HWC, maps_4PP) in enumerate(zip(crops_BHWC.numpy(), maps.cpu().numpy(), strict=True)):
            group, label = chosen[len(items)]
            items.append(
                {
                    "group": group,
                    "class": names[label],
                    "training_images": int(counts[label]),
                    "predicted": {head: names[classes[b]] for head, classes in predicted.items()},
                    "picture": data_uri(overlay.strip(crop_HWC, list(maps_4PP)), "PNG", optimize=True),
                }
            )
    return items


def _block_table(facts: dict[str, Any]) -> page.Table:
    header = ["block", "px", *(f"rank {token}, {c}" for token in facts["rank"] for c in CENTRINGS)]
    header += ["CLS-DIST cosine", "patch cosine"]
    rows = [
        [
            str(index + 1),
            f"{min(heads):.1f} to {max(heads):.1f}",
            *(str(ranks[c][index]) for ranks in facts["rank"].values() for c in CENTRINGS),
            cell(facts["cosine"][index], 3),
            cell(facts["patch_similarity"][index], 3),
        ]
        for index, heads in enumerate(facts["distance"])
    ]
    return page.Table(f"By block, {facts['images']:,} {facts['set']} images", header, rows)


def _map_table(facts: dict[str, Any]) -> page.Table:
    header = ["classes", "images", "similarity", "spread CLS", "spread DIST"]
    rows = [
        [group, f"{m['images']:,}", *(cell(m[key], 3) for key in ("likeness", "spread_cls", "spread_dist"))]
        for group, m in facts["maps"].items()
    ]
    return page.Table("Rollout maps of CLS and DIST", header, rows)


def section(facts: dict[str, Any]) -> Section:
    """Return the report section of analysis/student.json."""
    blocks: list[Block] = [
        page.Gallery(
            "Image; rollout of CLS and of DIST; last block of CLS and of DIST",
            [(item["picture"], _caption(item)) for item in facts["gallery"]],
        ),
        page.Figure(
            "Mean attention distance of each head", figures.distances(facts["distance"], facts["uniform_distance"])
        ),
        page.Figure("Feature rank (99 % of the energy)", figures.over_blocks(_rank_lines(facts), "rank")),
        page.Figure(
            "Token similarity",
            figures.over_blocks({"CLS and DIST": facts["cosine"], "patches": facts["patch_similarity"]}, "cosine"),
        ),
        _map_table(facts),
        page.Fold("All blocks", _block_table(facts)),
    ]
    note = (
        f"On {facts['images']:,} {facts['set']} images. Pictures: the first image of each class, not selected; each "
        "map is scaled to its range, brighter is higher. Rollout: the product of the blocks' attention (mean over "
        "heads, half identity). Distance: mean distance of a patch to the patches that it attends to; the dotted line "
        "is uniform attention. Rank: number of singular values with 99 % of the energy, centred by sample (as in "
        "published figures) or by feature (as in PCA). Spread: entropy of a map, 1 for uniform attention."
    )
    return Section("Attention and features", note, blocks)


def _rank_lines(facts: dict[str, Any]) -> dict[str, list[float]]:
    return {f"{token}, by {c}": ranks[c] for token, ranks in facts["rank"].items() for c in CENTRINGS}


def _caption(item: dict[str, Any]) -> str:
    """Return a caption with the image's class and each head's prediction."""
    predictions = ", ".join(f"{head} {name}" for head, name in item["predicted"].items())
    return f"{item['group']}: {item['class']} ({item['training_images']:,} training images). Predicted: {predictions}"
