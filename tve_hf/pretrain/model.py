"""What a pre-training run trains: a new explainer, or one that is made over to another backbone; and how."""

import copy
import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..classifiers import SplitClassifier
from ..classifiers.search import is_mean_of
from ..compatibility import fit
from ..configuration_tve import TVEConfig
from ..geometry import normalization
from ..modeling_tve import TVEExplainer
from ..patches import GridSize, as_pair
from .arguments import PretrainArguments, check_patches

# The precision of a frozen backbone, by `mixed_precision`; float32 without.
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def config_for(classifier: SplitClassifier, grid_size: GridSize | None, hops: int, **sizes: Any) -> TVEConfig:
    """Describe an explainer for this classifier's backbone: its image, grid, features and fingerprint.

    Raises:
        ValueError: If the classifier takes no images or has no image processor, or the grid does not divide them.
    """
    probe = classifier.probe_inputs()
    pixel_values = probe["pixel_values"]
    if pixel_values.ndim != 4:
        raise ValueError(
            f"{classifier.name} takes rows of patches, whose grid depends on the image, but an explainer has one "
            'grid; use `tve_hf.methods.explain("exact", ...)` for it.'
        )
    rows, columns = classifier.default_grid() if grid_size is None else as_pair(grid_size)
    with torch.no_grad():
        output = classifier.backbone(**probe)
    names = classifier.backbone.feature_names
    maps = zip(names, output.features, strict=True)
    pooled = [name for name, feature in maps if is_mean_of(output.embeddings, feature)]
    return TVEConfig(
        image_size=list(pixel_values.shape[-2:]),
        grid_size=rows if rows == columns else [rows, columns],
        hops=hops,
        embedding_dim=classifier.embedding_dim,
        feature_names=list(names),
        pooled_feature=pooled[0] if pooled else None,
        feature_dims=[feature.shape[1] for feature in output.features],
        **_identity(classifier),
        **sizes,
    )


def _identity(classifier: SplitClassifier) -> dict[str, Any]:
    """What an explainer's config says of its backbone's name, weights and images.

    Raises:
        ValueError: If nothing says how its images are normalised.
    """
    name = classifier.name
    if classifier.image_processor is None:
        raise ValueError(
            f"{name} came without an image processor, so how its images are normalised is not known; pass "
            "split_classifier(model, image_processor=...), the one that makes its images."
        )
    mean, std = normalization(classifier.image_processor)
    return {
        "image_mean": mean,
        "image_std": std,
        "backbone_name": os.path.basename(name.rstrip("/")) if os.path.isdir(name) else name,
        "backbone_fingerprint": classifier.fingerprint(),
        "quality": None,  # until it is measured with this backbone
    }


def build_explainer(args: PretrainArguments, classifier: SplitClassifier) -> tuple[TVEExplainer, SplitClassifier]:
    """A new explainer, or that of `args.explainer` made over to this backbone; and the classifier that it reads."""
    if args.explainer:
        explainer = TVEExplainer.from_pretrained(args.explainer, dtype=torch.float32)
        explainer = _with_backgrounds(explainer, args)
        classifier = fit(explainer, classifier)
        for name, value in _identity(classifier).items():
            setattr(explainer.config, name, value)
    else:
        sizes = {
            "hidden_size": args.hidden_size,
            "num_hidden_layers": args.num_hidden_layers,
            "num_attention_heads": args.num_attention_heads,
            "intermediate_size": 4 * args.hidden_size,
        }
        config = config_for(classifier, args.grid_size, args.hops, **sizes, **args.states())
        if config.backgrounds == "antithetical":
            check_patches(args.patches_per_image, config.grid_shape)
        explainer = TVEExplainer(config)
    explainer = explainer.to(classifier.device).train()
    if explainer.empty_embedding is not None:
        with torch.no_grad():
            explainer.empty_embedding.copy_(classifier.embed(torch.zeros_like(classifier.probe()))[0])
    return explainer, classifier


def _with_backgrounds(explainer: TVEExplainer, args: PretrainArguments) -> TVEExplainer:
    """This explainer with the backgrounds of the settings: where they are of another kind, its heads start anew."""
    config = copy.deepcopy(explainer.config)
    changed = config.backgrounds != args.backgrounds
    for name, value in args.states().items():
        setattr(config, name, value)
    config.coalition_scale = config.distribution.scale_on(config.grid_shape)
    config.validate_architecture()
    other = TVEExplainer(config)
    anew = tuple(f"trunk.{name}." for name in other.trunk.heads) if changed else ()
    weights = explainer.state_dict()
    other.load_state_dict({name: weights[name] for name in weights if not name.startswith(anew)}, strict=False)
    other.name_or_path = explainer.name_or_path
    return other


def choose_attention(model: nn.Module, mixed_precision: str) -> None:
    """Let a model of transformers, where it is in half precision on a CPU, compute attention by plain products.

    There torch's fused attention takes twice their time forwards, and four times backwards.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if on_cpu and mixed_precision != "no" and isinstance(model, PreTrainedModel):
        model.set_attn_implementation("eager")


def with_sizes_of_explainer(args: PretrainArguments) -> PretrainArguments:
    """Let the settings say what `args.explainer` is.

    Raises:
        ValueError: If they say something else.
    """
    if not args.explainer:
        return args
    config = TVEConfig.from_pretrained(args.explainer)
    names = ("grid_size", "hops", "hidden_size", "num_hidden_layers", "num_attention_heads")
    for name in names:
        asked, trained = getattr(args, name), getattr(config, name)
        if asked not in (trained, PretrainArguments.__dataclass_fields__[name].default):
            raise ValueError(f"{args.explainer} has {name}={trained}; leave {name}={asked} out to go on from it.")
    kept = {name: getattr(config, name) for name in names}
    if config.backgrounds == "random":  # whose distribution and operators stay too, where no others are asked for
        for name, value in args.states().items():
            if value == getattr(PretrainArguments("", ""), name):
                kept[name] = getattr(config, name)
    return replace(args, **kept)


def build_optimizer(
    args: PretrainArguments, explainer: TVEExplainer, steps: int, world: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW and its schedule: a rise, then half a cosine down to 0 at the last of `steps`."""
    decay = [p for p in explainer.parameters() if p.ndim > 1]
    rest = [p for p in explainer.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    # Accelerate steps a prepared schedule once for each process.
    warmup, end = (number * world for number in (int(args.warmup_ratio * steps), steps))
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, end)
