"""Draw docs/gallery: photographs beside the maps of several methods, and a deletion curve that grows.

    python examples/draw_gallery.py --output_dir docs/gallery

Needs matplotlib and scikit-image, whose photographs these are (CC0 or public domain). Everything is drawn by fixed
seeds. With another classifier, name methods that serve it:

    python examples/draw_gallery.py --classifier tve_hf/checkpoints/vit-tiny-tiny-imagenet \
        --methods tve chefer_cam legrad --output_dir gallery
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from skimage import data
from transformers import Pipeline, pipeline

from tve_hf.evaluation import insertion_deletion
from tve_hf.fidelity import even_shares, most_important
from tve_hf.files import write_whole
from tve_hf.geometry import normalization
from tve_hf.patches import mask_patches
from tve_hf.visualization import Explanation, gallery

# All photographs in colour of what can be recognised that come with scikit-image and are CC0 or public domain.
PHOTOGRAPHS = ("chelsea", "coffee", "rocket", "astronaut")
ANIMATED = "coffee"  # whose class the default classifier knows and is sure of
METHODS = ("tve", "sampled", "exact", "occlusion", "grad_cam")
SEED = 0
WIDTH = 1200  # pixels of a picture of the gallery
ORDERS = 20  # random orders of deletion, of which the mean is drawn
HOLD, STEP = 3000, 130  # ms of the last frame, and of the others


def views(name: str, generator: np.random.Generator) -> dict[str, Image.Image]:
    """A photograph, and a square of it at a random place, half as high to as high as the shorter side."""
    photograph = Image.fromarray(getattr(data, name)())
    shorter = min(photograph.size)
    side = int(generator.integers(shorter // 2, shorter + 1))
    left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
    return {"whole": photograph, "crop": photograph.crop((left, top, left + side, top + side))}


def rows_of(explain: Pipeline, image: Image.Image, methods: list[str]) -> tuple[str, list[Image.Image]]:
    """The predicted class in words, and the image with the map of each method, each on its own scale."""
    found = [explain(image, method=method)[0] for method in methods]
    label = f"{found[0]['label'].split(',')[0]} {found[0]['score']:.0%}"
    return label, [image, *(explanation["overlay"] for explanation in found)]


def draw_photograph(explain: Pipeline, name: str, methods: list[str], generator: np.random.Generator) -> Image.Image:
    """A row for the whole photograph and one for the crop."""
    rows = [rows_of(explain, image, methods) for image in views(name, generator).values()]
    picture = gallery([pictures for _, pictures in rows], ["photograph", *methods], [label for label, _ in rows])
    return picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)


class Deletion:
    """What the animation shows of one explanation: the images, most relevant patches first, and the curves."""

    def __init__(self, explain: Pipeline, explanation: Explanation, image: Image.Image):
        classifier, self.explanation = explain.classifier, explanation
        self.processor = explain.image_processor
        pixels = self.processor(image, return_tensors="pt")["pixel_values"].to(classifier.device)
        grid = explanation["attribution"].shape
        scores = torch.from_numpy(explanation["attribution"]).flatten()[None]
        levels = scores.shape[1] // 2 + 1
        orders = torch.rand(ORDERS, scores.shape[1], generator=torch.Generator().manual_seed(SEED))
        scores = torch.cat([scores, orders])
        images, classes = pixels.expand(len(scores), -1, -1, -1), torch.full((len(scores),), explanation["class_idx"])
        curves = insertion_deletion(classifier, images, scores, classes, levels, grid)
        self.share, self.curve, self.random = curves.share, curves.deletion[0], curves.deletion[1:].mean(0)
        keep = ~most_important(scores[:1], even_shares(levels, scores.shape[1]))
        self.images = mask_patches(pixels, keep, grid)[0]  # (levels, 3, H, W)

    def frame(self, level: int) -> Image.Image:
        """The map, the image without its most relevant patches, and the curves so far."""
        figure = Figure(figsize=(7.2, 2.4), layout="constrained")
        axes = figure.subplots(1, 3)
        mean, std = (torch.tensor(values)[:, None, None] for values in normalization(self.processor))
        seen = (self.images[level].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)
        axes[0].imshow(self.explanation["overlay"])
        axes[0].set_title(self.explanation["label"].split(",")[0], fontsize=9)
        axes[1].imshow(seen, interpolation="nearest")
        axes[1].set_title(f"{self.share[level]:.0%} of patches deleted", fontsize=9)
        for axis in axes[:2]:
            axis.set_xticks([])
            axis.set_yticks([])
        until = level + 1
        axes[2].plot(self.share[:until], self.random[:until], color="0.6", linestyle="--", label="random order, mean")
        axes[2].plot(self.share[:until], self.curve[:until], color="#b5331f", label="most relevant first")
        axes[2].set_xlim(0, 1)
        axes[2].set_ylim(0, 1.1 * max(self.curve.max().item(), self.random.max().item()))
        axes[2].set_xlabel("share of patches deleted", fontsize=8)
        axes[2].set_ylabel("probability of the class", fontsize=8)
        axes[2].tick_params(labelsize=7)
        axes[2].legend(fontsize=7, loc="upper right")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    def save(self, path: Path) -> None:
        """Save as an animated WebP that plays twice and ends with whole curves."""
        frames = [self.frame(level) for level in range(len(self.share))]
        times = [STEP] * (len(frames) - 1) + [HOLD]
        options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 2, "quality": 80}
        write_whole(path, lambda file: frames[0].save(file, **options))


def main(arguments: list[str] | None = None) -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--classifier", help="a name or folder; by default that of the package")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], help="the columns; the first is animated")
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    explain = pipeline("transferable-attribution", classifier=args.classifier, method=args.methods[0])
    generator = np.random.default_rng(SEED)
    for name in PHOTOGRAPHS:
        picture = draw_photograph(explain, name, args.methods, generator)
        few = picture.quantize(palette=picture.quantize(256))  # of 256 colours, dithered: a third of the bytes
        write_whole(args.output_dir / f"{name}.png", lambda file, drawn=few: drawn.save(file, optimize=True))
    photograph = Image.fromarray(getattr(data, ANIMATED)())
    Deletion(explain, explain(photograph)[0], photograph).save(args.output_dir / "deletion.webp")


if __name__ == "__main__":
    main()
