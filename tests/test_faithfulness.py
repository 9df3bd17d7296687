"""Predicted against true change over coalitions, by loops and numpy; and `verify` over random backgrounds."""

import numpy as np
import pytest
import torch
from tiny import GRID, make_explainer, noise_image, save_classifier
from transformers import pipeline

import tve_hf
from tve_hf.coalitions import Coalitions
from tve_hf.faithfulness import faithfulness


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tve_hf.split_classifier(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture(scope="module")
def pixel_values(classifier):
    return classifier.image_processor([noise_image(i) for i in range(2)], return_tensors="pt")["pixel_values"]


def true_logits(classifier, image, class_idx, keep):
    values = []
    for mask in keep:
        pixels = mask.view(GRID, GRID).repeat_interleave(8, 0).repeat_interleave(8, 1)
        with torch.no_grad():
            values.append(classifier.backbone.model((image * pixels)[None]).logits[0, class_idx].item())
    return np.array(values)


def test_r2_and_correlation_by_hand(classifier, pixel_values):
    torch.manual_seed(0)
    scores, class_idx = torch.randn(2, 2, GRID * GRID), torch.tensor([[0, 1], [2, 0]])
    checks = faithfulness(classifier, pixel_values, scores, class_idx, 16, "uniform")
    keep = Coalitions("uniform").draw(1, 16, (GRID, GRID), torch.Generator().manual_seed(1))[0]
    for i in range(2):
        for k in range(2):
            true = true_logits(classifier, pixel_values[i], class_idx[i, k], keep)
            foretold = np.array([scores[i, k][mask].sum().item() for mask in keep])
            check = checks[i][k]
            assert check.num_coalitions == 16
            assert check.pearson == pytest.approx(np.corrcoef(true, foretold)[0, 1], abs=1e-4)
            assert check.r2 == pytest.approx(1 - np.var(true - foretold) / np.var(true), rel=1e-4)
            low, high = check.r2_interval
            assert low < high and low <= check.r2


def test_least_squares_scores_account_for_more_than_any_others(classifier, pixel_values):
    """Of the very coalitions, least squares is the best map there is; twice as large a map is worse."""
    class_idx = torch.tensor([[0], [1]])
    keep = Coalitions().draw(1, 64, (GRID, GRID), torch.Generator().manual_seed(1))[0]
    design = np.hstack([np.ones((64, 1)), keep.double().numpy()])
    rows = [true_logits(classifier, image, int(y), keep) for image, y in zip(pixel_values, class_idx, strict=True)]
    best = torch.tensor(np.array([np.linalg.lstsq(design, row, rcond=None)[0][1:] for row in rows]))[:, None]
    at_best, doubled = (
        [check.r2 for (check,) in faithfulness(classifier, pixel_values, scores.float(), class_idx)]
        for scores in (best, 2 * best)
    )
    assert all(0 < one <= 1 and one > other for one, other in zip(at_best, doubled, strict=True))


def test_a_constant_map_correlates_with_nothing(classifier, pixel_values):
    scores = torch.zeros(2, 1, GRID * GRID)
    (first,), _ = faithfulness(classifier, pixel_values, scores, torch.tensor([[0], [1]]), 8)
    assert np.isnan(first.pearson) and first.r2 == pytest.approx(0, abs=1e-6)


def test_verify_of_the_pipeline(classifier, monkeypatch):
    explainer = make_explainer(classifier, backgrounds="random")
    explain = pipeline("transferable-attribution", model=explainer, classifier=classifier)
    images = [noise_image(seed) for seed in range(3)]
    alone = [explain(image, verify=8, top_k=2) for image in images]
    passes = []
    embed_masked = type(classifier).embed_masked

    def count(self, pixel_values, keep, *others, **inputs):
        passes.append(keep.shape[0] * keep.shape[1])
        return embed_masked(self, pixel_values, keep, *others, **inputs)

    monkeypatch.setattr(type(classifier), "embed_masked", count)
    batch = explain(images[::-1], verify=8, top_k=2, batch_size=3)[::-1]
    assert sum(passes) == 3 * 8  # for both classes
    for one, other in zip(alone, batch, strict=True):
        for k in range(2):
            assert one[k]["verification"]["r2"] == pytest.approx(other[k]["verification"]["r2"], abs=1e-4)
            assert {"num_coalitions", "r2", "r2_interval", "pearson"} == one[k]["verification"].keys()
    logits = explain(images[0], rule="logit", verify=8)[0]
    keep = Coalitions().draw(1, 8, (GRID, GRID), torch.Generator().manual_seed(1))[0]
    pixels = classifier.image_processor(images[:1], return_tensors="pt")["pixel_values"]
    true = true_logits(classifier, pixels[0], logits["class_idx"], keep)
    foretold = [logits["attribution"].flatten()[mask.numpy()].sum() for mask in keep]
    assert logits["verification"]["pearson"] == pytest.approx(np.corrcoef(true, foretold)[0, 1], abs=1e-3)


@pytest.mark.parametrize(
    ("number", "message"), [(4, "verify is 4; a correlation needs 8"), (9, "verify is 9, but co")]
)
def test_too_few_or_odd_is_said(classifier, number, message):
    explainer = make_explainer(classifier, backgrounds="random")
    explain = pipeline("transferable-attribution", model=explainer, classifier=classifier)
    with pytest.raises(ValueError, match=message):
        explain(noise_image(0), verify=number)
