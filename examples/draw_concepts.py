"""Draw the pictures of docs/concepts.md with the package's own checkpoints and scikit-image's cat (CC0).

    python examples/draw_concepts.py --output_dir docs/concepts

Needs matplotlib and scikit-image. Everything is drawn by fixed seeds.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from PIL import Image
from skimage import data
from torch import Tensor
from transformers import pipeline

from tve_hf import exact_meta_attribution, fidelity, sampled_meta_attribution, split_classifier, transfer
from tve_hf.coalitions import Coalitions
from tve_hf.faithfulness import r_squared, true_evidence
from tve_hf.geometry import normalization
from tve_hf.methods import explain as explain_by
from tve_hf.patches import REMOVALS, mask_patches, neighborhoods
from tve_hf.released import CHECKPOINTS, DEFAULT_CLASSIFIER
from tve_hf.verification import spearman
from tve_hf.visualization import heatmap, overlay

# The second head on the default backbone.
OTHER = CHECKPOINTS / DEFAULT_CLASSIFIER.name.replace("tiny-imagenet", "cats-vs-dogs")
RED, BLUE = "#b5331f", "#1f5fb5"


class Scene:
    """The cat as the classifier sees it, and what every picture needs of it."""

    def __init__(self) -> None:
        self.pipeline = pipeline("transferable-attribution")
        self.other = split_classifier(OTHER)
        self.photo = Image.fromarray(data.chelsea())
        self.classifier = self.pipeline.classifier
        self.pixels = self.pipeline.image_processor(self.photo, return_tensors="pt")["pixel_values"]
        self.grid = self.pipeline.model.config.grid_shape
        out = self.classifier(self.pixels)
        self.embedding, self.class_idx = out.embeddings, out.logits.argmax(-1)
        self.label = self.classifier.id2label[int(self.class_idx)]
        rows, columns = self.grid
        self.patch = rows // 2 * columns + columns // 3  # on the face

    def image(self, pixels: Tensor) -> Image.Image:
        """A normalised image (3, H, W) in the colours of photographs."""
        mean, std = (torch.tensor(values)[:, None, None] for values in normalization(self.pipeline.image_processor))
        values = (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        return Image.fromarray(np.rint(255 * values).astype(np.uint8))

    def masked(self, keep: Tensor, removal: str = "zero") -> Image.Image:
        """The image with only the patches of `keep`, (N,), as the classifier sees it."""
        return self.image(mask_patches(self.pixels, keep[None], self.grid, removal)[0, 0])

    def map(self, scores: Tensor) -> Image.Image:
        """Signed scores (N,) over the image, each patch a block."""
        image = self.image(self.pixels[0]).resize((384, 384))
        return overlay(image, heatmap(scores.reshape(self.grid), image.size, smooth=False))


def show(axis: Axes, image: Image.Image, title: str = "", below: str = "") -> None:
    """An image without ticks, with a line above and one below."""
    axis.imshow(image.resize((384, 384), Image.Resampling.NEAREST))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(below, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def arrow(figure: Figure, tail: tuple[Axes, float], head: tuple[Axes, float]) -> None:
    """An arrow from one picture to another, from and to these shares of their widths, at half their heights."""
    (start, x0), (end, x1) = tail, head
    within = {"coordsA": "axes fraction", "coordsB": "axes fraction", "axesA": start, "axesB": end}
    figure.add_artist(ConnectionPatch((x0, 0.5), (x1, 0.5), **within, arrowstyle="-|>", mutation_scale=14))


def draw_split(scene: Scene) -> Figure:
    """Backbone and heads: one embedding, two classifiers."""
    figure = Figure(figsize=(9, 4.2))
    grid = figure.add_gridspec(2, 4, width_ratios=[1.3, 0.25, 0.3, 1.3], hspace=0.6, wspace=0.7)
    photo, strip = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    show(photo, scene.image(scene.pixels[0]), "image x")
    limit = scene.embedding.abs().max().item()
    strip.imshow(scene.embedding.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    strip.set_title("embedding\nG(x)", fontsize=10)
    strip.set_xlabel(f"{scene.embedding.shape[1]} numbers", fontsize=9)
    strip.set_xticks([])
    strip.set_yticks([])
    arrow(figure, (photo, 1.04), (strip, -0.3))
    photo.annotate("backbone\nG", (1.06, 0.52), xycoords="axes fraction", fontsize=9)
    for row, (classifier, name) in enumerate([(scene.classifier, "head H₁"), (scene.other, "head H₂")]):
        axis = figure.add_subplot(grid[row, 3])
        values, classes = classifier.log_prob(scene.embedding)[0].exp().topk(min(4, len(classifier.id2label)))
        axis.barh(range(len(values)), values, color="0.55")
        axis.set_yticks(range(len(values)), [classifier.id2label[int(i)].split(",")[0] for i in classes], fontsize=9)
        axis.set_xlim(0, 1)
        axis.invert_yaxis()
        axis.set_title(f"{name}: {len(classifier.id2label)} classes, probabilities", fontsize=10)
        arrow(figure, (strip, 1.2), (axis, -0.65))
    return figure


def draw_masks(scene: Scene) -> Figure:
    """A patch, its neighbourhood alone and taken away, a coalition, and what may replace pixels."""
    figure = Figure(figsize=(9, 5.2))
    axes = figure.subplots(2, 4)
    around = neighborhoods(scene.grid, 1)[scene.patch]
    drawn = Coalitions().draw(1, 2, scene.grid, torch.Generator().manual_seed(3))[0, 0]
    show(axes[0, 0], scene.image(scene.pixels[0]), "the grid, and a patch z")
    rows, columns = scene.grid
    for line in range(1, columns):
        axes[0, 0].axvline(384 * line / columns, color="white", linewidth=0.5)
    for line in range(1, rows):
        axes[0, 0].axhline(384 * line / rows, color="white", linewidth=0.5)
    corner = 384 * (scene.patch % columns) / columns, 384 * (scene.patch // columns) / rows
    axes[0, 0].add_patch(Rectangle(corner, 384 / columns, 384 / rows, fill=False, edgecolor="red", linewidth=2))
    show(axes[0, 1], scene.masked(around), "kept: only N(z)")
    show(axes[0, 2], scene.masked(~around), "removed: all but N(z)")
    show(axes[0, 3], scene.masked(drawn), "a random coalition S")
    for axis, removal in zip(axes[1], REMOVALS, strict=False):
        show(axis, scene.masked(drawn, removal), f'removal="{removal}"')
    return figure


def draw_backgrounds(scene: Scene) -> Figure:
    """The same cat, explained from two backgrounds and from random ones."""
    figure = Figure(figsize=(9, 5.4))
    axes = figure.subplots(2, 4)
    around = neighborhoods(scene.grid, 1)[scene.patch]
    kept, removed = exact_meta_attribution(scene.classifier, scene.pixels, scene.grid, hops=1)
    two = transfer(kept, removed, scene.classifier, scene.class_idx, grid_size=scene.grid, hops=1)[0]
    sampled = sampled_meta_attribution(scene.classifier, scene.pixels, scene.grid, num_samples=400)
    many = transfer(*sampled, scene.classifier, scene.class_idx, rule="prob", grid_size=scene.grid)[0]
    coalitions = Coalitions().draw(1, 40, scene.grid, torch.Generator().manual_seed(5))[0]
    coalitions = coalitions[((coalitions.float().mean(-1) - 0.5).abs() < 0.2)]  # those that show a part
    within = coalitions[:, scene.patch]
    some = [coalitions[within][0], coalitions[within][1], coalitions[~within][0]]

    def probability(keep: Tensor) -> str:
        logits = scene.classifier(mask_patches(scene.pixels, keep[None], scene.grid)[0]).logits
        return f"f = {logits.softmax(-1)[0, scene.class_idx].item():.3f}"

    show(axes[0, 0], scene.image(scene.pixels[0]), "", f"f = {_probability(scene):.3f}, {_short(scene.label)}")
    show(axes[0, 1], scene.masked(around), "nothing else", probability(around))
    show(axes[0, 2], scene.masked(~around), "everything else", probability(~around))
    show(axes[0, 3], scene.map(two), "two backgrounds:\nmap of all patches")
    for axis, keep, title in zip(axes[1], some, ["with z", "with z", "without z"], strict=False):
        show(axis, scene.masked(keep), title, probability(keep))
    show(axes[1, 3], scene.map(many), "random backgrounds:\nmap of all patches")
    return figure


def _probability(scene: Scene) -> float:
    return scene.classifier.log_prob(scene.embedding)[0, scene.class_idx].exp().item()


def _short(label: str) -> str:
    return label.split(",")[0]


def draw_transfer(scene: Scene) -> Figure:
    """One pass of the explainer, and the maps of two classes of each of two heads."""
    figure = Figure(figsize=(9, 2.9))
    axes = figure.subplots(1, 5)
    show(axes[0], scene.image(scene.pixels[0]), "image")
    other = pipeline("transferable-attribution", model=scene.pipeline.model, classifier=scene.other)
    results = [*scene.pipeline(scene.photo, top_k=2), *other(scene.photo, top_k=2)]
    for axis, result, head in zip(axes[1:], results, ["H₁", "H₁", "H₂", "H₂"], strict=True):
        scores = torch.from_numpy(result["attribution"]).flatten()
        show(axis, scene.map(scores), f"{head}: {_short(result['label'])}", f"probability {result['score']:.3f}")
    return figure


def draw_numbers(scene: Scene) -> Figure:
    """Where R2, Spearman and fidelity come from."""
    figure = Figure(figsize=(9, 3.3))
    axes = figure.subplots(1, 3)
    scores, of_logit = (
        torch.from_numpy(scene.pipeline(scene.photo, rule=rule)[0]["attribution"]).flatten()[None]
        for rule in ("prob", "logit")
    )
    asked = scene.classifier, scene.pixels, scene.class_idx[None], 128, "smooth", scene.grid
    keep, true = true_evidence(*asked)
    foretold, true = (of_logit.double() @ keep.T.double())[0], true[0, 0]
    axes[0].scatter(foretold - foretold.mean(), true - true.mean(), s=9, color="0.35")
    axes[0].axline((0, 0), slope=1, color="black", linewidth=0.8)
    axes[0].set_xlabel("sum of the scores in S, logit, minus its mean", fontsize=8)
    axes[0].set_ylabel("logit when S alone is visible, minus its mean", fontsize=8)
    axes[0].set_title(f"R² = {r_squared(foretold, true).item():.2f} over 128 coalitions", fontsize=10)
    exact = explain_by("sampled", scene.classifier, scene.pixels, scene.class_idx, scene.grid, n_samples=2000)
    exact, predicted = exact.flatten(1), scores
    order = [values.argsort(-1).argsort(-1)[0] for values in (predicted, exact)]
    axes[1].scatter(*order, s=9, color="0.35")
    axes[1].set_xlabel("rank of the patch, explainer", fontsize=8)
    axes[1].set_ylabel("rank of the patch, 2000 masked passes", fontsize=8)
    axes[1].set_title(f"Spearman = {spearman(predicted, exact).item():.2f}", fontsize=10)
    curves = fidelity(scene.classifier, scene.pixels, scores, scene.class_idx, num_levels=21)
    axes[2].plot(curves.sparsity, curves.plus[0], color=RED, label="Fidelity+, S* taken away")
    axes[2].plot(curves.sparsity, curves.minus[0], color=BLUE, linestyle="--", label="Fidelity−, S* alone")
    axes[2].fill_between(curves.sparsity, curves.minus[0], curves.plus[0], color="0.9")
    axes[2].set_xlabel("sparsity: share of patches not in S*", fontsize=8)
    axes[2].set_ylabel("fall of the class's probability", fontsize=8)
    axes[2].set_title(f"gap = {curves.gap.item():.2f}, the mean distance", fontsize=10)
    axes[2].legend(fontsize=7)
    for axis in axes:
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    return figure


PICTURES = {
    "split": draw_split,
    "masks": draw_masks,
    "backgrounds": draw_backgrounds,
    "transfer": draw_transfer,
    "numbers": draw_numbers,
}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scene = Scene()
    for name, draw in PICTURES.items():
        FigureCanvasAgg(draw(scene)).print_figure(args.output_dir / f"{name}.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
