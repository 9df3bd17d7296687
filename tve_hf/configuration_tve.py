"""Configuration of the TVE explainer."""

import copy
import math
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, ViTMAEConfig
from transformers.configuration_utils import SubConfigSpec

from .coalitions import Coalitions

CoalitionName = Literal["smooth", "independent", "uniform", "shapley"]  # the keys of `coalitions.COALITIONS`
# Far more than any model has: building millions of layers from a few bytes of JSON would take hours, and the sizes of
# wider ones cannot be counted in 64 bits.
_MAX_LAYERS, _MAX_SIZE = 1000, 2**20


@strict
class BackboneReaderConfig(PreTrainedConfig):
    """Describe an explainer that reads a backbone's features: what it reads, its grid, layers, and which backbone.

    What the fields are is said in [`TVEConfig`].
    """

    image_size: int | list[int] | tuple[int, int] = 224
    grid_size: int | list[int] | tuple[int, int] = 14
    embedding_dim: int = 768
    num_channels: int = 3
    image_mean: list[float | int] | None = None
    image_std: list[float | int] | None = None
    feature_dims: list[int] = field(default_factory=list)
    feature_names: list[str] = field(default_factory=list)

    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    backbone_name: str | None = None
    backbone_fingerprint: str | None = None

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        return _pair(self.image_size)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        return _pair(self.grid_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of one patch, in pixels."""
        (height, width), (rows, cols) = self.image_shape, self.grid_shape
        return height // rows, width // cols

    @property
    def num_patches(self) -> int:
        """Number N of patches; patch (row, col) has index row * cols + col."""
        rows, cols = self.grid_shape
        return rows * cols

    def validate_architecture(self) -> None:
        """Check the fields against each other; `@strict` calls this at the end of `__init__`."""
        for name in ("image_size", "grid_size"):
            value = getattr(self, name)
            if not isinstance(value, int) and len(value) != 2:
                raise ValueError(f"{name}={value} has {len(value)} entries, give one number or two (vertical first).")
        sizes = {"image_size": min(self.image_shape), "grid_size": min(self.grid_shape)}
        sizes |= {f"feature_dims[{i}]": dim for i, dim in enumerate(self.feature_dims)}
        for name in ("embedding_dim", "num_channels", "hidden_size", "num_attention_heads", "intermediate_size"):
            sizes[name] = getattr(self, name)
        _check_range(1, sizes, most=_MAX_SIZE)
        layers = {"num_hidden_layers": self.num_hidden_layers, "feature_dims": len(self.feature_dims)}
        _check_range(0, layers, most=_MAX_LAYERS)
        for pixels, patches in zip(self.image_shape, self.grid_shape, strict=True):
            if pixels % patches:
                raise ValueError(
                    f"image_size={self.image_size} cannot be cut into grid_size={self.grid_size} patches of whole "
                    f"pixels, choose a grid_size that divides it."
                )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.num_channels:
                raise ValueError(
                    f"{name} has {len(value)} entries, give one per channel (num_channels={self.num_channels})."
                )
        if len(self.feature_names) != len(self.feature_dims):
            raise ValueError(
                f"feature_names has {len(self.feature_names)} entries and feature_dims {len(self.feature_dims)}, "
                f"give one name per feature map."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} cannot be split into num_attention_heads={self.num_attention_heads}, "
                f"choose a number of heads that divides it."
            )


@strict
class TVEConfig(BackboneReaderConfig):
    r"""Describe a [`TVEExplainer`]: its trunk, its patch grid and the backbone G that it was trained to imitate.

    The image is cut into a grid of patches and the explainer predicts, for every patch z, G of the image with only the
    neighbourhood N(z) visible and G of the image with only N(z) hidden (TVE, arXiv 2312.15359, Eq. 6). Or, for random
    backgrounds, the means of G over coalitions S of patches with z and of those without it (Eq. 3; `coalitions.py`).

    Args:
        backgrounds: `"antithetical"`, the two states of Eq. 6; or `"random"`, the means of Eq. 3.
        coalitions: random backgrounds: the distribution of S, one of `coalitions.COALITIONS`. `"shapley"` predicts
            Shapley values, which sum to G(x) - G(empty image).
        coalition_prob: `"independent"` coalitions: probability with which each patch is kept.
        coalition_scale: `"smooth"` coalitions: standard deviation of the blur of their fields, in patches; a tenth of
            the grid's shorter side by default.
        pooled_feature: `"backbone"` trunk, random backgrounds: the one of `feature_names` whose mean over positions is
            G(x), so that predictions start from what each position adds to it; None if there is none.
        refine_coalitions: random backgrounds: the distribution of the coalitions that `refine` computes. Chosen on
            the validation images.
        rule: how predictions become scores where nothing else is asked for, a key of `attribution.RULES`; None is
            the default for explainers with these `backgrounds`. Fitted on the validation images for random ones.
        label_removals: random backgrounds: what replaced removed pixels in training, one or several operators in turn.
        trunk: `"backbone"` reads the features that the backbone computes anyway and predicts differences of
            embeddings; `"vit_mae"` is the paper's: it reads pixels only, through a Mask-AutoEncoder and mixer heads.
        image_size: height and width of the normalised image, in pixels; one number means square.
        grid_size: rows and columns of patches, P in the paper; one number means square.
        hops: radius of N(z) in patches, Chebyshev distance, the paper's xi. 2 means a 5 x 5 window.
        embedding_dim: length D of an embedding G(x).
        num_channels: channels of the image.
        image_mean: per-channel mean that was subtracted from the backbone's images.
        image_std: per-channel standard deviation that divided them.
        feature_dims: `"backbone"` trunk: channels C_i of each feature map that it reads. Empty means that it reads
            pixels and the embedding only.
        feature_names: names of the classifier's modules that these maps come from, one per entry of `feature_dims`.
        hidden_size: `"backbone"` trunk: width of its transformer layers.
        num_hidden_layers: number of its transformer layers; 0 leaves each position to itself.
        num_attention_heads: heads per layer; must divide `hidden_size`.
        intermediate_size: width of the layers' MLP.
        hidden_act: activation of the transformer layers and of the mixer heads.
        layer_norm_eps: epsilon of all layer norms outside the Mask-AutoEncoder.
        initializer_range: standard deviation of freshly drawn weights.
        mae_config: `"vit_mae"` trunk: configuration of the Mask-AutoEncoder; `None` means `ViTMAEConfig()`. The
            explainer sees every patch, so it works on a copy whose `mask_ratio` is 0.
        num_head_layers: mixer layers of each of its two heads, n in the paper.
        activate_first_head_layer: whether the first of them has its activation, as in the paper; the research code
            has none there.
        shared_trunk: whether one Mask-AutoEncoder serves both heads, or each has its own as in the research code.
        backbone_name: name or path of the classifier whose backbone the explainer was trained on.
        backbone_fingerprint: fingerprint of that backbone's weights, to notice a different one.
        quality: what the last validation of its pre-training measured with that backbone: `num_images` held out, and
            what `tve_hf.pretrain.held_out` names of them, all finite; None if nothing was measured. See
            `tve_hf.compatibility.quality_in_words`.

    Example:

    ```python
    >>> from tve_hf import TVEConfig, TVEExplainer

    >>> config = TVEConfig(image_size=224, grid_size=14, embedding_dim=768, feature_dims=[768], feature_names=["norm"])
    >>> explainer = TVEExplainer(config)
    >>> config.num_patches, config.patch_size
    (196, (16, 16))
    ```"""

    model_type = "tve"
    sub_configs_defaults = {"mae_config": SubConfigSpec(config_class=ViTMAEConfig, optional=True)}

    trunk: Literal["backbone", "vit_mae"] = "backbone"
    hops: int = 2

    backgrounds: Literal["antithetical", "random"] = "antithetical"
    coalitions: CoalitionName = "smooth"
    coalition_prob: float = 0.5
    coalition_scale: float | None = None
    pooled_feature: str | None = None
    label_removals: list[str] = field(default_factory=lambda: ["zero"])
    refine_coalitions: CoalitionName = "independent"
    rule: str | None = None
    quality: dict[str, float | int] | None = None

    mae_config: dict | PreTrainedConfig | None = None
    num_head_layers: int = 17
    activate_first_head_layer: bool = True
    shared_trunk: bool = True

    @property
    def distribution(self) -> Coalitions:
        """The distribution of coalitions, of random backgrounds."""
        return Coalitions(self.coalitions, self.coalition_prob, self.coalition_scale)

    @property
    def is_efficient(self) -> bool:
        """Whether phi sums to G(x) - G(empty image), as Shapley values do."""
        return self.backgrounds == "random" and self.coalitions == "shapley"

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn `mae_config` into a config object, and give the Mask-AutoEncoder trunk one if it has none."""
        if __package__ == "tve_hf":
            # A pushed explainer names a copy of the pipeline's code, for those without this package. Here the task is
            # registered, and the copy shall be neither loaded nor asked trust for.
            kwargs.pop("custom_pipelines", None)
        if self.trunk == "vit_mae" and self.mae_config is None:
            self.mae_config = {}
        super().__post_init__(**kwargs)
        self.coalition_scale = self.distribution.scale_on(self.grid_shape)
        if self.mae_config is not None:
            mae_config: Any = copy.deepcopy(self.mae_config)
            mae_config.mask_ratio = 0.0
            self.mae_config = mae_config

    def validate_architecture(self) -> None:
        """Check the fields against each other; `@strict` calls this at the end of `__init__`."""
        super().validate_architecture()
        _check_range(0, {"hops": self.hops})
        _check_range(1, {"num_head_layers": self.num_head_layers}, most=_MAX_LAYERS)
        layers = ("num_hidden_layers", "decoder_num_hidden_layers")
        _check_range(0, {f"mae_config.{name}": getattr(self.mae_config, name, 0) for name in layers}, most=_MAX_LAYERS)
        self._validate_mae()
        if self.quality is not None and self.quality.get("num_images", 0) < 1:
            raise ValueError('quality does not say of how many images it is, give "num_images" too, or None.')
        for name, value in (self.quality or {}).items():
            if not math.isfinite(value):
                raise ValueError(f"quality[{name!r}] is {value}, leave out what was not measured.")
        if self.backgrounds == "random":
            self.distribution.check(self.grid_shape)
            if self.pooled_feature is not None:
                self._validate_pooled_feature(self.pooled_feature)
            if not self.label_removals:
                raise ValueError('label_removals is empty, name what replaces removed pixels, for example ["zero"].')

    def _validate_pooled_feature(self, name: str) -> None:
        """Check that this is a feature map of as many channels as an embedding has."""
        dims = dict(zip(self.feature_names, self.feature_dims, strict=True))
        if dims.get(name) != self.embedding_dim:
            raise ValueError(
                f"pooled_feature={name!r} has {dims.get(name, 'no')} channels and an embedding {self.embedding_dim}; "
                "name a feature map whose mean is the embedding, or None."
            )

    def _validate_mae(self) -> None:
        """Check that the Mask-AutoEncoder cuts the image into exactly the patches of the grid."""
        mae: Any = self.mae_config
        if self.trunk != "vit_mae":
            if mae is not None:
                raise ValueError(f'mae_config is not used by trunk="{self.trunk}", remove it or set trunk="vit_mae".')
            return
        (height, width), (rows, cols) = self.image_shape, self.grid_shape
        # transformers builds the position embeddings and the decoder of a ViTMAE for square grids of square patches.
        if rows != cols or height != width:
            raise ValueError(
                f'trunk="vit_mae" needs a square image and grid, not image_size={self.image_size} and '
                f'grid_size={self.grid_size}; use trunk="backbone" for others.'
            )
        if not isinstance(mae.patch_size, int):
            raise ValueError(f"mae_config.patch_size={mae.patch_size} must be one int, for example {height // rows}.")
        if _pair(mae.image_size) != (height, width) or mae.patch_size * rows != height:
            raise ValueError(
                f"mae_config with image_size={mae.image_size} and patch_size={mae.patch_size} does not give a "
                f"{rows} x {cols} grid on {height} x {width} pixels, "
                f"set its image_size={height} and patch_size={height // rows}."
            )
        if mae.num_channels != self.num_channels:
            raise ValueError(
                f"mae_config.num_channels is {mae.num_channels}, set it to num_channels={self.num_channels}."
            )


def _check_range(least: int, values: dict[str, int], most: int | None = None) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} is {value}, it must be {'at least 1' if least else '0 or more'}.")
        if most is not None and value > most:
            raise ValueError(f"{name} is {value}, it must be at most {most}.")


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


__all__ = ["BackboneReaderConfig", "TVEConfig"]
