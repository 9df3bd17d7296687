"""A classifier and its explainer, small, random and saved, for the tests of what is built on both."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from tve_hf import ShapleyConfig, ShapleyExplainer, SplitClassifier, TVEExplainer, split_classifier
from tve_hf.pretrain import config_for
from tve_hf.vit_shapley.coalitions import head_fingerprint

LABELS = ["tabby, tabby cat", "Egyptian cat", "Cardigan, Welsh corgi", "cardigan", "crane", "crane", "sports car"]
SIDE, GRID, HOPS = 32, 4, 1


def save_classifier(folder: Path, seed: int = 0, processor: BaseImageProcessor | None = None, **config) -> Path:
    """Save a ViT of two layers on 32 x 32 pixels and its processor, which resizes unless another is given."""
    torch.manual_seed(seed)
    settings = {
        "image_size": SIDE,
        "patch_size": 8,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "initializer_range": 0.2,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
    }
    model = ViTForImageClassification(ViTConfig(**(settings | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (processor or ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})).save_pretrained(folder)
    return folder


def make_explainer(classifier: SplitClassifier, **settings: Any) -> TVEExplainer:
    """Make an explainer for this classifier whose maps are not constant."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = config_for(classifier, grid_size=GRID, hops=HOPS, **sizes, **settings)
    torch.manual_seed(1)
    explainer = TVEExplainer(config).eval()
    with torch.no_grad():
        explainer.empty_embedding.copy_(classifier.embed(torch.zeros_like(classifier.probe()))[0])
        for name in explainer.trunk.heads:
            explainer.trunk.get_submodule(name).weight.normal_(std=0.2)
    return explainer


def make_shapley_explainer(
    classifier: SplitClassifier, grid_size: int | tuple[int, int] = GRID, spread: bool = True
) -> ShapleyExplainer:
    """Make a ViT-Shapley explainer for this classifier, whose maps are not constant if spread."""
    output = classifier(classifier.probe())
    config = ShapleyConfig(
        image_size=SIDE,
        grid_size=grid_size,
        embedding_dim=classifier.embedding_dim,
        feature_names=list(classifier.backbone.feature_names),
        feature_dims=[feature.shape[1] for feature in output.features],
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=classifier.id2label,
        backbone_name="tiny",
        backbone_fingerprint=classifier.fingerprint(),
        head_fingerprint=head_fingerprint(classifier),
    )
    torch.manual_seed(1)
    explainer = ShapleyExplainer(config).eval()
    with torch.no_grad():
        explainer.null.copy_(classifier.log_prob(classifier.embed(torch.zeros_like(classifier.probe()))).exp()[0])
        if spread:
            explainer.trunk.values.weight.normal_(std=0.2)
    return explainer


def save_pair(folder: Path, **classifier_settings) -> tuple[Path, Path]:
    """Save a classifier and its explainer; return their folders."""
    classifier = save_classifier(folder / "classifier", **classifier_settings)
    explainer = make_explainer(split_classifier(classifier))
    explainer.save_pretrained(folder / "explainer")
    return classifier, folder / "explainer"


def save_models(folder: Path, number: int) -> Path:
    """Save a classifier, explainers of it of every kind, under the kind's name, and pictures; return the folder."""
    classifier = split_classifier(save_classifier(folder / "classifier"))
    for backgrounds in ("random", "antithetical"):
        make_explainer(classifier, backgrounds=backgrounds).save_pretrained(folder / backgrounds)
    make_shapley_explainer(classifier).save_pretrained(folder / "shapley")
    save_noise(folder / "noise.parquet", number)
    return folder


# Settings of a short pre-training run.
RUN: dict[str, Any] = {
    "grid_size": GRID,
    "hops": HOPS,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patches_per_image": 3,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "mixed_precision": "no",
    "save_steps": 2,
}


def save_run(folder: Path, number: int = 8) -> dict[str, Any]:
    """Save a tiny classifier and a parquet file of images; return settings of a pre-training run on them."""
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [noise_image(seed) for seed in range(number)]}, features=features)
    rows.to_parquet(folder / "noise.parquet")
    return {
        "classifier": str(save_classifier(folder / "classifier")),
        "train_files": [str(folder / "noise.parquet")],
    } | RUN


def noise_image(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A coarse random picture, so that images differ after a resize too."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def save_noise(path: Path, number: int, **columns: list) -> Path:
    """Save such pictures, with other columns if given, as a parquet file."""
    import datasets  # an extra, which most tests do without

    rows = {"image": [noise_image(seed) for seed in range(number)]} | columns
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return path


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same bits."""
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
