"""The contract of every method, and each method against its definition."""

import inspect
import math

import numpy as np
import pytest
import torch
from tiny import make_shapley_explainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from tve_hf import methods
from tve_hf.attribution import exact_meta_attribution, transfer
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.configuration_tve import TVEConfig
from tve_hf.modeling_tve import TVEExplainer

NAMES = sorted(methods.available())
CLASS_IDX = torch.tensor([1, 3])


def _options(name: str, classifier: SplitClassifier, randomized) -> dict:
    """What a method needs besides its inputs, made tiny; {} serves every method that has no entry."""
    if name == "tve":
        config = TVEConfig(
            image_size=32,
            grid_size=4,
            hops=1,
            embedding_dim=classifier.embedding_dim,
            feature_dims=[f.shape[1] for f in classifier(classifier.probe()).features],
            feature_names=list(classifier.backbone.feature_names),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
        return {"explainer": randomized(TVEExplainer(config)).eval()}
    if name == "vit_shapley":
        return {"shapley_explainer": make_shapley_explainer(classifier)}
    return {
        "exact": {"hops": 1},
        "exact_sampled": {"n_samples": 2},
        "rise": {"n_samples": 30},
        "lime": {"n_samples": 40},
        "kernel_shap": {"n_samples": 40},
        "ig": {"n_steps": 5},
        "grad_shap": {"n_samples": 5},
    }.get(name, {})


# What each architecture has no use for; that it is refused is tested beside each method.
ATTENTION = {"raw_attention", "rollout", "attention_cam", "chefer_cam", "legrad", "libragrad", "text_span"}
ATTENTION |= {"partial_lrp", "transformer_attribution"}
REFUSED = {(name, "cnn") for name in ATTENTION} | {("deep_lift", "vit")}


def _found(model: nn.Module) -> dict:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "gradients": [p.grad for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [list(getattr(m, h).items()) for m in model.modules() for h in hooks],
        "attention": [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in model.modules()],
        "grad_enabled": torch.is_grad_enabled(),
    }


# --- the registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "architecture_name"), [(n, a) for n in NAMES for a in ("vit", "cnn") if (n, a) not in REFUSED]
)
def test_the_contract(build, images, randomized, name, architecture_name) -> None:
    model = build(architecture_name)
    classifier = split_classifier(model)
    options = _options(name, classifier, randomized)
    pixel_values = images(2, 32)
    given, state, found = pixel_values.clone(), {n: t.clone() for n, t in model.state_dict().items()}, _found(model)

    scores = methods.explain(name, classifier, pixel_values, CLASS_IDX, 4, **options)

    assert scores.shape == (2, 4, 4)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert not scores.requires_grad
    assert scores.flatten(1).std(1).any()  # Grad-CAM of one image may be empty
    assert _found(model) == found
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(pixel_values, given)
    assert not pixel_values.requires_grad and pixel_values.grad is None

    for i in range(1 if name == "random" else 2):  # whose later numbers depend on how many it draws
        alone = methods.explain(name, classifier, pixel_values[i : i + 1], CLASS_IDX[i : i + 1], (4, 4), **options)
        torch.testing.assert_close(alone[0], scores[i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random"}))  # whose numbers are those of no class
def test_several_classes_of_each_image(shared_model, images, randomized, name) -> None:
    classifier = split_classifier(shared_model("cnn" if (name, "vit") in REFUSED else "vit"))
    options, class_idx = _options(name, classifier, randomized), torch.tensor([[1, 0], [3, 1]])
    scores = methods.explain(name, classifier, images(2, 32), class_idx, 4, **options)
    assert scores.shape == (2, 2, 4, 4)
    for k in range(2):
        alone = methods.explain(name, classifier, images(2, 32), class_idx[:, k], 4, **options)
        torch.testing.assert_close(scores[:, k], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"tve", "vit_shapley"}))
def test_rectangular_grids(shared_model, images, name, randomized) -> None:
    classifier = split_classifier(shared_model("cnn" if (name, "vit") in REFUSED else "vit"))
    scores = methods.explain(
        name, classifier, images(2, 32), CLASS_IDX, (2, 4), **_options(name, classifier, randomized)
    )
    assert scores.shape == (2, 2, 4)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random", "centre"}))  # which do not run it
def test_an_error_inside_leaves_the_model_as_found(build, images, randomized, name) -> None:
    model = build("vit")
    classifier = split_classifier(model)
    options = _options(name, classifier, randomized)

    def fail(*_) -> None:
        raise RuntimeError("from the inside")

    model.classifier.register_forward_pre_hook(fail)
    found = _found(model)
    with pytest.raises(RuntimeError, match="from the inside"):
        methods.explain(name, classifier, images(2, 32), CLASS_IDX, 4, **options)
    assert _found(model) == found
    assert model.config._attn_implementation == "sdpa"


def test_an_unknown_method_is_answered_with_the_known_ones(shared_model, images) -> None:
    with pytest.raises(ValueError, match="Unknown method 'lime2'; choose one of .*exact.*rollout"):
        methods.explain("lime2", split_classifier(shared_model("cnn")), images(1, 32), CLASS_IDX[:1], 4)


@pytest.mark.parametrize("name", NAMES)
def test_images_and_classes_that_do_not_fit_are_refused(shared_model, images, randomized, name) -> None:
    classifier = split_classifier(shared_model("cnn" if (name, "vit") in REFUSED else "vit"))
    options, x = _options(name, classifier, randomized), images(2, 32)
    for class_idx in ([1, 5], [1, -1], [1], [1, 2, 3], [[1], [5]], [[[1]], [[2]]], [1.0, 2.0]):
        with pytest.raises(ValueError, match="must name, for each of 2 images, a class between 0 and 4, as a tensor"):
            methods.explain(name, classifier, x, torch.tensor(class_idx), 4, **options)
    with pytest.raises(ValueError, match="holds no image; pass a batch of at least one"):
        methods.explain(name, classifier, x[:0], CLASS_IDX[:0], 4, **options)
    x[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="pixel_values hold NaN or infinity"):
        methods.explain(name, classifier, x, CLASS_IDX, 4, **options)


def test_scores_that_are_not_finite_are_refused(build, images) -> None:
    model = build("vit")
    classifier = split_classifier(model)
    with torch.no_grad():
        model.vit.layers[0].attention.v_proj.bias[0] = torch.inf
    with pytest.raises(ValueError, match="The scores of legrad are not finite: the classifier's weights hold NaN"):
        methods.explain("legrad", classifier, images(2, 32), CLASS_IDX, 4)


DRAWING = sorted(name for name in NAMES if "generator" in inspect.signature(methods.load(name)).parameters)


@pytest.mark.parametrize("name", DRAWING)
def test_a_generator_alone_decides_what_is_drawn(shared_model, images, randomized, name) -> None:
    classifier, pixel_values = split_classifier(shared_model("cnn")), images(2, 32)
    options = _options(name, classifier, randomized)

    def draw(generator: torch.Generator | None) -> Tensor:
        return methods.explain(name, classifier, pixel_values, CLASS_IDX, 4, **options, generator=generator)

    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    zero, one = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    first, goes_on = draw(zero), draw(zero)
    assert torch.equal(draw(torch.Generator().manual_seed(0)), first)
    assert torch.equal(draw(None), first)
    assert not torch.equal(draw(one), first)
    assert not torch.equal(goes_on, first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_all_methods_that_draw_take_a_generator_and_no_seed() -> None:
    assert DRAWING == ["exact_sampled", "grad_shap", "kernel_shap", "lime", "random", "rise", "sampled"]
    assert not any("seed" in inspect.signature(methods.load(name)).parameters for name in NAMES)


# --- rollout --------------------------------------------------------------------------------------------------------


def _rollout(attentions: list[np.ndarray], prefix: int, side: int, queries: slice) -> np.ndarray:
    """Rollout of one image by loops: attentions (heads, T, T) of each block, first block first -> (side, side)."""
    num_tokens = attentions[0].shape[-1]
    flow = np.eye(num_tokens)
    for attention in attentions:
        mixed = np.zeros((num_tokens, num_tokens))
        for query in range(num_tokens):
            for key in range(num_tokens):
                mean = sum(head[query, key] for head in attention) / len(attention)
                mixed[query, key] = mean + (1.0 if query == key else 0.0)
            mixed[query] /= sum(mixed[query])
        flow = np.einsum("ij,jk->ik", mixed, flow)
    return flow[queries, prefix:].mean(0).reshape(side, side)


@pytest.mark.parametrize(
    ("name", "prefix", "queries"),
    [
        ("vit", 1, slice(1)),
        ("deit", 2, slice(1)),
        ("beit", 1, slice(1, None)),  # which pools its patches, and never reads its class token
        ("dinov2", 1, slice(1)),
        ("dinov2_with_registers", 5, slice(1)),
    ],
)
@torch.no_grad()
def test_rollout_equals_a_slow_one(build, shared_model, images, name, prefix, queries) -> None:
    eager = build(name)
    eager.set_attn_implementation("eager")
    pixel_values = images(2, 32)
    attentions = [a.double().numpy() for a in eager(pixel_values, output_attentions=True).attentions]
    assert len(attentions) == 4
    scores = methods.explain("rollout", split_classifier(shared_model(name)), pixel_values, CLASS_IDX, 4)
    for b in range(2):
        expected = _rollout([a[b] for a in attentions], prefix, 4, queries)
        assert expected.std() > 1e-4
        np.testing.assert_allclose(scores[b].numpy(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["swin", "convnext", "resnet", "cnn"])
def test_rollout_is_refused_where_no_class_token_looks_at_all_patches(build, images, specs, name) -> None:
    model = build(name)
    classifier = split_classifier(model)
    side = specs[name].side if name in specs else 32
    found = _found(model)
    with pytest.raises(ValueError, match=r"has no attention of a class token to all patches.*; use another, such as"):
        methods.explain("rollout", classifier, images(2, side), CLASS_IDX, 4)
    with pytest.raises(ValueError, match="has no attention of a class token"):
        methods.explain("rollout", classifier, images(1, side), CLASS_IDX[:1], 4)
    assert _found(model) == found


# --- Grad-CAM -------------------------------------------------------------------------------------------------------


def test_grad_cam_by_hand(build, images) -> None:
    model = build("cnn")
    with torch.no_grad():
        model.stages[2][0].bias.add_(0.5)  # so that the map is not empty
    pixel_values = images(2, 32)
    cam = methods.explain("grad_cam", split_classifier(model), pixel_values, CLASS_IDX, 4)
    with torch.no_grad():
        maps = pixel_values
        for stage in model.stages:
            maps = stage(maps)  # (B, 8, 4, 4)
        # logit = sum_c W[y, c] mean(map_c) + b, so every cell's gradient is W[y, c] / 16.
        expected = torch.zeros(2, 4, 4)
        for b in range(2):
            for channel in range(8):
                expected[b] += model.fc.weight[CLASS_IDX[b], channel] / 16 * maps[b, channel]
        expected = expected.clamp(min=0)
    assert expected.max() > 0
    torch.testing.assert_close(cam, expected, rtol=1e-4, atol=1e-6)


def test_grad_cam_of_an_earlier_layer_by_finite_differences(build, images) -> None:
    model = build("cnn").double()
    pixel_values = images(1, 32).double()
    class_idx = torch.tensor([2])
    cam = methods.explain("grad_cam", split_classifier(model), pixel_values, class_idx, 8, layer=1)
    with torch.no_grad():
        feature = model.stages[1](model.stages[0](pixel_values))  # (1, 6, 8, 8)

        def logit(feature: Tensor) -> float:
            return model.fc(model.stages[2](feature).mean((2, 3)))[0, 2].item()

        weights = []
        for channel in range(6):
            # The mean over cells of the gradient is the slope of moving all cells together, over the number of cells.
            step = torch.zeros_like(feature)
            step[:, channel] = 1e-6
            weights.append((logit(feature + step) - logit(feature - step)) / 2e-6 / 64)
        expected = sum(w * feature[:, c] for c, w in enumerate(weights)).clamp(min=0)
    assert expected.max() > 0
    torch.testing.assert_close(cam, expected.float(), rtol=1e-3, atol=1e-6)


def test_grad_cam_of_a_class_token_model_uses_the_last_map_that_matters(shared_model, images) -> None:
    model = shared_model("vit")
    pixel_values = images(1, 32)
    cam = methods.explain("grad_cam", split_classifier(model), pixel_values, CLASS_IDX[:1], 4)
    states = []
    hidden = model.vit.embeddings(pixel_values)
    for layer in model.vit.layers:
        hidden = layer(hidden)
        states.append(hidden)
    logit = model.classifier(model.vit.layernorm(hidden)[:, 0])[0, CLASS_IDX[0]]
    last, before = torch.autograd.grad(logit, [states[3], states[2]])
    assert not last[:, 1:].any()  # the last block's patch tokens go nowhere
    weights = before[0, 1:].mean(0)
    expected = (states[2][0, 1:] @ weights).clamp(min=0).view(1, 4, 4).detach()
    assert expected.max() > 0
    torch.testing.assert_close(cam, expected, rtol=1e-4, atol=1e-6)


def test_grad_cam_serves_every_architecture(shared_model, images, specs, architecture) -> None:
    classifier = split_classifier(shared_model(architecture))
    pixel_values = images(1, specs[architecture].side).expand(5, -1, -1, -1)
    cam = methods.explain("grad_cam", classifier, pixel_values, torch.arange(5), 4)
    assert torch.isfinite(cam).all()
    assert (cam >= 0).all()
    assert cam.any()
    assert not torch.equal(cam[0], cam[1])


def test_grad_cam_is_refused_where_there_is_no_map(processor_of, images) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match="No feature map of Sequential reaches the logits"):
        methods.explain("grad_cam", split_classifier(model, processor_of(3, 2, 2)), images(2, 2), CLASS_IDX % 3, 2)


def test_grad_cam_works_under_no_grad(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    expected = methods.explain("grad_cam", classifier, images(2, 32), CLASS_IDX, 4)
    with torch.no_grad():
        assert torch.equal(methods.explain("grad_cam", classifier, images(2, 32), CLASS_IDX, 4), expected)


# --- TVE, exact and random ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tve_is_the_explainer_and_the_head(shared_model, images, randomized) -> None:
    model = shared_model("cnn")
    classifier = split_classifier(model)
    explainer = _options("tve", classifier, randomized)["explainer"]
    pixel_values = images(2, 32)
    scores = methods.explain("tve", classifier, pixel_values, CLASS_IDX, 4, explainer=explainer, rule="log_prob")
    maps = [pixel_values]
    for stage in model.stages:
        maps.append(stage(maps[-1]))
    out = explainer(pixel_values, features=tuple(maps[1:]), embeddings=maps[-1].mean((2, 3)))
    log_kept, log_removed = model.fc(out.kept).log_softmax(-1), model.fc(out.removed).log_softmax(-1)
    for b in range(2):
        expected = (log_kept - log_removed)[b, :, CLASS_IDX[b]].view(4, 4)
        torch.testing.assert_close(scores[b], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tve_reads_the_feature_maps_that_the_explainer_was_trained_on(shared_model, images, randomized) -> None:
    """All blocks of a ViT have maps of one shape: others fit, and would move the map."""
    classifier = split_classifier(shared_model("vit"))
    explainer = _options("tve", classifier, randomized)["explainer"]
    pixel_values, names = images(2, 32), classifier.backbone.feature_names
    others = classifier.reading(tuple(reversed(names)))
    seen, other = classifier(pixel_values), others(pixel_values)
    wrong = explainer(pixel_values, features=other.features, embeddings=seen.embeddings).kept
    assert (wrong - explainer(pixel_values, features=seen.features, embeddings=seen.embeddings).kept).abs().max() > 0.1
    scores, from_others = (
        methods.explain("tve", one, pixel_values, CLASS_IDX, 4, explainer=explainer) for one in (classifier, others)
    )
    assert torch.equal(scores, from_others)


def test_tve_of_another_backbone_is_refused(shared_model, images, randomized) -> None:
    explainer = _options("tve", split_classifier(shared_model("cnn")), randomized)["explainer"]
    with pytest.raises(
        ValueError, match="The explainer TVEExplainer predicts embeddings of 8 dimensions, but the classifier's head"
    ):
        methods.explain(
            "tve", split_classifier(shared_model("vit")), images(1, 32), CLASS_IDX[:1], 4, explainer=explainer
        )


def test_tve_compares_explainer_and_classifier_once(shared_model, images, randomized, monkeypatch) -> None:
    classifier, asked = split_classifier(shared_model("cnn")), []
    explainer = _options("tve", classifier, randomized)["explainer"]
    monkeypatch.setattr("tve_hf.methods._fitting.fit", lambda *pair, **_: asked.append(pair))
    for one in (classifier, classifier, classifier.with_head(torch.randn(5, 8)), classifier):
        methods.explain("tve", one, images(1, 32), CLASS_IDX[:1], 4, explainer=explainer)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tve", "tve needs explainer, a TVEExplainer trained for TinyCNN; pass explainer=, or use 'exact'"),
        ("vit_shapley", "vit_shapley needs shapley_explainer, a ShapleyExplainer trained for TinyCNN; pass shapley"),
    ],
)
@pytest.mark.parametrize("grid", [None, 4])
def test_a_missing_explainer_is_named(shared_model, images, name, message, grid) -> None:
    classifier = split_classifier(shared_model("cnn"))
    for options in ({}, {message.split()[2].strip(","): None}):
        with pytest.raises(ValueError, match=message):
            methods.explain(name, classifier, images(1, 32), CLASS_IDX[:1], grid, **options)


def test_tve_on_another_grid_is_refused(shared_model, images, randomized) -> None:
    classifier = split_classifier(shared_model("cnn"))
    options = _options("tve", classifier, randomized)
    with pytest.raises(ValueError, match=r"grid is \(4, 4\), not \(8, 8\); pass grid_size=\(4, 4\)"):
        methods.explain("tve", classifier, images(1, 32), CLASS_IDX[:1], 8, **options)


def test_exact_is_definitions_1_and_2_on_a_rectangle(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    pixel_values = images(2, 24, 40)
    scores = methods.explain("exact", classifier, pixel_values, CLASS_IDX, (3, 5), hops=1, rule="logit_averaged")
    kept, removed = exact_meta_attribution(classifier, pixel_values, (3, 5), 1)
    flat = transfer(kept, removed, classifier, CLASS_IDX, "logit_averaged", (3, 5), 1)
    for row in range(3):
        for column in range(5):
            torch.testing.assert_close(scores[:, row, column], flat[:, row * 5 + column].detach())


def test_random_scores_follow_the_generator_and_look_normal(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return methods.explain("random", classifier, images(2, 32), CLASS_IDX, (40, 50), generator=generator)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert abs(draw(0).mean()) < 5 / math.sqrt(4000)
    assert abs(draw(0).std() - 1) < 5 / math.sqrt(2 * 4000)


class Doubles(TorchDispatchMode):
    """Counts the results of operations that are in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.number += sum(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result))
        return result


@pytest.mark.parametrize("name", ["tve", "exact", "occlusion", "rise", "kernel_shap", "ig", "grad_cam", "legrad"])
def test_nothing_is_computed_in_double_precision(shared_model, images, randomized, name) -> None:
    """Which some devices do not have."""
    classifier = split_classifier(shared_model("vit"))
    options = _options(name, classifier, randomized)
    with Doubles() as doubles:
        methods.explain(name, classifier, images(2, 32), CLASS_IDX, 4, **options)
    assert doubles.number == 0


def test_doubles_are_counted() -> None:
    with Doubles() as doubles:
        torch.ones(2).double()
    assert doubles.number == 1


def test_few_samples_are_not_spread_over_many_patches(randomized, images) -> None:
    """Without a grid: 16 x 16 patches would be the default for these images, of 160 pixels."""
    config = ResNetConfig(num_labels=3, embedding_size=4, hidden_sizes=[4, 4, 4, 4], depths=[1] * 4)
    model = randomized(ResNetForImageClassification(config)).eval()
    classifier = split_classifier(model, ViTImageProcessor(size={"height": 160, "width": 160}))
    x, class_idx = images(1, 160), torch.tensor([0])
    assert methods.explain("sampled", classifier, x, class_idx).shape == (1, 10, 10)
    assert methods.explain("sampled", classifier, x, class_idx, n_samples=512).shape == (1, 16, 16)
    assert methods.explain("sampled", classifier, x, class_idx, (16, 16), n_samples=16).shape == (1, 16, 16)
