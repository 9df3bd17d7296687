"""tve-hf bench."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .parser import dataclass_of

if TYPE_CHECKING:
    from ..benchmark.speed import Action
    from ..classifiers import SplitClassifier
    from ..modeling_tve import TVEExplainer

# Classifiers of random weights, as a config of transformers and its fields: time does not depend on the weights.
_RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit-base": ("vit", {}),
    "vit-large": (
        "vit",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "deit-base": ("deit", {"architectures": ["DeiTForImageClassification"]}),
    "swin-base": ("swin", {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}),
    "swin-large": ("swin", {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}),
    "resnet-101": ("resnet", {"depths": [3, 4, 23, 3]}),
    "resnet-152": ("resnet", {"depths": [3, 8, 36, 3]}),
}
# Explainers of random weights, by what is compared: the package's own; the paper's with one Mask-AutoEncoder, and with
# one each for kept and removed, as the research code was released.
_EXPLAINERS: dict[str, dict[str, Any]] = {
    "tve": {},
    "tve_vit_mae": {"trunk": "vit_mae"},
    "tve_research": {"trunk": "vit_mae", "shared_trunk": False, "activate_first_head_layer": False},
}
_METHODS = [*_EXPLAINERS, "legrad_last_2", "legrad", "grad_cam", "chefer_cam", "rollout", "ig@50", "rise@50"]
_METHODS += ["rise@4000", "kernel_shap@25", "kernel_shap@400"]


@dataclass
class BenchArguments:
    """Settings of one comparison of speed."""

    classifiers: list[str] = field(
        default_factory=lambda: list(_RANDOM),
        metadata={"help": f"Names or folders; or, with random weights, {', '.join(_RANDOM)}."},
    )
    model: str | None = field(
        default=None, metadata={"help": "Explainer of the classifier for tve; by default one of random weights."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(_METHODS),
        metadata={
            "help": f"{', '.join(_EXPLAINERS)}, legrad_last_2, or methods, sampling ones as name@samples. What takes "
            "many samples is measured on some, and scaled up."
        },
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16], metadata={"help": "Images of a batch."})
    repeats: int = field(default=20, metadata={"help": "Rounds, in each of which every method has its turn."})
    grid_size: int | None = field(default=None, metadata={"help": "P; the classifier's default grid by default."})
    hidden_size: int = field(default=256, metadata={"help": "Of the random explainer tve."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Of the random explainer tve."})
    num_attention_heads: int = field(default=4, metadata={"help": "Of the random explainer tve."})
    backgrounds: str = field(default="random", metadata={"help": "Of the random explainer tve."})
    rule: str | None = field(default=None, metadata={"help": "Of tve; that of the explainer by default."})
    num_labels: int = field(default=1000, metadata={"help": "Classes of a classifier of random weights."})
    image_size: int = field(default=224, metadata={"help": "Of a classifier of random weights, in pixels."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "A GPU if there is one, by default."})
    channels_last: bool = field(default=False, metadata={"help": "Lay convolutions out with channels last."})
    output_dir: str | None = field(default=None, metadata={"help": "Where speed.json, speed.md and speed.png go."})


def bench(arguments: list[str]) -> int:
    """Measure what explanations cost beside the prediction: time, operations, memory."""
    args = dataclass_of(bench, BenchArguments, arguments)
    report = compare(args)
    from ..benchmark.speed import table_of

    print(table_of(report))
    return 0


def compare(args: BenchArguments) -> dict[str, Any]:
    """Run one comparison, and write it where `args.output_dir` says.

    Raises:
        ValueError, OSError: If a setting is wrong, a name is unknown, or a folder cannot be written to.
    """
    import torch
    from transformers import set_seed

    from ..attribution import rule_named
    from ..benchmark import speed
    from ..benchmark.judge import parse_method
    from ..inputs import whole_number

    whole_number("repeats", args.repeats, least=2)
    for size in args.batch_sizes:
        whole_number("batch_sizes", size)
    if args.dtype not in (known := ("float32", "bfloat16", "float16")):
        raise ValueError(f"Unknown dtype {args.dtype!r}; choose one of {', '.join(known)}.")
    if args.rule is not None:
        rule_named(args.rule)
    for spec in args.methods:
        if spec not in _EXPLAINERS and spec not in speed.NAMED:
            parse_method(spec)
    set_seed(0)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report: dict[str, Any] = {
        "settings": asdict(args),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "measured": [],
    }
    for name in args.classifiers:
        classifier = _classifier(name, args, device)
        grid = (args.grid_size, args.grid_size) if args.grid_size else classifier.default_grid()
        explainers, unmade = _explainers(classifier, grid, args)
        for size in args.batch_sizes:
            pixel_values = torch.randn(size, *classifier.probe().shape[1:]).to(device, classifier.dtype)
            actions, refused = _actions(classifier, explainers, grid, pixel_values, args)
            rows = speed.measure(actions, pixel_values, args.repeats)
            entry = {"classifier": name, "batch_size": size, "grid": list(grid), "rows": rows}
            report["measured"].append(entry | {"refused": unmade | refused})
    if args.output_dir is not None:
        from pathlib import Path

        speed.write(report, Path(args.output_dir))
    return report


def _classifier(name: str, args: BenchArguments, device: Any) -> "SplitClassifier":
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil

    from ..classifiers import split_classifier
    from ..classifiers.layout import with_channels_last

    if name in _RANDOM:
        kind, sizes = _RANDOM[name]
        config = AutoConfig.for_model(kind, num_labels=args.num_labels, image_size=args.image_size, **sizes)
        model = AutoModelForImageClassification.from_config(config).eval().to(getattr(torch, args.dtype))
        side = {"height": args.image_size, "width": args.image_size}
        classifier = split_classifier(model, ViTImageProcessorPil(size=side))
        classifier.name = name
    else:
        classifier = split_classifier(name, dtype=getattr(torch, args.dtype))
    classifier = classifier.to(device)
    return with_channels_last(classifier) if args.channels_last else classifier


def _explainers(
    classifier: "SplitClassifier", grid: tuple[int, int], args: BenchArguments
) -> tuple[dict[str, "TVEExplainer"], dict[str, str]]:
    """The explainers that are asked for, by name; and why others cannot be made for this classifier."""
    from huggingface_hub.errors import StrictDataclassError

    from ..modeling_tve import TVEExplainer
    from ..pretrain.model import config_for

    explainers: dict[str, TVEExplainer] = {}
    refused: dict[str, str] = {}
    for name in [name for name in args.methods if name in _EXPLAINERS]:
        if name == "tve" and args.model is not None:
            explainer = TVEExplainer.from_pretrained(args.model)
        else:
            sizes = dict(_EXPLAINERS[name])
            if name == "tve":
                sizes |= {key: getattr(args, key) for key in ("hidden_size", "num_hidden_layers", "backgrounds")}
                sizes |= {"num_attention_heads": args.num_attention_heads, "intermediate_size": 4 * args.hidden_size}
            else:
                height = classifier.probe().shape[-2]
                sizes["mae_config"] = {"image_size": height, "patch_size": height // grid[0]}
            try:
                explainer = TVEExplainer(config_for(classifier, grid, hops=2, **sizes))
            except (ValueError, StrictDataclassError) as error:  # the Mask-AutoEncoder takes square images alone
                refused[name] = " ".join(str(error).split())
                continue
        explainers[name] = explainer.eval().to(classifier.device, classifier.dtype)
    return explainers, refused


def _actions(
    classifier: "SplitClassifier",
    explainers: dict[str, "TVEExplainer"],
    grid: tuple[int, int],
    pixel_values: Any,
    args: BenchArguments,
) -> tuple[dict[str, "Action"], dict[str, str]]:
    """What is measured, by name; and what cannot serve this classifier, with the reason."""
    import torch

    from ..benchmark import speed
    from ..benchmark.judge import refusal

    with torch.no_grad():
        class_idx = classifier(pixel_values).logits.argmax(-1)
    actions = {speed.PREDICTION: speed.prediction(classifier)}
    refused = {}
    for spec in args.methods:
        if spec in _EXPLAINERS:
            if spec in explainers:
                rule = args.rule if spec == "tve" else None
                actions[spec] = speed.by_explainer(classifier, explainers[spec], rule)
            continue
        action = speed.by_method(classifier, spec, grid, class_idx)
        method = speed.NAMED[spec][0] if spec in speed.NAMED else spec
        error = refusal(classifier, method, grid, {})
        if error is None:
            actions[spec] = action
        else:
            refused[spec] = str(error)
    return actions, refused
