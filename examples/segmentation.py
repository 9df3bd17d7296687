"""Do maps lie on the object? Methods against masks: pointing game, pixel accuracy, mIoU and mAP.

Each method explains the class that the classifier predicts. Masks are cut and scaled to what the image processor shows
to the model. Plausibility, not faithfulness: a classifier may look at what is not the object, and what it predicts may
be another object.

    python examples/segmentation.py --classifier mobilenet_v2_1.0_224_imagenet --files 'masks/test-*.parquet' \
        --grid_size 14 --methods centre grad_cam rise@400 --output_file segmentation.json
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image
from PIL import Image as Pictures
from tqdm.auto import tqdm

from tve_hf import TVEExplainer, methods, split_classifier
from tve_hf.benchmark.judge import options_of, parse_method, refusal
from tve_hf.evaluation.localization import localization
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.files import check_replaceable, dumps, write_whole
from tve_hf.geometry import seen_region
from tve_hf.patches import as_pair
from tve_hf.sources import UNREADABLE, open_images, read_image


def mask_as_seen(mask: Pictures.Image, image_processor: Any, height: int, width: int) -> torch.Tensor:
    """Return what a processor shows of a mask, boolean (height, width), as of its image; padding is background."""
    region = seen_region(image_processor, mask.size)
    seen = mask.convert("L").transform((width, height), Pictures.Transform.EXTENT, region)  # the nearest pixel
    return torch.from_numpy(np.array(seen) > 127)


def masked_images(files: str, image_column: str, mask_column: str, num_images: int | None) -> Any:
    """The first images and their masks, a data set of two undecoded columns.

    Raises:
        ValueError: If there are none, one cannot be read, or a mask is of another size than its image.
    """
    images = open_images([files], image_column=image_column, others=[mask_column])
    data: Any = images.data
    if not isinstance(data.features.get(mask_column), Image):
        raise ValueError(
            f"{files} has no images in a column {mask_column!r}; pass that of the masks as --mask_column."
        )
    if num_images is not None and num_images < 1:
        raise ValueError(f"{files} gives no image with --num_images {num_images}; pass at least one.")
    data = data.cast_column(mask_column, Image(decode=False)).select(range(min(num_images or len(data), len(data))))
    for number, row in enumerate(data):
        try:
            image, mask = (read_image(row[column]) for column in (image_column, mask_column))
        except UNREADABLE as error:
            raise ValueError(f"Image {number} of {files}, or its mask, cannot be read: {error}") from error
        if image.size != mask.size:
            raise ValueError(
                f"Image {number} of {files}, of {image.size} pixels, has a mask of {mask.size}; pass masks that fit."
            )
    return data


def main(arguments: list[str] | None = None) -> None:
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
    args = parser.parse_args(arguments)

    try:
        check_replaceable(args.output_file)
        if args.model is None and "tve" in (parse_method(spec)[0] for spec in args.methods):
            raise ValueError("The method tve needs an explainer of the classifier; pass --model.")
        classifier = split_classifier(args.classifier, dtype=torch.float32)
        explainer = TVEExplainer.from_pretrained(args.model).eval() if args.model else None
        grid = args.grid_size or (explainer.config.grid_size if explainer else None)
        for spec in args.methods:
            if error := refusal(
                classifier, spec, as_pair(grid or classifier.default_grid()), {"explainer": explainer}
            ):
                raise error
        data = masked_images(args.files, args.image_column, args.mask_column, args.num_images)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error

    maps: dict[str, list[torch.Tensor]] = {spec: [] for spec in args.methods}
    masks: list[torch.Tensor] = []
    for start in tqdm(range(0, len(data), args.batch_size), unit="batch"):
        rows = data[start : start + args.batch_size]
        images = [read_image(row) for row in rows[args.image_column]]
        pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
        height, width = pixel_values.shape[-2:]
        masks += [
            mask_as_seen(read_image(row), classifier.image_processor, height, width) for row in rows[args.mask_column]
        ]
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
    write_whole(args.output_file, lambda path: path.write_text(dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    main()
