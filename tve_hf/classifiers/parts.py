"""The two parts of a split classifier as modules: backbone G and the classifier's own head H_t."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .search import HeadPart
from .tracing import as_map, feature_in, first_tensor, hooked, logits_of
from .wrapped import is_compiled, uncompiled


@dataclass
class SplitClassifierOutput(ModelOutput):
    """One pass of a classifier.

    Args:
        logits: (B, C).
        embeddings: G(x), what the head reads, (B, D).
        features: maps of the backbone on the way there, a tuple of (B, C_i, h_i, w_i); prefix tokens are dropped.
    """

    logits: Tensor | None = None
    embeddings: Tensor | None = None
    features: tuple[Tensor, ...] | None = None


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
            given = embeddings[..., part.start : part.stop].reshape(-1, *part.input_shape)
            # Of a model that is spread over devices, the last part may lie on another one.
            logits = part.pool(module(given)).reshape(*embeddings.shape[:-1], -1).to(embeddings.device)
            shares.append(logits if part.scale == 1 else part.scale * logits)
        return shares[0] if len(shares) == 1 else torch.stack(shares).sum(0)


class Backbone(nn.Module):
    """G: runs the classifier and reads, through hooks, what its head is given and chosen feature maps."""

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[HeadPart],
        feature_names: tuple[str, ...] = (),
        other_inputs: tuple[str, ...] = (),
    ):
        super().__init__()
        self.model = model
        self.parts = tuple(parts)
        self.feature_names = feature_names
        self.other_inputs = other_inputs  # what the model reads besides pixel_values
        self.compiled = is_compiled(model)  # asked once: to look at every module in each pass would cost percents

    @property
    def embedding_dim(self) -> int:
        return max(part.stop for part in self.parts)

    @property
    def head_names(self) -> tuple[str, ...]:
        """The modules that give the logits, or shares of them."""
        return tuple(part.name for part in self.parts)

    @property
    def head_name(self) -> str:
        """The module that gives the logits.

        Raises:
            ValueError: If they are the sum of several.
        """
        if len(self.parts) > 1:
            raise ValueError(f"The logits are a sum over {', '.join(self.head_names)}; read head_names instead.")
        return self.head_names[0]

    def forward(self, pixel_values: Tensor, **inputs: Tensor) -> SplitClassifierOutput:
        """Return the embeddings, (B, D), the features, and the model's own logits, (B, C)."""
        missing = [name for name in self.other_inputs if name not in inputs]
        if missing:
            raise ValueError(
                f"{type(self.model).__name__} also reads {', '.join(missing)}: pass all that its image processor "
                "returns, classifier(**image_processor(image, return_tensors='pt'))."
            )
        embeddings: dict[int, Tensor] = {}
        features: dict[str, Tensor] = {}

        def hooks() -> Iterator[Any]:
            for part in self.parts:

                def keep_input(module: nn.Module, args: tuple, kwargs: dict, part: HeadPart = part) -> None:
                    given = first_tensor((*args, *kwargs.values()))
                    if given is not None:
                        embeddings[part.start] = part.read(given).flatten(1).to(pixel_values.device)

                yield self.model.get_submodule(part.name).register_forward_pre_hook(keep_input, with_kwargs=True)
            for name in self.feature_names:

                def keep_output(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
                    feature = as_map(feature_in(output, pixel_values), *pixel_values.shape[-2:])
                    if feature is not None:
                        features[name] = feature.to(pixel_values.device)

                yield self.model.get_submodule(name).register_forward_hook(keep_output)

        with uncompiled(self.model) if self.compiled else nullcontext(), hooked(hooks()):
            logits = logits_of(self.model(pixel_values, **inputs))
        missing = [part.name for part in self.parts if part.start not in embeddings]
        missing += [name for name in self.feature_names if name not in features]
        if missing and not self.compiled and is_compiled(self.model):  # since it was split
            self.compiled = True
            return self(pixel_values, **inputs)
        if missing:
            raise ValueError(
                f"{missing[0]!r} gives no embedding or feature map of images of {tuple(pixel_values.shape[-2:])} "
                "pixels; pass images of the size that the classifier was made for, or split it again if it changed."
            )
        embedding = torch.cat([embeddings[start] for start in sorted(embeddings)], -1)  # (B, D)
        if embedding.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"The head is given {embedding.shape[-1]} values for images of {tuple(pixel_values.shape[-2:])} "
                f"pixels, but expects {self.embedding_dim}; pass images of the size that the classifier was made for."
            )
        return SplitClassifierOutput(
            logits=logits,
            embeddings=embedding,
            features=tuple(features[name] for name in self.feature_names),
        )
