"""Do maps lie on the object? Methods against masks: pointing game, pixel accuracy, mIoU and mAP.

Each method explains the class that the classifier predicts. Masks are cut and scaled to what the image processor shows
to the model. Plausibility, not faithfulness: a classifier may look at what is not the object, and what it predicts may
be another object.

    python examples/segmentation.py --classifier mobilenet_v2_1.0_224_imagenet --files 'masks/test-*.parquet' \
        --grid_size 14 --methods centre grad_cam rise@400 --output_file segmentation.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image, load_dataset
from PIL import Image as Pictures
from tqdm.auto import tqdm

from tve_hf import TVEExplainer, methods, split_classifier
from tve_hf.benchmark.judge import options_of
from tve_hf.evaluation.localization import localization
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.geometry import seen_region
from tve_hf.images import load_image


def mask_as_seen(mask: Pictures.Image, image_processor: Any, height: int, width: int) -> torch.Tensor:
    """Return what a processor shows of a mask, boolean (height, width), as of its image; padding is background."""
    region = seen_region(image_processor, mask.size)
    seen = mask.convert("L").transform((width, height), Pictures.Transform.EXTENT, region)  # the nearest pixel
    return torch.from_numpy(np.array(seen) > 127)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--files", required=True, help="parquet files of images and masks of the same size")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--mask_column", default="mask", help="images too, white on the object")
    parser.add_argument("--methods", nargs="+", required=True, help="names, or name@samples")
    parser.add_argument("--model", help="explainer of the classifier, for the method tve")
    parser.add_argument("--grid_size", type=int, help="of the maps; the explainer's or the classifier's by default")
    parser.add_argument("--num_images", type=int, help="all if not given")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()

    classifier = split_classifier(args.classifier, dtype=torch.float32)
    explainer = TVEExplainer.from_pretrained(args.model).eval() if args.model else None
    grid = args.grid_size or (explainer.config.grid_size if explainer else None)
    data = load_dataset("parquet", data_files=args.files, split="train")
    data = data.select_columns([args.image_column, args.mask_column]).select(
        range(min(args.num_images or len(data), len(data)))
    )
    data = data.cast_column(args.image_column, Image(decode=False))
    maps: dict[str, list[torch.Tensor]] = {spec: [] for spec in args.methods}
    masks: list[torch.Tensor] = []
    for start in tqdm(range(0, len(data), args.batch_size), unit="batch"):
        rows = data[start : start + args.batch_size]
        images = [load_image(row) for row in rows[args.image_column]]
        pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
        for image, mask in zip(images, rows[args.mask_column], strict=True):
            if image.size != mask.size:
                raise ValueError(f"An image of {image.size} pixels has a mask of {mask.size}; pass masks that fit.")
            masks.append(mask_as_seen(mask, classifier.image_processor, *pixel_values.shape[-2:]))
        with torch.no_grad():
            class_idx = classifier(pixel_values).logits.argmax(-1)
        for spec in args.methods:
            offered = {"explainer": explainer, "generator": torch.Generator().manual_seed(start)}
            name, options = options_of(spec, offered)
            maps[spec].append(methods.explain(name, classifier, pixel_values, class_idx, grid, **options))

    report: dict[str, Any] = {
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "num_images": len(data),
        "methods": {},
    }
    print(f"{'':16} pointing  pixel accuracy  mIoU   mAP")
    for spec, parts in maps.items():
        found = localization(torch.cat(parts), torch.stack(masks))
        each = {
            "pointing": found.pointing,
            "pixel_accuracy": found.pixel_accuracy,
            "average_precision": found.average_precision,
        }
        report["methods"][spec] = {"mean_iou": round(found.mean_iou.item(), 4)} | {
            name: {
                "mean": round(values.mean().item(), 4),
                "interval": [round(end, 4) for end in bootstrap_interval(values)],
                "per_image": [round(value, 4) for value in values.tolist()],
            }
            for name, values in each.items()
        }
        print(
            f"{spec:16} {found.pointing.mean():8.3f}  {found.pixel_accuracy.mean():14.3f}  {found.mean_iou:.3f}"
            f"  {found.mean_average_precision:.3f}"
        )
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    args.output_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
