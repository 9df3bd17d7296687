"""Compare explanations on held-out images: fidelity of every method, its cost, and how far TVE is from exact."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Image, load_dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..attribution import DEFAULT_RULE, rule_named
from ..classifiers import split_classifier
from ..compatibility import fit
from ..evaluation.report import summarize, table_of
from ..files import dumps
from ..modeling_tve import TVEExplainer
from ..patches import REMOVALS, TOKEN_DROP, GridSize, as_pair
from ..vit_shapley.coalitions import fit_shapley
from ..vit_shapley.modeling import ShapleyExplainer
from .cells import Cells, digest
from .judge import Judge, parse_method, refusal

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
    test_files: list[str] = field(metadata={"help": "Parquet files (or patterns) of held-out images."})
    output_dir: str = field(metadata={"help": "Where report.json, table.md, the plots and the intermediate cells go."})
    model: str | None = field(default=None, metadata={"help": "Explainer of its backbone: adds tve and exact."})
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
    image_column: str = field(default="image")
    label_column: str = field(default="label", metadata={"help": "Used for the accuracy, where it exists."})
    num_images: int = field(default=300, metadata={"help": "Images, drawn at random by the seed."})
    grid_size: int | None = field(default=None, metadata={"help": "P; that of the explainer by default."})
    hops: int | None = field(default=None, metadata={"help": "Radius of neighbourhoods; the explainer's by default."})
    rule: str = field(default=DEFAULT_RULE)
    batch_size: int = field(default=20)
    num_gallery: int = field(default=4, metadata={"help": "Images in gallery.png; 0 for none."})
    seed: int = field(default=0)


def _specs(args: EvaluateArguments) -> list[str]:
    """All methods of an evaluation, without any twice: those of its explainers, then those asked for."""
    own = [*(["tve", "exact"] if args.model else []), *(["vit_shapley"] if args.vit_shapley else [])]
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


def _images(args: EvaluateArguments) -> tuple[Dataset, list[int]]:
    """The images, encoded, with labels where there are any; and which rows of the files they are."""
    data = load_dataset("parquet", data_files=args.test_files, split="train")
    column, names = args.image_column, data.column_names
    if column not in names:
        raise ValueError(f"No column {column!r} in {args.test_files}; choose image_column among {', '.join(names)}.")
    if min(args.num_images, len(data)) < 1:
        raise ValueError(f"{args.test_files} give no image with num_images={args.num_images}; pass at least one.")
    kept = [name for name in (column, args.label_column) if name in names]
    # Any images, for a set may be sorted by class; the same ones, and more, when more are asked for.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).tolist()
    rows = order[: args.num_images]
    return data.select_columns(kept).select(rows).cast_column(column, Image(decode=False)), rows


def _prepare(args: EvaluateArguments, state: PartialState) -> Judge:
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
    # Twice as fast for the convolutions of a CNN, and no slower for anything else.
    classifier = classifier.to(state.device, memory_format=torch.channels_last)
    explainer = shapley_explainer = None
    if args.model is not None:
        explainer = TVEExplainer.from_pretrained(args.model, dtype=torch.float32).eval().to(state.device)
        classifier = fit(explainer, classifier)
    if args.vit_shapley is not None:
        shapley_explainer = ShapleyExplainer.from_pretrained(args.vit_shapley, dtype=torch.float32).eval()
        fit_shapley(shapley_explainer.to(state.device), classifier)
    grid, hops = _grid_and_hops(args, explainer, shapley_explainer)
    data, rows = _images(args)
    offered = {"hops": hops, "rule": args.rule, "explainer": explainer, "shapley_explainer": shapley_explainer}
    refused = {spec: error for spec in specs if (error := refusal(classifier, spec, grid, offered))}
    for spec, error in refused.items():
        if spec in args.methods:  # by name; a budget is for any classifier, and some methods are for some
            raise error
    settings = {
        "classifier": digest(classifier),
        "explainer": digest(explainer) if explainer else None,
        "vit_shapley": digest(shapley_explainer) if shapley_explainer else None,
        "test_files": args.test_files,
        "grid": list(grid),
        "hops": hops,
        "rule": args.rule,
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
        image_column=args.image_column,
        label_column=args.label_column,
        shapley_explainer=shapley_explainer,
    )


def evaluate(args: EvaluateArguments) -> dict[str, Any]:
    """Run one evaluation and write report.json, table.md and plots to `args.output_dir`.

    What was computed before, by a run that was interrupted or had fewer methods, is not computed again. Under
    `accelerate launch` the batches are shared out among the processes.

    Raises:
        ValueError: If a name is unknown, there are no images, or the folder holds results of other settings.
    """
    state = PartialState()
    judge = _prepare(args, state)
    batches = list(judge.batches())
    own = batches[state.process_index :: state.num_processes]
    for start, stop in tqdm(own, unit="batch", disable=not state.is_main_process):
        judge.compute(start, stop)
    state.wait_for_everyone()

    table: dict[str, Tensor] = {}
    classes = judge.gather("classes")
    if "correct" in classes:
        table["correct"] = classes["correct"]
    if judge.explainer is not None:
        found = judge.gather("agreement")
        table |= {key: found[key] for key in ("spearman", "pearson", "kept_error", "removed_error")}
        table |= {key: found[key] for key in ("epsilon", "bound", "error")}
    curves: dict[str, dict[str, list[float]]] = {}
    cost = {}
    for spec in judge.specs:
        maps = judge.gather(f"maps/{spec}")
        cost[spec] = {name: maps[name].sum().item() / len(judge.data) for name in ("seconds", "forward", "backward")}
        for removal in args.removals:
            judged = judge.gather(f"fidelity/{removal}/{spec}")
            for side in ("plus", "minus"):
                table[f"{spec}/{removal}/{side}"] = judged[f"{side}_auc"]
            curves[f"{removal}/{spec}"] = {
                "sparsity": judged["sparsity"].view(len(batches), -1)[0].tolist(),
                **{side: judged[side].mean(0).tolist() for side in ("plus", "minus")},
            }
    table = {key: column.double() for key, column in table.items()}
    report = {
        "settings": asdict(args),
        "num_images": len(judge.data),
        "rows": judge.rows,
        "summary": summarize(table, judge.specs, args.removals),
        "refused": judge.refused,
        "cost": {spec: {key: round(value, 6) for key, value in found.items()} for spec, found in cost.items()},
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
