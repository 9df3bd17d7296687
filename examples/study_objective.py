"""Does anything beat Eq. 8? Explainers that learn by other losses, averaged weights or repeated draws, side by side.

All variants of a seed see the same images, mirrored alike, and the same exact meta-attributions, which are computed
once for all; they start from the same weights, and take as many steps with the optimizer of `tve-hf pretrain`. Each is
then measured on held-out images against the plain loss, image by image.

    python examples/study_objective.py --output_file objective.json \
        --case vit-tiny 8 1 'tiny_imagenet/train-*.parquet' 'tiny_imagenet/test-*.parquet'
"""

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Image, load_dataset
from torch import Tensor
from tqdm.auto import tqdm

from tve_hf import DEFAULT_RULE, SplitClassifier, exact_meta_attribution, fidelity, split_classifier, transfer
from tve_hf.cells import Cells, digest
from tve_hf.comparison import bootstrap_interval, spearman
from tve_hf.pretrain import HALF, PretrainArguments, draw
from tve_hf.pretraining_data import Order
from tve_hf.pretraining_images import Images, first_images
from tve_hf.pretraining_model import build_explainer, build_optimizer, choose_attention
from tve_hf.verification import Pair, prediction_errors

Loss = Callable[[Pair, Pair], Tensor]  # of predicted and exact, (B, k, D) each
DECAYS = (0.95, 0.98, 0.995)
SETTINGS = ("steps", "batch_size", "train_images", "held_out_images", "longer")


def distance(predicted: Pair, exact: Pair, weights: Any = (1.0, 1.0)) -> Tensor:
    """Eq. 8, or with weights of its two terms, numbers or (D,), another."""
    terms = zip(predicted, exact, weights, strict=True)
    return sum(((one - other).square() * weight).sum(-1).mean() for one, other, weight in terms)


def losses(classifier: SplitClassifier, exact: Pair, start: Pair) -> dict[str, Loss]:
    """The losses to compare, each about as large as Eq. 8 for predictions that do not know the image's differences.

    Args:
        classifier: its head is the general one, H_g.
        exact: of the first images.
        start: what an untrained explainer predicts for them.
    """
    variances = [(e - s).flatten(0, 1).var(0) for e, s in zip(exact, start, strict=True)]  # 2 x (D,)
    means = torch.stack([variance.mean() for variance in variances])
    balance = means.mean() / means  # kept and removed weigh the same
    # A dimension that hardly ever moves gets a hundred times the mean weight and no more.
    dimensions = torch.stack([m / v.clamp(min=0.01 * m) for m, v in zip(means, variances, strict=True)])
    deltas = means.sqrt().tolist()

    def huber(predicted: Pair, exact: Pair) -> Tensor:
        terms = zip(predicted, exact, deltas, strict=True)
        return sum(
            2 * torch.nn.functional.huber_loss(p, e, reduction="none", delta=d).sum(-1).mean() for p, e, d in terms
        )

    def divergence(predicted: Pair, exact: Pair) -> Tensor:
        both = [(classifier.log_prob(p), classifier.log_prob(e)) for p, e in zip(predicted, exact, strict=True)]
        return sum((e.exp() * (e - p)).sum(-1).mean() for p, e in both)

    def logits(predicted: Pair, exact: Pair) -> Tensor:
        return distance([classifier.head(p) for p in predicted], [classifier.head(e) for e in exact])

    def with_term(term: Loss, share: float) -> Loss:
        weight = share * (distance(start, exact) / term(start, exact)).item()
        return lambda predicted, exact: distance(predicted, exact) + weight * term(predicted, exact)

    return {
        "eq8": distance,
        "balanced": lambda p, e: distance(p, e, balance),
        "per_dimension": lambda p, e: distance(p, e, dimensions * balance[:, None]),
        "huber": huber,
        "kl": with_term(divergence, 0.1),
        "logits": with_term(logits, 0.1),
    }


class Student:
    """An explainer that learns by one of the losses as `tve-hf pretrain` would; and running means of its weights."""

    def __init__(self, args: PretrainArguments, classifier: SplitClassifier, steps: int, loss: Loss, decays: Any = ()):
        set_seed(args.seed)
        self.args, self.loss, self.seconds, self.done = args, loss, 0.0, 0
        self.explainer, _ = build_explainer(args, classifier)
        choose_attention(self.explainer, args.mixed_precision)
        self.optimizer, self.schedule = build_optimizer(args, self.explainer, steps, world=1)
        self.means = {decay: copy.deepcopy(self.explainer) for decay in decays}

    def learn(self, inputs: dict[str, Any], patch_idx: Tensor, exact: Pair) -> None:
        """One step on images, k of their patches (B, k), and what is exact for these."""
        start = time.process_time()
        self.loss(self.predict(inputs, patch_idx), exact).backward()
        torch.nn.utils.clip_grad_norm_(self.explainer.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.seconds += time.process_time() - start
        for decay, mean in self.means.items():
            share = (1 - decay) / (1 - decay**self.done)  # as Adam's means, free of where they start
            with torch.no_grad():
                for one, new in zip(mean.parameters(), self.explainer.parameters(), strict=True):
                    one.lerp_(new, share)

    def predict(self, inputs: dict[str, Any], patch_idx: Tensor) -> Pair:
        half = HALF.get(self.args.mixed_precision)
        with torch.autocast("cpu", half, enabled=half is not None):
            found = self.explainer(**inputs, patch_idx=patch_idx)
        return found.kept.float(), found.removed.float()


@torch.no_grad()
def look(classifier: SplitClassifier, pixel_values: Tensor) -> dict[str, Any]:
    """What an explainer reads."""
    seen = classifier.backbone(pixel_values.to(classifier.dtype))
    return {"pixel_values": pixel_values, "features": seen.features, "embeddings": seen.embeddings}


def train(
    args: PretrainArguments, classifier: SplitClassifier, teacher: SplitClassifier, pixel_values: Tensor, longer: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All explainers of one seed, by variant; and the seconds that a step spent in each part.

    Args:
        classifier: in full precision.
        teacher: the same in that of the training, for the exact meta-attributions.
        pixel_values: of the images to learn from, a multiple of the batch size.
        longer: how many times as many steps one explainer takes with its draws kept.
    """
    number, batch_size, steps = len(pixel_values), args.batch_size, args.max_steps
    config = build_explainer(args, classifier)[0].config
    choose_attention(teacher.backbone.model, args.mixed_precision)
    seconds: dict[str, float] = defaultdict(float)

    def exact_of(images: Tensor, patch_idx: Tensor) -> Pair:
        begun = time.process_time()
        found = exact_meta_attribution(teacher, images.to(teacher.dtype), config.grid_size, config.hops, patch_idx)
        seconds["masked passes"] += time.process_time() - begun
        return found[0].float(), found[1].float()

    first = pixel_values[:128]
    _, patch_idx = draw(args, steps, steps, len(first), config)
    exact, inputs = exact_of(first, patch_idx), look(teacher, first)
    seconds.clear()
    with torch.no_grad():
        start = Student(args, classifier, 1, distance).predict(inputs, patch_idx)
    students = {
        name: Student(args, classifier, steps, loss, DECAYS if name == "eq8" else ())
        for name, loss in losses(classifier, exact, start).items()
    }
    repeated = {
        "same_draws": Student(args, classifier, steps, distance),
        f"same_draws_{longer}_times_the_steps": Student(args, classifier, longer * steps, distance),
    }
    cache: dict[int, list[Tensor]] = {}  # of each image, the first draw: mirrored, patches, kept, removed
    order = Order(number, batch_size, 1, 0, 1, args.seed, 0, longer * steps)
    for step, keys in enumerate(tqdm(order, total=longer * steps, unit="step", mininterval=30)):
        rows = [key.number for key in keys]
        mirrored, patch_idx = draw(args, step, steps, batch_size, config)
        if step < steps:
            images = torch.where(mirrored.view(-1, 1, 1, 1), pixel_values[rows].flip(-1), pixel_values[rows])
            begun = time.process_time()
            inputs = look(teacher, images)
            seconds["plain pass"] += time.process_time() - begun
            exact = exact_of(images, patch_idx)
            for student in students.values():
                student.learn(inputs, patch_idx, exact)
            for row, *parts in zip(rows, mirrored, patch_idx, *exact, strict=True):
                cache.setdefault(row, parts)
        mirrored, patch_idx, *exact = (torch.stack(parts) for parts in zip(*(cache[row] for row in rows), strict=True))
        images = torch.where(mirrored.view(-1, 1, 1, 1), pixel_values[rows].flip(-1), pixel_values[rows])
        inputs = look(teacher, images)
        for name, student in repeated.items():
            if student.done < steps or name != "same_draws":
                student.learn(inputs, patch_idx, exact)
    seconds["explainer"] = students["eq8"].seconds
    explainers = {name: student.explainer for name, student in (students | repeated).items()}
    explainers |= {f"mean_{decay}": mean for decay, mean in students["eq8"].means.items()}
    return explainers, {name: torch.tensor(value / steps) for name, value in seconds.items()}


@torch.no_grad()
def measure(
    classifier: SplitClassifier, pixel_values: Tensor, explainers: dict[str, Any], grid_size: int, hops: int
) -> dict[str, Tensor]:
    """Errors, Spearman with exact and fidelity of every explainer, for each image, (n,): "variant/measure"."""
    inputs = look(classifier, pixel_values)
    class_idx = classifier.head(inputs["embeddings"]).argmax(-1)
    exact = exact_meta_attribution(classifier, pixel_values, grid_size, hops)

    def scores_of(pair: Pair, rule: str) -> Tensor:
        return transfer(*pair, classifier, class_idx, rule, grid_size, hops)

    def gap(scores: Tensor) -> Tensor:
        return fidelity(classifier, pixel_values, scores, class_idx, num_levels=8).gap

    truth, truth_eq7 = scores_of(exact, DEFAULT_RULE), scores_of(exact, "log_prob")
    found = {"exact/gap": gap(truth)}
    for name, explainer in tqdm(explainers.items(), desc="measure", mininterval=30):
        output = explainer.eval()(**inputs)
        pair = output.kept, output.removed
        errors = prediction_errors(classifier, pixel_values, class_idx, pair, exact)
        scores = scores_of(pair, DEFAULT_RULE)
        found |= {
            f"{name}/kept_error": errors["kept_error"],
            f"{name}/removed_error": errors["removed_error"],
            f"{name}/spearman": spearman(scores, truth),
            f"{name}/spearman_eq7": spearman(scores_of(pair, "log_prob"), truth_eq7),
            f"{name}/gap": gap(scores),
        }
    return found


def summary(seeds: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Means over images and seeds; beside them the paired difference from Eq. 8: interval, and mean of each seed."""
    table: dict[str, Any] = {}
    for key in seeds[0]:
        name, measured = key.split("/")
        values = torch.stack([seed[key] for seed in seeds]).double()  # (seeds, n)
        if name == "seconds":
            table.setdefault("seconds_per_step", {})[measured] = round(values.mean().item(), 4)
            continue
        cell: dict[str, Any] = {"mean": round(values.mean().item(), 4)}
        if name not in ("eq8", "exact"):
            differences = values - torch.stack([seed[f"eq8/{measured}"] for seed in seeds])
            cell["above_eq8"] = [round(bound, 4) for bound in bootstrap_interval(differences.mean(0))]
            cell["of_each_seed"] = [round(value, 4) for value in differences.mean(1).tolist()]
        table.setdefault(name, {})[measured] = cell
    return table


def images_of(files: str, number: int, classifier: SplitClassifier) -> Tensor:
    """Images spread over the files, for some sets are in the order of their labels."""
    data = load_dataset("parquet", data_files=files, split="train").cast_column("image", Image(decode=False))
    data = data.select(range(0, len(data), max(1, len(data) // number)))
    return first_images(Images(data, "image", files, len(data)), classifier, number)


def study(case: list[str], seed: int, args: argparse.Namespace) -> dict[str, Tensor]:
    """What is measured of all explainers of one backbone and seed, for each image."""
    name, grid_size, hops, train_files, held_out_files = case
    classifier = split_classifier(name, dtype=torch.float32).requires_grad_(False)
    shape = {"grid_size": int(grid_size), "hops": int(hops)}
    settings = {key: getattr(args, key) for key in SETTINGS} | shape | {"weights": digest(classifier)}

    def compute() -> dict[str, Tensor]:
        sizes = {"hidden_size": 192, "num_hidden_layers": 2, "batch_size": args.batch_size}
        learning = PretrainArguments(name, "", max_steps=args.steps, seed=seed, **sizes, **shape)
        images = images_of(train_files, args.train_images, classifier)
        teacher = split_classifier(name, dtype=HALF[learning.mixed_precision])
        explainers, seconds = train(learning, classifier, teacher, images, args.longer)
        held_out = images_of(held_out_files, args.held_out_images, classifier)
        return measure(classifier, held_out, explainers, **shape) | {f"seconds/{k}": v for k, v in seconds.items()}

    return Cells(args.cells / Path(name).name, settings).get(f"seed-{seed}", compute)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=5, action="append", metavar=("CLASSIFIER", "P", "HOPS", "TRAIN", "HELD_OUT"))
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--train_images", type=int, default=512, help="of which the batch size is a divisor")
    parser.add_argument("--held_out_images", type=int, default=32)
    parser.add_argument("--longer", type=int, default=3, help="how many times the steps a learner of kept draws takes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--cells", type=Path, default=Path("runs/objective"), help="where what is computed is kept")
    args = parser.parse_args()

    found: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    for seed in range(args.seeds):
        for case in args.case:
            found[Path(case[0]).name].append(study(case, seed, args))
            cases = {name: {"seeds": len(seeds), **summary(seeds)} for name, seeds in found.items()}
            report = {key: getattr(args, key) for key in SETTINGS} | {"cases": cases}
            args.output_file.parent.mkdir(parents=True, exist_ok=True)
            args.output_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
