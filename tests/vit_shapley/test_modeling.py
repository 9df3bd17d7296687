"""ShapleyExplainer: its values add up, its loss is the least squares objective, and it survives a file."""

import pytest
import torch
from tiny import GRID, LABELS, SIDE, make_shapley_explainer, same_weights, save_classifier
from transformers import AutoModel

import tve_hf

B, K, N, C = 2, 6, GRID**2, len(LABELS)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tve_hf.split_classifier(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture
def inputs(classifier):
    pixel_values = torch.randn(B, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = classifier(pixel_values)
    return {
        "pixel_values": pixel_values,
        "features": seen.features,
        "embeddings": seen.embeddings,
        "probabilities": seen.logits.softmax(-1),
    }


@torch.no_grad()
def test_values_add_up_to_what_the_image_adds_to_nothing(classifier, inputs) -> None:
    explainer = make_shapley_explainer(classifier)
    values = explainer(**inputs).shapley_values
    assert values.shape == (B, N, C)
    torch.testing.assert_close(values.sum(1), inputs["probabilities"] - explainer.null, atol=1e-5, rtol=0)
    assert values.std(1).min() > 1e-3 / N
    # The trunk speaks in shares of 1 / N. The same amount is added to every patch: what it says of differences stays.
    raw = explainer.trunk(*(inputs[name] for name in ("pixel_values", "features", "embeddings")))
    torch.testing.assert_close(values - values[:, :1], (raw - raw[:, :1]) / N, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_new_explainer_shares_out_evenly(classifier, inputs) -> None:
    explainer = make_shapley_explainer(classifier, spread=False)
    values = explainer(**inputs).shapley_values
    expected = (inputs["probabilities"] - explainer.null)[:, None] / N
    torch.testing.assert_close(values, expected.expand_as(values), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_loss_is_a_sum_by_loops(classifier, inputs) -> None:
    explainer = make_shapley_explainer(classifier)
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(B, K, N, generator=generator) < 0.5
    coalition_values = torch.rand(B, K, C, generator=generator)
    output = explainer(**inputs, keep=keep, coalition_values=coalition_values)
    total = 0.0
    for b in range(B):
        for k in range(K):
            for c in range(C):
                inside = sum(output.shapley_values[b, z, c].item() for z in range(N) if keep[b, k, z])
                total += (explainer.null[c].item() + inside - coalition_values[b, k, c].item()) ** 2
    assert output.loss.item() == pytest.approx(N * total / (B * K * C), rel=1e-4)


def test_every_weight_gets_a_gradient(classifier, inputs) -> None:
    explainer = make_shapley_explainer(classifier)
    keep = torch.rand(B, K, N) < 0.5
    explainer(**inputs, keep=keep, coalition_values=torch.rand(B, K, C)).loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in explainer.parameters())


def test_it_survives_a_file_and_auto_model_finds_it(classifier, inputs, tmp_path) -> None:
    explainer = make_shapley_explainer(classifier)
    explainer.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is tve_hf.ShapleyExplainer
    assert not any(report.values())
    assert same_weights(loaded, explainer)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).shapley_values, explainer(**inputs).shapley_values)
    assert loaded.config.id2label == dict(enumerate(LABELS))


def test_another_kind_of_explainer_is_refused(classifier, tmp_path) -> None:
    make_shapley_explainer(classifier).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no explainer, but a 'vit_shapley'"):
        tve_hf.TVEExplainer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probabilities": None}, r"probabilities is missing; pass shape \(2, 7\)"),
        ({"probabilities": torch.zeros(2, 6)}, r"probabilities is of shape \(2, 6\); pass shape \(2, 7\)"),
        ({"keep": torch.ones(2, 3, 5).bool()}, r"keep is of shape \(2, 3, 5\); pass shape \(2, 3, 16\)"),
        ({"keep": torch.ones(16).bool()}, r"keep is of shape \(16,\)"),
        ({"keep": torch.ones(2, 3, 16).bool()}, "coalition_values is missing"),
        ({"coalition_values": torch.ones(2, 3, 7)}, "keep is missing"),
        ({"embeddings": None}, "needs embeddings"),
    ],
)
def test_wrong_inputs_are_named(classifier, inputs, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_shapley_explainer(classifier)(**(inputs | changes))
