"""Mixup and CutMix are timm's batch mode: laws, pixels and targets."""

import numpy as np
import pytest
import torch
from laws import REJECT, counts_p, ks_p
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target

from fastdeitlt.config import MixupConfig
from fastdeitlt.data import mixup
from fastdeitlt.data.mixup import MixDraw
from fastdeitlt.errors import UserError

NUM = 50_000
SIZE = 32


def drawn(cfg: MixupConfig, num: int = NUM) -> list[MixDraw]:
    return [mixup.draw(1, i // 1000, i % 1000 // 2, i % 2, cfg, SIZE) for i in range(num)]


def split(draws: list[MixDraw]) -> tuple[np.ndarray, np.ndarray]:
    """lambda of Mixup, and (lambda, y0, y1, x0, x1) of CutMix."""
    boxes = np.array([(d.lam, *d.box) for d in draws if d.box is not None]).reshape(-1, 5)
    return np.array([d.lam for d in draws if d.box is None]), boxes


@pytest.fixture(scope="module")
def timm() -> tuple[np.ndarray, np.ndarray]:
    np.random.seed(0)
    theirs = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, num_classes=10)
    lams, boxes = [], []
    for _ in range(NUM):
        lam, use_cutmix = theirs._params_per_batch()
        if use_cutmix:
            box, lam = cutmix_bbox_and_lam((1, 3, SIZE, SIZE), lam, correct_lam=True)
            boxes.append((lam, *box))
        else:
            lams.append(lam)
    return np.array(lams), np.array(boxes)


def p_values(draws: list[MixDraw], timm: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    (lams, boxes), (timm_lams, timm_boxes) = split(draws), timm
    names = ("cutmix lambda", "y0", "y1", "x0", "x1")
    return {
        "switch": counts_p(np.array([len(lams), len(boxes)]), np.array([len(timm_lams), len(timm_boxes)])),
        "mixup lambda": ks_p(lams, timm_lams),
    } | {name: ks_p(boxes[:, i], timm_boxes[:, i]) for i, name in enumerate(names)}


def test_lambda_and_boxes_follow_timms_law(timm: tuple[np.ndarray, np.ndarray]) -> None:
    p = p_values(drawn(MixupConfig()), timm)
    assert min(p.values()) > REJECT, p


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ({"mixup_alpha": 0.6}, "mixup lambda"),
        ({"cutmix_alpha": 0.8}, "cutmix lambda"),
        ({"switch_prob": 0.55}, "switch"),
    ],
)
def test_a_wrong_law_is_noticed(wrong: dict, law: str, timm: tuple[np.ndarray, np.ndarray]) -> None:
    assert p_values(drawn(MixupConfig(**wrong), 20_000), timm)[law] < REJECT


def test_prob_and_alphas_switch_mixing_off() -> None:
    assert all(d == MixDraw() for d in drawn(MixupConfig(prob=0), 50))
    assert all(d == MixDraw() for d in drawn(MixupConfig(mixup_alpha=0, cutmix_alpha=0), 50))
    assert all(d.box is None for d in drawn(MixupConfig(cutmix_alpha=0), 50))
    assert all(d.box is not None for d in drawn(MixupConfig(mixup_alpha=0), 50))
    assert 350 < sum(d == MixDraw() for d in drawn(MixupConfig(prob=0.6), 1000)) < 450


def test_draw_depends_on_every_part_of_its_key() -> None:
    cfg = MixupConfig()
    base = mixup.draw(1, 2, 3, 4, cfg, SIZE)
    assert base == mixup.draw(1, 2, 3, 4, cfg, SIZE)
    others = [mixup.draw(*key, cfg, SIZE) for key in ((2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5))]
    assert base not in others


@pytest.mark.parametrize("mix", [MixDraw(0.3), MixDraw(1 - 6 * 4 / 100, (2, 8, 0, 4))], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_pixels_equal_timms(mix: MixDraw, format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(6, 3, 10, 10).contiguous(memory_format=format)
    theirs = Mixup(num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (mix.lam, mix.box is not None))
    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: (mix.box, mix.lam))
    expected, _ = theirs(images.clone(), torch.zeros(6, dtype=torch.long))
    mixed = mixup.apply(images, mix)
    assert mixed is images
    assert torch.equal(mixed, expected)
    assert mixed.is_contiguous(memory_format=format)


def test_an_unmixed_batch_may_be_odd_and_stays() -> None:
    images = torch.randn(3, 3, 4, 4)
    assert mixup.apply(images, MixDraw()) is images


def test_an_odd_batch_is_refused_with_its_size() -> None:
    with pytest.raises(UserError, match=r"got a batch of 3 images, expected an even number"):
        mixup.apply(torch.randn(3, 3, 4, 4), MixDraw(0.5))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.37, 1.0])
def test_targets_equal_timms(lam: float, smoothing: float) -> None:
    labels = torch.tensor([0, 6, 3, 3, 1, 2])
    ours = mixup.mixed_target(labels, labels.flip(0), lam, 7, smoothing)
    torch.testing.assert_close(ours, mixup_target(labels, 7, lam, smoothing), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.sum(1), torch.ones(6))
