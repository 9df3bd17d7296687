"""Sanity checks of methods whose answers are known."""

import copy
from functools import partial

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from untouched import left_as_found

from tve_hf import methods
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.evaluation.sanity import class_sensitivity, randomization, randomized, sensitivity_max

CLASS_IDX = torch.tensor([1, 3])


def brightness(classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor) -> Tensor:
    """A method that reads nothing but the image."""
    return pixel_values.mean(1)[:, ::8, ::8]


def head_only(classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor) -> Tensor:
    """A method that reads the class's row of the head alone."""
    return classifier.head.module.weight[class_idx].detach().unflatten(1, (4, 8))


def backbone_only(classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor) -> Tensor:
    return classifier.embed(pixel_values).detach().unflatten(1, (4, 8))


# --- sensitivity ----------------------------------------------------------------------------------------------------


def test_sensitivity_equals_a_loop_over_images_and_samples(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    explain = partial(methods.explain, "grad_cam", grid_size=4)
    pixel_values, class_idx = images(2, 32), torch.tensor([0, 0])
    found = sensitivity_max(explain, classifier, pixel_values, class_idx, 0.3, 4, torch.Generator().manual_seed(5))
    noise = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 0.6 - 0.3
    before = explain(classifier, pixel_values, class_idx)
    noisy = [explain(classifier, pixel_values + d, class_idx) for d in noise]
    for b in range(2):
        changes = [(after[b] - before[b]).square().sum() ** 0.5 for after in noisy]
        expected = max(changes) / before[b].square().sum() ** 0.5
        assert expected > 0.01
        assert found[b].item() == pytest.approx(expected.item(), rel=1e-5)


def test_sensitivity_of_maps_known_by_hand(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    pixel_values = images(2, 32)

    def steady(_: SplitClassifier, x: Tensor, __: Tensor) -> Tensor:
        return torch.full((len(x), 2, 2), 3.0)

    def zeros(_: SplitClassifier, x: Tensor, __: Tensor) -> Tensor:
        return torch.zeros(len(x), 2, 2)

    def touched(_: SplitClassifier, x: Tensor, __: Tensor) -> Tensor:  # by any noise
        return (x != pixel_values).float()[:, 0]

    def away(_: SplitClassifier, x: Tensor, __: Tensor) -> Tensor:  # by how far the pixels have moved, at most
        return 1 + (x - pixel_values).abs().amax((1, 2, 3)).view(-1, 1, 1).expand(-1, 2, 2)

    assert sensitivity_max(steady, classifier, pixel_values, CLASS_IDX).tolist() == [0, 0]
    assert sensitivity_max(zeros, classifier, pixel_values, CLASS_IDX).tolist() == [0, 0]
    assert sensitivity_max(touched, classifier, pixel_values, CLASS_IDX).tolist() == [torch.inf, torch.inf]
    change = sensitivity_max(away, classifier, pixel_values, CLASS_IDX, radius=0.05)
    assert (change <= 0.05 + 1e-6).all() and (change > 0.049).all()  # 3072 pixels come near the radius


def test_the_same_call_gives_the_same_sensitivity_and_the_image_stays(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    pixel_values = images(2, 32)
    before = pixel_values.clone()
    with left_as_found(classifier.backbone.model):
        one, other = (sensitivity_max(brightness, classifier, pixel_values, CLASS_IDX) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(pixel_values, before)


# --- randomisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "vit", "resnet"])
def test_one_part_is_drawn_anew_at_its_size_and_the_other_stays(build, images, specs, name) -> None:
    model = build(name)
    classifier = split_classifier(model)
    pixel_values = images(2, specs[name].side if name in specs else 32)
    with left_as_found(model), torch.no_grad():
        logits = classifier(pixel_values).logits
        head, backbone = (randomized(classifier, part) for part in ("head", "backbone"))
        assert torch.equal(head.embed(pixel_values), classifier.embed(pixel_values))
        embeddings = images(3, 1, classifier.embedding_dim, channels=1)[:, 0, 0]
        assert torch.equal(backbone.head(embeddings), classifier.head(embeddings))
        for changed in (head, backbone):
            assert not torch.allclose(changed(pixel_values).logits, logits, rtol=0.1)
            assert torch.equal(changed.head(changed.embed(pixel_values)), changed(pixel_values).logits)
    own = dict(model.named_parameters())
    for key, weight in backbone.backbone.model.named_parameters():
        if key.startswith(classifier.backbone.head_names[0]):
            assert torch.equal(weight, own[key])
        elif weight.numel() > 30:
            assert not torch.equal(weight, own[key])
            assert weight.mean().item() == pytest.approx(own[key].mean().item(), abs=own[key].std().item())
            assert weight.std().item() == pytest.approx(own[key].std().item(), rel=0.5)


def test_a_map_follows_the_part_it_reads_and_no_other(build, images) -> None:
    model = build("vit")
    classifier = split_classifier(model)
    pixel_values = images(2, 32)
    with left_as_found(model):
        for explain, of_head, of_backbone in ((brightness, 1, 1), (head_only, None, 1), (backbone_only, 1, None)):
            for part, expected in (("head", of_head), ("backbone", of_backbone)):
                found = randomization(explain, classifier, pixel_values, CLASS_IDX, part)
                assert found.shape == (2,)
                if expected is None:
                    assert (found < 0.7).all()
                else:
                    torch.testing.assert_close(found, torch.ones(2))


def test_randomization_is_a_rank_correlation_with_the_map_of_the_copy(shared_model, images) -> None:
    classifier = split_classifier(shared_model("vit"))
    explain = partial(methods.explain, "exact", grid_size=4, hops=1)
    found = randomization(explain, classifier, images(2, 32), CLASS_IDX, "backbone", torch.Generator().manual_seed(3))
    other = randomized(classifier, "backbone", torch.Generator().manual_seed(3))
    before, after = (explain(c, images(2, 32), CLASS_IDX).flatten(1) for c in (classifier, other))
    for b in range(2):
        assert found[b].item() == pytest.approx(spearmanr(before[b], after[b]).statistic, abs=1e-6)


def test_the_head_that_is_in_use_is_randomised_and_the_models_own_is_part_of_neither(build, images) -> None:
    model = build("vit")
    other = split_classifier(model).with_head(nn.Linear(32, 3).eval())
    head = randomized(other, "head")
    assert not torch.equal(head.head.weight, other.head.weight)
    for part in ("head", "backbone"):
        own = randomized(other, part).backbone.model.classifier
        assert torch.equal(own.weight, model.classifier.weight)


def test_a_head_of_buffers_is_randomised_and_a_function_is_refused(shared_model) -> None:
    classifier = split_classifier(shared_model("vit"))

    class Prompts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("texts", torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))

        def forward(self, embeddings: Tensor) -> Tensor:
            return embeddings @ self.texts.T

    prompts = classifier.with_head(Prompts())
    before = copy.deepcopy(prompts.head.texts)
    assert not torch.equal(randomized(prompts, "head").head.texts, before)
    assert torch.equal(prompts.head.texts, before)
    weight = torch.randn(3, 32)
    function = classifier.with_head(lambda embeddings: embeddings @ weight.T)
    with pytest.raises(ValueError, match="head of ViT.* is a function without weights .* pass it as an nn.Module"):
        randomized(function, "head")
    with pytest.raises(ValueError, match="Unknown part 'body'; choose head or backbone"):
        randomized(classifier, "body")


# --- class sensitivity ----------------------------------------------------------------------------------------------


def test_class_sensitivity_compares_the_two_likeliest_classes(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    explain = partial(methods.explain, "exact", grid_size=4, hops=1)
    pixel_values = images(3, 32)
    found = class_sensitivity(explain, classifier, pixel_values)
    with torch.no_grad():
        order = shared_model("cnn")(pixel_values).argsort(1, descending=True)
    for b in range(3):
        maps = [explain(classifier, pixel_values[b : b + 1], order[b, k : k + 1]).flatten() for k in range(2)]
        assert found[b].item() == pytest.approx(spearmanr(*maps).statistic, abs=1e-6)
    torch.testing.assert_close(class_sensitivity(brightness, classifier, pixel_values), torch.ones(3))


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    one_class = classifier.with_head(nn.Linear(8, 1))
    with pytest.raises(ValueError, match="has one class, so there is no runner-up"):
        class_sensitivity(brightness, one_class, images(1, 32))
    with pytest.raises(ValueError, match="num_samples = 0 gives nothing to compare"):
        sensitivity_max(brightness, classifier, images(2, 32), CLASS_IDX, num_samples=0)
    for call in (
        lambda x: class_sensitivity(brightness, classifier, x),
        lambda x: sensitivity_max(brightness, classifier, x, CLASS_IDX[:0]),
        lambda x: randomization(brightness, classifier, x, CLASS_IDX[:0], "head"),
    ):
        with pytest.raises(ValueError, match="holds no image; pass a batch of at least one"):
            call(images(0, 32))

    def broken(_: SplitClassifier, x: Tensor, __: Tensor) -> Tensor:
        return torch.full((len(x), 2, 2), torch.nan)

    with pytest.raises(ValueError, match="scores hold NaN or infinity, so its maps cannot be compared"):
        class_sensitivity(broken, classifier, images(2, 32))
