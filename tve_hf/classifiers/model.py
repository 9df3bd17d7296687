"""A split image classifier f = H_t o G: the two parts, and what is asked of them."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fingerprint import fingerprint
from ..heads import BinaryHead, as_head, try_head
from ..patches import TOKEN_DROP, GridSize, dividing_grid, embed_masked_images
from .labels import check_names, find_class, names_by_class
from .parts import Backbone, Head, SplitClassifierOutput
from .prompts import PromptHead, TextTower, check_prompts, no_text_tower
from .token_drop import embed_without_tokens
from .tracing import probe_like
from .wrapped import full_name, is_dispatched, named_weights, placement


class SplitClassifier(nn.Module):
    """An image classifier f = H_t o G as its two parts, `backbone` and `head`.

    Made by `split_classifier`; `with_head` and `with_prompts` put another head on the same backbone.
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
        text: TextTower | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.embedding_dim = embedding_dim
        self.id2label = id2label
        self.multi_label = multi_label
        self.image_processor = image_processor
        self.name = name
        self.text = text  # of a zero-shot model: makes heads of prompts
        self.train(backbone.model.training)

    @property
    def device(self) -> torch.device:
        return placement(self.backbone.model)[0]

    @property
    def dtype(self) -> torch.dtype:
        tensors = chain(self.backbone.parameters(), self.backbone.buffers())
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)

    @property
    def has_own_head(self) -> bool:
        """Whether the head is the one that the backbone's model ends with."""
        model, head = self.backbone.model, self.head
        return isinstance(head, Head) and (
            head.parts == self.backbone.parts
            and all(m is model.get_submodule(part.name) for m, part in zip(head.heads, head.parts, strict=True))
        )

    def probe(self) -> Tensor:
        """Return two images of noise of the size that the classifier takes, on its device and in its dtype."""
        return self.probe_inputs()["pixel_values"]

    def probe_inputs(self) -> dict[str, Tensor]:
        """Return the probe with all else that the classifier reads: `classifier(**classifier.probe_inputs())`."""
        return probe_like(self.backbone.model, self.image_processor, image_size=self.backbone.image_size)

    def forward(self, pixel_values: Tensor, **inputs: Tensor) -> SplitClassifierOutput:
        """Run f once on (B, 3, H, W): logits (B, C), embeddings (B, D) and feature maps.

        Args:
            pixel_values: images as the classifier's image processor makes them.
            inputs: what else the processor returns for them and the classifier reads, such as a mask of padding.
        """
        output = self.backbone(pixel_values, **inputs)
        if not self.has_own_head:  # otherwise its logits are those of the pass
            output.logits = self.head(output.embeddings)
        return output

    def embed(self, pixel_values: Tensor, **inputs: Tensor) -> Tensor:
        """Return G(x), (B, D), without feature maps.

        Args:
            pixel_values: (B, 3, H, W), as the classifier's image processor makes them.
            inputs: what else the processor returns for them and the classifier reads.
        """
        return self.backbone.embed(pixel_values, **inputs)

    @torch.no_grad()
    def default_grid(self, pixel_values: Tensor | None = None, **inputs: Tensor) -> tuple[int, int]:
        """Return the grid (rows, cols) to explain these images on where nothing else is asked for.

        That of the classifier's own patch tokens if it has some, 16 at most along a side, and they divide the image;
        otherwise `patches.dividing_grid`. Images that come as rows of patches have the grid of their patches.

        Args:
            pixel_values: images, (B, 3, H, W); of the classifier's own size if None.
            inputs: what else the processor returns for them and the classifier reads.

        Raises:
            ValueError: If no grid divides the images, or images in rows of patches have different ones.
        """
        if pixel_values is None:
            return self.default_grid(**self.probe_inputs())
        if "spatial_shapes" in inputs:
            shapes = sorted({(rows, columns) for rows, columns in inputs["spatial_shapes"].tolist()})
            if len(shapes) > 1:
                grids = ", ".join(f"{rows} x {columns}" for rows, columns in shapes)
                raise ValueError(f"The images have grids of {grids} patches; explain those of one grid at a time.")
            return shapes[0]
        height, width = pixel_values.shape[-2:]
        first = {name: value[:1] for name, value in inputs.items()}
        map_sizes = {tuple(feature.shape[-2:]) for feature in self.backbone(pixel_values[:1], **first).features}
        if len(map_sizes) == 1:  # the same through all depths: patch tokens; a CNN's maps shrink
            ((rows, columns),) = map_sizes
            if max(rows, columns) <= 16 and height % rows == 0 and width % columns == 0:
                return rows, columns
        return dividing_grid(height, width)

    def images_per_pass(self, pixel_values: Tensor, chunk_size: int | None = None) -> int:
        """Return how many masked images go through G at once, the bound on memory: `chunk_size`, unless it is None.

        Else 128; but on a CPU no more than 2^20 pixels, 20 images of 224 x 224, whose activations stay in its caches
        and are not asked of the system anew for each layer: several times faster for a CNN.
        """
        if chunk_size is not None:
            return chunk_size
        fitting = 2**20 // max(1, pixel_values.shape[-2] * pixel_values.shape[-1])
        return max(1, min(128, fitting)) if pixel_values.device.type == "cpu" else 128

    def embed_masked(
        self,
        pixel_values: Tensor,
        keep: Tensor,
        grid_size: GridSize,
        removal: str = "zero",
        chunk_size: int | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """Return G of each image with only some patches kept, in passes of at most `chunk_size` masked images.

        Args:
            pixel_values: (B, 3, H, W).
            keep: K sets of patches for each image, boolean (B, K, N).
            grid_size: of the N patches, a side or (rows, cols); it divides the image.
            removal: what replaces removed pixels, a key of `patches.REMOVALS`; or `patches.TOKEN_DROP`, which takes
                the tokens of removed patches out of a vision transformer's sequence, in passes of equally many tokens.
            chunk_size: as `images_per_pass` by default.
            inputs: what else the classifier reads, one row for each image.

        Returns:
            Embeddings, (B, K, D).
        """
        chunk_size = self.images_per_pass(pixel_values, chunk_size)
        if removal == TOKEN_DROP:
            return embed_without_tokens(self.backbone, pixel_values, keep, grid_size, chunk_size)
        return embed_masked_images(self.embed, pixel_values, keep, grid_size, removal, chunk_size, inputs)

    def class_index(self, asked: int | str) -> int:
        """Return the class of this number, or of this name or comma-separated synonym, in upper or lower case.

        Raises:
            ValueError: If it is no class, or the name of several; the message names the nearest, or all of them.
        """
        return find_class(asked, self.id2label, self.name)

    def check_classes(self, class_idx: Tensor, batch_size: int, several: bool = False) -> None:
        """Check that class_idx names a class of this head for each image, (B,); or K classes, (B, K), if `several`.

        Raises:
            ValueError: If it has another shape or dtype, or a class does not exist.
        """
        if torch.compiler.is_compiling():  # of a traced graph no values are known
            return
        fits = class_idx.ndim == 1 or (several and class_idx.ndim == 2)
        fits = fits and len(class_idx) == batch_size and class_idx.numel() > 0
        fits = fits and class_idx.dtype in (torch.int64, torch.int32)
        num_labels = len(self.id2label)
        # A zero-shot head without prompts has none, and says so when it is asked.
        if not fits or (num_labels and not 0 <= int(class_idx.min()) <= int(class_idx.max()) < num_labels):
            raise ValueError(
                f"class_idx {class_idx.tolist()} must name, for each of {batch_size} images, a class between 0 and "
                f"{num_labels - 1}, as a tensor of whole numbers."
            )

    def log_prob(self, embeddings: Tensor) -> Tensor:
        """Return log H_t(e) in float32, (..., D) -> (..., C): log-softmax, or log-sigmoid of a multi-label head.

        Finite wherever the head's logits are.
        """
        logits = self.head(embeddings).float()
        return F.logsigmoid(logits) if self.multi_label else logits.log_softmax(-1)

    def to(self, *args: Any, **kwargs: Any) -> "SplitClassifier":
        """Move or cast the classifier, as every module.

        Raises:
            ValueError: If it is spread over devices by accelerate, which then moves its inputs and weights.
        """
        if is_dispatched(self):
            raise ValueError(
                f"{self.name} was placed by its device_map and cannot be moved; leave it where it is, or load it "
                "without device_map."
            )
        return super().to(*args, **kwargs)

    def with_head(
        self,
        head: nn.Module | Callable[[Tensor], Tensor] | Tensor | Any,
        id2label: dict[int, str] | Sequence[str] | None = None,
        multi_label: bool = False,
    ) -> "SplitClassifier":
        """Put another head H_t, (..., D) -> (..., C), on this backbone; the backbone is shared, not copied.

        Args:
            head: a module; a function of embeddings; class prototypes (C, D), compared by their cosine; or a fitted
                classifier of scikit-learn. See `tve_hf.heads` for these with settings, and for nearest neighbours.
                It is put into eval mode.
            id2label: names of the classes; by default those of the estimator. If it names two classes and the head
                gives one logit z, the classes have the logits (0, z).
            multi_label: whether each class has a probability of its own, sigmoid(logit); so it is for a lone logit.

        Raises:
            TypeError: If it is no head.
            ValueError: If the head does not accept this backbone's embeddings, or `id2label` has another length.
        """
        module = as_head(head, self.embedding_dim, multi_label).eval()
        probe = torch.randn(2, 3, self.embedding_dim, generator=torch.Generator().manual_seed(0))
        probe[0, 0] = 0
        if isinstance(head, Tensor):
            module = module.to(self.device)
        module, num_labels = try_head(module, probe.to(self.device, self.dtype))
        if id2label is None:
            id2label = getattr(module, "id2label", None) or {i: f"LABEL_{i}" for i in range(num_labels)}
        names = names_by_class(id2label)
        if num_labels == 1 and len(names) == 2:
            module, num_labels, multi_label = BinaryHead(module), 2, False
        check_names(names, num_labels)
        return self._with(head=module, id2label=names, multi_label=multi_label or num_labels == 1)

    def with_prompts(
        self, candidate_labels: Sequence[str] | None = None, hypothesis_template: str | Sequence[str] | None = None
    ) -> "SplitClassifier":
        """Put a head of other prompts on the image tower of a zero-shot model; only its text tower is run.

        With a softmax, a single label has probability 1 whatever the image shows: give it alternatives.

        Args:
            candidate_labels: the classes, which become `id2label` as they are; by default those it has.
            hypothesis_template: a sentence with {} in the place of the label, or several to average over as in CLIP's
                zero-shot evaluation; by default the one it has, at first "This is a photo of {}.".

        Raises:
            ValueError: If there is no text tower, or labels or templates are empty, blank, repeated or too long.
        """
        if self.text is None:
            raise no_text_tower(self.name)
        before = self.head if isinstance(self.head, PromptHead) else None
        if candidate_labels is None and before is not None:
            candidate_labels = before.labels or None
        if hypothesis_template is None and before is not None:
            hypothesis_template = before.templates
        labels, templates = check_prompts(candidate_labels, hypothesis_template)
        head = self.text.head(labels, templates)
        return self._with(head=head, id2label=dict(enumerate(labels)), multi_label=self.text.sigmoid)

    def reading(self, feature_names: tuple[str, ...]) -> "SplitClassifier":
        """Return this classifier with `features` read from these modules; backbone and head are shared, not copied.

        Raises:
            ValueError: If the classifier has no such module.
        """
        names = tuple(full_name(self.backbone.model, name, self.name) for name in feature_names)
        return self._with(backbone=self.backbone.reading(names))

    def _with(self, **changes: Any) -> "SplitClassifier":
        """This classifier with some parts replaced; the others are shared, not copied."""
        parts = ("backbone", "head", "embedding_dim", "id2label", "multi_label", "image_processor", "name", "text")
        return SplitClassifier(**({part: getattr(self, part) for part in parts} | changes))

    def fingerprint(self, full: bool = False) -> str:
        """Summarise the backbone's weights, head excluded; compare two with `tve_hf.fingerprint.match`.

        They are the weights that it computes with: active adapters count as if they were merged, others do not.

        Args:
            full: read every value, so that a change of a single one is seen; otherwise a sample of each tensor.
        """
        model = self.backbone.model
        heads = [model.get_submodule(name) for name in self.backbone.head_names]
        return fingerprint((weight for _, weight in named_weights(model, without=heads)), full)
