"""Compare explanations on held-out images: fidelity of every method, its cost, and how far TVE is from exact."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..attribution import DEFAULT_RULE, rule_named, rule_of
from ..classifiers import split_classifier
from ..classifiers.compiled import with_compiled_passes
from ..classifiers.layout import with_channels_last
from ..configuration_tve import TVEConfig
from ..evaluation.report import summarize, table_of
from ..files import dumps
from ..modeling_tve import TVEExplainer
from ..patches import REMOVALS, TOKEN_DROP, GridSize, as_pair
from ..sources import open_images, sample_images
from ..vit_shapley.modeling import ShapleyExplainer
from .cells import Cells, digest
from .judge import Judge, parse_method, refusal
from .labels import is_correct

logger = logging.get_logger(__name__)

# What a judge says of an explainer itself; see `judge.agreement`.
AGREEMENT = ("spearman", "pearson", "kept_error", "removed_error", "epsilon", "bound", "error", "r2", "faithfulness")
# Every method that serves a classifier without training, and those that draw samples with as many as the TVE paper
# gave them, and with as many as they need to be worth comparing.
_ANY = ["random", "centre", "raw_attention", "rollout", "grad_cam", "attention_cam", "chefer_cam", "legrad"]
_ANY += ["libragrad", "text_span", "saliency", "ig", "grad_shap", "deep_lift", "occlusion", "exact"]
BUDGETS: dict[str, list[str]] = {
    "paper": [*_ANY, "rise@50", "lime@25", "kernel_shap@25"],
    "fair": [*_ANY, "rise@400", "lime@400", "kernel_shap@400"],
    "large": [*_ANY, "rise@2000", "lime@2000", "kernel_shap@2000"],
}


@dataclass
class EvaluateArguments:
    """Settings of one evaluation."""

    classifier: str = field(metadata={"help": "Classifier to explain: a name or folder."})
    test_files: list[str] = field(
        metadata={"help": "Held-out images: parquet, arrow, tar (webdataset) or image files, or patterns of one kind."}
    )
    output_dir: str = field(metadata={"help": "Where report.json, table.md, the plots and the intermediate cells go."})
    model: str | None = field(
        default=None, metadata={"help": "Explainer of its backbone: adds tve, and exact if it predicts that."}
    )
    vit_shapley: str | None = field(
        default=None, metadata={"help": "ViT-Shapley explainer of the classifier: adds vit_shapley."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["random", "rollout", "grad_cam"],
        metadata={"help": "Names of methods, sampling ones as name@samples, or budgets: paper, fair, large."},
    )
    removals: list[str] = field(
        default_factory=lambda: ["zero", "blur"],
        metadata={"help": f"Removal operators: {', '.join((*REMOVALS, TOKEN_DROP))}."},
    )
    candidate_labels: list[str] = field(default_factory=list, metadata={"help": "Classes of a zero-shot classifier."})
    hypothesis_template: list[str] = field(
        default_factory=list, metadata={"help": 'Sentences for them; "This is a photo of {}." by default.'}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images; found where there is one or it is called image."}
    )
    label_column: str = field(
        default="label", metadata={"help": "Numbers or names of classes, for the accuracy, where it exists."}
    )
    num_images: int = field(default=300, metadata={"help": "Images, drawn at random by the seed."})
    grid_size: int | None = field(default=None, metadata={"help": "P; that of the explainer by default."})
    hops: int | None = field(default=None, metadata={"help": "Radius of neighbourhoods; the explainer's by default."})
    rule: str | None = field(
        default=None, metadata={"help": "How embeddings become scores; by default the explainer's own rule."}
    )
    batch_size: int = field(default=20)
    torch_compile: bool = field(
        default=False, metadata={"help": "Compile the passes of masked images; worth it for a CNN on a CPU."}
    )
    num_gallery: int = field(default=4, metadata={"help": "Images in gallery.png; 0 for none."})
    seed: int = field(default=0)


def _specs(args: EvaluateArguments) -> list[str]:
    """All methods of an evaluation, without any twice: those of its explainers, then those asked for."""
    own = ["vit_shapley"] if args.vit_shapley else []
    if args.model:
        predicts_exact = TVEConfig.from_pretrained(args.model).backgrounds == "antithetical"
        own = ["tve", *(["exact"] if predicts_exact else []), *own]
    specs = list(dict.fromkeys([*own, *(spec for name in args.methods for spec in BUDGETS.get(name, [name]))]))
    for spec in specs:
        parse_method(spec)
    if "tve" in specs and args.model is None:
        raise ValueError("The method tve needs an explainer; pass model.")
    if "vit_shapley" in specs and args.vit_shapley is None:
        raise ValueError("The method vit_shapley needs an explainer of the classifier; pass vit_shapley.")
    return specs


def _grid_and_hops(
    args: EvaluateArguments, explainer: TVEExplainer | None, shapley_explainer: ShapleyExplainer | None
) -> tuple[tuple[int, int], int]:
    """Grid and radius that were asked for, or else those of the explainers, with which they must agree."""
    config = explainer.config if explainer else None
    trained = explainer or shapley_explainer
    grid: GridSize | None = args.grid_size or (trained.config.grid_shape if trained else None)
    hops = args.hops if args.hops is not None else config.hops if config else 2
    if grid is None:
        raise ValueError("Without an explainer the grid is not known; pass grid_size.")
    if config and (as_pair(grid), hops) != (config.grid_shape, config.hops):
        raise ValueError(
            f"The explainer's grid is {config.grid_shape} with hops={config.hops}; leave out grid_size and hops."
        )
    if shapley_explainer and shapley_explainer.config.grid_shape != as_pair(grid):
        raise ValueError(
            f"The grid of {args.vit_shapley} is {shapley_explainer.config.grid_shape}, not {as_pair(grid)}; compare "
            "explainers of one grid."
        )
    return as_pair(grid), hops


def _images(args: EvaluateArguments) -> tuple[Dataset, str, list[int]]:
    """The images, encoded, with labels if they have any; the column they are in; and which rows of the files."""
    images = open_images(args.test_files, image_column=args.image_column, others=[args.label_column])
    drawn, rows = sample_images(images, args.num_images, args.seed)
    data: Any = drawn.data  # map-style, for it was not streamed
    return data, images.column, rows


def _prepare(args: EvaluateArguments, state: PartialState) -> Judge:
    if args.rule is not None:
        rule_named(args.rule)
    specs = _specs(args)
    for removal in args.removals:
        if removal not in (*REMOVALS, TOKEN_DROP):
            known = ", ".join((*REMOVALS, TOKEN_DROP))
            raise ValueError(f"Unknown removal operator {removal!r}; choose among {known}.")
    classifier = split_classifier(
        args.classifier,
        dtype=torch.float32,
        candidate_labels=args.candidate_labels or None,
        hypothesis_template=args.hypothesis_template or None,
    )
    classifier = with_channels_last(classifier.to(state.device))
    if args.torch_compile:
        classifier = with_compiled_passes(classifier)
    explainer = shapley_explainer = None
    if args.model is not None:
        explainer = TVEExplainer.from_pretrained(args.model, dtype=torch.float32).eval().to(state.device)
    if args.vit_shapley is not None:
        shapley_explainer = ShapleyExplainer.from_pretrained(args.vit_shapley, dtype=torch.float32).eval()
        shapley_explainer = shapley_explainer.to(state.device)
    grid, hops = _grid_and_hops(args, explainer, shapley_explainer)
    data, image_column, rows = _images(args)
    offered = {"hops": hops, "rule": args.rule, "explainer": explainer, "shapley_explainer": shapley_explainer}
    refused = {spec: error for spec in specs if (error := refusal(classifier, spec, grid, offered))}
    for spec, error in refused.items():
        # Asked for by name; a budget is for any classifier, and some methods are for some.
        if spec in (*args.methods, "tve", "vit_shapley"):
            raise error
    settings = {
        "classifier": digest(classifier),
        "test_files": args.test_files,
        "grid": list(grid),
        "hops": hops,
        "rule": args.rule or "of each method",
        "seed": args.seed,
    }
    return Judge(
        classifier=classifier,
        explainer=explainer,
        data=data,
        rows=rows,
        cells=Cells(Path(args.output_dir) / "cells", settings),
        specs=[spec for spec in specs if spec not in refused],
        refused={spec: str(error) for spec, error in refused.items()},
        removals=args.removals,
        grid=grid,
        hops=hops,
        rule=args.rule,
        batch_size=args.batch_size,
        seed=args.seed,
        image_column=image_column,
        shapley_explainer=shapley_explainer,
    )


def _correct(args: EvaluateArguments, judge: Judge) -> Tensor | None:
    """Whether the classifier is right, 1 or 0 for each image, (n,); None, with a warning, if labels do not tell."""
    if args.label_column not in judge.data.column_names:
        return None
    feature = judge.data.features[args.label_column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    labels, class_idx = judge.data[args.label_column], judge.gather("classes")["class_idx"]
    correct = is_correct(class_idx, list(labels), judge.classifier.id2label, names)
    if correct is None and PartialState().is_main_process:
        logger.warning(
            f"The labels in column {args.label_column!r} are not the classes of {judge.classifier.name}, so the "
            "accuracy is left out; for it, pass as label_column one of their numbers or names."
        )
    return correct


def evaluate(args: EvaluateArguments) -> dict[str, Any]:
    """Run one evaluation and write report.json, table.md and plots to `args.output_dir`.

    What was computed before, by a run that was interrupted or had fewer methods, is not computed again. Under
    `accelerate launch` the batches are shared out among the processes.

    Raises:
        ValueError: If a name is unknown, the images cannot be read, an explainer is of another classifier, or the
            folder holds results of other settings.
    """
    state = PartialState()
    judge = _prepare(args, state)
    batches = list(judge.batches())
    own = batches[state.process_index :: state.num_processes]
    for start, stop in tqdm(own, unit="batch", disable=not state.is_main_process):
        judge.compute(start, stop)
    state.wait_for_everyone()

    table: dict[str, Tensor] = {}
    correct = _correct(args, judge)
    if correct is not None:
        table["correct"] = correct
    if judge.explainer is not None:
        compared = judge.gather("agreement")
        table |= {key: compared[key] for key in AGREEMENT if key in compared}
    curves: dict[str, dict[str, list[float]]] = {}
    cost = {}
    for spec in judge.specs:
        maps = judge.gather(f"maps/{spec}")
        cost[spec] = {name: maps[name].sum().item() / len(judge.data) for name in ("seconds", "forward", "backward")}
        table[f"{spec}/faithfulness"] = judge.gather(f"faithfulness/{judge.backgrounds}/{spec}")["faithfulness"]
        cost[spec]["explainer"] = judge.explainer_share(spec)
        for removal in args.removals:
            judged = judge.gather(f"fidelity/{removal}/{spec}")
            for side in ("plus", "minus"):
                table[f"{spec}/{removal}/{side}"] = judged[f"{side}_auc"]
            curves[f"{removal}/{spec}"] = {
                "sparsity": judged["sparsity"][0].tolist(),
                **{side: judged[side].mean(0).tolist() for side in ("plus", "minus")},
            }
    table = {key: column.double() for key, column in table.items()}
    rule = args.rule or (DEFAULT_RULE if judge.explainer is None else rule_of(judge.explainer.config))
    report = {
        "settings": asdict(args),
        "rule": rule,
        "num_images": len(judge.data),
        "rows": judge.rows,
        "summary": summarize(table, judge.specs, args.removals),
        "refused": judge.refused,
        "cost": {spec: {key: round(value, 6) for key, value in entry.items()} for spec, entry in cost.items()},
        "curves": {
            key: {name: [round(v, 4) for v in values] for name, values in curve.items()}
            for key, curve in curves.items()
        },
        "per_image": {key: [round(v, 5) for v in column.tolist()] for key, column in table.items()},
    }
    if state.is_main_process:
        folder = Path(args.output_dir)
        (folder / "report.json").write_text(dumps(report, indent=1) + "\n")
        (folder / "table.md").write_text(table_of(report) + "\n")
        from .plots import draw

        draw(report, folder)
        if args.num_gallery:
            judge.gallery(args.num_gallery).save(folder / "gallery.png")
    state.wait_for_everyone()
    return report
