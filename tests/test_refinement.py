"""Refinement against a mixed model's equations, against games that are additive or all noise, and in the pipeline."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from tiny import GRID, make_explainer, noise_image, save_classifier
from transformers import pipeline

import tve_hf
from tve_hf.attribution import transfer
from tve_hf.refinement import Refinement, missed_by
from tve_hf.trunk_backbone import kept_and_removed

NUM_PATCHES = GRID * GRID


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tve_hf.split_classifier(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture(scope="module")
def explainer(classifier):
    """Of random backgrounds, with weights that say something."""
    return make_explainer(classifier, backgrounds="random")


@pytest.fixture(scope="module")
def case(classifier, explainer):
    pixel_values = classifier.image_processor([noise_image(i) for i in range(3)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = classifier(pixel_values)
        output = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
    return pixel_values, output.kept, output.removed, seen.logits.argmax(-1)


@pytest.mark.parametrize("rule", ["prob", "logit", "log_prob"])
@pytest.mark.parametrize("n", [3, 6, 7, 40])
def test_correction_is_the_posterior_mean_of_a_mixed_model(classifier, explainer, case, rule, n):
    """Henderson's mixed-model equations and the restricted likelihood over residuals' contrasts, image by image."""
    pixel_values, kept, removed, class_idx = case
    config = explainer.config
    added = Refinement(classifier, pixel_values, kept, removed, config, n).correction(classifier, class_idx, rule)
    keep = tve_hf.coalitions.Coalitions("independent").draw(
        1, n + n % 2, (GRID, GRID), torch.Generator().manual_seed(0)
    )[0, :n]
    evidence = {
        "prob": lambda logits: logits.softmax(-1),
        "logit": lambda logits: logits,
        "log_prob": lambda logits: logits.log_softmax(-1),
    }[rule]
    x = keep.double().numpy() - 0.5
    for i, image in enumerate(pixel_values):
        y = int(class_idx[i])
        residuals = []
        with torch.no_grad():
            for mask in keep:
                pixels = mask.view(GRID, GRID).repeat_interleave(8, 0).repeat_interleave(8, 1)
                true = evidence(classifier.backbone.model((image * pixels)[None]).logits)[0, y]
                phi = kept[i] - removed[i]
                base = (kept[i] + removed[i]).mean(0) / 2
                embedding = base + sum(((1.0 if mask[z] else 0.0) - 0.5) * phi[z] for z in range(NUM_PATCHES))
                residuals.append((true - evidence(classifier.head(embedding))[y]).item())
            scores = (evidence(classifier.head(kept[i])) - evidence(classifier.head(removed[i])))[:, y]
        expected = posterior_mean(np.array(residuals), x, np.stack([np.ones(n), x @ scores.double().numpy()], 1))
        assert np.allclose(added[i].numpy(), expected, atol=1e-5 + 1e-4 * np.abs(expected).max())


def posterior_mean(residuals, x, fixed):
    """Mean of delta, over noises a factor of sqrt(10) apart, by generic linear algebra on n x n matrices."""
    contrasts = scipy.linalg.null_space(fixed.T)  # (n, n - 2)
    likelihoods, means = [], []
    for noise in 10 ** np.arange(-1, 4.1, 0.5):
        observed = contrasts.T @ residuals
        covariance = contrasts.T @ (x @ x.T + noise * np.eye(len(x))) @ contrasts
        scale = observed @ np.linalg.solve(covariance, observed) / len(observed)
        likelihoods.append(scipy.stats.multivariate_normal(cov=scale * covariance).logpdf(observed))
        left = np.block([[fixed.T @ fixed, fixed.T @ x], [x.T @ fixed, x.T @ x + noise * np.eye(x.shape[1])]])
        means.append(np.linalg.solve(left, np.concatenate([fixed.T, x.T]) @ residuals)[2:])
    return scipy.special.softmax(likelihoods) @ np.array(means)


def test_many_passes_find_what_is_orthogonal_to_the_map(classifier, explainer, case, monkeypatch):
    """Whatever was predicted: where the embedding is a sum over patches, all is found but the map's own steepness."""
    pixel_values, kept, removed, class_idx = case
    torch.manual_seed(2)
    phi, base = torch.randn(3, NUM_PATCHES, classifier.embedding_dim), torch.randn(3, classifier.embedding_dim)

    def additive(self, pixel_values, keep, *others, **inputs):
        return base[:, None] + (keep.float() - 0.5) @ phi

    monkeypatch.setattr(type(classifier), "embed_masked", additive)
    refinement = Refinement(classifier, pixel_values, kept, removed, explainer.config, 20_000)
    scores = transfer(kept, removed, classifier, class_idx, "logit", GRID, 1)
    refined = scores + refinement.correction(classifier, class_idx, "logit")
    truth = transfer(*kept_and_removed(phi, base, 0.5), classifier, class_idx, "logit", GRID, 1)
    along = (truth * scores).sum(-1, keepdim=True) / scores.square().sum(-1, keepdim=True) * scores
    assert not torch.allclose(scores, truth - along + scores, atol=0.1)
    assert torch.allclose(refined, truth - along + scores, atol=2e-2)


def test_noise_changes_nothing():
    """Residuals that no patch explains leave the map; those that patches explain are found, under the same noise."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(100, NUM_PATCHES, generator=generator, dtype=torch.float64) < 0.5
    design = keep.double() - 0.5
    noise = torch.randn(50, 100, generator=generator, dtype=torch.float64)
    scores, delta = torch.randn(2, 50, NUM_PATCHES, generator=generator, dtype=torch.float64)
    of_noise = missed_by(scores, noise, design)
    least_squares = torch.linalg.lstsq(design.expand(50, -1, -1), noise.unsqueeze(-1)).solution.squeeze(-1)
    assert of_noise.square().mean() < 0.1 * least_squares.square().mean()
    delta = 2 * (delta - (delta * scores).sum(-1, keepdim=True) / scores.square().sum(-1, keepdim=True) * scores)
    found = missed_by(scores, delta @ design.T + noise, design)
    assert (found - delta).square().mean() < 0.1 * delta.square().mean()
    assert missed_by(scores, torch.zeros_like(noise), design).abs().max() == 0


def test_classes_and_averaging(classifier, explainer, case):
    pixel_values, kept, removed, class_idx = case
    refinement = Refinement(classifier, pixel_values, kept, removed, explainer.config, 8)
    both = torch.stack([class_idx, (class_idx + 1) % len(classifier.id2label)], 1)
    together = refinement.correction(classifier, both, "prob")
    for k in range(2):
        alone = refinement.correction(classifier, both[:, k], "prob")
        assert torch.allclose(together[:, k], alone, atol=1e-6)
    plain = refinement.correction(classifier, class_idx, "logit").view(-1, 1, GRID, GRID)
    mean = torch.nn.functional.avg_pool2d(plain, 3, 1, 1, count_include_pad=False).flatten(1)
    assert torch.allclose(refinement.correction(classifier, class_idx, "logit_averaged"), mean, atol=1e-6)


def test_pipeline_and_method_refine_alike_alone_and_in_a_batch(classifier, explainer):
    explain = pipeline("transferable-attribution", model=explainer, classifier=classifier)
    images = [noise_image(seed) for seed in range(3)]
    plain = [explain(image)[0] for image in images]
    alone = [explain(image, refine=9)[0] for image in images]
    batch = [first for (first,) in explain(images, refine=9, batch_size=3)]
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    class_idx = torch.tensor([explanation["class_idx"] for explanation in alone])
    scores = tve_hf.methods.explain("tve", classifier, pixel_values, class_idx, explainer=explainer, refine=9)
    for i in range(3):
        assert not np.allclose(plain[i]["attribution"], alone[i]["attribution"], atol=1e-4)
        assert np.allclose(alone[i]["attribution"], batch[i]["attribution"], atol=1e-5)
        assert np.allclose(alone[i]["attribution"], scores[i].numpy(), atol=1e-5)


def test_what_cannot_be_refined_is_said(classifier, explainer, case):
    pixel_values, kept, removed, class_idx = case
    explain = pipeline("transferable-attribution", model=explainer, classifier=classifier)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"refine is {n}; pass a whole number from 1 on, for example 25"):
            explain(noise_image(0), refine=n)
    for n in (1, 2):
        with pytest.raises(
            ValueError, match=f"refine is {n}; of fewer than 3 masked passes nothing is left for single"
        ):
            explain(noise_image(0), refine=n)
    refinement = Refinement(classifier, pixel_values, kept, removed, explainer.config, 4)
    with pytest.raises(ValueError, match="the rule 'standardized_logit' is not; choose prob or logit"):
        refinement.correction(classifier, class_idx, "standardized_logit")
    antithetical = pipeline("transferable-attribution", model=make_explainer(classifier), classifier=classifier)
    with pytest.raises(ValueError, match="backgrounds='antithetical'; train one with `tve-hf pretrain --backgrounds"):
        antithetical(noise_image(0), refine=4)
