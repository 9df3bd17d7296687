"""What do maps lose when classifier and explainer compute in half precision, or with weights of eight bits?

    python benchmarks/precision.py --classifier vit --model tve-vit --files 'held-out/*.parquet' --output_file vit.json

On the same images: how often the class stays that of float32, the rank correlation with its maps, and the fidelity of
the maps under the classifier in float32, where both are asked for the class of float32. "int8" is torchao's dynamic
quantisation (`pip install torchao`) of the linear layers in lists of layers, which are the transformers' blocks and
the explainer's readers of features; convolutions, the head and the explainer's last layer stay as they are.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tve_hf import TVEExplainer, fidelity, split_classifier
from tve_hf.attribution import rule_of
from tve_hf.classifiers import SplitClassifier
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.files import dumps
from tve_hf.folding import explain_pass
from tve_hf.sources import open_images, read_image
from tve_hf.verification import spearman

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}
REMOVALS = ("zero", "blur")


def linears_of_blocks(model: nn.Module) -> set[str]:
    """Names of the linear layers in all lists of blocks."""
    return {
        f"{outer}.{inner}"
        for outer, blocks in model.named_modules()
        if isinstance(blocks, nn.ModuleList)
        for inner, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear)
    }


def quantize(model: nn.Module, names: set[str]) -> None:
    """Quantise these layers in place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in names)


def prepared(name: str, model: str, dtype: str) -> tuple[SplitClassifier, TVEExplainer]:
    """Classifier and explainer in a precision, the first reading what the second needs."""
    classifier = split_classifier(name, dtype=DTYPES[dtype])
    explainer = TVEExplainer.from_pretrained(model, dtype=DTYPES[dtype]).eval()
    if dtype == "int8":
        for part in (classifier.backbone.model, explainer):
            quantize(part, linears_of_blocks(part))
    return classifier.reading(tuple(explainer.config.feature_names)), explainer


def maps(classifier: SplitClassifier, explainer: TVEExplainer, pixel_values: Tensor, class_idx: Tensor | None) -> Any:
    """The predicted classes, (B,), and the maps, (B, N), of those or of the classes asked for."""
    pixel_values = pixel_values.to(classifier.dtype)
    seen = classifier(pixel_values)
    predicted = seen.logits.argmax(-1)
    asked = predicted if class_idx is None else class_idx
    scores = explain_pass(explainer, classifier, pixel_values, seen, asked, rule_of(explainer.config))
    return predicted, scores.flatten(1).float()


@torch.no_grad()
def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each precision."""
    models = {dtype: prepared(args.classifier, args.model, dtype) for dtype in ("float32", *args.dtypes)}
    judge, explainer = models["float32"]
    images = open_images(args.files)
    data: Any = images.data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).tolist()
    data = data.select(order[: args.num_images])
    found: dict[str, dict[str, list[Tensor]]] = {dtype: {} for dtype in models}
    for start in tqdm(range(0, len(data), args.batch_size), unit="batch"):
        decoded = [read_image(row) for row in data[start : start + args.batch_size][images.column]]
        pixel_values = judge.image_processor(decoded, return_tensors="pt")["pixel_values"]
        class_idx, reference = maps(*models["float32"], pixel_values, None)
        for dtype, pair in models.items():
            predicted, scores = maps(*pair, pixel_values, class_idx)
            values = {"same_class": (predicted == class_idx).float(), "spearman": spearman(scores, reference)}
            for removal in REMOVALS:
                grid = explainer.grid_shape
                values[removal] = fidelity(judge, pixel_values, scores, class_idx, 14, grid, removal).gap
            for name, column in values.items():
                found[dtype].setdefault(name, []).append(column)
    rows = []
    for dtype, columns in found.items():
        joined = {name: torch.cat(parts).double() for name, parts in columns.items()}
        row: dict[str, Any] = {"dtype": dtype, "same_class": round(joined["same_class"].mean().item(), 4)}
        row["spearman"] = round(joined["spearman"].median().item(), 4)
        for removal in REMOVALS:
            lost = joined[removal] - torch.cat(found["float32"][removal]).double()
            interval = [round(end, 4) for end in bootstrap_interval(lost)]
            row[removal] = {"gap": round(joined[removal].mean().item(), 4), "above_float32": interval}
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--model", required=True, help="explainer of the classifier")
    parser.add_argument("--files", nargs="+", required=True, help="held-out images")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"], choices=[*DTYPES])
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", type=Path)
    args = parser.parse_args(arguments)
    settings = {name: value for name, value in vars(args).items() if name != "output_file"}
    text = dumps({"settings": settings, "rows": compare(args)}, indent=1)
    print(text)
    if args.output_file:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        args.output_file.write_text(text + "\n")


if __name__ == "__main__":
    main()
