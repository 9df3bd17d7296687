"""A folded head gives the scores of the unfolded way, for every head that is affine; others go that way."""

import gc
import weakref

import pytest
import torch
from tiny import make_explainer, save_classifier
from torch import Tensor, nn
from transformers import ViTImageProcessorPil

from tve_hf import folding
from tve_hf.attribution import RULES, check_rule, transfer
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.folding import explain_pass
from tve_hf.modeling_tve import TVEExplainer

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
# Both kinds of backgrounds, and the coalitions whose scores sum to G(x) - G(empty image).
BACKGROUNDS = {
    "antithetical": {},
    "random": {"backgrounds": "random"},
    "shapley": {"backgrounds": "random", "coalitions": "shapley"},
    "independent": {"backgrounds": "random", "coalitions": "independent", "coalition_prob": 0.2},
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> SplitClassifier:
    return split_classifier(save_classifier(tmp_path_factory.mktemp("vit")))


@pytest.fixture(scope="module")
def pooling(shared_model) -> SplitClassifier:
    """A classifier whose embedding is the mean of a feature map."""
    return split_classifier(shared_model("cnn"), PROCESSOR)


def spread(explainer: TVEExplainer) -> TVEExplainer:
    """No weight is neutral."""
    torch.manual_seed(2)
    with torch.no_grad():
        for tensor in (*explainer.trunk.differences.parameters(), *explainer.trunk.starting_at_zero()):
            tensor.add_(0.3 * torch.randn_like(tensor))
    return explainer


def unfolded(explainer: TVEExplainer, classifier: SplitClassifier, pixel_values: Tensor, *asked) -> Tensor:
    seen, config = classifier(pixel_values), explainer.config
    out = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
    class_idx, rule = asked
    return transfer(out.kept, out.removed, classifier, class_idx, rule, config.grid_shape, config.hops)


def is_folded(explainer: TVEExplainer, classifier: SplitClassifier) -> bool:
    return folding._KEPT[classifier.head][explainer].folded is not None


def rules_for(explainer: TVEExplainer) -> list[str]:
    def takes(rule: str) -> bool:
        try:
            check_rule(explainer.config, rule)
        except ValueError:
            return False
        return True

    return [rule for rule in RULES if takes(rule)]


@torch.no_grad()
@pytest.mark.parametrize("backgrounds", BACKGROUNDS)
@pytest.mark.parametrize("name", ["vit", "pooling"])
def test_every_rule_and_class_is_that_of_the_unfolded_way(request, monkeypatch, images, name, backgrounds) -> None:
    monkeypatch.setattr(folding, "MOST_LOGITS", 0)  # 64 classes at a time at least; the head has one part more
    classifier = request.getfixturevalue(name)
    explainer = spread(make_explainer(classifier, **BACKGROUNDS[backgrounds]))
    assert (explainer.config.pooled_feature is not None) == (name == "pooling")
    classifier = classifier.reading(tuple(explainer.config.feature_names))
    wide = classifier.with_head(nn.Sequential(nn.Dropout(), nn.Linear(classifier.embedding_dim, 150)))
    pixel_values = images(3, 32)
    for head, class_idx in ((classifier, [[0, 4], [2, 1], [3, 3]]), (wide, [149, 7, 64])):
        for rule in rules_for(explainer):
            asked = head, pixel_values, torch.tensor(class_idx), rule
            expected = unfolded(explainer, *asked)
            seen = head(pixel_values)
            scores = explain_pass(explainer, head, pixel_values, seen, *asked[2:])
            assert is_folded(explainer, head) and expected.std() > 1e-4
            torch.testing.assert_close(scores.flatten(-2), expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_efficient_scores_sum_to_the_change_of_the_logit(pooling, images) -> None:
    explainer = spread(make_explainer(pooling, **BACKGROUNDS["shapley"]))
    classifier, pixel_values = pooling.reading(tuple(explainer.config.feature_names)), images(2, 32)
    seen = classifier(pixel_values)
    scores = explain_pass(explainer, classifier, pixel_values, seen, torch.tensor([1, 3]), "logit")
    change = seen.logits - classifier.head(explainer.empty_embedding)
    torch.testing.assert_close(scores.sum((1, 2)), change[[0, 1], [1, 3]])


@torch.no_grad()
@pytest.mark.parametrize("backgrounds", ["antithetical", "random"])
def test_a_classifier_in_bfloat16_loses_its_rounding_alone(tmp_path, images, backgrounds) -> None:
    exact = split_classifier(save_classifier(tmp_path), dtype=torch.float32)
    half = split_classifier(tmp_path, dtype=torch.bfloat16)
    explainer = spread(make_explainer(exact, **BACKGROUNDS[backgrounds]))
    names, pixel_values, class_idx = tuple(explainer.config.feature_names), images(4, 32), torch.tensor([0, 1, 2, 3])
    half, exact = half.reading(names), exact.reading(names)
    seen = half(pixel_values.bfloat16())
    # The same head in float32, on what the pass in bfloat16 saw.
    out = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
    precise = exact.with_head(exact.head)
    precise.head.load_state_dict({key: value.float() for key, value in half.head.state_dict().items()})
    for rule in rules_for(explainer):
        truth, rounded = (
            transfer(out.kept.float(), out.removed.float(), head, class_idx, rule, 4, 1) for head in (precise, half)
        )
        scores = explain_pass(explainer, half, pixel_values, seen, class_idx, rule).flatten(1)
        assert is_folded(explainer, half)
        assert (scores - truth).abs().max() <= 2**-8 * (1 + seen.logits.abs().max()), rule
        if backgrounds == "random":  # base + phi and base - phi are rounded alike, and differ by little
            assert (scores - truth).abs().mean() < (rounded - truth).abs().mean(), rule


class Clamped(nn.Linear):
    def forward(self, embeddings: Tensor) -> Tensor:
        return super().forward(embeddings).clamp(-30, 30)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["relu", "clamped", "norm", "prototypes", "estimator", "no derivative"])
def test_other_heads_go_the_unfolded_way(pooling, images, kind) -> None:
    torch.manual_seed(0)
    dim = pooling.embedding_dim
    if kind == "estimator":
        linear_model = pytest.importorskip("sklearn.linear_model")
        points, labels = torch.randn(30, dim).numpy(), [i % 3 for i in range(30)]
        head = linear_model.LogisticRegression().fit(points, labels)
    else:
        head = {
            "relu": nn.Sequential(nn.Linear(dim, 9), nn.ReLU(), nn.Linear(9, 4)),
            "clamped": Clamped(dim, 4),
            "norm": nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4)),
            "prototypes": torch.randn(4, dim),
            "no derivative": lambda e: torch.from_numpy(e.numpy()[..., :3]),
        }[kind]
    explainer = spread(make_explainer(pooling, backgrounds="random"))
    classifier = pooling.reading(tuple(explainer.config.feature_names)).with_head(head)
    pixel_values, class_idx = images(2, 32), torch.tensor([0, 2])
    seen = classifier(pixel_values)
    scores = explain_pass(explainer, classifier, pixel_values, seen, class_idx, "prob")
    assert not is_folded(explainer, classifier)
    assert torch.equal(scores.flatten(1), unfolded(explainer, classifier, pixel_values, class_idx, "prob"))


@torch.no_grad()
def test_changes_of_any_weight_are_noticed(build, images) -> None:
    classifier = split_classifier(build("cnn"), PROCESSOR)
    explainer = spread(make_explainer(classifier, backgrounds="random"))
    classifier = classifier.reading(tuple(explainer.config.feature_names))
    pixel_values, asked = images(2, 32), (torch.tensor([0, 1]), "prob")
    head, trunk, last = classifier.head.module, explainer.trunk, explainer.trunk.differences
    changes = {
        "nothing": lambda: None,
        "a head in place": lambda: head.weight.mul_(1.5),
        "a head by .data": lambda: head.weight.data.mul_(0.5),
        "one class by .data": lambda: head.weight.data[3].mul_(3),
        "the last layer by .data": lambda: trunk.differences.weight.data.mul_(1.2),
        "the shares": lambda: trunk.share_change.add_(0.3),
        "an adapter of the head": lambda: head.register_forward_hook(lambda module, args, output: 1.4 * output),
        "an adapter of the last layer": lambda: trunk.register_module("differences", nn.Sequential(last, nn.Tanh())),
    }
    before = None
    for name, change in changes.items():
        change()
        scores = explain_pass(explainer, classifier, pixel_values, classifier(pixel_values), *asked)
        expected = unfolded(explainer, classifier, pixel_values, *asked).unflatten(1, (4, 4))
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=2e-5, msg=name)
        assert before is None or not torch.allclose(before, expected, rtol=1e-3), name
        before = expected


@torch.no_grad()
def test_other_trunks_and_values_that_are_not_finite_go_the_unfolded_way(pooling, images) -> None:
    explainer = spread(make_explainer(pooling, backgrounds="random"))
    classifier = pooling.reading(tuple(explainer.config.feature_names))
    pixel_values = images(2, 32)
    seen, asked = classifier(pixel_values), (torch.tensor([0, 1]), "logit")
    explain_pass(explainer, classifier, pixel_values, seen, *asked)
    with pytest.raises(ValueError, match="not finite"):
        explain_pass(explainer, classifier, pixel_values * torch.nan, classifier(pixel_values * torch.nan), *asked)
    assert is_folded(explainer, classifier)  # and still is, for the next images
    paper = make_explainer_of_paper(classifier)
    scores = explain_pass(paper, classifier, pixel_values, seen, *asked)
    torch.testing.assert_close(scores.flatten(1), unfolded(paper, classifier, pixel_values, *asked))


def make_explainer_of_paper(classifier: SplitClassifier) -> TVEExplainer:
    from trunks import MAE, mae_config

    mae = MAE | {"image_size": 32, "patch_size": 8}
    config = mae_config(image_size=32, embedding_dim=classifier.embedding_dim, mae_config=mae)
    torch.manual_seed(0)
    return TVEExplainer(config).eval()


@torch.no_grad()
def test_what_is_kept_keeps_no_model_alive(pooling, images) -> None:
    explainer = spread(make_explainer(pooling, backgrounds="random"))
    classifier, pixel_values = pooling.reading(tuple(explainer.config.feature_names)), images(1, 32)
    explain_pass(explainer, classifier, pixel_values, classifier(pixel_values), torch.tensor([0]), "prob")
    gone = weakref.ref(explainer)
    del explainer
    gc.collect()
    assert gone() is None
