"""How far an explainer is to be trusted: what is said of its measurements, and when it warns of itself."""

import logging

import pytest
import torch
from tiny import make_explainer, save_classifier

from tve_hf import TVEExplainer, split_classifier
from tve_hf.compatibility import fit, quality_in_words, quality_with
from tve_hf.released import EXPLAINERS

# Of the shipped explainer after a tenth of its training, by its log.
EARLY = {"num_images": 32, "embedding_r2": 0.156891, "logit_r2": 0.372267, "logit_pearson": 0.691762}
EARLY |= {"spearman": 0.497802, "fidelity_gap": 0.354922, "sampled_fidelity_gap": 0.471363}
# Of an antithetical one at its end.
EXACT = {"num_images": 16, "kept_error": 0.35, "removed_error": 0.88, "spearman": 0.66, "epsilon": 16.5}
EXACT |= {"fidelity_gap": 0.231, "exact_fidelity_gap": 0.243}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return split_classifier(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.mark.parametrize(
    ("quality", "words"),
    [
        (None, "How good the explainer is for this backbone was not measured; verify says it of each map."),
        (
            EARLY,
            "On 32 held-out images the explainer accounts for 37% of what masking does to the class's logit "
            "(median), and its maps reach 75% of the fidelity of sampled ones.",
        ),
        (
            EXACT,
            "On 16 held-out images the explainer ranks the patches as the exact attribution does by a Spearman of "
            "0.66, and its maps reach 95% of the fidelity of exact ones.",
        ),
        (  # which there is not much of: no share of it
            EARLY | {"sampled_fidelity_gap": -0.01},
            "On 32 held-out images the explainer accounts for 37% of what masking does to the class's logit (median).",
        ),
        (
            EARLY | {"logit_r2": -0.3},
            "On 32 held-out images the explainer accounts for 0% of what masking does to the class's logit "
            "(median), and its maps reach 75% of the fidelity of sampled ones, which is poor.",
        ),
        (
            {"num_images": 2, "kept_error": 1.0, "fidelity_gap": 0.0, "exact_fidelity_gap": 0.2},
            "On 2 held-out images the explainer gives constant maps, and its maps reach 0% of the fidelity of exact "
            "ones, which is poor.",
        ),
    ],
)
def test_in_words(quality, words):
    assert quality_in_words(quality) == words


def warnings_of(explainer, classifier, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tve_hf"), "propagate", True)
    caplog.clear()
    fit(explainer, classifier)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("quality", "warns"),
    [
        (None, False),
        (EARLY, False),
        (EXACT, False),
        (EARLY | {"logit_r2": 0.19}, True),
        (EARLY | {"fidelity_gap": 0.23}, True),
        (EXACT | {"spearman": 0.39}, True),
        (EXACT | {"fidelity_gap": 0.12}, True),
    ],
)
def test_a_poor_one_is_warned_of(classifier, caplog, monkeypatch, quality, warns):
    explainer = make_explainer(classifier)
    explainer.config.quality = quality
    found = warnings_of(explainer, classifier, caplog, monkeypatch)
    assert len(found) == warns and all("is poor: on " in warning and "sampled" in warning for warning in found)


@pytest.mark.parametrize("backgrounds", ["antithetical", "random"])
def test_one_that_was_never_trained_is_warned_of(classifier, caplog, monkeypatch, backgrounds):
    config = make_explainer(classifier, backgrounds=backgrounds).config
    torch.manual_seed(0)
    (warning,) = warnings_of(TVEExplainer(config).eval(), classifier, caplog, monkeypatch)
    assert "was never trained, so its maps say nothing; train it with `tve-hf pretrain`" in warning


def test_measurements_are_of_the_weights_that_were_measured(classifier, tmp_path):
    config = make_explainer(classifier).config
    config.quality = dict(EXACT)
    assert quality_with(config, classifier) == EXACT
    half = split_classifier(save_classifier(tmp_path / "same"), dtype=torch.bfloat16)
    assert quality_with(config, half) == EXACT
    other = split_classifier(save_classifier(tmp_path / "other", seed=1))
    assert quality_with(config, other) is None
    config.quality = None
    assert quality_with(config, classifier) is None


@pytest.mark.parametrize("folder", EXPLAINERS)
def test_the_shipped_ones_are_not_poor(folder):
    quality = TVEExplainer.from_pretrained(folder).config.quality
    assert quality is not None and "poor" not in quality_in_words(quality)
