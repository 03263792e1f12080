"""What is fitted on validation images: the best fit there is, the textbook's formulas, nothing from the test set."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from fastdeitlt.data.sets.splits import Classes
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import score
from fastdeitlt.evaluation.posthoc import METHODS, PostHoc, apply, fit, log_prior, post_hoc, temperatures
from fastdeitlt.models.saved import Saved
from fastdeitlt.store.manifest import Calibration, Preprocess
from fastdeitlt.tools.model_card import model_card

COUNTS = [500, 120, 60, 20, 8]


def heads(num_images=600, cls_gain=2.0, dist_gain=2.0, scale=3.0, seed=0):
    """Overconfident heads: CLS knows the classes in front, DIST those behind."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(num_images) % 5
    onehot_NK = torch.nn.functional.one_hot(labels_N, 5)
    front_K = torch.linspace(1, 0, 5)
    cls_NK = torch.randn(num_images, 5, generator=generator) + cls_gain * onehot_NK * front_K
    dist_NK = torch.randn(num_images, 5, generator=generator) + dist_gain * onehot_NK * (1 - front_K)
    return scale * cls_NK, scale * dist_NK, labels_N


def balanced_nll(logits_NK, labels_N):
    losses_N = torch.nn.functional.cross_entropy(logits_NK.double(), labels_N, reduction="none")
    return float(torch.stack([losses_N[labels_N == k].mean() for k in labels_N.unique()]).mean())


def test_a_temperature_is_the_best_of_a_fine_grid_and_moves_no_decision():
    cls_NK, dist_NK, labels_N = heads()
    prior = log_prior(COUNTS)
    (weight,) = fit("CLS, temperature", cls_NK, dist_NK, labels_N, prior)
    grid = {1 / t: balanced_nll(cls_NK / t, labels_N) for t in np.linspace(0.5, 10, 2000)}
    assert weight == pytest.approx(min(grid, key=grid.get), rel=0.01) and 1 / weight > 2
    scaled_NK = apply("CLS, temperature", [weight], cls_NK, dist_NK, prior)
    assert torch.equal(scaled_NK.argmax(1), cls_NK.argmax(1))


@pytest.mark.parametrize("method", METHODS)
def test_every_fit_is_a_minimum_and_classes_count_the_same(method):
    cls_NK, dist_NK, labels_N = heads()
    kept = (labels_N < 3) | (torch.arange(len(labels_N)) % 4 == 0)  # an unbalanced validation set
    val, prior = (cls_NK[kept], dist_NK[kept], labels_N[kept]), log_prior(COUNTS)
    weights = fit(method, *val, prior)

    def loss(candidate):
        away = sum((w - s) ** 2 for w, s in zip(candidate, METHODS[method][1], strict=True))
        return balanced_nll(apply(method, candidate, *val[:2], prior), val[2]) + away / 2 / len(val[2])

    best = loss(weights)
    assert best < loss(METHODS[method][1])
    for index in range(len(weights)):
        for step in (-0.02, 0.02):
            assert loss([w + step * (i == index) for i, w in enumerate(weights)]) > best - 1e-7


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith(("CLS", "DIST"))])
def test_at_its_start_a_method_decides_as_avg_does(method):
    cls_NK, dist_NK, _ = heads()
    start_NK = apply(method, METHODS[method][1], cls_NK, dist_NK, log_prior(COUNTS))
    assert torch.allclose(start_NK.softmax(1), ((cls_NK + dist_NK) / 2).softmax(1), atol=1e-6)


def test_the_prior_of_a_model_that_learned_the_frequencies_is_taken_out_whole():
    """Logits log p(x | y) + log prior: Menon et al. 2021 predict tau = 1."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(5000) % 5
    x_N5 = torch.randn(5000, 5, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels_N, 5)
    prior = log_prior(COUNTS)
    logits_NK = (1.5 * x_N5 + prior).float()  # the log-likelihood ratio of Gaussians 1.5 apart
    one, tau = fit("AVG, class prior", logits_NK, logits_NK, labels_N, prior)
    assert one == pytest.approx(1, abs=0.06) and tau == pytest.approx(1, abs=0.06)
    val, test = (
        tuple(x[part] for x in (logits_NK, logits_NK, labels_N)) for part in (slice(0, 2500), slice(2500, None))
    )
    found = post_hoc(val, test, COUNTS)
    assert found.result.accuracy("AVG, class prior") > found.result.accuracy("AVG") + 5
    assert found.result.accuracy("AVG, class prior, tau = 1") == pytest.approx(
        100 * multiclass_accuracy(test[0] - prior.float(), test[2], num_classes=5, average="micro").item(), abs=1e-3
    )
    # told the prior of the training set, adjusting gives back what the model said; told another, it does better
    assert found.prior_known["backward 50"] > 1.05 * found.prior_known["uniform"]


def test_calibrated_scores_on_the_test_set_agree_with_torchmetrics():
    val, test = heads(seed=1), heads(seed=2)
    found = post_hoc(val, test, COUNTS)
    for name in ("AVG, temperature", "fusion"):
        logits_NK = apply(name, found.weights[name], *test[:2], log_prior(COUNTS))
        ece = multiclass_calibration_error(logits_NK.double().softmax(1), test[2], num_classes=5, n_bins=15)
        assert found.result.heads[name].ece["threshold"]["all"] == pytest.approx(100 * ece.item(), abs=1e-3)
    plain, calibrated = (found.result.heads[name] for name in ("AVG", "AVG, temperature"))
    assert calibrated.top1 == plain.top1
    assert calibrated.ece["threshold"]["all"] < plain.ece["threshold"]["all"]
    assert calibrated.nll["threshold"]["all"] < plain.nll["threshold"]["all"]


def test_the_fit_takes_nothing_from_the_test_set():
    val, test = heads(seed=1), heads(seed=2)
    shuffled = (test[0], test[1], test[2].flip(0))
    assert post_hoc(val, test, COUNTS).weights == post_hoc(val, shuffled, COUNTS).weights


def test_a_perfect_or_hopeless_validation_set_gives_finite_weights():
    labels_N = torch.arange(20) % 5
    perfect_NK = 50 * torch.nn.functional.one_hot(labels_N, 5).float()
    for sign in (1, -1):
        found = post_hoc((sign * perfect_NK,) * 2 + (labels_N,), (perfect_NK, perfect_NK, labels_N), COUNTS)
        assert np.isfinite([w for weights in found.weights.values() for w in weights]).all()
        assert found.result.accuracy("AVG, temperature") == 100


def test_it_survives_json_with_gaps_and_refuses_something_else():
    val = heads(num_images=40)
    test = tuple(x[val[2] < 4] for x in val)  # the last class has no test image
    found = post_hoc(val, test, COUNTS)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert PostHoc.from_json(json.loads(text)).to_json() == found.to_json()
    assert [row[0] for row in found.rows()] == ["AVG", "AVG, class prior, tau = 1", *METHODS]
    with pytest.raises(UserError, match="post-hoc scores: num_fitted"):
        PostHoc.from_json({})


def test_the_model_card_of_an_export_names_the_temperature():
    val, test = heads(seed=1), heads(seed=2)
    fitted, plain = post_hoc(val, test, COUNTS), score(*test, COUNTS)
    info = {"model": {"name": "deit_tiny_distilled_patch8_32"}}
    results = {"test": plain.to_json(), "posthoc": fitted.to_json()}
    found = temperatures(val, COUNTS)
    assert {head: 1 / weight for head in found for weight in fitted.weights[f"{head}, temperature"]} == found
    saved = Saved(
        torch.nn.Identity(), "student", list("abcde"), Classes("model", 5), torch.arange(5),
        preprocess=Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, img_size=32), info=info, results=results,
        calibration=Calibration(temperatures=found, num_fitted=600),
    )  # fmt: skip
    card = model_card(saved, "deit", {})
    assert f"softmax: AVG {found['AVG']:.3f}, CLS {found['CLS']:.3f}" in card and "600 validation images" in card
    after = fitted.result.heads["AVG, temperature"].ece["threshold"]["all"]
    assert (
        f"uncalibrated {plain.heads['AVG'].ece['threshold']['all']:.1f} %, with a fitted temperature {after:.1f} %"
        in card
    )
    del results["posthoc"]
    card = model_card(replace(saved, calibration=None), "deit", {})
    assert "uncalibrated" in card and "No temperature was fitted" in card and "with a fitted" not in card
