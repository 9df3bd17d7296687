"""Splitting a classifier: head(embed(x)) is the model, the embedding is the right one, and the model is left alone."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from untouched import left_as_found

from tve_hf.classifiers import split_classifier

VIT = {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


def _rebuilt(keep: Tensor, image: Tensor, rows: int, columns: int) -> Tensor:
    """Zero the patches (N,) that are not kept of one image (C, H, W), pixel rectangle by pixel rectangle."""
    height, width = image.shape[1] // rows, image.shape[2] // columns
    image = image.clone()
    for row, column in itertools.product(range(rows), range(columns)):
        if not keep[row * columns + column]:
            image[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = 0
    return image


# --- every architecture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_head_of_embedding_is_the_model(shared_model, images, specs, architecture, batch) -> None:
    model, spec = shared_model(architecture), specs[architecture]
    pixel_values = images(batch, spec.side)
    logits = model(pixel_values).logits
    assert logits.std() > 0.01  # the tiny weights do say something
    classifier = split_classifier(model)
    embeddings = classifier.embed(pixel_values)
    assert embeddings.shape == (batch, spec.embedding_dim)
    assert classifier.embedding_dim == spec.embedding_dim
    again = classifier.head(embeddings)
    assert (again - logits).abs().max() <= 1e-5 * logits.abs().max()


@torch.no_grad()
def test_one_pass_gives_logits_embeddings_and_features(shared_model, images, specs, architecture) -> None:
    model, spec = shared_model(architecture), specs[architecture]
    classifier = split_classifier(model)
    pixel_values = images(3, spec.side)
    logits = model(pixel_values).logits
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    out = classifier(pixel_values)
    handle.remove()
    assert len(calls) == 1
    torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.embeddings, classifier.embed(pixel_values))
    assert [tuple(f.shape) for f in out.features] == [(3, *shape) for shape in spec.feature_shapes]
    assert all(f.std() > 0 for f in out.features)
    assert len(classifier.backbone.feature_names) == len(spec.feature_shapes)


@torch.no_grad()
def test_images_of_a_batch_do_not_mix(shared_model, images, specs, architecture) -> None:
    classifier = split_classifier(shared_model(architecture))
    pixel_values = images(3, specs[architecture].side)
    together = classifier(pixel_values)
    for i in range(3):
        alone = classifier(pixel_values[i : i + 1])
        torch.testing.assert_close(alone.embeddings[0], together.embeddings[i], rtol=1e-3, atol=1e-4)
        for one, batch in zip(alone.features, together.features, strict=True):
            torch.testing.assert_close(one[0], batch[i], rtol=1e-3, atol=1e-4)


def test_heads_take_leading_dimensions(shared_model, architecture) -> None:
    classifier = split_classifier(shared_model(architecture))
    embeddings = torch.randn(2, 3, classifier.embedding_dim, generator=torch.Generator().manual_seed(0))
    logits = classifier.head(embeddings)
    assert logits.shape == (2, 3, 5)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(logits[i, j], classifier.head(embeddings[i, j].unsqueeze(0))[0])


def test_the_model_is_left_as_found(build, images, specs, architecture) -> None:
    model = build(architecture)
    next(model.parameters()).requires_grad_(False)
    model.get_submodule("classifier").register_forward_hook(lambda *_: None)
    with left_as_found(model):
        classifier = split_classifier(model)
        classifier(images(2, specs[architecture].side))
        classifier.fingerprint()
        classifier.with_head(torch.zeros(2, classifier.embedding_dim))


def test_the_model_is_left_as_found_after_an_error_inside(build, images, specs, architecture) -> None:
    model = build(architecture)
    classifier = split_classifier(model)
    with left_as_found(model):
        with pytest.raises(Exception, match="channel|size"):
            classifier(images(2, specs[architecture].side, channels=2))

    def fail(*_) -> None:
        raise RuntimeError("from the inside")

    model.get_submodule(classifier.backbone.head_names[0]).register_forward_pre_hook(fail)
    with left_as_found(model):
        with pytest.raises(RuntimeError, match="from the inside"):
            split_classifier(model)


def test_gradients_reach_the_image(shared_model, images, specs, architecture) -> None:
    model = shared_model(architecture)
    classifier = split_classifier(model)
    pixel_values = images(1, specs[architecture].side).requires_grad_()
    (ours,) = torch.autograd.grad(classifier(pixel_values).logits[0, 1], pixel_values)
    (theirs,) = torch.autograd.grad(model(pixel_values).logits[0, 1], pixel_values)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


# --- what the parts are, worked out by hand -------------------------------------------------------------------------


@torch.no_grad()
def test_vit_by_hand(shared_model, images) -> None:
    model = shared_model("vit")
    classifier = split_classifier(model)
    assert classifier.backbone.head_names == ("classifier",)
    assert classifier.head.module is model.classifier
    pixel_values = images(2, 32)
    out = classifier(pixel_values)

    hidden = model.vit.embeddings(pixel_values)  # (B, 1 + 16, 32)
    states = []
    for layer in model.vit.layers:
        hidden = layer(hidden)
        states.append(hidden)
    class_token = model.vit.layernorm(hidden)[:, 0]
    torch.testing.assert_close(out.embeddings, class_token)
    torch.testing.assert_close(out.logits, class_token @ model.classifier.weight.T + model.classifier.bias)
    assert classifier.backbone.feature_names == ("vit.layers.1", "vit.layers.2", "vit.layers.3")
    for feature, state in zip(out.features, states[1:], strict=True):
        for row, column in itertools.product(range(4), range(4)):
            torch.testing.assert_close(feature[:, :, row, column], state[:, 1 + row * 4 + column])


@torch.no_grad()
@pytest.mark.parametrize(("name", "prefix"), [("deit", 2), ("dinov2", 1), ("dinov2_with_registers", 5)])
def test_prefix_tokens_are_dropped(shared_model, images, name, prefix) -> None:
    model = shared_model(name)
    classifier = split_classifier(model)
    seen = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: seen.__setitem__(n, o))
        for n in classifier.backbone.feature_names
    ]
    out = classifier(images(2, 32))
    for handle in handles:
        handle.remove()
    for feature, name in zip(out.features, classifier.backbone.feature_names, strict=True):
        tokens = seen[name] if isinstance(seen[name], Tensor) else seen[name][0]
        assert tokens.shape[1] == prefix + 16
        assert torch.equal(feature, tokens[:, prefix:].transpose(1, 2).reshape(2, 32, 4, 4))


@torch.no_grad()
def test_dinov2_by_hand(shared_model, images) -> None:
    model = shared_model("dinov2")
    pixel_values = images(2, 32)
    tokens = model.dinov2(pixel_values).last_hidden_state
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    torch.testing.assert_close(split_classifier(model).embed(pixel_values), expected)


@torch.no_grad()
def test_resnet_by_hand(shared_model, images) -> None:
    model = shared_model("resnet")
    classifier = split_classifier(model)
    assert classifier.head.module is model.classifier[1]  # the linear layer, without the flattening before it
    pixel_values = images(2, 64)
    out = classifier(pixel_values)
    maps = model.resnet(pixel_values, output_hidden_states=True).hidden_states
    torch.testing.assert_close(out.embeddings, maps[-1].mean((2, 3)))
    for feature, expected in zip(out.features, maps[2:], strict=True):
        torch.testing.assert_close(feature, expected)


@torch.no_grad()
def test_a_plain_module_that_returns_a_tensor(shared_model, images) -> None:
    model = shared_model("cnn")
    classifier = split_classifier(model)
    pixel_values = images(2, 32)
    out = classifier(pixel_values)
    maps = [pixel_values]
    for stage in model.stages:
        maps.append(stage(maps[-1]))
    torch.testing.assert_close(out.logits, model(pixel_values))
    torch.testing.assert_close(out.embeddings, maps[-1].mean((2, 3)))
    for feature, expected in zip(out.features, maps[1:], strict=True):
        torch.testing.assert_close(feature, expected)
    assert classifier.id2label == {i: f"LABEL_{i}" for i in range(5)}
    assert classifier.name == "TinyCNN"
    assert not classifier.multi_label


class ConvolutionHead(nn.Module):
    """A head that is a 1 x 1 convolution on a map of one pixel, on channels-last stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(3, 6), nn.Linear(6, 7), nn.Linear(7, 8)])
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        x = F.avg_pool2d(pixel_values, 8).permute(0, 2, 3, 1)  # (B, h, w, C)
        for stage in self.stages:
            x = stage(x).relu()
        return {"scores": self.head(x.permute(0, 3, 1, 2).mean((2, 3), keepdim=True)).flatten(1)}


@torch.no_grad()
def test_a_convolution_as_head_and_channels_last_maps(images, randomized, processor_of) -> None:
    model = randomized(ConvolutionHead()).eval()
    classifier = split_classifier(model, processor_of(3, 24, 40))
    pixel_values = images(2, 24, 40)
    out = classifier(pixel_values)
    assert classifier.embedding_dim == 8
    torch.testing.assert_close(out.logits, model(pixel_values)["scores"])
    assert [tuple(f.shape) for f in out.features] == [(2, 6, 3, 5), (2, 7, 3, 5), (2, 8, 3, 5)]
    cell = pixel_values[:, :, 16:24, 8:16].mean((2, 3))  # row 2, column 1
    torch.testing.assert_close(out.features[0][:, :, 2, 1], model.stages[0](cell))


# --- logits that are not the output of one module ------------------------------------------------------------------


class Endings(nn.Module):
    """A small network with several heads, whose ending is a function of itself and its feature map."""

    def __init__(self, ending: Callable[["Endings", Tensor], Tensor]) -> None:
        super().__init__()
        self.ending = ending
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
        self.point = nn.Conv2d(8, 4, 1)
        self.blunt = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU())
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.ending(self, self.conv(pixel_values).relu())


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("ending", "names", "scales", "embedding"),
    [
        (  # each head has its own input
            lambda m, x: (m.heads[0](x.mean((2, 3))) + m.heads[1](x.amax((2, 3)))) / 2,
            ("heads.0", "heads.1"),
            [0.5, 0.5],
            lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1),
        ),
        (  # both have the same
            lambda m, x: m.heads[1](x.mean((2, 3))) - 0.3 * m.heads[0](x.mean((2, 3))),
            ("heads.1", "heads.0"),
            [1.0, -0.3],
            lambda x: x.mean((2, 3)),
        ),
        (lambda m, x: 3 * m.heads[0](x.mean((2, 3))), ("heads.0",), [3.0], lambda x: x.mean((2, 3))),
        (lambda m, x: m.temperature * m.heads[0](x.mean((2, 3))), ("heads.0",), None, lambda x: x.mean((2, 3))),
        # pooled behind the head: tokens, channels-last and channels-first maps
        (lambda m, x: m.heads[0](_tokens(x)).mean(1), ("heads.0",), [1.0], lambda x: x.mean((2, 3))),
        (lambda m, x: m.heads[0](x.movedim(1, -1)).mean((1, 2)), ("heads.0",), [1.0], lambda x: x.mean((2, 3))),
        (lambda m, x: m.point(x).mean((2, 3)), ("point",), [1.0], lambda x: x.mean((2, 3))),
        (  # and both
            lambda m, x: (m.point(x).mean((2, 3)) + m.heads[0](x.amax((2, 3)))) / 2,
            ("point", "heads.0"),
            [0.5, 0.5],
            lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1),
        ),
        (  # the maximum does not commute with the head, which is given the whole map
            lambda m, x: m.heads[0](x.mean((2, 3))) + 0.5 * m.heads[1](_tokens(x)).amax(1),
            ("heads.0", "heads.1"),
            [1.0, 0.5],
            lambda x: torch.cat([x.mean((2, 3)), _tokens(x).flatten(1)], 1),
        ),
        # axes of one element
        (lambda m, x: m.heads[0](x.mean((2, 3)).unsqueeze(1)), ("heads.0",), [1.0], lambda x: x.mean((2, 3))),
        (lambda m, x: m.point(x.mean((2, 3), keepdim=True)), ("point",), [1.0], lambda x: x.mean((2, 3))),
    ],
)
def test_heads_that_are_combined_or_pooled(randomized, processor_of, images, ending, names, scales, embedding) -> None:
    model = randomized(Endings(ending)).eval()
    with left_as_found(model):
        classifier = split_classifier(model, processor_of(3, 32, 32))
    assert classifier.backbone.head_names == names
    assert scales is None or [part.scale for part in classifier.backbone.parts] == pytest.approx(scales, abs=1e-6)
    for side in (32, 48):
        if side == 48 and any(part.by_max for part in classifier.backbone.parts):
            with pytest.raises(ValueError, match=r"is given 296 values for images of \(48, 48\).*expects 136"):
                classifier(images(3, side))
            continue
        out = classifier(images(3, side))
        torch.testing.assert_close(out.embeddings, embedding(model.conv(images(3, side)).relu()))
        torch.testing.assert_close(out.logits, model(images(3, side)).reshape(3, 4), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_heads_are_averaged_in_half_precision_too(randomized, processor_of) -> None:
    model = randomized(Endings(lambda m, x: (m.heads[0](x.mean((2, 3))) + m.heads[1](x.amax((2, 3)))) / 2)).eval()
    classifier = split_classifier(model.to(torch.bfloat16), processor_of(3, 32, 32))
    assert [part.scale for part in classifier.backbone.parts] == [0.5, 0.5]


@torch.no_grad()
@pytest.mark.parametrize("num_labels", [1, 2])
def test_heads_of_one_or_two_logits_are_averaged(randomized, processor_of, images, num_labels) -> None:
    model = Endings(lambda m, x: (m.heads[0](x.mean((2, 3))) + m.heads[1](x.amax((2, 3)))) / 2)
    model.heads = nn.ModuleList(nn.Linear(8, num_labels) for _ in range(2))
    classifier = split_classifier(randomized(model).eval(), processor_of(3, 32, 32))
    assert classifier.embedding_dim == 16
    torch.testing.assert_close(classifier(images(3, 32)).logits, model(images(3, 32)))


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (lambda m, x: m.blunt(x).mean((2, 3)), "more than the input of 'blunt', averaged over positions"),
        (lambda m, x: m.heads[0](x.mean((2, 3))).maximum(m.heads[1](x.amax((2, 3)))), "0 of its modules output"),
        (lambda m, x: m.heads[0](x.mean((2, 3))) * x.mean((1, 2, 3)).unsqueeze(1), "0 of its modules output"),
    ],
)
def test_endings_that_are_not_linear_are_refused(randomized, processor_of, ending, message) -> None:
    model = randomized(Endings(ending)).eval()
    with left_as_found(model), pytest.raises(ValueError, match=f"Cannot split.*{message}"):
        split_classifier(model, processor_of(3, 32, 32))


# --- orientation and rectangles -------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_lie_where_their_patches_are(images, randomized) -> None:
    model = randomized(ViTForImageClassification(ViTConfig(image_size=(24, 40), num_labels=5, **VIT))).eval()
    for layer in model.vit.layers:  # no token hears of another: a token changes with its own patch alone
        layer.attention.o_proj.weight.zero_()
    classifier = split_classifier(model)
    pixel_values = images(1, 24, 40)
    before = classifier(pixel_values).features
    row, column = 2, 1
    pixel_values[:, :, 16:24, 8:16] += 1
    after = classifier(pixel_values).features
    assert len(before) == 3
    for one, other in zip(before, after, strict=True):
        changed = (one != other).any(1)[0]  # (3, 5)
        assert changed.shape == (3, 5)
        assert changed.nonzero().tolist() == [[row, column]]


@torch.no_grad()
def test_a_convolutions_map_lies_where_the_pixels_are(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    pixel_values = images(1, 64, 96)
    before = classifier(pixel_values).features[-1]  # strides of 8: (8, 12)
    pixel_values[:, :, 48:56, 8:16] += 5  # row 6, column 1
    changed = (before != classifier(pixel_values).features[-1]).any(1)[0].nonzero()
    assert [6, 1] in changed.tolist()
    assert (changed - torch.tensor([6, 1])).abs().max() <= 1


@torch.no_grad()
def test_rectangular_vit(images, randomized) -> None:
    model = randomized(ViTForImageClassification(ViTConfig(image_size=(16, 40), num_labels=5, **VIT))).eval()
    classifier = split_classifier(model)
    assert classifier.probe().shape == (2, 3, 16, 40)
    out = classifier(images(2, 16, 40))
    assert [tuple(f.shape) for f in out.features] == [(2, 32, 2, 5)] * 3
    torch.testing.assert_close(out.logits, model(images(2, 16, 40)).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "swin", "convnext", "resnet", "mobilenet_v1", "mobilenet_v2"])
def test_rectangular_images_through_models_made_for_squares(shared_model, images, specs, name) -> None:
    model, spec = shared_model(name), specs[name]
    classifier = split_classifier(model)
    pixel_values = images(2, spec.side, 2 * spec.side)
    out = classifier(pixel_values)
    torch.testing.assert_close(out.logits, model(pixel_values).logits, rtol=1e-5, atol=1e-5)
    assert [tuple(f.shape) for f in out.features] == [(2, c, h, 2 * w) for c, h, w in spec.feature_shapes]


@torch.no_grad()
def test_a_rectangle_in_the_configuration_of_swin(images, randomized) -> None:
    values = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1], "window_size": 2, "patch_size": 2}
    model = randomized(SwinForImageClassification(SwinConfig(image_size=(24, 40), num_labels=5, **values))).eval()
    out = split_classifier(model)(images(2, 24, 40))
    torch.testing.assert_close(out.logits, model(images(2, 24, 40)).logits)
    assert [tuple(f.shape[2:]) for f in out.features] == [(6, 10), (3, 5), (3, 5), (3, 5)]


# --- precision ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "cnn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(build, images, name, dtype) -> None:
    model = build(name).to(dtype)
    classifier = split_classifier(model)
    assert classifier.dtype == dtype
    pixel_values = images(2, 32).to(dtype)
    out = classifier(pixel_values)
    assert out.embeddings.dtype == dtype
    expected = model(pixel_values)
    torch.testing.assert_close(out.logits, expected if isinstance(expected, Tensor) else expected.logits)
    assert classifier.log_prob(out.embeddings).dtype == torch.float32


def test_a_split_does_not_depend_on_the_global_generator(build) -> None:
    torch.manual_seed(0)
    one = split_classifier(build("vit")).probe()
    torch.manual_seed(1)
    assert torch.equal(one, split_classifier(build("vit")).probe())


# --- loading --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_folder_is_loaded_with_its_processor(shared_models_dir) -> None:
    folder = shared_models_dir / "mobilenet_v1_0.25_128_imagenet"
    classifier = split_classifier(folder)
    assert classifier.image_processor is not None
    assert len(classifier.id2label) == 1001
    assert tuple(classifier.probe().shape) == (2, 3, 128, 128)
    assert not classifier.training
    probe = classifier.probe()
    model = classifier.backbone.model
    torch.testing.assert_close(classifier(probe).logits, model(probe).logits)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_train_mode_is_refused(build) -> None:
    with pytest.raises(ValueError, match=r"TinyCNN is in train mode.*model\.eval\(\)"):
        split_classifier(build("cnn").train())


def test_a_submodule_in_train_mode_is_refused_and_left_so(build) -> None:
    model = build("resnet")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].train()
    with pytest.raises(ValueError, match=r"resnet\.embedder.* is in train mode"):
        split_classifier(model)
    assert norms[0].training


class Body(nn.Module):
    """Something to hang an unusual ending on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.fc = nn.Linear(8, 4)

    def pooled(self, pixel_values: Tensor) -> Tensor:
        return self.conv(pixel_values).relu().mean((2, 3))


class Squared(Body):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.fc(self.pooled(pixel_values)) ** 2


class Whole(nn.Module):
    """All weights are in one module whose output is the logits; what comes before it only shifts the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Squared()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.network(pixel_values - 0.5)


class Headless(Body):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.pooled(pixel_values)


class TwoHeads(Body):
    """Equal heads: either output is the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 4)
        self.other.load_state_dict(self.fc.state_dict())

    def forward(self, pixel_values: Tensor) -> Tensor:
        pooled = self.pooled(pixel_values)
        self.other(pooled)
        return self.fc(pooled)


class Sideways(Body):
    """The last module is told about the image by another way than its input."""

    class Head(nn.Linear):
        bonus: Tensor

        def forward(self, embeddings: Tensor) -> Tensor:
            return super().forward(embeddings) + self.bonus

    def __init__(self) -> None:
        super().__init__()
        self.fc = self.Head(8, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.fc.bonus = pixel_values.flatten(1)[:, :4]
        out = self.fc(self.pooled(pixel_values))
        self.fc.bonus = torch.zeros(4)
        return out


class Noisy(Body):
    """Dropout that eval() does not reach."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.dropout(self.fc(self.pooled(pixel_values)), 0.5, training=True)


class Segmenter(Body):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.conv(pixel_values)


class Mute(Body):
    def forward(self, pixel_values: Tensor) -> str:
        return "a cat"


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (Squared, "0 of its modules output its logits.*computed outside of a module.*wrap it"),
        (Whole, "0 of its modules output its logits"),
        (Headless, "0 of its modules output its logits"),
        (TwoHeads, r"2 of its modules output its logits.*other, fc"),
        (Sideways, "Cannot split Sideways: its logits depend on more than the input of 'fc'"),
        (Noisy, "Cannot split"),
        (Segmenter, r"logits of shape \(2, 8, 4, 4\).*\(batch, classes\)"),
        (Mute, "The model returned str"),
    ],
)
def test_what_cannot_be_split_is_refused(randomized, processor_of, model_class, message) -> None:
    model = randomized(model_class()).eval()
    if model_class is TwoHeads:
        model.other.load_state_dict(model.fc.state_dict())
    with left_as_found(model, but_the_generator=True), pytest.raises(ValueError, match=message):
        split_classifier(model, processor_of(3, 32, 32))


def test_a_processor_without_pixel_values_is_refused(shared_model) -> None:
    with pytest.raises(ValueError, match="gives flattened_patches, but no pixel_values; pass one"):
        split_classifier(
            shared_model("cnn"), lambda image, return_tensors: {"flattened_patches": torch.zeros(1, 9, 9)}
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused(shared_model, images) -> None:
    model = torch.jit.trace(shared_model("cnn"), images(1, 32))
    with pytest.raises(ValueError, match="inside TorchScript cannot be watched; pass the module"):
        split_classifier(model.eval())


def test_a_model_without_a_classification_head_is_refused() -> None:
    model = ViTModel(ViTConfig(image_size=32, **VIT)).eval()
    with pytest.raises(ValueError, match=r"shape \(2, 17, 32\); pass an image classifier"):
        split_classifier(model)


# --- other heads ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_with_a_linear_head(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    head = nn.Linear(8, 3)
    other = classifier.with_head(head, id2label={0: "a", 1: "b", 2: "c"})
    pixel_values = images(2, 32)
    embeddings = classifier.embed(pixel_values)
    assert other.backbone is classifier.backbone
    assert other.embedding_dim == 8
    assert other.id2label == {0: "a", 1: "b", 2: "c"}
    torch.testing.assert_close(other(pixel_values).logits, embeddings @ head.weight.T + head.bias)
    torch.testing.assert_close(classifier(pixel_values).logits, shared_model("cnn")(pixel_values))
    assert other.fingerprint() == classifier.fingerprint()


@torch.no_grad()
def test_with_a_callable_head(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    other = classifier.with_head(lambda e: torch.stack([e.sum(-1), e.amax(-1)], -1))
    embeddings = classifier.embed(images(2, 32))
    assert other.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert torch.equal(other(images(2, 32)).logits[:, 0], embeddings.sum(1))
    assert other.log_prob(embeddings.unsqueeze(1)).shape == (2, 1, 2)


@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 3), lambda: lambda e: e @ torch.ones(7, 3)])
def test_a_head_of_another_dimension_is_refused(shared_model, make) -> None:
    with pytest.raises(ValueError, match="does not accept embeddings of 8 dimensions"):
        split_classifier(shared_model("cnn")).with_head(make())


@pytest.mark.parametrize("id2label", [{0: "a"}, {i: str(i) for i in range(4)}, {}])
def test_labels_that_do_not_fit_the_head_are_refused(shared_model, id2label) -> None:
    with pytest.raises(ValueError, match=f"id2label names {len(id2label)} classes, but the head gives 3 logits"):
        split_classifier(shared_model("cnn")).with_head(nn.Linear(8, 3), id2label=id2label)


def test_log_prob_is_log_softmax_or_log_sigmoid(shared_model) -> None:
    classifier = split_classifier(shared_model("cnn")).with_head(lambda e: e[..., :3])
    embeddings = torch.tensor([[1.0, -2.0, 0.5] + [0.0] * 5])
    total = math.log(math.exp(1) + math.exp(-2) + math.exp(0.5))
    expected = torch.tensor([[1 - total, -2 - total, 0.5 - total]])
    torch.testing.assert_close(classifier.log_prob(embeddings), expected)
    several = classifier.with_head(lambda e: e[..., :3], multi_label=True)
    expected = torch.tensor([[-math.log1p(math.exp(-x)) for x in (1.0, -2.0, 0.5)]])
    torch.testing.assert_close(several.log_prob(embeddings), expected)


def test_multi_label_and_single_logit_models_use_a_sigmoid(specs, build) -> None:
    assert not split_classifier(build("vit")).multi_label
    model = build("vit")
    model.config.problem_type = "multi_label_classification"
    assert split_classifier(model).multi_label
    model = build("vit")
    model.classifier = nn.Linear(32, 1).eval()
    assert split_classifier(model).multi_label


# --- masked images --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("height", "width", "grid_size"), [(32, 32, 4), (24, 40, (3, 5))])
def test_embed_masked_equals_a_loop(shared_model, images, height, width, grid_size) -> None:
    classifier = split_classifier(shared_model("cnn"))
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    pixel_values = images(2, height, width)
    keep = torch.rand(2, 5, rows * columns, generator=torch.Generator().manual_seed(0)) > 0.5
    embeddings = classifier.embed_masked(pixel_values, keep, grid_size)
    assert embeddings.shape == (2, 5, 8)
    for b, k in itertools.product(range(2), range(5)):
        image = _rebuilt(keep[b, k], pixel_values[b], rows, columns)
        torch.testing.assert_close(embeddings[b, k], classifier.embed(image.unsqueeze(0))[0])


@torch.no_grad()
def test_embed_masked_does_not_depend_on_the_chunks_and_bounds_them(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    keep = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    sizes = []
    handle = classifier.backbone.model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    expected = classifier.embed_masked(images(2, 32), keep, 4)
    assert sizes == [10]
    for chunk_size, chunks in ((1, [1] * 10), (3, [3, 2, 3, 2]), (5, [5, 5]), (10, [10])):
        sizes.clear()
        torch.testing.assert_close(
            classifier.embed_masked(images(2, 32), keep, 4, chunk_size=chunk_size), expected, rtol=1e-5, atol=1e-6
        )
        assert sizes == chunks
    handle.remove()


@pytest.mark.parametrize(
    ("shape", "expected"), [((3, 32, 32), 128), ((3, 224, 224), 20), ((3, 512, 256), 8), ((3, 4096, 4096), 1)]
)
def test_passes_on_a_cpu_are_bounded_by_their_pixels(shared_model, shape, expected) -> None:
    classifier = split_classifier(shared_model("cnn"))
    assert classifier.images_per_pass(torch.empty(1, *shape)) == expected
    assert classifier.images_per_pass(torch.empty(1, *shape), 7) == 7
    assert classifier.images_per_pass(torch.empty(1, *shape, device="meta")) == 128


@torch.no_grad()
def test_what_else_a_classifier_reads_goes_with_each_masked_image(shared_model, images) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cnn = shared_model("cnn")

        def forward(self, pixel_values: Tensor, shift: Tensor) -> Tensor:
            return self.cnn(pixel_values + shift.view(-1, 1, 1, 1))

    def processor(image: object, return_tensors: str) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(1, 3, 32, 32), "shift": torch.zeros(1)}

    classifier = split_classifier(Shifted().eval(), processor)
    pixel_values, shift = images(3, 32), torch.tensor([0.0, 1.0, 2.0])
    keep = torch.rand(3, 5, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    for chunk_size in (2, 10, 128):
        found = classifier.embed_masked(pixel_values, keep, 4, chunk_size=chunk_size, shift=shift)
        for b, k in itertools.product(range(3), range(5)):
            image = _rebuilt(keep[b, k], pixel_values[b], 4, 4)
            expected = classifier.embed(image.unsqueeze(0), shift=shift[b : b + 1])[0]
            torch.testing.assert_close(found[b, k], expected, rtol=1e-4, atol=1e-5)
