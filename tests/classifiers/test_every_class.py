"""Every class that transformers lists for image classification is split exactly, or refused with the reason."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, Siglip2ImageProcessorPil
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.models.dinat import modeling_dinat
from untouched import left_as_found

from tve_hf import methods
from tve_hf.classifiers import split_classifier

NUM_LABELS = 5
_VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_MLP = _VIT | {"intermediate_size": 64}
_TOWER = {"vision_config": _MLP}
_WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_PYRAMID = _STAGES | {"num_attention_heads": [1, 2, 2, 2], "image_size": 64}
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}

# What makes each model type tiny.
TINY: dict[str, dict[str, Any]] = {
    "beit": _MLP,
    "bit": _STAGES | {"embedding_size": 8, "num_groups": 4},
    "clip": _TOWER,
    "convnext": _STAGES | {"image_size": 64},
    "convnextv2": _STAGES | {"image_size": 64},
    "cvt": {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "data2vec-vision": _MLP,
    "deit": _MLP,
    "dinat": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": 3},
    "dinov2": _VIT | {"mlp_ratio": 2},
    "dinov2_with_registers": _VIT | {"mlp_ratio": 2},
    "donut-swin": _WINDOWS,
    "efficientnet": {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "focalnet": {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1]},
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 32],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 32, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "hidden_sizes": [16, 16, 32, 32],
    },
    "hiera": {
        "image_size": [64, 64],
        "embed_dim": 8,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 2],
        "num_query_pool": 2,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False, False],
    },
    "ijepa": _MLP,
    "imagegpt": {"n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 9},
    "levit": {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [1, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "metaclip_2": _TOWER,
    "mobilenet_v1": {"image_size": 64, "depth_multiplier": 0.125},
    "mobilenet_v2": {"image_size": 64, "depth_multiplier": 0.125},
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
        "num_attention_heads": 2,
    },
    "mobilevitv2": {
        "image_size": 64,
        "width_multiplier": 0.25,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [32, 32, 32],
    },
    "perceiver": {
        "image_size": 32,
        "num_latents": 8,
        "d_latents": 32,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
    },
    "poolformer": _STAGES,
    "pp_lcnet": {"scale": 0.25, "class_expand": 32},
    "pvt": _PYRAMID,
    "pvt_v2": _PYRAMID,
    "regnet": _STAGES | {"embedding_size": 8, "groups_width": 4},
    "resnet": _STAGES | {"embedding_size": 8},
    "segformer": _PYRAMID,
    "shieldgemma2": {
        "vision_config": _MLP,
        "text_config": _TEXT | {"num_key_value_heads": 1, "vocab_size": 8},
        "mm_tokens_per_image": 4,
    },
    "siglip": _TOWER,
    "siglip2": {"vision_config": {key: _MLP[key] for key in _MLP if key != "image_size"} | {"num_patches": 16}},
    "swiftformer": {"image_size": 64, "embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "textnet": {
        "image_size": [64, 64],
        "stem_out_channels": 8,
        "hidden_sizes": [8, 8, 16, 24, 32],
        "conv_layer_kernel_sizes": [[[3, 3]]] * 4,
        "conv_layer_strides": [[2]] * 4,
    },
    "timm_wrapper": {"architecture": "test_resnet"},
    "vit": _MLP,
    "vit_msn": _MLP,
}
CLASSES = {
    name: model_type
    for model_type, names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()
    for name in ([names] if isinstance(names, str) else names)
}
REFUSED = {
    "ImageGPTForImageClassification": r"reads tokens \(input_ids\), not pixels",
    "ShieldGemma2ForImageClassification": r"reads text \(input_ids\) beside the image",
}
# Where D is not the input of one linear layer: what it is instead.
EMBEDDING_DIMS = {
    "DeiTForImageClassificationWithTeacher": 2 * 32,  # class and distillation token
    "LevitForImageClassificationWithTeacher": 2 * 32,  # each head has a norm of its own
    "SwiftFormerForImageClassification": 32,  # both heads are given the same
    "Dinov2ForImageClassification": 2 * 32,  # class token and mean of the patches
    "PerceiverForImageClassificationLearned": 32,  # of one query
}

# Whose last block attends among all tokens, and those of which every block does.
ATTENDS_LAST = {
    "DonutSwinForImageClassification",
    "PvtForImageClassification",
    "PvtV2ForImageClassification",
    "SegformerForImageClassification",
    "SwinForImageClassification",
    "Swinv2ForImageClassification",
}
# Of these, the ones with a convolution between that attention and the head.
CONVOLVES_AFTER = {"PvtV2ForImageClassification", "SegformerForImageClassification"}
ATTENDS = {
    "BeitForImageClassification",
    "CLIPForImageClassification",
    "Data2VecVisionForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "IJepaForImageClassification",
    "MetaClip2ForImageClassification",
    "SiglipForImageClassification",
    "ViTForImageClassification",
    "ViTMSNForImageClassification",
}


def _neighborhood_attention(self: nn.Module, hidden_states: Tensor, output_attentions: bool = False) -> tuple:
    """Stand in for the attention of NATTEN, which is compiled for each machine: the mean over 3 x 3 values."""
    values = self.value(hidden_states).permute(0, 3, 1, 2)
    return (nn.functional.avg_pool2d(values, 3, stride=1, padding=1).permute(0, 2, 3, 1),)


@pytest.fixture(scope="module", autouse=True)
def _natten() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_dinat, "requires_backends", lambda *_: None)
        patch.setattr(modeling_dinat.NeighborhoodAttention, "forward", _neighborhood_attention)
        yield


@pytest.fixture(scope="module")
def make(fitted, processor_of) -> Callable[[str], SimpleNamespace]:
    """Builder of a tiny model of a class, in eval mode, and of its inputs; each model is built once."""
    built: dict[str, SimpleNamespace] = {}

    def inputs_of(processor: Any, side: int) -> Callable[[int], dict[str, Tensor]]:
        def draw(batch: int) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(batch)
            inputs = {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}
            if isinstance(processor, Siglip2ImageProcessorPil):  # images of other shapes, so that some are padded
                given = processor([Image.new("RGB", (40, 20 + 10 * i)) for i in range(batch)], return_tensors="pt")
                shape = given["pixel_values"].shape
                inputs = dict(given) | {"pixel_values": torch.randn(shape, generator=generator)}
            return inputs

        return draw

    def get(name: str) -> SimpleNamespace:
        if name not in built:
            model_type = CLASSES[name]
            if model_type == "timm_wrapper":
                pytest.importorskip("timm")
            config = CONFIG_MAPPING[model_type](**TINY[model_type], num_labels=NUM_LABELS)
            side = TINY[model_type].get("vision_config", TINY[model_type]).get("image_size", 64)
            side = side if isinstance(side, int) else side[0]
            processor = processor_of(3, side, side)
            if model_type == "siglip2":
                processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
            model = fitted(getattr(transformers, name)(config), side)
            built[name] = SimpleNamespace(model=model, processor=processor, inputs=inputs_of(processor, side))
        return built[name]

    return get


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def test_the_table_is_complete() -> None:
    assert set(TINY) == set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    assert set(REFUSED) | set(EMBEDDING_DIMS) <= set(CLASSES)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in REFUSED])
@torch.no_grad()
def test_every_class_is_split_exactly_in_two_passes_and_left_as_found(make, name) -> None:
    case = make(name)
    passes = []
    handle = case.model.register_forward_hook(lambda *_: passes.append(1))
    with left_as_found(case.model):
        classifier = split_classifier(case.model, case.processor)
        assert len(passes) == 2
        for batch in (1, 3):
            inputs = case.inputs(batch)
            logits = _logits(case.model(**inputs))
            embeddings = classifier.embed(**inputs)
            out = classifier(**inputs)
            assert logits.shape == (batch, NUM_LABELS)
            assert embeddings.shape == (batch, classifier.embedding_dim)
            for again in (classifier.head(embeddings), out.logits):
                assert (again - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert logits.std(0).max() > 0.01 * logits.abs().max()  # they do depend on the image
    handle.remove()
    assert classifier.embedding_dim == EMBEDDING_DIMS.get(name, classifier.head.heads[0].weight[0].numel())


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_read_pixels_alone_are_refused(name) -> None:
    model_type = CLASSES[name]
    model = getattr(transformers, name)(CONFIG_MAPPING[model_type](**TINY[model_type])).eval()
    with left_as_found(model), pytest.raises(ValueError, match=f"Cannot split {name}: it {REFUSED[name]}"):
        split_classifier(model)


def test_what_a_model_reads_beside_pixels_must_be_passed(make) -> None:
    case = make("Siglip2ForImageClassification")
    classifier = split_classifier(case.model, case.processor)
    pixel_values = case.inputs(2)["pixel_values"]
    assert classifier.backbone.feature_names == ()  # rows of patches are not images
    with pytest.raises(ValueError, match="also reads pixel_attention_mask, spatial_shapes: pass all that"):
        classifier(pixel_values)
    with pytest.raises(ValueError, match=r"shape \(2, 16, 192\)"):
        classifier.embed_masked(pixel_values, torch.ones(2, 1, 16, dtype=torch.bool), 4)


@pytest.mark.parametrize(
    "name",
    [
        "DeiTForImageClassificationWithTeacher",
        "LevitForImageClassificationWithTeacher",
        "SwiftFormerForImageClassification",
    ],
)
def test_two_heads_are_averaged_and_both_left_out_of_the_fingerprint(make, name) -> None:
    case = make(name)
    classifier = split_classifier(case.model, case.processor)
    assert [part.scale for part in classifier.backbone.parts] == [0.5, 0.5]
    fingerprint = classifier.fingerprint()
    other = copy.deepcopy(classifier)
    with torch.no_grad():
        for head in other.head.heads:
            head.weight.add_(1)
    assert other.fingerprint() == fingerprint


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in {*REFUSED, "Siglip2ForImageClassification"}])
def test_attention_methods_serve_a_class_or_say_that_it_does_not_attend(make, name) -> None:
    case = make(name)
    classifier = split_classifier(case.model, case.processor)
    pixel_values = case.inputs(2)["pixel_values"]
    last = ATTENDS | ATTENDS_LAST
    for method, served in {
        "attention_cam": last,
        "partial_lrp": last - CONVOLVES_AFTER,
        "legrad": ATTENDS,
        "transformer_attribution": ATTENDS,
    }.items():
        with left_as_found(case.model):
            if name in served:
                scores = methods.explain(method, classifier, pixel_values, torch.tensor([1, 3]), 4)
                assert torch.isfinite(scores).all()
                assert (scores.flatten(1).std(1) > 0).all()
            else:
                with pytest.raises(
                    ValueError, match="(block, which this method reads|cannot pass relevance); use another"
                ):
                    methods.explain(method, classifier, pixel_values, torch.tensor([1, 3]), 4)
