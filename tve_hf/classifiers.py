"""Split an image classifier f = H_t o G into backbone G and head H_t by looking at one forward pass, not by name."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from .fingerprint import fingerprint
from .parts import Backbone, Head, SplitClassifierOutput
from .patches import GridSize, mask_patches
from .pretrained_cfg import id2label_from, image_processor_from, pretrained_cfg_of
from .splitting import MAX_HEADS, check_inputs, differ, find_features, find_head, probe_like, trace


class SplitClassifier(nn.Module):
    """An image classifier f = H_t o G as its two parts, `backbone` and `head`.

    Made by `split_classifier`; `with_head` puts another head on the same backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        embedding_dim: int,
        id2label: dict[int, str],
        multi_label: bool = False,
        image_processor: Any = None,
        name: str = "classifier",
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.embedding_dim = embedding_dim
        self.id2label = id2label
        self.multi_label = multi_label
        self.image_processor = image_processor
        self.name = name
        self.train(backbone.model.training)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def probe(self) -> Tensor:
        """Return two images of noise of the size that the classifier takes, on its device and in its dtype."""
        return probe_like(self.backbone.model, self.image_processor)["pixel_values"]

    def forward(self, pixel_values: Tensor, **inputs: Tensor) -> SplitClassifierOutput:
        """Run f once on (B, 3, H, W): logits (B, C), embeddings (B, D) and feature maps.

        Args:
            pixel_values: images as the classifier's image processor makes them.
            inputs: what else the processor returns for them and the classifier reads, such as a mask of padding.
        """
        output = self.backbone(pixel_values, **inputs)
        output.logits = self.head(output.embeddings)
        return output

    def embed(self, pixel_values: Tensor, **inputs: Tensor) -> Tensor:
        """Return G(x), (B, D); arguments as for `forward`."""
        return self.backbone(pixel_values, **inputs).embeddings

    def embed_masked(
        self, pixel_values: Tensor, keep: Tensor, grid_size: GridSize, removal: str = "zero", chunk_size: int = 128
    ) -> Tensor:
        """Return G of each image with only some patches kept, in passes of at most `chunk_size` masked images.

        Args:
            pixel_values: (B, 3, H, W).
            keep: K sets of patches for each image, boolean (B, K, N).
            grid_size, removal: as for `patches.mask_patches`.

        Returns:
            Embeddings, (B, K, D).
        """
        batch, num_masks = keep.shape[:2]
        image_of = torch.arange(batch, device=pixel_values.device).repeat_interleave(num_masks)
        masks = keep.flatten(0, 1).unsqueeze(1).to(pixel_values.device)  # (B K, 1, N)
        rows = [
            self.embed(mask_patches(pixel_values[images], part, grid_size, removal).squeeze(1))
            for images, part in zip(image_of.split(chunk_size), masks.split(chunk_size), strict=True)
        ]
        return torch.cat(rows).unflatten(0, (batch, num_masks))

    def log_prob(self, embeddings: Tensor) -> Tensor:
        """Return log H_t(e) in float32, (..., D) -> (..., C): log-softmax, or log-sigmoid of a multi-label head."""
        logits = self.head(embeddings).float()
        return F.logsigmoid(logits) if self.multi_label else logits.log_softmax(-1)

    def with_head(
        self,
        head: nn.Module | Callable[[Tensor], Tensor],
        id2label: dict[int, str] | None = None,
        multi_label: bool = False,
    ) -> "SplitClassifier":
        """Put another head H_t, (..., D) -> (..., C), on this backbone; the backbone is shared, not copied.

        Raises:
            ValueError: If the head does not accept this backbone's embeddings, or `id2label` has another length.
        """
        probe = torch.zeros(2, self.embedding_dim, device=self.device, dtype=self.dtype)
        try:
            with torch.no_grad():
                logits = head(probe)
        except RuntimeError as error:
            raise ValueError(
                f"The head does not accept embeddings of {self.embedding_dim} dimensions ({error}); "
                "pass one made for this backbone."
            ) from error
        num_labels = logits.shape[-1]
        if id2label is None:
            id2label = {i: f"LABEL_{i}" for i in range(num_labels)}
        if len(id2label) != num_labels:
            raise ValueError(f"id2label names {len(id2label)} classes, but the head gives {num_labels} logits.")
        module = head if isinstance(head, nn.Module) else _Function(head)
        return SplitClassifier(
            self.backbone, module, self.embedding_dim, id2label, multi_label, self.image_processor, self.name
        )

    def reading(self, feature_names: tuple[str, ...]) -> "SplitClassifier":
        """Return this classifier with `features` read from these modules; backbone and head are shared, not copied.

        Raises:
            ValueError: If the classifier has no such module.
        """
        modules = dict(self.backbone.model.named_modules())
        missing = [name for name in feature_names if name not in modules]
        if missing:
            raise ValueError(
                f"{self.name} has no module {missing[0]!r} to read a feature map from; choose one it has."
            )
        backbone = Backbone(self.backbone.model, self.backbone.parts, feature_names, self.backbone.other_inputs)
        return SplitClassifier(
            backbone, self.head, self.embedding_dim, self.id2label, self.multi_label, self.image_processor, self.name
        )

    def fingerprint(self) -> str:
        """Summarise the backbone's weights, head excluded; compare two with `tve_hf.fingerprint.match`."""
        model = self.backbone.model
        heads = [model.get_submodule(name) for name in self.backbone.head_names]
        head = {id(t) for module in heads for t in module.state_dict(keep_vars=True).values()}
        return fingerprint(t for t in model.state_dict(keep_vars=True).values() if id(t) not in head)


class _Function(nn.Module):
    """A plain callable as a module, so that it can be a submodule."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.function(embeddings)


def split_classifier(
    model: nn.Module | str | os.PathLike,
    image_processor: Any = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> SplitClassifier:
    """Split an image classifier into backbone and head, f = H_t o G, by watching two passes over noise.

    The head is the innermost module with weights whose output is the logits; the embedding is what it is given.
    Where the logits are a fixed sum or mean of several modules' outputs, the embedding is all that they are given.
    The split is accepted only if `head(embed(x))` gives the logits of another probe.

    Args:
        model: a classifier in eval mode, of transformers, timm or any `nn.Module` that maps pixel_values (B, 3, H, W)
            to logits (B, C); or a name or folder for `AutoModelForImageClassification.from_pretrained`.
        image_processor: its image processor, for the size of the probe and for what the model reads besides pixels;
            by default loaded with the model if that is a name, and made from `pretrained_cfg` if it has one, as
            timm's models do.
        dtype: precision to load a named model in, by default the one that it was saved in.
        trust_remote_code: whether a named model may run code from its repository.

    Raises:
        ValueError: If the model is in train mode, reads text, or gives its logits by other ways than these.
    """
    if not isinstance(model, nn.Module):
        name = os.fspath(model)
        image_processor = image_processor or AutoImageProcessor.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
        loaded, report = AutoModelForImageClassification.from_pretrained(
            name,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        classifier = split_classifier(loaded, image_processor)
        prefixes = tuple(f"{part}." for part in classifier.backbone.head_names)
        untrained = [key for key in report["missing_keys"] if key.startswith(prefixes)]
        if untrained:  # transformers has drawn them at random
            raise ValueError(
                f"{name} has no trained head ({sorted(untrained)[0]} is missing): pass a model trained to classify."
            )
        return classifier
    check_inputs(model)
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0]} is in train mode, where dropout is active; call model.eval() first.")

    config = getattr(model, "config", None)
    pretrained_cfg = pretrained_cfg_of(model)
    name = getattr(config, "_name_or_path", None) or pretrained_cfg.get("architecture") or type(model).__name__
    if image_processor is None:
        image_processor = image_processor_from(pretrained_cfg)
    probe = probe_like(model, image_processor)
    logits, calls = trace(model, **probe)
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{name} gives NaN or infinite logits for plain noise: download or train it again, or load it in float32."
        )
    try:
        parts = find_head(model, logits, calls)
    except ValueError:
        if logits.numel() > MAX_HEADS:
            raise
        # Two images give fewer logits than there may be heads: look at more, to tell what each contributes.
        probe = probe_like(model, image_processor, MAX_HEADS + 1)
        logits, calls = trace(model, **probe)
        parts = find_head(model, logits, calls)
    pixel_values = probe["pixel_values"]
    feature_names = find_features(calls, parts[0].name, pixel_values)
    del calls
    num_labels = logits.shape[-1]
    id2label = getattr(config, "id2label", None) or id2label_from(pretrained_cfg, num_labels)
    if not id2label or len(id2label) != num_labels:
        id2label = {i: f"LABEL_{i}" for i in range(num_labels)}
    backbone = Backbone(model, parts, feature_names, tuple(probe)[1:])
    classifier = SplitClassifier(
        backbone,
        Head(model, parts),
        backbone.embedding_dim,
        id2label=id2label,
        multi_label=num_labels == 1 or getattr(config, "problem_type", None) == "multi_label_classification",
        image_processor=image_processor,
        name=name,
    )
    with torch.no_grad():
        output = classifier.backbone(**(probe | {"pixel_values": pixel_values.flip(-1).roll(1, 0)}))
        again = classifier.head(output.embeddings)
    if differ(again, output.logits):
        names = ", ".join(
            f"{part.name!r}{', averaged over positions' if part.pooled and not part.by_max else ''}" for part in parts
        )
        raise ValueError(
            f"Cannot split {type(model).__name__}: its logits depend on more than the input of {names}; "
            "wrap it so that one module gives the logits from one embedding."
        )
    return classifier
