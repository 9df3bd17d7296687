"""Configuration of the ViT-Shapley explainer."""

from typing import Any

from huggingface_hub.dataclasses import strict

from ..configuration_tve import BackboneReaderConfig


@strict
class ShapleyConfig(BackboneReaderConfig):
    r"""Describe a [`ShapleyExplainer`]: what it reads, its patch grid, its classes and the one classifier it is for.

    The fields that are not listed are those of [`TVEConfig`]'s `"backbone"` trunk, and mean the same.

    Args:
        id2label: names of the C classes, as in every config of transformers.
        head_fingerprint: 16 numbers by which to recognise the head whose probabilities the explainer learnt; another
            head needs another explainer.

    Example:

    ```python
    >>> from tve_hf import ShapleyConfig, ShapleyExplainer

    >>> config = ShapleyConfig(image_size=64, grid_size=8, embedding_dim=192, id2label={0: "cat", 1: "dog"})
    >>> explainer = ShapleyExplainer(config)
    >>> config.num_patches, config.num_labels
    (64, 2)
    ```"""

    model_type = "vit_shapley"

    head_fingerprint: list[float | int] | None = None

    def validate_architecture(self) -> None:
        """Check the fields against each other; `@strict` calls this at the end of `__init__`."""
        super().validate_architecture()
        labels: Any = self.id2label
        if sorted(labels) != list(range(len(labels))) or not labels:
            raise ValueError(f"id2label has the keys {list(labels)[:8]}, number the classes from 0.")
        if self.num_patches < 2:
            raise ValueError(f"grid_size={self.grid_size} has a single patch, choose one of at least two.")


__all__ = ["ShapleyConfig"]
