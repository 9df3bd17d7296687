"""Classifiers inside of something else: adapters, int8 and half precision, device maps, torch.compile."""

import copy
import itertools
import warnings

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny import make_explainer, noise_image, save_classifier, save_pair
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, pipeline
from untouched import left_as_found

import tve_hf
from tve_hf import split_classifier
from tve_hf.classifiers.wrapped import named_weights
from tve_hf.compatibility import fit
from tve_hf.fingerprint import fingerprint, match

BLOCKS = ("vit.layers.0", "vit.layers.1", "vit.layers.2")


@pytest.fixture(scope="module")
def plain(randomized) -> nn.Module:
    """A ViT, not to be changed."""
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=5,
    )
    return randomized(ViTForImageClassification(config)).eval()


@pytest.fixture
def vit(plain) -> nn.Module:
    return copy.deepcopy(plain)


@torch.no_grad()
def _assert_split(classifier: tve_hf.SplitClassifier, model: nn.Module, vit: nn.Module, pixel_values: Tensor) -> None:
    """The parts give the model's logits, and the embedding is the class token of its ViT."""
    out = classifier(pixel_values)
    torch.testing.assert_close(out.logits, model(pixel_values).logits)
    torch.testing.assert_close(out.embeddings, vit(pixel_values).last_hidden_state[:, 0])
    torch.testing.assert_close(classifier.head(out.embeddings.unsqueeze(1)), out.logits.unsqueeze(1))
    assert len(out.features) == 3


# --- adapters -------------------------------------------------------------------------------------------------------


def _lora(**values) -> LoraConfig:
    values = {"target_modules": ["q_proj", "v_proj"]} | values
    return LoraConfig(r=4, init_lora_weights=False, **values)


ADAPTERS = {
    "lora": _lora(),
    "lora and head": _lora(modules_to_save=["classifier"]),
    "lora in the head too": _lora(target_modules=["q_proj", "classifier"]),
    "copy of a norm": _lora(modules_to_save=["classifier", "vit.layernorm"]),
    "convolution": _lora(target_modules=["projection", "fc1"]),
    "dora": _lora(use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "fc1"], feedforward_modules=["fc1"], init_ia3_weights=False),
}


@torch.no_grad()
def _adapted(vit: nn.Module, *configs: PeftConfig) -> PeftModel:
    """Wrap the ViT, in place, and change all that the adapters add, as training would."""
    own = {weight.data_ptr() for weight in vit.parameters()}
    model = get_peft_model(vit, configs[0])
    for i, config in enumerate(configs[1:]):
        model.add_adapter(f"other_{i}", config)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.data_ptr() not in own:
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_active_adapters_count_as_merged(vit, plain, images, kind) -> None:
    model = _adapted(vit, ADAPTERS[kind])
    pixel_values = images(3, 32)
    with left_as_found(model):
        classifier = split_classifier(model)
        found = classifier.fingerprint()
    assert classifier.backbone.head_names == ("base_model.model.classifier",)
    assert classifier.backbone.feature_names == tuple(f"base_model.model.{name}" for name in BLOCKS)
    _assert_split(classifier, model, model.base_model.model.vit, pixel_values)
    assert (model(pixel_values).logits - plain(pixel_values).logits).abs().max() > 0.01

    merged = copy.deepcopy(model).merge_and_unload()  # PEFT's own
    assert found == split_classifier(merged.eval()).fingerprint()
    assert match(found, split_classifier(plain).fingerprint()) == "same architecture, other weights"
    with model.disable_adapter():
        assert classifier.fingerprint() == split_classifier(plain).fingerprint()


def test_merged_in_place_is_the_same_backbone(vit, images) -> None:
    model = _adapted(vit, _lora())
    classifier = split_classifier(model)
    before, embeddings = classifier.fingerprint(), classifier.embed(images(2, 32))
    model.merge_adapter()
    torch.testing.assert_close(classifier.embed(images(2, 32)), embeddings, rtol=1e-4, atol=1e-4)
    assert classifier.fingerprint() == before
    with model.disable_adapter():
        plain = classifier.fingerprint()
    assert match(plain, before) == "same architecture, other weights"


def test_adapters_in_the_head_alone_leave_the_backbone_as_it_was(vit, plain, images) -> None:
    model = _adapted(vit, _lora(target_modules=["classifier"]))
    classifier = split_classifier(model)
    before = split_classifier(plain)
    assert classifier.fingerprint() == before.fingerprint()
    torch.testing.assert_close(classifier.embed(images(2, 32)), before.embed(images(2, 32)))
    assert (classifier(images(2, 32)).logits - before(images(2, 32)).logits).abs().max() > 0.01
    _assert_split(classifier, model, model.base_model.model.vit, images(2, 32))


@torch.no_grad()
def test_a_split_follows_the_active_adapter(vit, plain, images) -> None:
    config = _lora(modules_to_save=["classifier", "vit.layernorm"])
    model = _adapted(vit, config, config)
    classifier = split_classifier(model)
    logits, prints = [], []
    for name in ("default", "other_0"):
        model.set_adapter(name)
        model.eval()
        _assert_split(classifier, model, model.base_model.model.vit, images(2, 32))
        logits.append(model(images(2, 32)).logits)
        prints.append(classifier.fingerprint())
    with model.disable_adapter():
        _assert_split(classifier, plain, plain.vit, images(2, 32))
    assert (logits[0] - logits[1]).abs().max() > 0.01
    assert match(*prints) == "same architecture, other weights"


def test_adapters_that_transformers_adds(vit, plain, images, tmp_path) -> None:
    other = _adapted(copy.deepcopy(vit), _lora(modules_to_save=["classifier"]))
    other.save_pretrained(tmp_path)
    vit.load_adapter(tmp_path)
    classifier = split_classifier(vit.eval())
    assert classifier.backbone.head_names == ("classifier",)
    _assert_split(classifier, other, other.base_model.model.vit, images(2, 32))
    assert classifier.fingerprint() == split_classifier(other).fingerprint()
    vit.disable_adapters()
    assert classifier.fingerprint() == split_classifier(plain).fingerprint()


def test_a_folder_of_an_adapter_is_loaded(plain, vit, images, tmp_path) -> None:
    plain.save_pretrained(tmp_path / "base")
    model = _adapted(vit, _lora(modules_to_save=["classifier"]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "adapter")
    classifier = split_classifier(tmp_path / "adapter")
    _assert_split(classifier, model, model.base_model.model.vit, images(2, 32))
    assert classifier.fingerprint() == split_classifier(model).fingerprint()


def test_an_explainer_of_the_plain_backbone_reads_the_same_maps_of_a_wrapped_one(tmp_path, images, caplog) -> None:
    original = split_classifier(save_classifier(tmp_path))
    explainer = make_explainer(original)
    explainer.config.backbone_fingerprint = original.fingerprint()
    pixel_values = images(2, 32)
    model = get_peft_model(copy.deepcopy(original.backbone.model), _lora(target_modules=["classifier"])).eval()
    wrapped = fit(explainer, split_classifier(model, original.image_processor))
    assert caplog.text == ""
    for one, other in zip(wrapped(pixel_values).features, original(pixel_values).features, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="no module 'layers.9' to read a feature map from; choose one it has"):
        wrapped.reading(("layers.9",))
    with pytest.raises(ValueError, match="no module 'q_proj'"):  # of which block?
        wrapped.reading(("q_proj",))


# --- precision ------------------------------------------------------------------------------------------------------


def _int8(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move to another package
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8).eval()


def test_int8_layers_have_weights_though_no_parameters(plain, vit, images) -> None:
    model = _int8(plain)
    assert not list(model.classifier.parameters())
    classifier = split_classifier(model)
    assert classifier.backbone.head_names == ("classifier",)
    assert classifier.backbone.feature_names == BLOCKS
    _assert_split(classifier, model, model.vit, images(3, 32))
    with torch.no_grad():
        for name, layer in vit.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(model.get_submodule(name).weight().dequantize())
    assert classifier.fingerprint() == split_classifier(vit).fingerprint()
    assert match(classifier.fingerprint(), split_classifier(plain).fingerprint()) != "no"


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
def test_a_model_without_any_parameter(images, processor_of) -> None:
    torch.manual_seed(0)
    model = _int8(nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3)))
    assert not [*model.parameters(), *model.buffers()]
    classifier = split_classifier(model, processor_of(3, 4, 4))
    assert classifier.embedding_dim == 16 and classifier.backbone.head_names == ("3",)
    assert (classifier.device, classifier.dtype) == (torch.device("cpu"), torch.float32)
    torch.testing.assert_close(classifier(images(2, 4)).logits, model(images(2, 4)))
    torch.testing.assert_close(classifier.embed(images(2, 4)), model[:3](images(2, 4)))


def test_a_tensor_that_quantises_is_read_as_what_it_stands_for() -> None:
    class Halves(Tensor):
        def dequantize(self) -> Tensor:
            return self.as_subclass(Tensor) / 2

    layer = nn.Linear(2, 3)
    expected = dict(layer.state_dict())
    layer.weight = nn.Parameter((2 * layer.weight.detach()).as_subclass(Halves))
    weights = dict(named_weights(layer))
    assert list(weights) == ["weight", "bias"]
    assert type(weights["weight"]) is Tensor
    torch.testing.assert_close(weights, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_heads_of_float32_buffers(plain, vit, images, dtype) -> None:
    classifier = split_classifier(vit.to(dtype))
    assert match(classifier.fingerprint(), split_classifier(plain).fingerprint()) == "same weights"
    pixel_values = images(2, 32)
    kept, removed = tve_hf.exact_meta_attribution(classifier, pixel_values.to(dtype), grid_size=2, hops=0)
    stored = split_classifier(plain).embed(images(30, 32, seed=2))
    exact = tve_hf.exact_meta_attribution(split_classifier(plain), pixel_values, grid_size=2, hops=0)
    for head in (stored[:3], tve_hf.heads.NeighborsHead(stored, torch.arange(30) % 3, k=25)):
        scores = tve_hf.transfer(kept, removed, classifier.with_head(head), torch.tensor([0, 1]))
        expected = tve_hf.transfer(*exact, split_classifier(plain).with_head(head), torch.tensor([0, 1]))
        assert expected.std() > 0.01
        torch.testing.assert_close(scores, expected, rtol=0.1, atol=0.1)


# --- device maps ----------------------------------------------------------------------------------------------------

MAPS = {
    "backbone on disk": {"vit": "disk", "classifier": "cpu"},
    "head on disk": {"vit": "cpu", "classifier": "disk"},
    "by blocks": {
        "vit.embeddings": "cpu",
        "vit.layers.0": "disk",
        "vit.layers.1": "cpu",
        "vit.layers.2": "disk",
        "vit.layernorm": "cpu",
        "classifier": "disk",
    },
}


@pytest.fixture(params=[*MAPS, "kept in memory", "loaded so"])
def dispatched(vit, plain, tmp_path, request) -> nn.Module:
    """The ViT with its weights elsewhere."""
    if request.param == "kept in memory":
        return cpu_offload(vit, execution_device="cpu")
    if request.param == "loaded so":
        pytest.importorskip("accelerate", minversion="1.15")  # older ones refuse a whole model on disk
        plain.save_pretrained(tmp_path / "saved")
        folder = tmp_path / "offload"
        return ViTForImageClassification.from_pretrained(
            tmp_path / "saved", device_map={"": "disk"}, offload_folder=folder
        ).eval()
    return dispatch_model(vit, MAPS[request.param], offload_dir=tmp_path)


def test_offloaded_weights_are_found_and_stay_offloaded(dispatched, plain, images) -> None:
    before = [name for name, weight in dispatched.named_parameters() if weight.is_meta]
    assert before
    classifier = split_classifier(dispatched)
    assert classifier.device == torch.device("cpu") and classifier.dtype == torch.float32
    _assert_split(classifier, plain, plain.vit, images(2, 32))
    assert classifier.fingerprint() == split_classifier(plain).fingerprint()
    weights = dict(named_weights(dispatched))
    torch.testing.assert_close(weights, dict(plain.state_dict()))
    assert [name for name, weight in dispatched.named_parameters() if weight.is_meta] == before
    with pytest.raises(ValueError, match="placed by its device_map and cannot be moved; leave it where it is"):
        classifier.to("cpu")


def test_a_dispatched_model_with_adapters(vit, images, tmp_path) -> None:
    model = _adapted(vit, _lora(modules_to_save=["classifier"]))
    expected, logits = split_classifier(model).fingerprint(), model(images(2, 32)).logits
    places = {"base_model.model.vit": "disk", "base_model.model.classifier": "cpu"}
    classifier = split_classifier(dispatch_model(model, places, offload_dir=tmp_path))
    assert classifier.fingerprint() == expected
    torch.testing.assert_close(classifier(images(2, 32)).logits, logits)


def test_a_pipeline_leaves_a_dispatched_classifier_where_it_is(tmp_path) -> None:
    folder, explainer = save_pair(tmp_path)
    expected = pipeline("transferable-attribution", model=str(explainer), classifier=str(folder))(noise_image(0))
    processor = ViTImageProcessorPil.from_pretrained(folder)
    model = ViTForImageClassification.from_pretrained(
        folder, device_map={"vit": "disk", "classifier": "cpu"}, offload_folder=tmp_path / "offload"
    ).eval()
    explain = pipeline(
        "transferable-attribution", model=str(explainer), classifier=model, image_processor=processor, device="cpu"
    )
    (found,) = explain(noise_image(0), verify=2)
    assert found["class_idx"] == expected[0]["class_idx"]
    torch.testing.assert_close(found["attribution"], expected[0]["attribution"])
    assert model.vit.layers[0].attention.q_proj.weight.is_meta


def test_nan_is_found_in_an_offloaded_weight(tmp_path) -> None:
    folder = save_classifier(tmp_path / "classifier")
    classifier = split_classifier(folder)
    explainer = make_explainer(classifier)
    with torch.no_grad():
        classifier.backbone.model.vit.layers[1].mlp.fc1.bias[3] = torch.nan
    dispatch_model(classifier.backbone.model, MAPS["backbone on disk"], offload_dir=tmp_path)
    with pytest.raises(ValueError, match=r"NaN or infinity in backbone\.model\.vit\.layers\.1\.mlp\.fc1\.bias"):
        fit(explainer, classifier)


def test_weights_that_were_never_loaded_are_refused() -> None:
    with pytest.raises(ValueError, match=r"The weight 1\.weight was never loaded; load the model"):
        fingerprint(weight for _, weight in named_weights(nn.Sequential(nn.ReLU(), nn.Linear(2, 2, device="meta"))))


def test_weights_come_in_the_order_of_the_state_dict(shared_model, architecture) -> None:
    model = shared_model(architecture)
    expected = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    found = dict(named_weights(model))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shared = nn.Linear(2, 2)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    assert [name for name, _ in named_weights(twice)] == list(twice.state_dict())
    assert list(named_weights(twice, without=[twice[2]])) == []


# --- torch.compile --------------------------------------------------------------------------------------------------


def _compiled(model: nn.Module, how: str, backend) -> nn.Module:
    if how == "whole":
        return torch.compile(model, backend=backend)
    if how == "in place":
        model.compile(backend=backend)
    elif how == "backbone":
        model.vit = torch.compile(model.vit, backend=backend)
    else:
        for block in model.vit.layers:
            block.compile(backend=backend)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("how", "has_run"), itertools.product(["whole", "in place", "backbone", "blocks"], [0, 1]))
def test_compiled_models_are_split_as_they_were_written(vit, plain, images, caplog, how, has_run) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = _compiled(vit, how, counter)
    if has_run:
        model(images(2, 32))
    compiled = counter.frame_count
    assert bool(compiled) == bool(has_run)
    classifier = split_classifier(model)
    expected = split_classifier(plain)
    for seed in range(3):  # the same hooks do not fire twice
        pixel_values = images(2, 32, seed=seed)
        out, truth = classifier(pixel_values), expected(pixel_values)
        torch.testing.assert_close(out.logits, truth.logits)
        torch.testing.assert_close(out.embeddings, truth.embeddings)
        torch.testing.assert_close(out.features, truth.features)
    read = classifier.reading(BLOCKS)(pixel_values)
    torch.testing.assert_close(read.features, truth.features)
    assert classifier.fingerprint() == expected.fingerprint()
    assert counter.frame_count == compiled
    torch.testing.assert_close(model(pixel_values).logits, truth.logits)
    assert counter.frame_count == compiled or not has_run  # what was compiled still is
    assert counter.frame_count > 0


@pytest.mark.slow
@torch.no_grad()
def test_a_model_compiled_by_the_default_backend(vit, plain, images) -> None:
    torch._dynamo.reset()
    model = torch.compile(vit)
    torch.testing.assert_close(model(images(2, 32)).logits, plain(images(2, 32)).logits, rtol=1e-4, atol=1e-4)
    classifier = split_classifier(model)
    assert classifier.backbone.model is vit
    torch.testing.assert_close(classifier(images(2, 32)).logits, plain(images(2, 32)).logits)


def test_a_compiled_model_is_said_to_run_uncompiled(vit, monkeypatch) -> None:
    said = []
    monkeypatch.setattr("tve_hf.classifiers.split.logger.warning", said.append)
    split_classifier(vit)
    assert said == []
    split_classifier(torch.compile(vit, backend="eager"))
    assert said == [
        "ViTForImageClassification is compiled: its embeddings are read by hooks, which compiled code skips, so it "
        "runs uncompiled here."
    ]
