"""What an explainer learns from: patches or coalitions drawn for each image, and the backbone's embeddings of them.

Labels come in pairs, (B, k, D) each: kept and removed of k patches, or a coalition and its antithetic of k = K / 2.
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor

from ..classifiers import SplitClassifier
from ..configuration_tve import TVEConfig
from ..patches import as_pair, neighborhoods, sample_patches
from .arguments import PretrainArguments

Pair = tuple[Tensor, Tensor]
# The parts of the loss that are reported, by `backgrounds`.
LOSSES = {"antithetical": ("kept_loss", "removed_loss"), "random": ("loss",)}


def draw(args: PretrainArguments, turn: int, turns: int, images: int, config: TVEConfig) -> Pair:
    """Draw which images of a whole step are mirrored, (images,) bool, and their patches, (images, k), or coalitions.

    Seeded by the step alone, so that neither resuming nor the number of processes changes what is drawn; or by an
    image's number instead, so that no epoch does.

    Returns:
        As said; coalitions are boolean, (images, K, N).
    """
    generator = torch.Generator().manual_seed(args.seed * turns + turn)
    mirrored = torch.zeros(images, dtype=torch.bool)
    if args.flip:
        mirrored = torch.rand(images, generator=generator) < 0.5
    return mirrored, _draw_states(args, images, config, generator)


def _draw_states(args: PretrainArguments, images: int, config: TVEConfig, generator: Generator) -> Tensor:
    if config.backgrounds == "random":
        return config.distribution.draw(images, args.coalitions_per_image, config.grid_shape, generator)
    return sample_patches(images, math.prod(as_pair(config.grid_size)), args.patches_per_image, generator)


def exact_labels(classifier: SplitClassifier, pixel_values: Tensor, states: Tensor, config: TVEConfig) -> Pair:
    """Compute the labels of what was drawn, patches (B, k) or coalitions (B, K, N): pairs, (B, k, D) each."""
    if config.backgrounds == "random":
        embeddings = embed_coalitions(classifier, pixel_values, states, config).unflatten(1, (-1, 2))
        return embeddings[:, :, 0], embeddings[:, :, 1]
    near = neighborhoods(config.grid_size, config.hops, pixel_values.device)[states]  # N(z), (B, k, N)
    keep = torch.cat([near, ~near], 1)  # Eq. 6, as `exact_meta_attribution` has it
    kept, removed = classifier.embed_masked(pixel_values, keep, config.grid_size).chunk(2, dim=1)
    return kept, removed


def embed_coalitions(classifier: SplitClassifier, pixel_values: Tensor, states: Tensor, config: TVEConfig) -> Tensor:
    """Return G(S; x) of coalitions (B, K, N), (B, K, D); the removal operators take turns, pair by pair."""
    pairs = states.unflatten(1, (-1, 2))  # (B, K / 2, 2, N)
    turns = len(config.label_removals)
    parts = [
        classifier.embed_masked(pixel_values, pairs[:, turn::turns].flatten(1, 2), config.grid_size, removal)
        for turn, removal in enumerate(config.label_removals)
    ]
    embeddings = torch.empty(*states.shape[:2], parts[0].shape[-1], dtype=parts[0].dtype, device=parts[0].device)
    for turn, part in enumerate(parts):
        embeddings.unflatten(1, (-1, 2))[:, turn::turns] = part.unflatten(1, (-1, 2))
    return embeddings


def model_inputs(labels: Pair, states: Tensor, config: TVEConfig) -> dict[str, Any]:
    """What the explainer's `forward` reads of them."""
    first, second = labels
    if config.backgrounds == "random":
        return {"coalitions": states, "coalition_labels": torch.stack([first, second], 2).flatten(1, 2)}
    return {"patch_idx": states, "kept_labels": first, "removed_labels": second}


@torch.no_grad()
def label_weights(classifier: SplitClassifier, config: TVEConfig, pixel_values: Tensor, states: Tensor) -> Tensor:
    """Weights that let every dimension say as much in the loss, (2, D); or (D,) for random backgrounds.

    They are the mean variance over the variance of each dimension, of kept and of removed - G(x), which are what is to
    be learnt. For random backgrounds one over the variance within an image, and over D: a loss of 1 then says no more
    than each image's mean. A dimension that hardly moves gets at most a hundred times the mean weight of its part.

    Args:
        pixel_values: images to measure the variances on, (B, 3, H, W).
        states: some of their patches, (B, k), or coalitions, (B, K, N).
    """
    first, second = (values.float() for values in exact_labels(classifier, pixel_values, states, config))
    if config.backgrounds == "random":
        both = torch.cat([first, second], 1)  # (B, K, D)
        variances = both.var(1).mean(0)
        return 1 / variances.clamp(min=0.01 * variances.mean()) / len(variances)
    differences = torch.stack([first, second - classifier.embed(pixel_values)[:, None]])  # (2, B, k, D)
    variances = differences.float().flatten(1, 2).var(1)
    return variances.mean() / variances.clamp(min=0.01 * variances.mean(1, keepdim=True))
