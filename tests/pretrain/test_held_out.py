"""What a validation reports: the numbers of `verify` and `fidelity`, and no error in exact predictions."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny import GRID, HOPS, SIDE, make_explainer, noise_image, save_classifier
from transformers.utils import ModelOutput

import tve_hf
from tve_hf.pretrain.held_out import HeldOut


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tve_hf.split_classifier(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture(scope="module")
def pixel_values(classifier):
    return classifier.image_processor([noise_image(seed) for seed in range(5)], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("rule", [None, "log_prob"])
def test_the_numbers_are_those_of_the_public_functions(classifier, pixel_values, rule):
    """Under the explainer's own rule, or that of its kind if it has none."""
    explainer = make_explainer(classifier)
    explainer.config.rule = rule
    watch = HeldOut(classifier, pixel_values, explainer.config)
    row, _ = watch.compare(explainer)
    assert set(row) == set(watch.measures)
    seen = classifier(pixel_values)
    class_idx = seen.logits.argmax(-1)
    with torch.no_grad():
        found = explainer(pixel_values, features=seen.features, embeddings=seen.embeddings)
    inputs = classifier, pixel_values, found.kept, found.removed, class_idx, GRID * GRID, "log_prob", GRID, HOPS
    checked = tve_hf.verify(*inputs)
    assert row["kept_error"] == pytest.approx(np.mean([one.kept_error for one in checked]), rel=1e-4)
    assert row["removed_error"] == pytest.approx(np.mean([one.removed_error for one in checked]), rel=1e-4)
    assert row["epsilon"] == pytest.approx(np.median([one.epsilon for one in checked]), rel=1e-4)
    maps = {}
    for name, pair in {
        "fidelity_gap": (found.kept, found.removed),
        "exact_fidelity_gap": tve_hf.exact_meta_attribution(classifier, pixel_values, GRID, HOPS),
    }.items():
        maps[name] = tve_hf.transfer(*pair, classifier, class_idx, rule or tve_hf.DEFAULT_RULE, GRID, HOPS)
        gap = tve_hf.fidelity(classifier, pixel_values, maps[name], class_idx).gap
        assert row[name] == pytest.approx(gap.mean().item(), abs=1e-5)
    ranked = [spearmanr(*both).statistic for both in zip(*(one.detach() for one in maps.values()), strict=True)]
    assert row["spearman"] == pytest.approx(np.median(ranked), abs=1e-4)


def test_exact_predictions_have_no_error_and_the_exact_picture(classifier, pixel_values):
    held_out = HeldOut(classifier, pixel_values, make_explainer(classifier).config)
    kept, removed = tve_hf.exact_meta_attribution(classifier, pixel_values, GRID, HOPS)
    row, picture = held_out.compare(lambda **inputs: ModelOutput(kept=kept, removed=removed))
    assert row["kept_error"] == row["removed_error"] == row["epsilon"] == 0
    assert row["spearman"] == pytest.approx(1)
    assert row["fidelity_gap"] == row["exact_fidelity_gap"]
    cells = np.asarray(picture)[30:]  # below the captions
    third = (picture.width - 6) // 3
    assert np.array_equal(cells[:, third + 6 : 2 * third], cells[:, 2 * third + 6 : 3 * third])
    assert not np.array_equal(cells[:, 6:third], cells[:, third + 6 : 2 * third])


def test_the_picture_shows_the_image_in_its_own_colours(classifier, pixel_values):
    held_out = HeldOut(classifier, pixel_values, make_explainer(classifier).config)
    for seed in range(2):
        photo = held_out._photo(pixel_values[seed])
        assert np.abs(np.asarray(photo, int) - np.asarray(noise_image(seed).resize((SIDE, SIDE), 2), int)).max() <= 1
