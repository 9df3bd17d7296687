"""Tiny zero-shot models of every kind that transformers lists, with random weights, and their processors."""

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
    SiglipProcessor,
    ViTImageProcessorPil,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

SIDE = 32
WORDS = "a an the this is of photo picture drawing cat dog two dogs remote control on red chair . , it".split()
VOCAB = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[BOS]", *WORDS, "[EOS]"])}
POSITIONS = 64  # to which transformers' pipeline pads for SigLIP

_MLP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_VISION = _MLP | {"image_size": SIDE, "patch_size": 8}
_TEXT = _MLP | {
    "vocab_size": len(VOCAB),
    "max_position_embeddings": POSITIONS,
    "bos_token_id": VOCAB["[BOS]"],
    "eos_token_id": VOCAB["[EOS]"],
    "pad_token_id": VOCAB["[PAD]"],
}
_CLIP = {"vision_config": _VISION, "text_config": _TEXT, "projection_dim": 24}

# What makes each model type tiny.
TINY: dict[str, dict[str, Any]] = {
    "align": {
        "vision_config": {"image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
        "text_config": _TEXT,
        "projection_dim": 80,
    },
    "altclip": _CLIP | {"text_config": _TEXT | {"project_dim": 32}},
    "blip": _CLIP | {"text_config": _TEXT | {"is_decoder": False}},
    "blip-2": {
        "vision_config": _VISION,
        "qformer_config": _TEXT | {"encoder_hidden_size": 32, "use_qformer_text_input": True},
        "image_text_hidden_size": 16,
        "num_query_tokens": 4,
    },
    "chinese_clip": _CLIP,
    "clip": _CLIP,
    "clipseg": _CLIP,
    "metaclip_2": _CLIP,
    "siglip": {"vision_config": _VISION, "text_config": _TEXT | {"projection_size": 32}},
    "siglip2": {
        "vision_config": {key: _VISION[key] for key in _VISION if key != "image_size"} | {"num_patches": 16},
        "text_config": _TEXT | {"projection_size": 32},
    },
    "tipsv2": {"vision_config": _VISION, "text_config": _TEXT},
    "videoprism": {
        "vision_config": _MLP | {"num_spatial_layers": 1, "num_temporal_layers": 1, "num_auxiliary_layers": 1},
        "text_config": _TEXT,
    },
}


def make_model(model_type: str, **config: Any) -> Any:
    """Build a tiny model in eval mode, with the weights that its config draws."""
    name = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type]
    return getattr(transformers, name)(CONFIG_MAPPING[model_type](**(TINY[model_type] | config))).eval()


def make_tokenizer(model_max_length: int = POSITIONS) -> PreTrainedTokenizerFast:
    """A tokenizer of single words, [BOS] before and [EOS] after them."""
    tokenizer = Tokenizer(models.WordLevel(VOCAB, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[(word, VOCAB[word]) for word in ("[BOS]", "[EOS]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor(model_type: str, **tokenizer: Any) -> CLIPProcessor | SiglipProcessor:
    """A processor for tiny images and words."""
    image_processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    if model_type == "siglip2":
        image_processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    kind = SiglipProcessor if "siglip" in model_type else CLIPProcessor
    return kind(image_processor=image_processor, tokenizer=make_tokenizer(**tokenizer))
