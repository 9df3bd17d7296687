"""The two parts of a split classifier as modules: backbone G and the classifier's own head H_t.

A pass of either needs no more than this file.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..patches import is_grid, tiling_grid, token_grid
from .wrapped import is_compiled, uncompiled


@dataclass
class SplitClassifierOutput(ModelOutput):
    """One pass of a classifier.

    Args:
        logits: (B, C).
        embeddings: G(x), what the head reads, (B, D).
        features: maps of the backbone on the way to it, a tuple of (B, C_i, h_i, w_i); prefix tokens are dropped.
    """

    logits: Tensor | None = None
    embeddings: Tensor | None = None
    features: tuple[Tensor, ...] | None = None


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """The tensor itself, or those of a tuple, list or mapping."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else (value,)
    return tuple(item for item in values if isinstance(item, Tensor))


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first one of a tuple, list or mapping."""
    return next(iter(tensors_in(value)), None)


def logits_in(output: Any) -> Tensor:
    """The logits in what a model returns, (B, C); axes of one element, as of a single query, are dropped.

    Raises:
        ValueError: If it returns none of that shape.
    """
    logits = getattr(output, "logits", None)
    logits = first_tensor(output) if logits is None else logits
    if logits is not None and logits.ndim > 2 and logits[0].numel() == max(logits.shape[1:]):
        logits = logits.flatten(1)
    if logits is None or logits.ndim != 2:
        returned = type(output).__name__ if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"The model returned {returned}; pass an image classifier whose logits have shape (batch, classes)."
        )
    return logits


@dataclass(frozen=True)
class HeadPart:
    """A module that gives the logits, or a fixed share of them, from a part of the embedding.

    Args:
        name: the module's.
        pooled: axes of positions, over which the model takes the mean or maximum of the module's output. The mean is
            taken of its input instead, which is the same for a linear module such as a 1 x 1 convolution; for a
            maximum, the inputs at all positions are the embedding.
        by_max: whether it is the maximum.
        scale: the logits are the sum over all parts of scale * output.
        start: where its input begins in the embedding; parts that read the same input share it.
        input_shape: of that input for one image.
    """

    name: str
    pooled: tuple[int, ...] = ()
    by_max: bool = False
    scale: float = 1.0
    start: int = 0
    input_shape: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.input_shape)

    def pool(self, output: Tensor) -> Tensor:
        """The module's output with its positions pooled."""
        if not self.pooled:
            return output
        return output.amax(self.pooled, keepdim=True) if self.by_max else output.mean(self.pooled, keepdim=True)

    def read(self, module_input: Tensor) -> Tensor:
        """What of the module's input is a part of the embedding."""
        return module_input if self.by_max else self.pool(module_input)


@dataclass(frozen=True)
class MapLayout:
    """How to see what a module gives as a feature map, whatever the size of the images.

    Args:
        place: which of the module's output tensors it is.
        axes: "channels_first", (B, C, h, w); "channels_last", (B, h, w, C); or "tokens", (B, prefix + h * w, C).
        prefix: how many tokens come before those of the patches, such as a class token.
    """

    place: int
    axes: Literal["channels_first", "channels_last", "tokens"]
    prefix: int = 0

    def tensor_in(self, output: Any, num_images: int) -> Tensor | None:
        """The tensor of a module's output that is the map, as the module gives it; None if it has other rows."""
        tensors = tensors_in(output)[self.place : self.place + 1]
        return next((tensor for tensor in tensors if tensor.shape[:1] == (num_images,)), None)

    def as_map(self, tensor: Tensor | None, height: int, width: int) -> Tensor | None:
        """That tensor as a map (B, C, h, w) of images of that height and width; None if it is none of theirs."""
        if tensor is None or tensor.ndim != (3 if self.axes == "tokens" else 4):
            return None
        if self.axes == "tokens":
            grid = tiling_grid(tensor.shape[1] - self.prefix, height, width)
            return None if grid is None else tensor[:, self.prefix :].transpose(1, 2).unflatten(2, grid)
        feature = tensor if self.axes == "channels_first" else tensor.permute(0, 3, 1, 2)
        return feature if is_grid(feature.shape[2], feature.shape[3], height, width) else None


def find_layout(tensors: Sequence[Tensor], images: Tensor) -> MapLayout | None:
    """Find the first of a module's output tensors that is a feature map of images (B, C, H, W), and its layout.

    Channels-first and channels-last maps are told apart by which of them tiles the image with the squarer cells.
    """
    height, width = images.shape[-2:]
    for place, tensor in enumerate(tensors):
        if tensor.shape[:1] != images.shape[:1]:  # some have a row for each window or patch instead of each image
            continue
        if tensor.ndim == 3 and (grid := token_grid(tensor.shape[1], height, width)) is not None:
            return MapLayout(place, "tokens", grid[0])
        layouts = (MapLayout(place, "channels_first"), MapLayout(place, "channels_last"))
        maps = [(layout, seen) for layout in layouts if (seen := layout.as_map(tensor, height, width)) is not None]
        if maps:
            return min(maps, key=lambda pair: abs(height * pair[1].shape[3] - width * pair[1].shape[2]))[0]
    return None


class Head(nn.Module):
    """H_t: a classifier's own last module, applied to embeddings with any leading dimensions, (..., D) -> (..., C).

    Several modules where the logits are their weighted sum.
    """

    def __init__(self, model: nn.Module, parts: Sequence[HeadPart]):
        super().__init__()
        self.parts = tuple(parts)
        self.heads = nn.ModuleList(model.get_submodule(part.name) for part in parts)

    @property
    def module(self) -> nn.Module:
        """The module that gives the logits, where it is one."""
        (module,) = self.heads
        return module

    def forward(self, embeddings: Tensor) -> Tensor:
        shares = []
        for part, module in zip(self.parts, self.heads, strict=True):
            module_input = embeddings[..., part.start : part.stop].reshape(-1, *part.input_shape)
            # Of a model that is spread over devices, the last part may lie on another one.
            logits = part.pool(module(module_input)).reshape(*embeddings.shape[:-1], -1).to(embeddings.device)
            shares.append(logits if part.scale == 1 else part.scale * logits)
        return shares[0] if len(shares) == 1 else torch.stack(shares).sum(0)


class Backbone(nn.Module):
    """G: runs the classifier and reads, through hooks, what its head reads, and chosen feature maps.

    Args:
        model: the whole classifier.
        parts: its head.
        feature_names: the modules whose outputs are read as feature maps.
        other_inputs: names of what the model reads besides pixel_values.
        layouts: of the map that each module gives, by its name. Backbones of one model share them: where the split
            saw no map, as in a module that gives one for larger images alone, the first pass with one adds it.
        image_size: (height, width) of the images that the model takes, where it does not say so itself.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[HeadPart],
        feature_names: tuple[str, ...] = (),
        other_inputs: tuple[str, ...] = (),
        layouts: dict[str, MapLayout] | None = None,
        image_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.model = model
        self.parts = tuple(parts)
        self.feature_names = feature_names
        self.other_inputs = other_inputs
        self.layouts = {} if layouts is None else layouts
        self.image_size = image_size
        self.compiled = is_compiled(model)  # asked once: to look at every module in each pass would cost percents

    @property
    def embedding_dim(self) -> int:
        return max(part.stop for part in self.parts)

    @property
    def head_names(self) -> tuple[str, ...]:
        """The modules that give the logits, or shares of them."""
        return tuple(part.name for part in self.parts)

    def reading(self, feature_names: tuple[str, ...]) -> "Backbone":
        """This backbone with feature maps of these modules; all else is shared."""
        return Backbone(self.model, self.parts, feature_names, self.other_inputs, self.layouts, self.image_size)

    def forward(self, pixel_values: Tensor, **inputs: Tensor) -> SplitClassifierOutput:
        """Return the embeddings, (B, D), the features, and the model's own logits, (B, C)."""
        logits, embeddings, features = self._run(pixel_values, inputs, self.feature_names)
        return SplitClassifierOutput(logits=logits, embeddings=embeddings, features=features)

    def embed(self, pixel_values: Tensor, **inputs: Tensor) -> Tensor:
        """Return the embeddings alone, (B, D): no feature map is held, which for many masked images is most memory."""
        return self._run(pixel_values, inputs, ())[1]

    def layout_of(self, name: str, output: Any, images: Tensor) -> MapLayout | None:
        """How to see what a module has given for images (B, C, H, W) as a feature map; None if it is none."""
        if name not in self.layouts:
            layout = find_layout(tensors_in(output), images)
            if layout is None:
                return None
            self.layouts[name] = layout
        return self.layouts[name]

    def _run(
        self, pixel_values: Tensor, inputs: dict[str, Tensor], feature_names: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        self._check_inputs(inputs)
        head_inputs: dict[int, Tensor] = {}
        features: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            if self.compiled:
                hooks.enter_context(uncompiled(self.model))
            for part in self.parts:
                hooks.enter_context(self._keep_input(part, head_inputs, pixel_values))
            for name in feature_names:
                hooks.enter_context(self._keep_map(name, features, pixel_values))
            logits = logits_in(self.model(pixel_values, **inputs))
        missing = [part.name for part in self.parts if part.start not in head_inputs]
        missing += [name for name in feature_names if name not in features]
        if missing and not self.compiled and is_compiled(self.model):  # since it was split
            self.compiled = True
            return self._run(pixel_values, inputs, feature_names)
        if missing:
            raise ValueError(
                f"{missing[0]!r} gives no embedding or feature map of images of {tuple(pixel_values.shape[-2:])} "
                "pixels; pass images of the size that the classifier was made for, or split it again if it changed."
            )
        embeddings = torch.cat([head_inputs[start] for start in sorted(head_inputs)], -1)  # (B, D)
        if embeddings.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"The head is given {embeddings.shape[-1]} values for images of {tuple(pixel_values.shape[-2:])} "
                f"pixels, but expects {self.embedding_dim}; pass images of the size that the classifier was made for."
            )
        return logits, embeddings, tuple(features[name] for name in feature_names)

    def _check_inputs(self, inputs: dict[str, Tensor]) -> None:
        missing = [name for name in self.other_inputs if name not in inputs]
        if missing:
            raise ValueError(
                f"{type(self.model).__name__} also reads {', '.join(missing)}: pass all that its image processor "
                "returns, classifier(**image_processor(image, return_tensors='pt'))."
            )

    def _keep_input(self, part: HeadPart, head_inputs: dict[int, Tensor], pixel_values: Tensor) -> Any:
        """Keep what a part of the head reads, (B, its share of D), until the handle is left."""

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            module_input = first_tensor((*args, *kwargs.values()))
            if module_input is not None:
                head_inputs[part.start] = part.read(module_input).flatten(1).to(pixel_values.device)

        return self.model.get_submodule(part.name).register_forward_pre_hook(keep, with_kwargs=True)

    def _keep_map(self, name: str, features: dict[str, Tensor], pixel_values: Tensor) -> Any:
        """Keep a module's feature map, (B, C, h, w), until the handle is left."""

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            layout = self.layout_of(name, output, pixel_values)
            if layout is None:
                return
            feature = layout.as_map(layout.tensor_in(output, pixel_values.shape[0]), *pixel_values.shape[-2:])
            if feature is not None:
                features[name] = feature.to(pixel_values.device)

        return self.model.get_submodule(name).register_forward_hook(keep)
