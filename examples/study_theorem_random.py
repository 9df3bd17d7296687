"""Theorem 1 for random backgrounds: how far an explainer's maps are from those of what it predicts, and every bound.

    python examples/study_theorem_random.py --classifier vit-tiny --model tve-vit-tiny \
        --files 'tiny_imagenet/test-*.parquet' --output_dir runs/theorem

The truth is what the explainer learnt to predict: kept and removed by least squares over masked passes, with its own
coalitions and what replaced removed pixels in its training. docs/concepts.md has the formulas. A truth that is sampled
has an error of its own, so all is measured a second time between the two halves of the passes, which are independent:
their distance is twice the error of the truth, but for what a ridge penalty holds back in both alike.

Of each image, for the class that the classifier predicts, `report.json` has, of the explainer against the truth and,
under "halves/", of one half of the passes against the other: `epsilon` and `bound` of Theorem 1; `spread`, the range
of log(predicted / true) over all states, a bound whatever epsilon is; and of maps by log-probabilities, by
probabilities ("prob/") and, where the head is affine, by logits ("logit/") the mean `error`, its mean square, `bound`
and the mean `size` of the true scores, the error of a map of zeros. `examples/study_theorem.py` counts and draws them.
Started again, what was computed is not computed again.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from study_theorem import PREFIXES, study
from torch import Tensor
from tqdm.auto import tqdm

from tve_hf import RULES, SplitClassifier, TVEConfig, TVEExplainer, split_classifier
from tve_hf.attribution import evidence_of
from tve_hf.benchmark.cells import Cells, digest
from tve_hf.classifiers.compiled import with_compiled_passes
from tve_hf.classifiers.layout import with_channels_last
from tve_hf.compatibility import fit
from tve_hf.files import dumps, write_whole
from tve_hf.heads import affine_map
from tve_hf.pretrain.labels import embed_coalitions
from tve_hf.sampling import Regression
from tve_hf.sources import open_images, read_image, sample_images
from tve_hf.trunk_backbone import kept_and_removed
from tve_hf.verification import Pair, prediction_errors

BATCH = 10


def sampled(classifier: SplitClassifier, pixel_values: Tensor, keep: Tensor, config: TVEConfig) -> list[Pair]:
    """Kept and removed, (B, N, D) each, of all these coalitions (M, N), of their first and of their second half.

    As `sampled_meta_attribution`, but with the removal operators of the explainer's training in turn.
    """
    how = config.distribution
    embeddings = embed_coalitions(classifier, pixel_values, keep.expand(len(pixel_values), -1, -1), config)
    full = classifier.embed(pixel_values)
    empty = classifier.embed(torch.zeros_like(pixel_values[:1])).expand_as(full)
    middle, found = len(keep) // 2, []
    for some in (slice(None), slice(middle), slice(middle, None)):
        regression = Regression(keep[some], how, empty, full)
        regression.add(slice(0, len(keep[some])), embeddings[:, some])
        phi, base, _ = regression.solve()
        found.append(kept_and_removed(phi, base, how.keep_prob))
    return found


def compared(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, predicted: Pair, true: Pair
) -> dict[str, Tensor]:
    """Errors and bounds of each image, (B,), as the head of this file names them."""
    theorem = prediction_errors(classifier, pixel_values, class_idx, predicted, true)
    found = {name: theorem[name] for name in ("epsilon", "bound")}
    parts = [part.float() for part in (*predicted, *true)]
    for rule, prefix in PREFIXES.items():
        states = [evidence_of(RULES[rule], part, classifier, class_idx[:, None]).squeeze(1) for part in parts]
        kept_hat, removed_hat, kept, removed = states  # (B, N) each
        scores = kept - removed
        error = kept_hat - removed_hat - scores
        if rule == "log_prob":
            ratios = torch.cat([kept_hat - kept, removed_hat - removed], -1)
            found["spread"] = ratios.amax(-1) - ratios.amin(-1)
        elif rule == "prob":
            found["prob/bound"] = found["epsilon"] * (kept + removed_hat).mean(-1)
        else:
            affine = affine_map(classifier.head, classifier.embedding_dim, classifier.dtype, classifier.device)
            if affine is None:
                continue
            distance = ((parts[0] - parts[1]) - (parts[2] - parts[3])).norm(dim=-1)  # of the phi, (B, N)
            found["logit/bound"] = affine.weight[class_idx].norm(dim=-1) * distance.mean(-1)
        found[f"{prefix}error"] = error.abs().mean(-1)
        found[f"{prefix}squared_error"] = error.square().mean(-1)
        found[f"{prefix}size"] = scores.abs().mean(-1)
    return found


def checked(args: argparse.Namespace) -> tuple[SplitClassifier, TVEExplainer]:
    """The classifier, which reads what the explainer reads, and the explainer.

    Raises:
        ValueError: If they do not fit, the explainer has two backgrounds, or the passes make no two equal halves.
    """
    explainer = TVEExplainer.from_pretrained(args.model, dtype=torch.float32).eval()
    config = explainer.config
    if config.backgrounds != "random":
        raise ValueError(
            f"{args.model} is an explainer of two backgrounds, whose truth is exact; measure it by `tve-hf evaluate`, "
            "and give the report to examples/study_theorem.py."
        )
    whole = 4 * len(config.label_removals)  # two halves, of pairs, with every removal operator as often in each
    if args.num_samples < whole or args.num_samples % whole:
        raise ValueError(f"--num_samples is {args.num_samples}; give a multiple of {whole} for this explainer.")
    classifier = with_channels_last(split_classifier(args.classifier, dtype=torch.float32))
    classifier = with_compiled_passes(classifier) if args.torch_compile else classifier
    return fit(explainer, classifier), explainer


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--model", required=True, help="explainer of its backbone, of random backgrounds")
    parser.add_argument("--files", required=True, nargs="+", help="held-out images")
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--num_samples", type=int, default=512, help="masked passes of each image")
    parser.add_argument("--torch_compile", action="store_true", help="compile the passes of masked images")
    parser.add_argument("--seed", type=int, default=0, help="draws the images and the coalitions")
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args(arguments)
    try:
        classifier, explainer = checked(args)
        images, _ = sample_images(open_images(args.files), args.num_images, args.seed)
        settings: dict[str, Any] = {"digests": [digest(part) for part in (classifier, explainer)]}
        settings |= {name: getattr(args, name) for name in ("files", "num_samples", "seed")}
        cells = Cells(args.output_dir / "cells", settings)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    data: Any = images.data
    config = explainer.config
    generator = torch.Generator().manual_seed(args.seed)
    keep = config.distribution.draw(1, args.num_samples, config.grid_shape, generator)[0]  # of all images

    def measured(rows: list[Any]) -> dict[str, Tensor]:
        decoded = [read_image(row) for row in rows]
        pixel_values = classifier.image_processor(decoded, return_tensors="pt")["pixel_values"]
        seen = classifier(pixel_values)
        out = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
        whole, first, second = sampled(classifier, pixel_values, keep, config)
        compare = partial(compared, classifier, pixel_values, seen.logits.argmax(-1))
        halves = compare(first, second)
        return compare((out.kept, out.removed), whole) | {f"halves/{name}": halves[name] for name in halves}

    parts = []
    for start in tqdm(range(0, len(data), BATCH), unit="batch"):
        stop = min(start + BATCH, len(data))
        rows = data[start:stop][images.column]
        parts.append(cells.get(f"{start:06}-{stop:06}", partial(measured, rows)))
    columns = {name: torch.cat([part[name] for part in parts]).double() for name in sorted(parts[0])}
    report: dict[str, Any] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "num_images": len(data),
        "per_image": {name: [round(value, 6) for value in column.tolist()] for name, column in columns.items()},
    }
    report["summary"] = study(report, args.output_dir / "theorem.png")
    write_whole(args.output_dir / "report.json", lambda path: path.write_text(dumps(report, indent=1) + "\n"))
    print(dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
