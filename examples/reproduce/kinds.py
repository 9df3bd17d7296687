"""Cells of a table from each kind of file that a step leaves: a function for each, by the names that recipes use."""

from collections.abc import Callable
from math import isnan
from typing import Any

import torch

from tve_hf.evaluation.statistics import bootstrap_interval


def accuracy(found: dict[str, Any]) -> dict[str, str]:
    """Of `eval_results.json`."""
    return {"": f"{100 * found['eval_accuracy']:.1f} %"}


def fidelity(found: dict[str, Any], removal: str) -> dict[str, str]:
    """Both areas, Fidelity+ / Fidelity−, of every method of a `report.json` of `tve-hf evaluate`, the best first."""
    rows = found["summary"]["fidelity"][removal]
    best_first = sorted(rows, key=lambda spec: -rows[spec]["gap"][0])
    return {spec: f"{rows[spec]['plus_auc'][0]:.2f} / {rows[spec]['minus_auc'][0]:.2f}" for spec in best_first}


def gap(found: dict[str, Any], removal: str, beside: str = "tve") -> dict[str, str]:
    """Fidelity+ less Fidelity− of every method, and the 95 % paired interval of how far it is above `beside`."""
    cells = {}
    rows = found["summary"]["fidelity"][removal]
    for spec in sorted(rows, key=lambda spec: -rows[spec]["gap"][0]):
        cells[spec] = f"{rows[spec]['gap'][0]:.3f}"
        if beside == "tve":  # which a report compares with
            above = rows[spec].get("gap_above_tve")
        elif spec != beside:
            above = bootstrap_interval(_gaps(found, spec, removal) - _gaps(found, beside, removal))
        else:
            above = None
        if above:
            cells[spec] += f" ({above[0]:+.3f} to {above[1]:+.3f})"
    return cells


def _gaps(found: dict[str, Any], spec: str, removal: str) -> torch.Tensor:
    """Of each image, (n,)."""
    plus, minus = (torch.tensor(found["per_image"][f"{spec}/{removal}/{side}"]) for side in ("plus", "minus"))
    return plus.double() - minus.double()


def ratio(found: dict[str, Any]) -> dict[str, str]:
    """Of `speed.json` of `tve-hf bench`, one classifier and batch: time beside the prediction's, with its interval."""
    (entry,) = found["measured"]
    cells = {}
    for row in entry["rows"]:
        low, high = row["interval"]
        cells[row["name"]] = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
    return cells


def passes(found: dict[str, Any]) -> dict[str, str]:
    """Of `passes.json`: the gap of each form and number of masked passes, under both removal operators."""
    cells = {}
    for row in found["rows"]:
        gaps = [
            "{:.3f} ({:.3f} to {:.3f})".format(row[removal]["gap"], *row[removal]["interval"])
            for removal in ("zero", "blur")
        ]
        cells[f"{row['backgrounds']}, {row['passes']:,} passes"] = " / ".join(gaps)
    return cells


def loss(found: dict[str, Any]) -> dict[str, str]:
    """Of `training.json`: the first and the last loss of its log, means over as many steps as a row has."""
    rows = [row["loss"] for row in found["log"] if "loss" in row]
    return {"first": f"{rows[0]:.3f}", "last": f"{rows[-1]:.3f}"}


def embeddings(found: dict[str, Any]) -> dict[str, str]:
    """Of a file of `compare_embeddings.py`."""
    spread = {f"directions, {when}": f"{number:.1f}" for when, number in found["directions"].items()}
    return spread | {"likeness": f"{found['likeness']:.2f}"}


def estimates(found: dict[str, Any], at: list[str]) -> dict[str, str]:
    """Of a summary of values with their 95 % intervals, [value, low, high]: the entries under these keys."""
    entries = found["summary"]
    for key in at:
        entries = entries[key]
    cells = {}
    for name, row in entries.items():
        value, low, high = map(float, row)  # "nan" where there was nothing to say it of
        interval = "" if isnan(low) or isnan(high) else f" ({low:.3f} to {high:.3f})"
        cells[name] = "" if isnan(value) else f"{value:.3f}{interval}"
    return cells


def perturbation(found: dict[str, Any], explained: str) -> dict[str, str]:
    """Both areas in per cent, negative / positive, of every row of a `report.json` of `study_perturbation.py`.

    Before them the accuracy with nothing deleted; in brackets 95 % intervals of how far areas are above the
    reference's. `explained` is the class that maps are of.
    """
    cells = {"accuracy of the whole images": f"{100 * found['accuracy']:.1f}"}
    for name, row in found["summary"][explained].items():
        orders = row["negative"], row["positive"]
        cells[name] = " / ".join(f"{100 * order['mean']:.1f}" for order in orders)
        if above := [order["above_interval"] for order in orders if "above_interval" in order]:
            cells[name] += f" ({' / '.join(f'{100 * low:+.1f} to {100 * high:+.1f}' for low, high in above)})"
    return cells


def segmentation(found: dict[str, Any]) -> dict[str, str]:
    """Pixel accuracy / mIoU / mAP in per cent of every method of a file of `segmentation.py`."""
    cells = {}
    for spec, row in found["methods"].items():
        values = row["pixel_accuracy"]["mean"], row["mean_iou"], row["average_precision"]["mean"]
        cells[spec] = " / ".join(f"{100 * value:.1f}" for value in values)
    return cells


BOUNDS = {"theorem": "Theorem 1", "spread": "spread", "prob": "probabilities", "logit": "logits"}


def theorem(found: dict[str, Any], of: str | None = None) -> dict[str, str]:
    """Of `report.json` of `study_theorem_random.py`, or of the file that `study_theorem.py` writes beside its picture.

    Args:
        of: "halves", for those in place of the explainer.
    """
    counts = found["summary"] if of is None else found["summary"][of]
    cells = {
        "ε < 1": "{with_bound} of {images} images, {within_bound} within the bound".format(**counts),
        "median ε": f"{counts['median_epsilon']:.2f}",
        "median error, nats": f"{counts['median_error_nats']:.3f}",
    }
    for name in [name for name in BOUNDS if name in counts]:
        medians = " / ".join(f"{float(counts[name][f'median_{part}']):.4f}" for part in ("error", "bound", "size"))
        cells[BOUNDS[name]] = f"{medians}, {counts[name]['below_size']}"
    for rule, share in counts.get("sampling_share", {}).items():
        cells[f"share of sampling, {rule}"] = f"{100 * share:.0f} %"
    return cells


KINDS: dict[str, Callable[..., dict[str, str]]] = {
    "accuracy": accuracy,
    "embeddings": embeddings,
    "estimates": estimates,
    "fidelity": fidelity,
    "gap": gap,
    "loss": loss,
    "passes": passes,
    "ratio": ratio,
    "perturbation": perturbation,
    "segmentation": segmentation,
    "theorem": theorem,
}
