"""Every model family of timm is split exactly, alone and in the wrapper of transformers."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm_families import FAMILIES, NUM_LABELS, Member, noise, relative_error
from tiny import make_explainer
from transformers import AutoImageProcessor, TimmWrapperConfig, TimmWrapperForImageClassification, pipeline
from untouched import left_as_found

from tve_hf import split_classifier
from tve_hf.geometry import seen_region
from tve_hf.methods import grad_cam

timm = pytest.importorskip("timm", reason="timm is not installed; `make test-extras` makes an environment that has it")

# Members whose heads differ from that of their family's smallest.
UNUSUAL = {
    "a class and a distillation token": Member("deit_tiny_distilled_patch16_224", 64, {"depth": 3}),
    "the same, after stages": Member("pit_ti_distilled_224", 64),
    "two heads on one map of convolutions": Member("levit_conv_128s", 128),
    "the class token of a pyramid": Member("mvitv2_small_cls", 64),
    "the mean of patches, then a norm": Member("beitv2_base_patch16_224", 64, {"depth": 3}),
    "the same, with rotary positions": Member("eva02_tiny_patch14_224", 56, {"depth": 3, "img_size": 56}),
    "registers": Member("vit_dwee_patch16_reg1_gap_256", 64, {"depth": 3}),
    "an attention pool": Member("vit_base_patch16_siglip_224", 64, {"depth": 3}),
    "an attention pool after a class token": Member("vit_pe_core_tiny_patch16_384", 64, {"depth": 3}),
    "an attention pool, patches of any shape": Member("naflexvit_base_patch16_map", 64, {"depth": 3}),
    "mean and maximum, side by side": Member("test_resnet", 96, {"global_pool": "catavgmax"}),
    "mean and maximum, averaged": Member("test_vit", 64, {"global_pool": "avgmax"}),
    "a hidden layer": Member("test_convnext", 96, {"head_hidden_size": 48}),
    "attention over blocks and grids": Member("test_maxvit", 64),
    "reparameterised branches": Member("repvgg_a0"),
}
MEMBERS = FAMILIES | UNUSUAL
# Where the logits are not one head's: the weight of each. D counts what they are given once.
HALVES = {"head": 0.5, "head_dist": 0.5}
WEIGHTS: dict[str, dict[str, float]] = {
    "a class and a distillation token": HALVES,
    "the same, after stages": HALVES,
    "two heads on one map of convolutions": {"head.linear": 0.5, "head_dist.linear": 0.5},  # each after its own norm
    "levit": {"head.linear": 0.5, "head_dist.linear": 0.5},
    "crossvit": {"head.0": 0.5, "head.1": 0.5},
    "efficientformer": HALVES,
    "efficientformer_v2": HALVES,
    "swiftformer": HALVES,
    "volo": {"head": 1, "aux_head": 0.5},  # the latter's maximum over the patches
}
DIMS = {
    "a class and a distillation token": 2 * 192,
    "the same, after stages": 2 * 256,
    "two heads on one map of convolutions": 2 * 384,
    "levit": 2 * 384,
    "volo": 384 + 4 * 4 * 384,
}


def test_the_table_is_complete() -> None:
    assert set(FAMILIES) == set(timm.list_modules())
    for family, member in FAMILIES.items():
        assert member.name in timm.list_models(module=family)


@pytest.mark.parametrize("name", MEMBERS)
@torch.no_grad()
def test_every_family_is_split_exactly_in_two_passes_and_left_as_found(name) -> None:
    member = MEMBERS[name]
    wrapper = member.build()
    images = [noise(batch, member.side) for batch in (1, 3)]
    logits = [wrapper.timm_model(x) for x in images]
    found = []
    for model in (wrapper, wrapper.timm_model):
        passes: list[int] = []
        handle = model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        with left_as_found(wrapper):
            classifier = split_classifier(model)
            assert len(passes) == 2
            for x, theirs in zip(images, logits, strict=True):
                out = classifier(x)
                assert out.embeddings.shape == (len(x), classifier.embedding_dim)
                assert relative_error(out.logits, theirs) <= 1e-5  # the head's, of the embeddings alone
        handle.remove()
        assert classifier.probe().shape == (2, 3, member.side, member.side)  # its own processor tells the size
        assert classifier.name == member.name
        assert len(out.features) in (3, 4)
        if len(out.features) == 4:  # the last is there since its mean is what the head reads
            torch.testing.assert_close(out.features[-1].mean((2, 3)), out.embeddings, atol=1e-4, rtol=1e-4)
        assert all(f.ndim == 4 and len(f) == 3 and f.shape[2] == f.shape[3] > 1 for f in out.features)
        heads = {part.name.removeprefix("timm_model."): part.scale for part in classifier.backbone.parts}
        if name != "efficientvim":  # whose weights are learnt: see below
            assert list(heads.values()) == [1] or heads == WEIGHTS[name]
        assert classifier.embedding_dim == DIMS.get(name, wrapper.timm_model.head_hidden_size)
        found.append(out.embeddings)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["resnet", "vision_transformer", "crossvit", "efficientvim", "convnext", "nfnet"])
@torch.no_grad()
def test_the_embedding_is_what_timm_calls_pre_logits(name) -> None:
    model = FAMILIES[name].build().timm_model
    classifier = split_classifier(model)
    x = classifier.probe()
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(classifier.embed(x), expected)


@torch.no_grad()
def test_eight_weighted_heads_are_found_even_for_two_classes() -> None:
    model = Member("efficientvim_m1_dist", 128).build(num_labels=2).timm_model
    with left_as_found(model):
        classifier = split_classifier(model)
    parts = classifier.backbone.parts
    weights = torch.cat([model.weights.softmax(0), model.weights_dist.softmax(0)]) / 2
    assert [part.name for part in parts] == [f"{heads}.{i}" for heads in ("heads", "heads_dist") for i in range(4)]
    torch.testing.assert_close(torch.tensor([part.scale for part in parts]), weights, atol=1e-4, rtol=0)
    assert classifier.embedding_dim == model.head_hidden_size  # both heads of a stage share their input
    x = noise(3, 128)
    assert relative_error(classifier.head(classifier.embed(x)), model(x)) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, r"Cannot split ResNet: it has no head \(num_classes=0\)"),
        ({"features_only": True}, r"logits of shape \(2, \d+, 48, 48\)"),
    ],
)
def test_models_without_logits_are_refused(settings, message) -> None:
    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 96, 96)}, **settings).eval()
    with left_as_found(model), pytest.raises(ValueError, match=message):
        split_classifier(model)


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("vit_tiny_patch16_224", (64, 64), {"depth": 1}),
        ("vit_tiny_patch16_224", (64, 96), {"depth": 1}),
        ("swin_tiny_patch4_window7_224", (96, 96), {"depths": (1, 1, 1, 1)}),
        ("levit_128s", (160, 160), {}),  # says its size nowhere
        ("deit_tiny_patch16_224", (48, 48), {"depth": 1}),
    ],
)
@torch.no_grad()
def test_a_model_of_another_size_than_its_configuration_says_is_looked_at(name, size, settings) -> None:
    model = timm.create_model(name, img_size=size, **settings).eval()
    with pytest.raises((AssertionError, RuntimeError)):
        model(noise(1, model.pretrained_cfg["input_size"][-1]))
    with left_as_found(model):
        classifier = split_classifier(model)
    assert classifier.probe().shape == (2, 3, *size)
    image = Image.new("RGB", (200, 150))
    assert classifier.image_processor(images=image, return_tensors="pt")["pixel_values"].shape == (1, 3, *size)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert relative_error(classifier.head(classifier.embed(x)), model(x)) <= 1e-5


def test_labels_are_those_of_the_configuration() -> None:
    labels = split_classifier(timm.create_model("test_resnet").eval()).id2label
    assert len(labels) == 1000 and labels[281].startswith("tabby")
    assert split_classifier(timm.create_model("test_resnet", num_classes=3).eval()).id2label == {
        i: f"LABEL_{i}" for i in range(3)
    }
    overlay = {"label_names": ["cat", "dog"]}
    model = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay=overlay).eval()
    assert split_classifier(model).id2label == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(("crop_pct", "crop_mode"), [(0.875, "center"), (1.0, "squash"), (0.8, "border")])
def test_images_are_prepared_as_timm_does_and_the_region_is_known(crop_pct, crop_mode) -> None:
    overlay = {"input_size": (3, 96, 96), "crop_pct": crop_pct, "crop_mode": crop_mode, "mean": (0.3, 0.4, 0.5)}
    model = timm.create_model("test_resnet", pretrained_cfg_overlay=overlay).eval()
    processor = split_classifier(model).image_processor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"][0], transform(image))
    scale = {"center": 150 / int(96 / crop_pct), "border": 200 / int(96 / crop_pct)}.get(crop_mode)
    width, height = (200, 150) if scale is None else (96 * scale, 96 * scale)
    expected = (100 - width / 2, 75 - height / 2, 100 + width / 2, 75 + height / 2)
    assert seen_region(processor, image.size) == pytest.approx(expected, abs=scale or 1)


def test_a_plain_model_is_explained_without_an_image_processor(tmp_path) -> None:
    model = Member("test_resnet").build().timm_model
    classifier = split_classifier(model)
    explainer = make_explainer(classifier)
    assert explainer.config.image_mean == pytest.approx(model.pretrained_cfg["mean"])
    assert explainer.config.backbone_name == "test_resnet"
    explain = pipeline("transferable-attribution", model=explainer, classifier=model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    (found,) = explain(image)
    with torch.no_grad():
        logits = model(classifier.image_processor(images=image, return_tensors="pt")["pixel_values"])
    assert found["class_idx"] == logits.argmax().item()
    assert found["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-5)
    assert found["overlay"].size == image.size

    explain.save_pretrained(tmp_path)
    again = pipeline("transferable-attribution", model=str(tmp_path), classifier=model)(image)[0]
    assert np.array_equal(again["attribution"], found["attribution"])

    other = timm.create_model("test_resnet", num_classes=5, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)}).eval()
    with pytest.raises(ValueError, match="image_mean|pixels"):
        pipeline("transferable-attribution", model=explainer, classifier=other)


def test_a_saved_wrapper_is_split_by_name(tmp_path) -> None:
    cfg = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9}
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=NUM_LABELS, pretrained_cfg=cfg)
    model = TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    for classifier in (split_classifier(tmp_path), split_classifier(model)):
        assert classifier.image_processor.data_config["mean"] == (0.1, 0.2, 0.3)  # not that of the architecture
        assert classifier.probe().shape == (2, 3, 96, 96)
        assert classifier.fingerprint() == split_classifier(model).fingerprint()
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), type(classifier.image_processor))


def test_a_folder_that_timm_wrote_is_split_by_name(tmp_path) -> None:
    model = timm.create_model("test_vit", num_classes=5).eval()
    names = [f"class {number}" for number in range(5)]
    timm.models.save_for_hf(
        model, tmp_path, model_config={"label_names": names}, model_args={"num_classes": 5}, safe_serialization=True
    )
    classifier = split_classifier(tmp_path)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images).logits, model(images))
    assert list(classifier.id2label.values()) == names


def test_features_have_a_row_for_each_image_even_where_other_outputs_come_first() -> None:
    """TNT's blocks give the pixels of each patch, (B N, 16, d), and then the patches."""
    classifier = split_classifier(FAMILIES["tnt"].build().timm_model)
    x = classifier.probe()
    assert [f.shape for f in classifier(x).features] == [(2, 384, 4, 4)] * 3
    scores = grad_cam.explain(classifier, x, torch.tensor([0, 1]), (4, 4))
    assert scores.shape == (2, 4, 4) and scores.any()
