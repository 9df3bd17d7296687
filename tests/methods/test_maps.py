"""Every method by the pipeline: the scores of `methods.explain`, drawn and named as those of an explainer."""

import numpy as np
import pytest
import torch
from tiny import GRID, HOPS, make_explainer, make_shapley_explainer, noise_image, save_classifier
from transformers import pipeline
from transformers.utils import logging as transformers_logging

import tve_hf

TASK = "transferable-attribution"
IMAGES = [noise_image(seed, (40, 36)) for seed in range(2)]
FEW = {"n_samples": 20}
OPTIONS = {"exact": {"hops": HOPS}, "exact_sampled": {"n_samples": 1, "hops": HOPS}, "ig": {"n_steps": 3}}
OPTIONS |= dict.fromkeys(["sampled", "rise", "lime", "kernel_shap", "grad_shap"], FEW)
RULES = {"sampled": "prob", "exact": tve_hf.DEFAULT_RULE}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tve_hf.split_classifier(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture(scope="module")
def explain(classifier):
    return pipeline(TASK, classifier=classifier, method="sampled", method_kwargs=FEW)


@pytest.fixture(scope="module")
def with_explainer(classifier):
    return pipeline(TASK, model=make_explainer(classifier, backgrounds="random"), classifier=classifier)


def pixels_of(classifier, images=IMAGES):
    return classifier.image_processor(images, return_tensors="pt")["pixel_values"]


# DeepLIFT refuses transformers; the explainer's own map is that of the pipeline with one.
@pytest.mark.parametrize("name", sorted(tve_hf.methods.available() - {"tve", "deep_lift"}))
def test_the_pipeline_gives_the_scores_of_the_method(classifier, explain, with_explainer, name):
    options = OPTIONS.get(name, {})
    if name == "vit_shapley":
        options = {"shapley_explainer": make_shapley_explainer(classifier)}
    for run in (explain, with_explainer):
        results = run(IMAGES, batch_size=2, class_idx=[1, 3], method=name, method_kwargs=options)
        for k, index in enumerate((1, 3)):
            class_idx = torch.full((2,), index)
            scores = tve_hf.methods.explain(name, classifier, pixels_of(classifier), class_idx, **options)
            for i in range(2):
                result = results[i][k]
                assert np.allclose(result["attribution"], scores[i], rtol=1e-5, atol=1e-6)
                assert (result["class_idx"], result["method"], result["rule"]) == (index, name, RULES.get(name))
                assert result["attribution"].dtype == np.float32 and result["overlay"].size == (40, 36)


def test_the_explainers_map_by_its_name(classifier, with_explainer):
    (result,) = with_explainer(IMAGES[0], class_idx=1, method="tve", rule="logit")
    scores = tve_hf.methods.explain(
        "tve", classifier, pixels_of(classifier, IMAGES[0]), 1, explainer=with_explainer.model, rule="logit"
    )
    assert np.allclose(result["attribution"], scores[0], atol=1e-5) and result["method"] == "tve"


def test_options_of_a_call_and_of_the_pipeline(classifier, explain):
    pixel_values = pixels_of(classifier, IMAGES[0])

    def same(options, name="sampled", **expected):
        (result,) = explain(IMAGES[0], class_idx=1, **options)
        return np.allclose(
            result["attribution"], tve_hf.methods.explain(name, classifier, pixel_values, 1, **expected)[0], atol=1e-6
        )

    assert same({}, **FEW)
    assert same({"rule": "logit"}, **FEW, rule="logit")
    assert same({"method_kwargs": {"n_samples": 8, "grid_size": (2, 4)}}, n_samples=8, grid_size=(2, 4))
    # Another method does not inherit the options of the first.
    assert same({"method": "occlusion"}, name="occlusion")
    assert same({"method": "grad-cam"}, name="grad_cam")
    assert not same({"method_kwargs": {"n_samples": 30}}, **FEW)


def test_verification_of_scores_that_add_up(classifier, explain):
    """Against faithfulness asked by hand of the scores in the unit that adds up."""
    from tve_hf.faithfulness import faithfulness

    pixel_values, class_idx = pixels_of(classifier, IMAGES[0]), torch.tensor([[1, 3]])
    for name, rule, unit in (("sampled", {"rule": "logit"}, "logit"), ("kernel_shap", {}, "prob")):
        results = explain(IMAGES[0], class_idx=[1, 3], method=name, method_kwargs=FEW, verify=16)
        scores = tve_hf.methods.explain(name, classifier, pixel_values, class_idx, **FEW, **rule)
        (expected,) = faithfulness(classifier, pixel_values, scores.flatten(2), class_idx, 16, rule=unit)
        for result, other in zip(results, expected, strict=True):
            assert result["verification"]["r2"] == pytest.approx(other.r2, abs=1e-3)
            assert result["verification"]["num_coalitions"] == 16


def test_all_classes_share_the_masked_passes(classifier, explain):
    seen = []
    handle = classifier.backbone.model.register_forward_hook(lambda m, a, output: seen.append(len(output.logits)))
    explain(IMAGES[0], top_k=5)
    handle.remove()
    # To classify it; for the grid; nothing and everything; and the samples.
    assert sum(seen) == 1 + 1 + 2 + FEW["n_samples"]


def test_a_bar_of_masked_passes_that_transformers_silences(explain, capsys):
    was_on = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.enable_progress_bar()
        explain(IMAGES[0])
        assert "masked passes" in capsys.readouterr().err
        transformers_logging.disable_progress_bar()
        explain(IMAGES[0])
        assert "masked passes" not in capsys.readouterr().err
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def test_there_is_no_explainer_to_save(explain, tmp_path):
    with pytest.raises(ValueError, match="no explainer to save"):
        explain.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_tensor_in_half_precision_and_a_multi_label_head(tmp_path):
    folder = save_classifier(tmp_path, problem_type="multi_label_classification")
    explain = pipeline(TASK, classifier=str(folder), method="occlusion", dtype=torch.bfloat16)
    assert explain.classifier.dtype == torch.bfloat16
    (result,) = explain(IMAGES[0], class_idx=1)
    full = tve_hf.split_classifier(folder)
    scores = tve_hf.methods.explain("occlusion", full, pixels_of(full, IMAGES[0]), 1, GRID)
    assert np.corrcoef(result["attribution"].ravel(), scores.ravel())[0, 1] > 0.9
